"""Similarity: how much of the backdoor's features is left inside the purified model.

Zhu, Liang, Wu. *Breaking the False Sense of Security in Backdoor Defense through
Re-Activation Attack.* NeurIPS 2024, arXiv 2405.16134.

In each 3x3 convolution inside the residual blocks, take the channels of the backdoored model whose
output the trigger changes most (mean absolute change, the top 10 %). Linear CKA compares their
activations on triggered images in the backdoored model and in another one; S is the mean over
layers:

    CKA(X, Y) = ||X'Y||^2 / (||X'X|| ||Y'Y||)    columns centred, Frobenius norms
    BEC       = (S - S_min) / (1 - S_min)        S_min over the models that are compared here

    python analysis/similarity.py --result_file badnet_demo --clean_record clean_demo

CKA of a model with itself is 1, and does not change if features are rotated or scaled. BEC depends
on which models are compared, so S stands beside it, and so does S of a clean model: it shows how
similar two models are that saw the same data, without any backdoor. A network without blocks is
compared in all its convolutions. Defenses that change the architecture are skipped.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import CLEAN, AnalysisConfig, Results, run
from analysis.subject import Controlled, Subject
from models import Classifier
from models.channels import convolutions
from models.modes import evaluating
from models.outputs import recording
from utils.data.batches import as_float, spread
from utils.errors import listed

if TYPE_CHECKING:
    from utils.plot import Figure

ROUNDING = 1e-9  # of CKA's sums, and more


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Controlled):
    images: Annotated[int, Field(ge=2, description="triggered test images, at most")]
    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="channels of a layer that count; the first is reported"),
    ]
    batch_size: Annotated[int, Field(ge=1, description="images per pass")]

    needs_trigger = needs_defenses = True

    def check(self, subject: Subject) -> None:
        compared_layers(subject.model)


def compared_layers(model: nn.Module) -> list[str]:
    """The 3x3 convolutions inside blocks, without shortcuts; all convolutions if there are none.

    Inside a block is what has a part of the network above it: `layer1.0.conv1`, not `conv1`.

    Raises:
        UserError: if the network has no convolution.
    """
    layers = convolutions(model)
    inside = [
        name
        for name, layer in layers.items()
        if layer.kernel_size == (3, 3)
        and "." in name
        and not any(word in name for word in ("shortcut", "downsample"))
    ]
    return inside or list(layers)


def gram(features: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of features whose columns are centred: float (N, D) -> float64 (N, N).

    It is exactly 0 for float32 features whose rows are all the same: in float64 sums are exact.
    """
    centred = features.double() - features.double().mean(0)
    return centred @ centred.T


def cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear CKA from two Gram matrices of the same images.

    ||X'Y||^2 is the sum of the products of the entries of XX' and YY'.

    Args:
        first: float (N, N), from `gram`; of the backdoored model.
        second: likewise, of the other model.

    Returns:
        In [0, 1]. It is 0 if only the second is 0: its channels are dead, so nothing of the first
        is left. NaN if the first is 0: there is nothing to compare with.
    """
    if first.any() and not second.any():
        return 0.0
    return float((first * second).sum() / (first.norm() * second.norm()))


def top_channels(change: torch.Tensor, share: float) -> torch.Tensor:
    """The channels that change most: float (C,) -> int64 (max(1, round(share C)),), ascending."""
    count = max(1, round(share * len(change)))
    return change.topk(count).indices.sort().values


def backdoor_existence(similarity: Mapping[str, float]) -> dict[str, float | None]:
    """BEC of each model: 0 for the one that is least like the backdoored model, which has 1.

    Args:
        similarity: S by model, without the backdoored one.

    Returns:
        None for each if all are 1, up to the rounding of sums, or if there is one alone, which
        cannot be compared with others.
    """
    least = min(similarity.values(), default=1.0)
    if least > 1 - ROUNDING or len(similarity) < 2:
        return dict.fromkeys(similarity)
    return {name: (value - least) / (1 - least) for name, value in similarity.items()}


@torch.no_grad()
def changes(
    model: nn.Module, layers: Sequence[str], clean: torch.Tensor, triggered: torch.Tensor, size: int
) -> dict[str, torch.Tensor]:
    """Mean absolute change of each channel's output from clean images to triggered ones.

    Args:
        clean, triggered: uint8 (N, C, H, W), the same images.
        size: images per pass.

    Returns:
        Float64 (channels,) by layer, on the CPU; layers that are never called are skipped.
    """
    device = next(model.parameters()).device
    sums: dict[str, torch.Tensor] = {}
    with evaluating(model), recording(model, layers) as outputs:
        for pair in zip(clean.split(size), triggered.split(size), strict=True):
            kept = []
            for images in pair:
                model(as_float(images, device))
                kept.append({name: output.float() for name, output in outputs.items()})
            for name in outputs:
                change = (kept[1][name] - kept[0][name]).abs().mean(dim=(2, 3)).sum(0)
                sums[name] = sums.get(name, 0) + change.double().cpu()
    return {name: total / len(clean) for name, total in sums.items()}


@torch.no_grad()
def grams(
    model: nn.Module,
    channels: Mapping[str, Sequence[torch.Tensor]],
    images: torch.Tensor,
    size: int,
) -> dict[str, list[torch.Tensor]]:
    """Gram matrices of activations on chosen channels.

    Args:
        channels: by layer, several choices of channels.
        images: uint8 (N, C, H, W).
        size: images per pass.

    Returns:
        By layer, one for each choice: float64 (N, N), on the CPU.
    """
    device = next(model.parameters()).device
    parts: dict[str, list[list[torch.Tensor]]] = {
        name: [[] for _ in chosen] for name, chosen in channels.items()
    }
    with evaluating(model), recording(model, channels) as outputs:
        for batch in images.split(size):
            model(as_float(batch, device))
            for name, choices in channels.items():
                for kept, chosen in zip(parts[name], choices, strict=True):
                    kept.append(outputs[name][:, chosen.to(device)].float().flatten(1).cpu())
    return {name: [gram(torch.cat(kept)) for kept in many] for name, many in parts.items()}


def look(subject: Subject, config: Config, results: Results) -> None:
    """S and BEC of each defense, and S of a clean model.

    Tables: `similarity` (model, share, layer, cka). Headline: `similarity` (S), `bec`.
    """
    triggered, layers = subject.triggered, compared_layers(subject.model)
    rows = spread(len(triggered.index), config.images)
    images, clean = triggered.images[rows], subject.data.test.images[triggered.index[rows]]
    shares = tuple(dict.fromkeys(config.shares))
    change = changes(subject.model, layers, clean, images, config.batch_size)
    channels = {
        name: [top_channels(values, share) for share in shares] for name, values in change.items()
    }
    reference = grams(subject.model, channels, images, config.batch_size)
    constant = [name for name, many in reference.items() if not all(one.any() for one in many)]
    if constant:
        results.warn(
            f"skipped: {listed(constant)}: the channels that the trigger changes most give the "
            "same for all triggered images"
        )
    models: dict[str, Classifier] = {}
    for purified in subject.purified:
        model = subject.same_network(results, purified)
        if model is not None:
            models[purified.name] = model
    control = subject.same_clean_network(results)
    if control is not None:
        models[CLEAN] = control
    results.lack_of_control(
        subject.clean,
        "how similar two models are that share no backdoor is not known",
    )
    table: list[dict[str, Any]] = []
    for name, model in models.items():
        other = grams(model, channels, images, config.batch_size)
        table += [
            {
                "model": name,
                "share": share,
                "layer": layer,
                "cka": cka(reference[layer][number], other[layer][number]),
            }
            for number, share in enumerate(shares)
            for layer in channels
        ]
    results.tables["similarity"] = table
    means = {share: mean_by_model(table, share) for share in shares}
    bec = backdoor_existence(means[shares[0]])
    for name, value in means[shares[0]].items():
        results.headline[name] = {"similarity": value, "bec": bec[name]}
    results.facts["similarity_by_share"] = {f"{s:g}": value for s, value in means.items()}
    of_clean = results.headline.get(CLEAN, {}).get("similarity")
    for name, numbers in results.headline.items():
        if name != CLEAN:
            text = f"{name}: S = {numbers['similarity']:.3f}"
            text += "" if of_clean is None else f"; a clean model: {of_clean:.3f}"
            results.conclude(text)
    if table:
        results.figures["similarity"] = lambda: draw(table, shares[0])


def mean_by_model(table: Sequence[Mapping[str, Any]], share: float) -> dict[str, float]:
    """S: the mean of CKA over the layers, by model; layers without a number are skipped."""
    values: dict[str, list[float]] = {}
    for row in table:
        if row["share"] == share and row["cka"] == row["cka"]:
            values.setdefault(row["model"], []).append(row["cka"])
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def draw(table: Sequence[Mapping[str, Any]], share: float) -> "Figure":
    """similarity.png: CKA by layer, a curve for each model."""
    import pandas as pd

    from utils import charts

    rows = pd.DataFrame(table)
    rows = rows[rows["share"] == share]
    places = {name: number for number, name in enumerate(dict.fromkeys(rows["layer"]), start=1)}
    wide = rows.assign(place=rows["layer"].map(places))
    wide = wide.pivot(index="place", columns="model", values="cka")
    return charts.curves_of(
        {"": wide[list(dict.fromkeys(rows["model"]))]},
        f"convolution, in the order of the network ({len(places)})",
        f"Linear CKA with the backdoored model, on the {100 * share:g} % of channels that the "
        "trigger changes most",
        ylabel="CKA",
        controls=(CLEAN,),
        ylim=(-0.03, 1.03),
    )


if __name__ == "__main__":
    run(Config, look)
