"""Neural Cleanse: searches the smallest trigger of each class, and unlearns unusually small ones.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao. *Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks.* IEEE S&P 2019.

For each class, NC searches the smallest mask and pattern that send every image to the class. A
class whose mask is abnormally small is a target. Its trigger is unlearned by fine-tuning on images
that carry it and keep their true labels.

    for each class t   min over m, p   CE(h((1 - m) x + m p), t) + c ||m||_1
    flagged            |m_t| <= median, and |m_t - median| / (1.4826 MAD) > mad_threshold

    python defense/nc.py --result_file badnet_demo

c rises while the trigger works and falls while it does not. If no class is flagged, the model is
given back as it is. This happens for triggers that cover the image, that differ from image to
image, or that have several targets, and differs from seed to seed. A wrong class can be flagged,
also of a clean model, so the verdict is not a proof. The search costs `nc_epoch` passes per class.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import FineTuned, checked, run
from models.copies import copied
from models.modes import evaluating, frozen
from models.parts import learning_weights
from utils.data.batches import as_float, augment, least_share, none_of
from utils.errors import listed
from utils.perturb import to_unit
from utils.process.seeds import generator
from utils.training.findings import Picture, Verdict
from utils.training.loop import Loop
from utils.training.sgd import fine_tune

Trigger = tuple[torch.Tensor, torch.Tensor]  # mask (1, H, W), pattern (C, H, W)


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    nc_epoch: Annotated[int, Field(ge=1, description="most passes of a class's search")]
    mask_lr: Annotated[float, Field(gt=0, description="learning rate of the search's Adam")]
    init_cost: Annotated[float, Field(ge=0, description="c at the start")]
    atk_succ_threshold: Annotated[
        float, Field(ge=0, le=1, description="share of images from which on a trigger works")
    ]
    patience: Annotated[int, Field(ge=1, description="passes in a row before c changes")]
    cost_multiplier: Annotated[float, Field(gt=1, description="by which c rises")]
    early_stop: Annotated[bool, Field(description="end a search that no longer gets better")]
    early_stop_threshold: Annotated[
        float, Field(gt=0, le=1, description="better is a mask under this share of the best one")
    ]
    early_stop_patience: Annotated[int, Field(ge=1, description="passes without a better mask")]
    unlearning_ratio: Annotated[
        float, Field(ge=0, le=1, description="images that get a flagged trigger / clean subset")
    ]
    mad_threshold: Annotated[float, Field(ge=0, description="index above which to flag a class")]

    advice = "lower --lr or --unlearning_ratio, or give more images (--ratio)"
    moves_images = True


def stamp(images: torch.Tensor, mask: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """(1 - mask) x + mask pattern.

    Shape:
        (N, C, H, W), (1, H, W), (C, H, W) float in [0, 1] -> (N, C, H, W).
    """
    return (1 - mask) * images + mask * pattern


def invert_trigger(
    model: nn.Module,
    images: torch.Tensor,
    target: int,
    config: Config,
    loop: Loop | None = None,
) -> Trigger:
    """The smallest trigger that sends images to a class; the best of the passes.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits; used in eval mode and
            left as it was.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        target: the class.
        loop: counts the passes as a phase.

    Returns:
        Mask (1, H, W) and pattern (C, H, W), float in (0, 1). If no pass reached
        `atk_succ_threshold`, those of the first pass.
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    shape = images.shape[1:]
    theta = {
        "mask": torch.ones(1, *shape[1:], device=device, dtype=torch.float32, requires_grad=True),
        "pattern": torch.ones(shape, device=device, dtype=torch.float32, requires_grad=True),
    }
    optimizer = torch.optim.Adam(theta.values(), lr=config.mask_lr, betas=(0.5, 0.9))
    order = generator(config.random_seed, f"batches of class {target}")
    crops = generator(config.random_seed, f"augmentation of class {target}", images.device)
    best: dict[str, torch.Tensor] = {}  # the trigger that is kept
    inf = torch.tensor(torch.inf, dtype=torch.float64)
    search = {
        "cost": torch.tensor(config.init_cost, dtype=torch.float64),
        **{"best_norm": inf.clone(), "compared_norm": inf.clone()},
        **{name: torch.tensor(0) for name in ("up", "down", "stall", "went_up", "went_down")},
    }
    called = loop.alone(model)
    with evaluating(model), frozen(model):
        for _ in loop.rounds(
            config.nc_epoch,
            f"class {target}",
            rate="--mask_lr",
            theta=theta,
            optimizer=optimizer,
            order=order,
            crops=crops,
            best=best,
            search=search,
        ):
            for index in loop.batches(len(images), config.batch_size, order, least=1):
                batch = augment(images[index], config.crop_padding, config.flip, crops)
                x = as_float(batch, device)
                mask, pattern = to_unit(theta["mask"]), to_unit(theta["pattern"])
                logits = called(stamp(x, mask, pattern).to(x.dtype))
                wanted = torch.full((len(x),), target, device=device)
                norm = mask.sum()
                loss = F.cross_entropy(logits, wanted) + float(search["cost"]) * norm
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                success = (logits.argmax(1) == wanted).float().mean()
                # Means over batches, whatever their size: each counts as one image.
                loop.log(1, loss=loss, success=success, norm=norm)
            means = loop.losses()
            if adjust(search, best, theta, means["success"], means["norm"], config):
                loop.stop()
    if search["best_norm"].isinf():
        before = loop.findings.facts.get("without_trigger", [])
        loop.findings.facts["without_trigger"] = sorted({*before, target})
    return best["mask"], best["pattern"]


@torch.no_grad()
def adjust(
    search: dict[str, torch.Tensor],
    best: dict[str, torch.Tensor],
    theta: dict[str, torch.Tensor],
    success: float,
    norm: float,
    config: Config,
) -> bool:
    """Keeps a pass's trigger if it is better, changes the cost; whether the search ends.

    Args:
        search: the state of the search; changed.
        best: the trigger that is kept; changed.
        theta: the trigger as it is now.
        success: share of the images that were sent to the class, over the pass's batches.
        norm: mean of the mask's sum over the pass's batches.
    """
    works = success >= config.atk_succ_threshold
    now = {name: to_unit(value).clone() for name, value in theta.items()}
    if works and norm < search["best_norm"]:
        best.update(now)
        search["best_norm"].fill_(norm)
    if config.early_stop and search["best_norm"].isfinite():
        is_no_better = search["best_norm"] >= config.early_stop_threshold * search["compared_norm"]
        search["stall"].copy_(search["stall"] + 1 if is_no_better else torch.tensor(0))
        search["compared_norm"].copy_(torch.minimum(search["compared_norm"], search["best_norm"]))
        has_turned = bool(search["went_up"]) and bool(search["went_down"])
        if has_turned and search["stall"] >= config.early_stop_patience:
            return True
    search["up"].copy_(search["up"] + 1 if works else torch.tensor(0))
    search["down"].copy_(torch.tensor(0) if works else search["down"] + 1)
    if search["up"] >= config.patience:
        search["up"].fill_(0)
        search["cost"].mul_(config.cost_multiplier)
        search["went_up"].fill_(1)
    elif search["down"] >= config.patience:
        search["down"].fill_(0)
        search["cost"].div_(config.cost_multiplier**1.5)
        search["went_down"].fill_(1)
    if not best:
        best.update(now)
    return False


def outlier_index(norms: torch.Tensor) -> torch.Tensor:
    """|n - median| / (1.4826 median |n - median|), the lower of two middle values as median.

    Shape:
        (K,) float -> (K,) float >= 0; 0 where n is the median, and infinite elsewhere if most of
        the norms are.
    """
    apart = (norms - norms.median()).abs()
    return torch.where(apart == 0, 0, apart / (1.4826 * apart.median()))


def flagged_classes(norms: torch.Tensor, threshold: float = 2.0) -> list[int]:
    """The classes whose norm is at most the median and whose index is over the threshold.

    Args:
        norms: (K,) float.

    Returns:
        The smallest norm first.
    """
    is_flagged = (norms <= norms.median()) & (outlier_index(norms) > threshold)
    return [label for label in norms.argsort(stable=True).tolist() if is_flagged[label]]


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier without the triggers that were found; the model is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the passes, and takes the verdict.

    Returns:
        The model after the last round, in eval mode; as it was, if no class is flagged, as always
        of two classes.

    Example:
        >>> config = Config.load(n_rounds=1, nc_epoch=2)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    if config.n_rounds:
        learning_weights(model)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        classes = model(as_float(images[:1], device)).shape[1]
    if classes < 3:
        loop.findings.warn(
            "of two classes none can be flagged, because the smaller norm is the median; the "
            "triggers are shown without a verdict; give another defense"
        )
    triggers = [invert_trigger(model, images, label, config, loop) for label in range(classes)]
    if failed := loop.findings.facts.get("without_trigger"):
        which = (
            f"class {listed(failed)}: its norm is"
            if len(failed) == 1
            else (f"classes {listed(failed)}: their norms are")
        )
        loop.findings.warn(
            f"no trigger sent {100 * config.atk_succ_threshold:g} % of the images to {which} of "
            "the first pass and may mislead the verdict; give more --nc_epoch"
        )
    norms = torch.stack([mask.sum().cpu() for mask, _ in triggers])
    flagged = flagged_classes(norms, config.mad_threshold)
    _report(loop, images, triggers, norms, flagged)
    model = copied(model, training=False)
    if not flagged:
        loop.findings.say("no class is flagged, so the model is given back as it was")
    if not flagged or config.n_rounds == 0:
        return model

    drawn = torch.randperm(len(images), generator=generator(config.random_seed, "stamped images"))
    share, rest = drawn.tensor_split([round(config.unlearning_ratio * len(images))])
    if config.unlearning_ratio and not len(share):
        loop.findings.warn(
            f"{none_of('--unlearning_ratio', config.unlearning_ratio, len(images), 'images')}, so "
            f"no trigger is unlearned; give at least {least_share(len(images))}, or more images"
        )
    chosen = as_float(images[share])
    stamped = [
        stamp(chosen, mask.to(chosen), pattern.to(chosen))
        for mask, pattern in (triggers[label] for label in flagged)
    ]
    index = torch.cat([rest, *[share] * len(flagged)])
    fine_tune(model, torch.cat([as_float(images[rest]), *stamped]), labels[index], config, loop)
    return model


def _report(
    loop: Loop,
    images: torch.Tensor,
    triggers: list[Trigger],
    norms: torch.Tensor,
    flagged: list[int],
) -> None:
    """States the norms, the triggers of the eight smallest, and the verdict on three or more."""
    index = outlier_index(norms)
    suspicion = index.where(norms <= norms.median(), 0)
    if len(norms) > 2:
        loop.findings.verdict = Verdict(bool(flagged), tuple(flagged), tuple(suspicion.tolist()))
    loop.findings.tables["norms"] = [
        {"class": label, "mask_norm": float(norms[label]), "index": float(index[label])}
        for label in range(len(norms))
    ]
    shown = norms.argsort(stable=True)[:8].tolist()
    example = as_float(images[:1]).cpu().float()
    masks, patterns = (
        torch.stack([triggers[label][part].cpu() for label in shown]) for part in (0, 1)
    )
    names = [f"class {label}\nnorm {float(norms[label]):.1f}" for label in shown]
    loop.findings.pictures["triggers"] = Picture(
        "the smallest triggers, by class",
        {
            "mask": masks.expand_as(patterns),
            "pattern": patterns,
            "stamped": stamp(example, masks, patterns),
        },
        captions={"mask": names},
        is_labelled=False,
    )


if __name__ == "__main__":
    run(Config, purify)
