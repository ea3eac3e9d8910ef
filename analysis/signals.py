"""Signals of a backdoor in a model: five ways to look for one without its trigger.

The table of `analysis/inspection.py` says what each of them is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from analysis.base import AnalysisConfig
from analysis.subject import Defended
from models.heads import head
from models.modes import evaluating, frozen
from models.outputs import recording
from utils.data.batches import as_float
from utils.data.labelled import Labelled
from utils.errors import UserError
from utils.perturb import Norm, Start, initial_perturbation, project
from utils.process.seeds import generator
from utils.training.evaluate import head_features
from utils.training.labelshare import (
    FEWEST_TO_STAND_OUT,
    LabelShare,
    Tally,
    add,
    alone,
    label_share,
    robust_z,
)

LARGE, SMALL, TRANSFER, HEAD, NOISE, CLEANSE = "A", "A'", "B", "C", "D", "E"
TITLES = {
    LARGE: "A: share of adversarial images",
    SMALL: "A': the same, small steps",
    TRANSFER: "B: transferred to other images",
    HEAD: "C: median norm / norm in features",
    NOISE: "D: largest margin on noise",
    CLEANSE: "E: median mask / mask (NC)",
}
UNITS = {  # of the numbers by class
    LARGE: "share of images",
    SMALL: "share of images",
    TRANSFER: "share of pairs",
    HEAD: "ratio",
    NOISE: "logits",
    CLEANSE: "ratio",
}
COMPARING = (HEAD, NOISE, CLEANSE)  # a class with the others; of two classes none can stand out
FEWEST_PAIRS = 10  # of a class in B


@dataclass(frozen=True, kw_only=True)
class SignalConfig(AnalysisConfig, Defended):
    """How the signals are computed."""

    yaml_folder = "inspect"

    probes: Annotated[int, Field(ge=1, description="clean training images, drawn by class")]
    norm_type: Annotated[Norm, Field(description="A: ball of the perturbation, as in SAU")]
    bound: Annotated[float, Field(ge=0, description="A: its radius, pixels in [0, 1]")]
    start: Annotated[Start, Field(description="A: perturbation before the first step")]
    step_size: Annotated[float, Field(gt=0, description="A: step, pixels in [0, 1]")]
    steps: Annotated[int, Field(ge=1, description="A: steps")]
    small_bound: Annotated[float, Field(ge=0, description="A': radius of the L_inf ball")]
    small_step_size: Annotated[float, Field(gt=0, description="A': step, pixels in [0, 1]")]
    small_steps: Annotated[int, Field(ge=1, description="A': steps")]
    transfer_rounds: Annotated[
        int, Field(ge=1, description="B: other images that each perturbation is added to")
    ]
    quantile: Annotated[
        float, Field(gt=0, le=1, description="C: share of the images that is sent to the class")
    ]
    noise_images: Annotated[int, Field(ge=1, description="D: noise images for each class")]
    noise_steps: Annotated[int, Field(ge=1, description="D: steps, at most")]
    noise_lr: Annotated[float, Field(gt=0, description="D: learning rate of SGD")]
    noise_momentum: Annotated[float, Field(ge=0, lt=1, description="D: momentum of SGD")]


@dataclass(frozen=True)
class Signal:
    """What a signal says of a model.

    Attributes:
        by_class: a number for each class; larger is more suspicious, NaN where there is none.
        statistic: one number for the model; larger is more suspicious.
        top: the most suspicious class; None if there is none, or several are it.
        facts: more numbers.
    """

    by_class: list[float]
    statistic: float
    top: int | None
    facts: dict[str, float]


def fooled(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: Norm,
    bound: float,
    start: Start,
    step_size: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Perturbations by sign steps on the cross-entropy, each up to the first change of its label.

    With SAU's values these are SAU's perturbations where the model is its own reference.

    Args:
        model: used in eval mode, left as it was.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64 true labels.
        generator: source of the start `random`, on the CPU.

    Returns:
        (N, C, H, W) float, in pixels; images + perturbations may leave [0, 1].
    """
    delta = initial_perturbation(start, bound, norm, images, generator)
    with evaluating(model), frozen(model):
        with torch.no_grad():
            predictions = model(images).argmax(1)
        active = torch.arange(len(images), device=images.device)
        for _ in range(steps):
            moving = delta[active].requires_grad_()
            logits = model(images[active] + moving)
            is_fooled = logits.argmax(1) != predictions[active]
            losses = F.cross_entropy(logits, labels[active], reduction="none")
            (gradient,) = torch.autograd.grad(losses.where(~is_fooled, 0).sum(), moving)
            delta[active] += step_size * gradient.sign()
            delta = project(delta, bound, norm)
            active = active[~is_fooled]
            if len(active) == 0:
                break
    return delta


def steps_of(config: SignalConfig) -> dict[str, Callable[..., torch.Tensor]]:
    """`fooled` with the values of signal A and of A'."""
    return {
        LARGE: functools.partial(
            fooled,
            norm=config.norm_type,
            bound=config.bound,
            start=config.start,
            step_size=config.step_size,
            steps=config.steps,
        ),
        SMALL: functools.partial(
            fooled,
            norm="L_inf",
            bound=config.small_bound,
            start="zero",
            step_size=config.small_step_size,
            steps=config.small_steps,
        ),
    }


def smallest_move(constraints: torch.Tensor, margins: torch.Tensor) -> float:
    """The norm of the smallest s with constraints s >= margins.

    It is a least distance problem, solved as non-negative least squares (Lawson and Hanson, 1974).

    Args:
        constraints: float (M, D).
        margins: float (M,).

    Returns:
        >= 0; infinity if no s fulfils them.
    """
    from scipy.optimize import nnls

    if bool((margins <= 0).all()):
        return 0.0
    # Only the span of the constraints matters, so M numbers describe s.
    basis = torch.linalg.qr(constraints.double().T).Q
    inside = constraints.double() @ basis
    scale = float(margins.abs().max())  # so that the problem has numbers near 1
    system = torch.cat([inside.T, (margins.double() / scale).unsqueeze(0)]).numpy()
    wanted = torch.zeros(len(system), dtype=torch.float64)
    wanted[-1] = 1
    solution, _ = nnls(system, wanted.numpy())
    residual = torch.from_numpy(system @ solution) - wanted
    if float(residual.norm()) < 1e-9:
        return math.inf
    return scale * float((residual[:-1] / -residual[-1]).norm())


def head_norms(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    quantile: float,
) -> list[float]:
    """For each class k, the smallest move of all features that sends most images to it.

    The move s fulfils (w_k - w_j)' s >= the quantile, over the images of other classes, of
    (w_j - w_k)' phi + b_j - b_k, for each j != k.

    Args:
        features: float (N, D), before the head.
        labels: int64 (N,).
        weight, bias: of the head, float (K, D) and (K,).
        quantile: in (0, 1].

    Returns:
        K norms; NaN for a class without images of other classes.
    """
    logits = features @ weight.T + bias
    norms = []
    for label in range(len(weight)):
        rest = torch.arange(len(weight)) != label
        others = logits[labels != label]
        if len(others) == 0:
            norms.append(math.nan)
            continue
        gaps = (others[:, rest] - others[:, [label]]).double().quantile(quantile, dim=0)
        norms.append(smallest_move(weight[label] - weight[rest], gaps))
    return norms


def largest_margin(
    model: nn.Module, target: int, shape: Sequence[int], config: SignalConfig
) -> float:
    """The largest margin of a class over noise images that maximise it by SGD, kept in [0, 1].

    The steps end early if the mean margin has changed by less than a hundred-thousandth.

    Args:
        shape: (C, H, W) of an image.
    """
    device = next(model.parameters()).device
    draws = generator(config.random_seed, f"noise of class {target}")
    images = torch.rand((config.noise_images, *shape), generator=draws).to(device)
    images.requires_grad_()
    optimizer = torch.optim.SGD([images], config.noise_lr, momentum=config.noise_momentum)
    best, before = -math.inf, math.inf
    with evaluating(model), frozen(model):
        for _ in range(config.noise_steps):
            logits = model(images)
            others = logits.index_fill(1, torch.tensor([target], device=device), -torch.inf)
            margins = logits[:, target] - others.max(1).values
            best = max(best, float(margins.detach().max()))
            optimizer.zero_grad()
            (-margins.sum()).backward()
            optimizer.step()
            with torch.no_grad():
                images.clamp_(0, 1)
            mean = float(margins.detach().mean())
            if abs(mean - before) < 1e-5 * abs(mean):
                break
            before = mean
    return best


def log_p_value(margins: Sequence[float]) -> float:
    """How likely the largest margin is, if all are drawn from the gamma law of the others.

    The law has mean and variance (sample) of the other K - 1 margins; p = 1 - F(largest)^K.

    Returns:
        The natural logarithm of p, at most 0. It is 0 if the others fit no gamma law: their mean is
        not positive, all are equal, or it is one alone; or if a margin is not finite.
    """
    values = torch.tensor(sorted(margins), dtype=torch.float64)
    others, largest = values[:-1], float(values[-1])
    if len(others) < 2 or not values.isfinite().all():
        return 0.0
    mean, variance = float(others.mean()), float(others.var())
    if not mean > 0 or not variance > 0:
        return 0.0
    above = log_gamma_tail(mean**2 / variance, largest * mean / variance)
    if above < math.log(1e-100):  # then 1 - (1 - e)^K is K e, as far as float64 goes
        return math.log(len(values)) + above
    return math.log(-math.expm1(len(values) * math.log1p(-math.exp(above))))


def log_gamma_tail(shape: float, x: float) -> float:
    """log(1 - F(x)) of the gamma law of scale 1, also where 1 - F(x) itself is 0 in float64.

    There it is Legendre's continued fraction, x^a e^-x / Gamma(a) / (x + 1 - a - 1 (1 - a) /
    (x + 3 - a - 2 (2 - a) / (x + 5 - a - ...))).

    Args:
        shape: a > 0.
        x: >= 0.
    """
    above = float(torch.special.gammaincc(torch.tensor(shape).double(), torch.tensor(x).double()))
    if above > 1e-290:
        return math.log(above)
    rest = 0.0
    for n in range(100, 0, -1):
        rest = n * (n - shape) / (x + 2 * n + 1 - shape - rest)
    return shape * math.log(x) - x - math.lgamma(shape) - math.log(x + 1 - shape - rest)


def of_share(share: LabelShare) -> Signal:
    """A and A': the share of each class."""
    return Signal(
        list(share.share),
        max((s for s in share.share if s == s), default=0.0),
        share.top,
        {"entropy": share.entropy, "z": share.z},
    )


def transferred(
    model: nn.Module,
    images: torch.Tensor,
    predictions: torch.Tensor,
    adversarial: torch.Tensor,
    delta: torch.Tensor,
    rounds: int,
) -> list[float]:
    """How often the perturbation of one image sends another one to the same class, by that class.

    Image j gets the perturbation of image j + r, for r = 1 to `rounds`. Perturbations that fooled
    nobody, and images that the model sends to the class anyway, are not counted.

    Args:
        images: (N, C, H, W) float in [0, 1], in a random order.
        predictions, adversarial: int64 (N,), labels of images and of images + delta.
        delta: (N, C, H, W) float.

    Returns:
        A share for each class; NaN for fewer than ten pairs.
    """
    classes = model(images[:1]).shape[1]
    hits, total = torch.zeros(classes), torch.zeros(classes)
    for shift in range(1, min(rounds, len(images) - 1) + 1):
        wanted = adversarial.roll(-shift)
        counts = (wanted != predictions.roll(-shift)) & (wanted != predictions)
        moved = images + delta.roll(-shift, dims=0)
        labels = torch.cat([model(batch).argmax(1) for batch in moved.split(128)])
        total += torch.bincount(wanted[counts], minlength=classes).cpu()
        hits += torch.bincount(wanted[counts & (labels == wanted)], minlength=classes).cpu()
    share = hits / total
    return share.where(total >= FEWEST_PAIRS, torch.nan).tolist()


def outstanding(norms: Sequence[float]) -> Signal:
    """C and E: the median over each norm, which is large where a class is unusually easy to reach.

    The statistic is how far the smallest norm is under the median; see `robust_z`. It is 0 for
    fewer than three finite norms, of which none can stand out.
    """
    values = torch.tensor(norms, dtype=torch.float64)
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return Signal([math.nan] * len(norms), 0.0, None, {})
    ratios = finite.quantile(0.5) / values.clamp(min=1e-12)
    statistic = robust_z(-finite) if len(finite) >= FEWEST_TO_STAND_OUT else 0.0
    return Signal(ratios.tolist(), statistic, alone(-values), {"norm": float(finite.min())})


def signals_of(
    model: nn.Module, probes: Labelled, config: SignalConfig, device: torch.device
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Functions that compute signals A to D of a model, as plain data; C needs a linear head."""
    images, labels = as_float(probes.images, device), probes.labels.to(device)
    shape = probes.images.shape[1:]

    @functools.cache
    def adversarial(name: str) -> torch.Tensor:
        draws = generator(config.random_seed, "start")
        parts = zip(images.split(128), labels.split(128), strict=True)
        return torch.cat([steps_of(config)[name](model, x, y, generator=draws) for x, y in parts])

    def labels_of(pictures: torch.Tensor) -> torch.Tensor:
        with evaluating(model), torch.no_grad():
            return torch.cat([model(batch).argmax(1) for batch in pictures.split(128)])

    def share(name: str) -> dict[str, Any]:
        with evaluating(model), torch.no_grad():
            tally = Tally(model(images[:1]).shape[1])
        add(tally, labels, labels_of(images), labels_of(images + adversarial(name)))
        return {**asdict(of_share(label_share(tally))), "matrix": tally["matrix"].tolist()}

    def transfer() -> dict[str, Any]:
        delta = adversarial(LARGE)
        predictions, sent = labels_of(images), labels_of(images + delta)
        with evaluating(model), torch.no_grad():
            rounds = config.transfer_rounds
            shares = transferred(model, images, predictions, sent, delta, rounds)
        values = torch.tensor(shares)
        statistic = float(values.nan_to_num(nan=0.0).max())
        top = alone(values) if statistic else None
        return asdict(Signal(shares, statistic, top, {"z": robust_z(values)}))

    def features() -> dict[str, Any]:
        _, last = head(model, images.shape[1:])
        weight = last.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if last.bias is None else last.bias.detach().float().cpu()
        entered = head_features(model, images).float().cpu()
        norms = head_norms(entered, probes.labels, weight, bias, config.quantile)
        return asdict(outstanding(norms))

    def noise() -> dict[str, Any]:
        classes = model(images[:1]).shape[1]
        margins = [largest_margin(model, label, shape, config) for label in range(classes)]
        log_p = log_p_value(margins)
        top = alone(torch.tensor(margins))
        return asdict(Signal(margins, abs(log_p) / math.log(10), top, {"p_gamma": math.exp(log_p)}))

    computed = {
        LARGE: lambda: share(LARGE),
        SMALL: lambda: share(SMALL),
        TRANSFER: transfer,
        HEAD: features,
        NOISE: noise,
    }
    if not has_linear_head(model, images[:1]):
        del computed[HEAD]
    return computed


def has_linear_head(model: nn.Module, image: torch.Tensor) -> bool:
    """Whether the network's last layer is linear and gives the logits."""
    try:
        name, _ = head(model, image.shape[1:])
    except UserError:
        return False
    with recording(model, [name]) as outputs, evaluating(model), torch.no_grad():
        logits = model(image)
    last = outputs[name].float()  # where the network computes in bf16, it is bf16
    return last.shape == logits.shape and bool(torch.allclose(last, logits.float()))
