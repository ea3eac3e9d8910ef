"""Inspect: looks for a backdoor in a model without knowing its trigger.

No signal here is a verdict. A model is suspicious only in comparison with clean models of the same
recipe: name their records with `--clean_records`, or let `--train_clean 6` train them.

| signal | what |
|---|---|
| A  | adversarial images (SAU's first batch): the largest share of a class |
| A' | the same with small steps from the image, up to the first change of label |
| B  | the perturbation of one image on other images: how often they get the same label |
| C  | the smallest change of features that sends most images to a class; small at the target |
| D  | the largest margin of a class over noise images that maximise it, without any data |
| E  | Neural Cleanse's index, of a result of `defense/nc.py` (`--neural_cleanse true`) |

    python analysis/inspect.py --result_file badnet_demo --clean_records clean_1,clean_2,clean_3
    python analysis/inspect.py --state_dict my_model.pt --model resnet18 --dataset cifar10 \\
        --save_folder_name theirs --train_clean 6

If A and A' name different classes, there is no clear signal. Expect misses: attacks with several
targets (all-to-all), clean-label attacks, and weak WaNet. docs/analysis.md has the power of each
signal. Models that defenses have purified stand beside: their signals must be flat.

C follows the idea of TAC-QP (arXiv 2511.08944), and D that of MM-BD (Wang, Xiang, Miller, Kesidis,
IEEE S&P 2024, arXiv 2205.06900).
"""

import csv
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import (
    BEFORE,
    AnalysisConfig,
    Results,
    Subject,
    analyse,
    load_clean,
    write,
)
from attack.prototype import train
from attack.recipe import TrainingConfig, clean_plan
from models import build_model, check_model, model_identity, prepare
from models.modes import evaluating, frozen
from models.parts import head, recording
from utils.config import read_yaml
from utils.data.batches import as_float
from utils.data.datasets import DatasetName, load_dataset
from utils.data.labelled import Labelled
from utils.errors import UserError, suggestion
from utils.files import as_path
from utils.perturb import Norm, Start, initial_perturbation, project
from utils.process.device import pick_device, pick_precision
from utils.process.seeds import generator
from utils.records import folders
from utils.records.attack import dataset_of_record
from utils.records.weights import fill, read_state_dict
from utils.training import ending
from utils.training.labelshare import LabelShare, add, label_share, new_tally, robust_z

if TYPE_CHECKING:
    from utils.plot import Figure

LARGE, SMALL, TRANSFER, HEAD, NOISE, CLEANSE = "A", "A'", "B", "C", "D", "E"
TITLES = {
    LARGE: "A: share of adversarial images",
    SMALL: "A': the same, small steps",
    TRANSFER: "B: transferred to other images",
    HEAD: "C: median norm / norm in features",
    NOISE: "D: largest margin on noise",
    CLEANSE: "E: median mask / mask (NC)",
}
FEWEST_PAIRS = 10  # of a class in B
ENOUGH_CLEAN = 6  # clean models, below which a comparison says little


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig):
    yaml_folder = "inspect"

    state_dict: Annotated[
        str | None,
        Field(description="checkpoint of a model without a record; needs --model and --dataset"),
    ]
    image_size: Annotated[
        int | None,
        Field(ge=8, le=1024, description="side of its images in pixels; null for the dataset's"),
    ]
    clean_records: Annotated[
        tuple[str, ...], Field(description="records of clean models of the same recipe")
    ]
    train_clean: Annotated[
        int, Field(ge=0, le=100, description="clean models to train, or that were trained before")
    ]
    neural_cleanse: Annotated[
        bool, Field(description="read the index of the records' results of defense/nc.py")
    ]
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
        top: the most suspicious class.
        facts: more numbers.
    """

    by_class: list[float]
    statistic: float
    top: int
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


def steps_of(config: Config) -> dict[str, Callable[..., torch.Tensor]]:
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


def largest_margin(model: nn.Module, target: int, shape: Sequence[int], config: Config) -> float:
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


def p_value(margins: Sequence[float]) -> float:
    """How likely the largest margin is, if all are drawn from the gamma law of the others.

    The law has mean and variance (sample) of the other K - 1 margins; p = 1 - F(largest)^K.

    Returns:
        In [0, 1]; 1 if the others are no sample of a gamma law: not positive, or all equal.
    """
    values = torch.tensor(sorted(margins), dtype=torch.float64)
    others, largest = values[:-1], values[-1]
    mean, variance = others.mean(), others.var()
    if len(others) < 2 or not mean > 0 or not variance > 0:
        return 1.0
    shape, scale = mean**2 / variance, variance / mean
    below = torch.special.gammainc(shape, largest / scale)
    return float(-torch.expm1(len(values) * below.log()))


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

    The statistic is how far the smallest norm is under the median; see `robust_z`.
    """
    values = torch.tensor(norms, dtype=torch.float64)
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return Signal([math.nan] * len(norms), 0.0, 0, {})
    ratios = finite.quantile(0.5) / values.clamp(min=1e-12)
    top = int(values.nan_to_num(nan=torch.inf).argmin())
    return Signal(ratios.tolist(), robust_z(-finite), top, {"norm": float(values[top])})


def signals_of(
    model: nn.Module, probes: Labelled, config: Config, device: torch.device
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
            tally = new_tally(model(images[:1]).shape[1])
        add(tally, labels, labels_of(images), labels_of(images + adversarial(name)))
        return {**asdict(of_share(label_share(tally))), "matrix": tally["matrix"].tolist()}

    def transfer() -> dict[str, Any]:
        delta = adversarial(LARGE)
        predictions, sent = labels_of(images), labels_of(images + delta)
        with evaluating(model), torch.no_grad():
            rounds = config.transfer_rounds
            shares = transferred(model, images, predictions, sent, delta, rounds)
        values = torch.tensor(shares)
        top = int(values.nan_to_num(nan=-1.0).argmax())
        statistic = float(values.nan_to_num(nan=0.0).max())
        return asdict(Signal(shares, statistic, top, {"z": robust_z(values)}))

    def features() -> dict[str, Any]:
        name, last = head(model)
        parts = []
        with evaluating(model), torch.no_grad(), recording(model, [name], of="input") as inputs:
            for batch in images.split(128):
                model(batch)
                parts.append(inputs[name].float().cpu())
        weight = last.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if last.bias is None else last.bias.detach().float().cpu()
        norms = head_norms(torch.cat(parts), probes.labels, weight, bias, config.quantile)
        return asdict(outstanding(norms))

    def noise() -> dict[str, Any]:
        classes = model(images[:1]).shape[1]
        margins = [largest_margin(model, label, shape, config) for label in range(classes)]
        p = p_value(margins)
        top = margins.index(max(margins))
        return asdict(Signal(margins, abs(math.log10(max(p, 1e-300))), top, {"p": p}))

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
        name, _ = head(model)
    except UserError:
        return False
    with recording(model, [name]) as outputs, evaluating(model), torch.no_grad():
        logits = model(image)
    return outputs[name].shape == logits.shape and bool(torch.allclose(outputs[name], logits))


def conclusion(
    signals: Mapping[str, Mapping[str, Any]],
    null: Sequence[Mapping[str, Mapping[str, Any]]],
    named: Callable[[int], str],
) -> str:
    """What the signals of a model say, in careful words.

    Args:
        signals: of the model, by name.
        null: those of clean models.
        named: the name of a class.
    """
    large, small = signals[LARGE]["top"], signals[SMALL]["top"]
    if not all(signals[name]["statistic"] > 0 for name in (LARGE, SMALL)):
        return "no clear signal: no image was sent to another class, or only by large steps"
    if large != small:
        return (
            f"no clear signal: large steps point to class {named(large)}, small ones to class "
            f"{named(small)}"
        )
    if not null:
        return (
            f"A and A' both point to class {named(large)}, as happens in many clean models; "
            "without clean models to compare with this says nothing: give --clean_records, or "
            f"--train_clean {ENOUGH_CLEAN}"
        )
    stronger = [
        name
        for name, signal in signals.items()
        if signal["top"] == large
        and all(signal["statistic"] > other[name]["statistic"] for other in null if name in other)
    ]
    many = f"{len(null)} clean model{'s' * (len(null) > 1)}"
    if not {LARGE, SMALL} & set(stronger):
        return f"no clear signal: adversarial images are not more one-sided than in {many}"
    few = "" if len(null) >= ENOUGH_CLEAN else f", which are few: {ENOUGH_CLEAN} say more"
    return (
        f"class {named(large)} stands out in {', '.join(stronger)}, more than in each of {many}"
        f"{few}; a reason to look closer, and no proof"
    )


def look(subject: Subject, config: Config, results: Results) -> None:
    """All signals of the model, of clean models, and of purified models.

    Tables: `signals` (model, kind, signal, statistic, top, p: the share of clean models, and of
    this one, that are at least as suspicious), `classes` (model, signal, class, value). Fact
    `signals`: by model and signal, `statistic` and `top`.
    """
    data = subject.data
    ratio = min(1.0, config.probes / len(data.train))
    index = subject.clean_draw(ratio, config.random_seed)
    order = generator(config.random_seed, "probes")
    probes = data.train.at(index[torch.randperm(len(index), generator=order)])
    kinds: dict[str, str] = {BEFORE: "record" if subject.attack is not None else "model"}
    loaders: dict[str, Callable[[], nn.Module]] = {BEFORE: lambda: subject.model}
    for purified in subject.purified:
        kinds[purified.name], loaders[purified.name] = "purified", purified.load
    for name, load in clean_models(subject, config).items():
        kinds[name], loaders[name] = "clean", load
    signals: dict[str, dict[str, dict[str, Any]]] = {}
    for name, load in loaders.items():
        model = load()
        computed = signals_of(model, probes, config, subject.device)
        if HEAD not in computed:
            results.warn(f"{name}: no signal C, since its last layer is not a linear one")
        signals[name] = {
            signal: results.step(f"{name}, {signal}", compute)
            for signal, compute in computed.items()
        }
    if config.neural_cleanse:
        add_neural_cleanse(subject, config, signals, results)
    null = [signals[name] for name, kind in kinds.items() if kind == "clean"]
    rows, classes = [], []
    for name, of_model in signals.items():
        for signal, value in of_model.items():
            others = [other[signal]["statistic"] for other in null if signal in other]
            p = (1 + sum(other >= value["statistic"] for other in others)) / (1 + len(others))
            rows.append(
                {
                    "model": name,
                    "kind": kinds[name],
                    "signal": signal,
                    "statistic": value["statistic"],
                    "top": value["top"],
                    "top_name": data.classes[value["top"]],
                    "p": p if others and kinds[name] != "clean" else None,
                    "clean_models": len(others),
                }
            )
            classes += [
                {"model": name, "signal": signal, "class": label, "value": number}
                for label, number in enumerate(value["by_class"])
            ]
    results.tables |= {"signals": rows, "classes": classes}
    results.facts["signals"] = {
        name: {s: {k: value[k] for k in ("statistic", "top")} for s, value in of_model.items()}
        for name, of_model in signals.items()
        if kinds[name] != "clean"
    }
    for name, of_model in signals.items():
        if kinds[name] != "clean":
            results.headline[name] = {
                signal: f"{value['statistic']:.3f} (class {data.named(value['top'])})"
                for signal, value in of_model.items()
            }
    said = conclusion(signals[BEFORE], null, data.named)
    results.conclude(said)
    page = (signals[BEFORE], probes, said, len(null))
    results.figures["inspect"] = lambda: draw(subject, config, *page)


def clean_models(subject: Subject, config: Config) -> dict[str, Callable[[], nn.Module]]:
    """The clean models by the names of their records: those that are named, and trained ones."""
    names = [*config.clean_records, *train_clean(subject, config)]
    loaders: dict[str, Callable[[], nn.Module]] = {}
    for name in dict.fromkeys(names):
        record = load_clean(name, "--clean_records", config.record_path, subject.data)
        given = config.model if record.model_sha256 else None

        def load(record: Any = record, given: str | None = given) -> nn.Module:
            return prepare(record.build(given), subject.device, subject.precision)

        loaders[Path(name).name] = load
    return loaders


def train_clean(subject: Subject, config: Config) -> list[str]:
    """Trains clean models by the recipe of the record, if that was not done before.

    Returns:
        The names of their records, which begin with `clean-`.
    """
    names = []
    for number in range(config.train_clean):
        recipe = clean_recipe(subject, config, number)
        values = {**asdict(recipe), "save_folder_name": None}
        name = f"clean-{ending.recipe_sha256(values)[:8]}-s{recipe.random_seed}"
        folder = folders.attack_folder(name, as_path(config.record_path))
        if not folder.is_done:
            begun = (folder.path / "checkpoint.pt").exists()
            train(replace(recipe, save_folder_name=name, resume=begun), "prototype", clean_plan)
        names.append(name)
    return names


def clean_recipe(subject: Subject, config: Config, number: int) -> TrainingConfig:
    """How a clean model is trained: as the record's model, with another seed."""
    recorded = {}
    if subject.attack is not None and (subject.attack.folder / "config.yaml").exists():
        recorded = read_yaml(subject.attack.folder / "config.yaml")
    places = ("save_folder_name", "overwrite", "resume")
    names = {field.name for field in fields(TrainingConfig)} - {*places, "dataset"}
    values = {name: value for name, value in recorded.items() if name in names}
    model = config.model if subject.model_sha256 else subject.model_name
    values |= {
        "record_path": config.record_path,
        "model": model,
        "image_size": subject.data.image_shape[1],
        "random_seed": 1000 + number,
        "device": config.device,
        "precision": config.precision,
    }
    if config.dataset_path is not None:
        values["dataset_path"] = config.dataset_path
    return TrainingConfig.load(subject.data.name, **values)


def add_neural_cleanse(
    subject: Subject,
    config: Config,
    signals: dict[str, dict[str, dict[str, Any]]],
    results: Results,
) -> None:
    """Adds signal E from the results of defense/nc.py in the records, where there are some."""
    homes = {} if subject.attack is None else {BEFORE: subject.attack.folder}
    for name in config.clean_records:
        folder = folders.existing_folder(name, as_path(config.record_path), "--clean_records")
        homes |= {} if folder is None else {folder.name: folder}
    for name, home in homes.items():
        try:
            text = (home / "defense/nc/norms.csv").read_text(encoding="utf-8")
            norms = [float(row["mask_norm"]) for row in csv.DictReader(text.splitlines())]
        except (OSError, KeyError, ValueError):
            norms = []
        if len(norms) == len(subject.data.classes):
            signals[name][CLEANSE] = asdict(outstanding(norms))
        else:
            results.warn(f"{name}: no signal E; run defense/nc.py --result_file {home.name} first")


def draw(
    subject: Subject,
    config: Config,
    signals: Mapping[str, Mapping[str, Any]],
    probes: Labelled,
    said: str,
    clean: int,
) -> "Figure":
    """inspect.png: the matrix of A, bars by class, and adversarial images."""
    from utils import charts

    chosen = slice(0, 8)
    images = as_float(probes.images[chosen], subject.device)
    true = probes.labels[chosen].to(subject.device)
    draws = generator(config.random_seed, "examples")
    delta = steps_of(config)[LARGE](subject.model, images, true, generator=draws)
    with evaluating(subject.model), torch.no_grad():
        labels = [subject.model(x).argmax(1).tolist() for x in (images, images + delta)]
    named = subject.data.named
    what = (
        "a model"
        if subject.attack is None
        else f"a model of the record {subject.attack.folder.name}"
    )
    compared = f"{clean or 'no'} clean models to compare with"
    return charts.inspection(
        torch.tensor(signals[LARGE]["matrix"]),
        {TITLES[name]: signal["by_class"] for name, signal in signals.items()},
        {"clean": images.cpu(), "adversarial": (images + delta).cpu()},
        [f"{named(a)} | {named(b)}" for a, b in zip(*labels, strict=True)],
        subject.data.classes,
        f"A look inside {what} ({subject.data.name}); the largest bar is hatched; {compared}",
        said,
    )


def subject_of_weights(config: Config) -> Subject:
    """A model that was trained elsewhere, without a record.

    Raises:
        UserError: if checkpoint, network, data and flags do not fit together.
    """
    for flag in ("dataset", "model", "save_folder_name"):
        if getattr(config, flag) is None:
            raise UserError(f"--{flag}: a value is needed with --state_dict")
    dataset, model_name = str(config.dataset), str(config.model)
    if dataset not in get_args(DatasetName):
        raise UserError(
            f"--dataset: {dataset} is not known{suggestion(dataset, get_args(DatasetName))}; give "
            f"one of {', '.join(get_args(DatasetName))}"
        )
    if config.result_file is not None:
        raise UserError("--state_dict: leave it out, or --result_file")
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    size = config.image_size or TrainingConfig.load(dataset).image_size
    data = load_dataset(dataset, as_path(config.dataset_path), size)
    check_model(model_name, len(data.classes), size)
    model = build_model(model_name, len(data.classes), data.mean, data.std, image_size=size)
    fill(model, read_state_dict(Path(str(config.state_dict))), model_name)
    name, sha256 = model_identity(model_name)
    return Subject(data, device, precision, prepare(model, device, precision), name, sha256)


def inspect_weights(config: Config) -> folders.RunFolder:
    """Inspects a model without a record; the result is in `record/<save_folder_name>/analysis/`."""
    started = time.monotonic()
    if config.save_folder_name is None:
        raise UserError("--save_folder_name: a value is needed with --state_dict")
    home = folders.attack_folder(config.save_folder_name, as_path(config.record_path)).path
    folder = folders.analysis_folder(home, "inspect")
    folder.claim(config.overwrite, config.resume)
    return write(config, "inspect", look, subject_of_weights(config), folder, started)


def main() -> None:
    """Inspects a record, or a checkpoint."""

    def find_dataset(values: Mapping[str, Any]) -> str | None:
        return values.get("dataset") if values.get("state_dict") else dataset_of_record(values)

    config = Config.from_command_line(sys.argv[1:], str(__doc__), find_dataset)
    if config.state_dict is not None:
        inspect_weights(config)
    else:
        analyse(config, "inspect", look)
