"""Weights: how far each defense has moved each layer, and which channels most.

    distance   ||w_pur - w_bd|| / ||w_bd||, of all weights of a layer

    python analysis/weights.py --result_file badnet_demo

A defense that prunes moves few layers far; fine-tuning moves all a little. Running statistics of
BatchNorm are not weights. Defenses that change the architecture are skipped.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import AnalysisConfig, Results, run
from analysis.subject import Defended, Subject
from models.parts import bare

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Defended):
    channels: Annotated[int, Field(ge=1, description="channels that the table names")]

    needs_defenses = True


def layers_of(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The weights of each layer that has some, by its name, in the order of the network.

    Complex weights are pairs of real ones.
    """
    layers: dict[str, list[torch.Tensor]] = {}
    for name, weight in bare(model).named_parameters():
        numbers = torch.view_as_real(weight) if weight.is_complex() else weight
        layers.setdefault(name.rpartition(".")[0], []).append(numbers.detach().double().cpu())
    return layers


def distance(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """||after - before|| / ||before|| over tensors of the same shapes; NaN if all are 0 before."""
    moved = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.square().sum()) for a in before)
    return (moved / size) ** 0.5 if size else float("nan")


def channel_distances(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`distance` of each output channel: (O, ...) float -> (O,) float; 0 where both are 0."""
    moved = (after - before).flatten(1).norm(dim=1)
    return moved / before.flatten(1).norm(dim=1).clamp(min=1e-12)


def look(subject: Subject, config: Config, results: Results) -> None:
    """The distance of each layer for each defense.

    Tables: `weights` (defense, layer, is_matrix: convolution or linear, distance), `channels`
    (defense, layer, channel, distance: the farthest ones of convolutions and linear layers).
    Headline: `distance` over all weights, and `farthest_layer`, which is None if none has moved.
    """
    before = layers_of(subject.model)
    rows: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []
    for purified in subject.purified:
        model = subject.same_network(results, purified)
        if model is None:
            continue
        after = layers_of(model)
        distances = {name: distance(before[name], after[name]) for name in before}
        rows += [
            {
                "defense": purified.name,
                "layer": name,
                "is_matrix": before[name][0].dim() > 1,
                "distance": value,
            }
            for name, value in distances.items()
        ]
        moved = [
            {"defense": purified.name, "layer": name, "channel": number, "distance": value}
            for name, tensors in before.items()
            if tensors[0].dim() > 1
            for number, value in enumerate(channel_distances(tensors[0], after[name][0]).tolist())
        ]
        moved.sort(key=lambda row: -float(row["distance"]))
        channels += moved[: config.channels]
        whole = distance(*(list(chain.from_iterable(w.values())) for w in (before, after)))
        numbers = {name: value for name, value in distances.items() if value > 0}  # NaN is not
        farthest = max(numbers, key=lambda name: numbers[name], default=None)
        results.headline[purified.name] = {"distance": whole, "farthest_layer": farthest}
        if whole == 0:
            results.conclude(f"{purified.name}: no weight has moved")
        if farthest is not None:
            results.conclude(
                f"{purified.name}: weights moved by {100 * whole:.2f} %, most in {farthest} "
                f"({100 * numbers[farthest]:.1f} %)"
            )
    results.tables |= {"weights": rows, "channels": channels}
    if rows:
        results.figures["weights"] = lambda: draw(rows)


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """weights.png: the distance of convolutions and linear layers, a curve for each defense."""
    import pandas as pd

    from utils import charts

    table = pd.DataFrame(rows)
    table = table[table["is_matrix"]] if table["is_matrix"].any() else table
    places = {name: number for number, name in enumerate(dict.fromkeys(table["layer"]), start=1)}
    wide = table.assign(place=table["layer"].map(places), percent=100 * table["distance"])
    wide = wide.pivot(index="place", columns="defense", values="percent")
    return charts.curves_of(
        {"": wide.where(wide > 0)},
        f"convolution or linear layer, in the order of the network ({len(places)})",
        "How far each layer moved",
        ylabel="percent of its norm",
        log=True,
    )


if __name__ == "__main__":
    run(Config, look)
