"""SAU: unlearns the adversarial examples that the model shares with the backdoored one.

Wei, Zhang, Zha, Wu. *Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared
Adversarial Examples.* NeurIPS 2023, arXiv 2307.10562.

Given a backdoored classifier h_bd and a few clean labelled images, find a classifier h, started at
h_bd, that the unknown trigger no longer controls. An adversarial example x + d of h is *shared* if
both h and h_bd are fooled and give the same wrong label. A trigger within the bound that still
works is such an example, so driving shared examples out bounds the backdoor risk, without making h
robust to every perturbation:

    outer   min over weights   lambda1 L_cl + lambda2 L_sar   at d*
    inner   d* = argmax over ||d|| <= bound   lambda3 L_adv + lambda4 L_share   image by image

| symbol  | term                                                                      | flag      |
|---------|---------------------------------------------------------------------------|-----------|
| lambda1 | L_cl: cross-entropy of h on clean images                                  | `lmd_1`   |
| lambda2 | L_sar: -log(1 - p_h(x + d)[label by h_bd]) where h_bd is fooled           | `lmd_3`   |
| (none)  | cross-entropy of h on x + d: plain adversarial training, off              | `lmd_2`   |
| lambda3 | L_adv: mean of the cross-entropies of h and h_bd on x + d                 | `beta_1`  |
| lambda4 | L_share: minus the Jensen-Shannon divergence of the two softmaxes at x + d | `beta_2`  |

    python defense/sau.py --result_file badnet_demo

The details are those of the published code: fooled means that the prediction differs from the one
on the clean image, x + d is not clipped, the sign step is used with every norm, and the learning
rate is constant. Two flags are ours: `--stop auto` decides on held-out clean images when to stop,
and `--exact_sar` keeps L_sar's gradient where the model is very certain. At the
paper's protocol (one seed, CIFAR-10 as JPEG), BadNets' ASR fell from 93.63 to 1.30 % while ACC fell
from 87.72 to 85.81 %. RESULTS.md has all other results, and says where SAU fails.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import CleanData, Scored, checked, run
from models.copies import copied
from models.modes import evaluating, frozen, mixes_images
from utils.data.batches import as_float, spread, wide
from utils.perturb import Norm, Start, initial_perturbation, project
from utils.process import distributed
from utils.process.device import rows_of
from utils.process.seeds import generator
from utils.training.findings import Findings, Picture
from utils.training.labelshare import Tally, add, label_share
from utils.training.loop import Loop
from utils.training.selection import Best, fit_and_held_out

FLOOR = 1e-6  # is added to what L_sar takes the logarithm of
NEAR_CEILING = 10.0  # L_sar of an image; by the floor it ends at 13.8
LEAST = 0.2  # part of n_rounds that `--stop auto` runs in any case


@dataclass(frozen=True, kw_only=True)
class SharedAdversarial(CleanData, Scored):
    """The inner problem, the weights of the losses, and Adam."""

    norm_type: Annotated[Norm, Field(description="ball of delta; Reg is no bound")]
    trigger_norm: Annotated[float, Field(ge=0, description="its radius, pixels in [0, 1]")]
    pgd_init: Annotated[Start, Field(description="delta before the first step")]
    adv_lr: Annotated[float, Field(gt=0, description="inner step size, pixels in [0, 1]")]
    adv_steps: Annotated[int, Field(ge=0, description="inner steps")]
    beta_1: Annotated[float, Field(ge=0, description="weight of L_adv (lambda3)")]
    beta_2: Annotated[float, Field(ge=0, description="weight of L_share (lambda4)")]
    lmd_1: Annotated[float, Field(ge=0, description="weight of L_cl (lambda1)")]
    lmd_2: Annotated[float, Field(ge=0, description="weight of the cross-entropy on x + delta")]
    lmd_3: Annotated[float, Field(ge=0, description="weight of L_sar (lambda2)")]
    lr: Annotated[float, Field(gt=0, description="learning rate of Adam; SAU keeps it constant")]
    exact_sar: Annotated[
        bool,
        Field(description="L_sar without its floor, under which its gradient ends; not published"),
    ]
    wd: Annotated[float, Field(ge=0, description="weight decay of Adam")]
    adam_beta_1: Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")]
    adam_beta_2: Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")]
    amsgrad: Annotated[bool, Field(description="AMSGrad variant of Adam")]

    advice = "lower --lr, or give more images (--ratio)"
    moves_images = True
    takes_float16 = False

    def adam(self, model: nn.Module) -> torch.optim.Adam:
        """The optimizer of the weights that learn."""
        return torch.optim.Adam(
            [weight for weight in model.parameters() if weight.requires_grad],
            lr=self.lr,
            betas=(self.adam_beta_1, self.adam_beta_2),
            weight_decay=self.wd,
            amsgrad=self.amsgrad,
            fused=next(model.parameters()).device.type == "cuda",
        )


@dataclass(frozen=True, kw_only=True)
class Config(SharedAdversarial):
    outer_steps: Annotated[int, Field(ge=1, description="optimizer steps per batch, same delta")]
    train_mode: Annotated[bool, Field(description="BatchNorm in train mode in the outer step")]
    stop: Annotated[
        Literal["rounds", "auto"],
        Field(description="after n_rounds, or once held-out images say so; auto is not published"),
    ]
    val_ratio: Annotated[
        float, Field(gt=0, lt=1, description="held-out images / clean subset (stop auto)")
    ]
    patience: Annotated[
        int, Field(ge=1, description="rounds without a better one to the end (stop auto)")
    ]

    @property
    def in_train_mode(self) -> bool:
        """Whether `train_mode` is set."""
        return self.train_mode

    @property
    def gives_back_early(self) -> bool:
        """Whether `train_mode` is set."""
        return self.train_mode


def shared_perturbation(
    model: nn.Module,
    reference: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: SharedAdversarial,
    *,
    ref_predictions: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    part: tuple[int, slice] | None = None,
) -> torch.Tensor:
    """Perturbations that make images shared adversarial examples (inner problem, PGD).

    Both models are used in eval mode, without gradients of their weights, and are given back as
    they were. A shared image has no gradient, so it stays shared. It is skipped in the later steps,
    which does not change the result. (After BatchNorm without running statistics it would, so there
    no image is skipped.)

    Args:
        model: h, from (N, C, H, W) float in [0, 1] to (N, K) logits.
        reference: h_bd, likewise.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64 true labels.
        ref_predictions: (N,) int64 labels that h_bd gives the clean images, if known.
        generator: source of the start `random`, on the CPU.
        part: see `initial_perturbation`.

    Returns:
        delta: (N, C, H, W) float, pixel units. images + delta may leave [0, 1].
    """
    delta = initial_perturbation(
        config.pgd_init, config.trigger_norm, config.norm_type, images, generator, part
    )
    with torch.enable_grad(), evaluating(model, reference), frozen(model, reference):
        with torch.no_grad():
            predictions = model(images).argmax(1)
            if ref_predictions is None:
                ref_predictions = reference(images).argmax(1)
        active = torch.arange(len(images), device=images.device)
        keeps_all = mixes_images(model) or mixes_images(reference)
        for _ in range(config.adv_steps):
            moving = delta[active].requires_grad_()
            adversarial = images[active] + moving
            logits, ref_logits = model(adversarial), reference(adversarial)
            fooled = logits.argmax(1) != predictions[active]
            ref_fooled = ref_logits.argmax(1) != ref_predictions[active]
            shared = fooled & ref_fooled & (logits.argmax(1) == ref_logits.argmax(1))

            # L_adv pushes a model only until it is fooled; L_share acts until the image is shared.
            ce = F.cross_entropy(logits, labels[active], reduction="none")
            ref_ce = F.cross_entropy(ref_logits, labels[active], reduction="none")
            pushed = ce.where(~fooled, 0).sum() + ref_ce.where(~ref_fooled, 0).sum()
            adversarial_loss = pushed / (2 * len(images))
            divergence = jensen_shannon(logits, ref_logits).where(~shared, 0).sum() / len(images)
            loss = config.beta_2 * divergence - config.beta_1 * adversarial_loss
            (gradient,) = torch.autograd.grad(loss, moving)

            delta[active] -= config.adv_lr * gradient.sign()
            delta = project(delta, config.trigger_norm, config.norm_type)
            if keeps_all:
                continue
            active = active[rows_of(~shared)]  # some shared ones may be among them
            if len(active) == 0:
                break
    return delta


def jensen_shannon(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of two softmaxes, natural logarithm, probabilities at least 1e-8.

    Shape:
        (N, K), (N, K) float -> (N,) float in [0, log 2].
    """
    p, q = (wide(values).softmax(1).clamp(min=1e-8) for values in (logits, ref_logits))
    log_mean = ((p + q) / 2).log()
    return ((p * (p.log() - log_mean)).sum(1) + (q * (q.log() - log_mean)).sum(1)) / 2


def unlearning_loss(
    logits: torch.Tensor,
    adv_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ref_adv_logits: torch.Tensor,
    labels: torch.Tensor,
    config: SharedAdversarial,
) -> dict[str, torch.Tensor]:
    """The outer objective on one batch.

    An image counts in L_sar when h_bd gives x + d a label t that is neither the true label nor the
    label that h_bd gives x, whether or not h is fooled. -log(1 - p_t) is computed as the mean of
    two forms, one with 1 - p_t and one with the sum of the other probabilities. Clamping stops the
    gradient once p_t < 0.001. Each logarithm has 1e-6 added, so that L_sar ends at 13.8 and has
    hardly any gradient where 1 - p_t is smaller. With `exact_sar` (ours, not published) it is
    computed from logits without this floor.

    Args:
        logits, adv_logits: (N, K) float, h on x and on x + d.
        ref_logits, ref_adv_logits: (N, K) float, h_bd on x and on x + d.
        labels: (N,) int64.

    Returns:
        Scalars `clean` (L_cl), `adversarial` (cross-entropy on x + d), `shared` (L_sar) and
        `total`.
    """
    logits, adv_logits = wide(logits), wide(adv_logits)
    clean = F.cross_entropy(logits, labels)
    adversarial = F.cross_entropy(adv_logits, labels)

    fooled_to = ref_adv_logits.argmax(1)
    counted = (fooled_to != labels) & (fooled_to != ref_logits.argmax(1))
    per_image = shared_losses(adv_logits, fooled_to, is_exact=config.exact_sar)
    shared = (per_image * counted).sum() / len(labels)

    total = config.lmd_1 * clean + config.lmd_2 * adversarial + config.lmd_3 * shared
    return {"clean": clean, "adversarial": adversarial, "shared": shared, "total": total}


def shared_losses(
    adv_logits: torch.Tensor, fooled_to: torch.Tensor, *, is_exact: bool
) -> torch.Tensor:
    """L_sar of each image, if it counts; see `unlearning_loss`.

    Args:
        adv_logits: (N, K) float32 or float64, h on x + d; K >= 2.
        fooled_to: (N,) int64, the label t that h_bd gives x + d.
        is_exact: without the published floor.

    Returns:
        (N,) float.
    """
    is_fooled_to = F.one_hot(fooled_to, adv_logits.shape[1]).bool()
    if is_exact:
        others = adv_logits.masked_fill(is_fooled_to, -math.inf).logsumexp(1)
        return (adv_logits.logsumexp(1) - others).clamp(min=-math.log(0.999))
    probabilities = adv_logits.softmax(1)
    p = probabilities[is_fooled_to]
    others = probabilities.masked_fill(is_fooled_to, 0).sum(1)
    by_others = (FLOOR + others.clamp(max=0.999)).log()
    return -(by_others + (1 + FLOOR - p.clamp(min=0.001)).log()) / 2


def held_out_signals(
    model: nn.Module,
    reference: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
) -> dict[str, float]:
    """What SAU measures on images that it does not learn from (ours, not published).

    Args:
        model, reference: h and h_bd, as in `shared_perturbation`; in eval mode.
        images: (N, C, H, W), float in [0, 1] or uint8; N >= 1.
        labels: (N,) int64.

    Returns:
        `acc`, the accuracy of h on the images; `share`, the part of them for which a shared
        adversarial example was found; means of the losses `clean` (L_cl) and `shared` (L_sar); and
        `total`, the outer objective.
    """
    device = next(model.parameters()).device
    start = generator(config.random_seed, "held-out perturbation")
    sums = dict.fromkeys(("acc", "share", "clean", "shared", "total"), 0.0)
    for batch, targets in zip(
        images.split(config.batch_size), labels.split(config.batch_size), strict=True
    ):
        x, y = as_float(batch, device), targets.to(device)
        delta = shared_perturbation(model, reference, x, y, config, generator=start)
        with torch.no_grad():
            logits, ref_logits = model(x), reference(x)
            adv_logits, ref_adv = model(x + delta), reference(x + delta)
            losses = unlearning_loss(logits, adv_logits, ref_logits, ref_adv, y, config)
        predictions, label = logits.argmax(1), adv_logits.argmax(1)
        is_shared = (label == ref_adv.argmax(1)) & (label != predictions)
        is_shared &= label != ref_logits.argmax(1)
        sums["acc"] += float((predictions == y).sum())
        sums["share"] += float(is_shared.sum())
        for name in ("clean", "shared", "total"):
            sums[name] += len(x) * float(losses[name])
    return {name: value / len(images) for name, value in sums.items()}


def held_out_measure(signals: Mapping[str, float], count: int) -> tuple[float, float]:
    """What `--stop auto` decides by: error + share of the held-out images, and its standard error.

    The standard error is that of two independent shares of `count` images.

    Args:
        signals: as `held_out_signals` gives them.
    """
    rates = 1 - signals["acc"], signals["share"]
    return sum(rates), math.sqrt(sum(rate * (1 - rate) for rate in rates) / count)


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A purified copy of a backdoored classifier; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, or with `stop` auto after the one that is kept, in eval
        mode.

    Raises:
        UserError: if a loss is not finite.

    Example:
        >>> config = Config.load(n_rounds=1, norm_type="L2", trigger_norm=1.0)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    best, held_out = None, (images[:0], labels[:0])
    if config.stop == "auto":
        fit, held = fit_and_held_out(
            labels,
            config.val_ratio,
            config.random_seed,
            loop.findings,
            purpose="learn from",
            otherwise="all rounds are run",
        )
        if len(held):
            best = Best(model, config.patience, math.ceil(LEAST * config.n_rounds))
            held_out = images[held], labels[held]
            images, labels = images[fit], labels[fit]
    device = next(model.parameters()).device
    reference = copied(model, training=False)
    reference.requires_grad_(False)
    model = copied(model, training=False)
    learner = loop.parallel(model)
    attacked = loop.alone(model), loop.alone(reference)
    optimizer = config.adam(model)
    is_mixing = mixes_images(reference)
    # The reference on clean images never changes, if it takes each alone; if not, one batch tells
    # how many classes there are.
    asked = images[: config.batch_size] if is_mixing else images
    with torch.no_grad():
        ref_logits = torch.cat(
            [reference(as_float(batch, device)) for batch in asked.split(config.batch_size)]
        )
    order = generator(config.random_seed, "batches")
    start = generator(config.random_seed, "perturbation")

    loop.findings.pictures["perturbations"] = lambda: examples(reference, images, labels, config)
    sent = Tally(ref_logits.shape[1])
    changing: dict[str, Any] = {"optimizer": optimizer, "order": order, "start": start}
    changing |= {"sent": sent, **({"best": best.state} if best else {})}
    for number in loop.rounds(config.n_rounds, model=model, **changing):
        for index in loop.batches(len(images), config.batch_size, order, least=1):
            x, y = as_float(images[index], device), labels[index].to(device)
            with torch.no_grad():
                ref_clean = reference(x) if is_mixing else ref_logits[index.to(device)]
            ref_predictions = ref_clean.argmax(1)
            delta = shared_perturbation(
                *attacked,
                x,
                y,
                config,
                ref_predictions=ref_predictions,
                generator=start,
                part=loop.part,
            )
            with torch.no_grad():
                ref_adv = reference(x + delta)
            if number == 1:
                add(sent, y, ref_predictions, ref_adv.argmax(1))
                if not loop.position.batches:  # h is still the model before
                    report(loop.findings, sent)
            for _ in range(config.outer_steps):
                model.train(config.train_mode)
                logits, adv_logits = learner(torch.cat([x, x + delta])).chunk(2)
                model.eval()
                losses = unlearning_loss(logits, adv_logits, ref_clean, ref_adv, y, config)
                optimizer.zero_grad()
                loop.backward(losses["total"])
                optimizer.step()
                loop.log(len(index), **losses)
        if number == 1:
            warn_of_loss(loop.findings, sent, loop.losses()["shared"], config)
        if best:
            signals = held_out_signals(*attacked, *held_out, config)
            loop.findings.tables.setdefault("held_out", []).append({"round": number, **signals})
            if best.keep(model, *held_out_measure(signals, len(held_out[1])), number):
                loop.stop()
    if best and best.round:
        best.put_into(model)
        text = f"the model is that of round {best.round}, by held-out images"
        loop.findings.say(text, best_round=best.round, held_out_images=len(held_out[1]))
    return model


def report(findings: Findings, sent: Tally) -> None:
    """States where the adversarial images of the first batch went: to the target, in many attacks.

    The same happens in some clean models; see `analysis/inspect.py`.
    """
    share = label_share(sent)
    largest = max((value for value in share.share if not math.isnan(value)), default=0.0)
    where = f"go to class {share.top} most" if share.top is not None else "go to no class most"
    findings.say(
        f"adversarial images of the model before {where} (first batch): {100 * largest:.1f} % of "
        "those of other classes",
        label_share={"top": share.top, "share": largest, "entropy": share.entropy},
    )


def warn_of_loss(findings: Findings, sent: Tally, shared: float, config: SharedAdversarial) -> None:
    """Warns where no loss has a weight, or L_sar of the first round unlearns nothing.

    L_sar has nothing to unlearn, or hardly any gradient.

    Args:
        sent: where the adversarial images of the round went.
        shared: L_sar, the mean over all images, those that do not count as 0.
    """
    findings.warn_without_loss(lmd_1=config.lmd_1, lmd_2=config.lmd_2, lmd_3=config.lmd_3)
    if not config.lmd_3:
        return
    counts, images = (distributed.total(sent[name]).sum() for name in ("sent", "matrix"))
    counted = float(counts) / max(1, int(images))
    if not counted:
        findings.warn(
            "no image of the first round has an adversarial example that the model falls for, so "
            "L_sar is 0 and nothing is unlearned; give a larger --trigger_norm, or another defense"
        )
    elif shared > NEAR_CEILING * counted and not config.exact_sar:
        findings.warn(
            f"L_sar, {shared:.1f}, is near its ceiling of {-counted * math.log(FLOOR):.1f}, where "
            "it has hardly any gradient: SAU as published may leave the backdoor as it is; give "
            "--exact_sar"
        )


def examples(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: SharedAdversarial
) -> Picture:
    """Up to eight images, and adversarial examples of the model as it was."""
    device = next(model.parameters()).device
    chosen = spread(len(images), 8)
    clean = as_float(images[chosen], device)
    delta = shared_perturbation(
        model,
        model,
        clean,
        labels[chosen].to(device),
        config,
        generator=generator(config.random_seed, "examples"),
    )
    return Picture(
        "shared adversarial examples of the model before; label before | after",
        {"clean": clean, "adversarial": clean + delta},
        is_compared=True,
    )


if __name__ == "__main__":
    run(Config, purify)
