"""Path: walks in a straight line from the backdoored weights to the purified ones, and beyond.

Min, Qin, Zhang, Shen, Cheng. *Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense.* NeurIPS 2024, arXiv 2410.09838.

    w(t) = w_bd + t (w_pur - w_bd),  t = 0, 0.1, ..., 1.5

ACC, ASR and RA of w(t) say whether a purified model is far from the backdoored one, or just over
the edge: then ASR is high until shortly before t = 1, and a small step back brings the trigger
back. If ACC falls in between, the two models are in different basins, and a straight line says
little about the way from one to the other.

    python analysis/path.py --result_file badnet_demo --clean_record clean_demo

All weights are interpolated, BatchNorm's among them; t = 0 and t = 1 are the two models, bit for
bit. BatchNorm's running statistics are interpolated too (variances not below 0), or measured anew
on the clean subset at each t (`--bn reestimate`); then the scores at t = 0 and t = 1 change, too.
Nothing is trained. Defenses that change the architecture are skipped.

Controls: the scores at t = 0 and t = 1 are compared with the summaries. The path to a clean model
shows what lies between two models that have nothing but the data in common.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import CLEAN, AnalysisConfig, Results, percent, run
from analysis.subject import Controlled, Subject
from models import Classifier
from models.copies import copied
from models.modes import evaluating
from utils.data.batches import as_float

if TYPE_CHECKING:
    from utils.plot import Figure

HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Controlled):
    t_end: Annotated[float, Field(ge=1, le=10, description="last t; 1 is the purified model")]
    t_steps: Annotated[int, Field(ge=1, le=100, description="steps from t = 0 to t = 1")]
    bn: Annotated[
        Literal["interpolate", "reestimate"],
        Field(description="BatchNorm's running statistics: interpolated, or measured at each t"),
    ]
    ratio: Annotated[
        float, Field(gt=0, le=1, description="clean images that measure them / training set")
    ]

    needs_defenses = True

    def check(self, subject: Subject) -> None:
        if self.bn == "reestimate":
            subject.clean_draw(self.ratio, self.random_seed)


def interpolated(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], t: float
) -> dict[str, torch.Tensor]:
    """start + t (end - start), by name; exact at 0 and 1.

    Variances (`running_var`) are not below 0. Values that are no floats come from `start` if
    t < 1, and from `end` otherwise.

    Args:
        start, end: state dicts with the same names and shapes.
        t: any number.
    """
    state = {}
    for name, first in start.items():
        last = end[name]
        if not (first.is_floating_point() or first.is_complex()):
            state[name] = first if t < 1 else last
            continue
        state[name] = torch.lerp(first, last, t)
        if name.endswith("running_var"):
            state[name] = state[name].clamp(min=0)
    return state


@torch.no_grad()
def reestimate(model: nn.Module, images: torch.Tensor, batch_size: int = 128) -> None:
    """Measures BatchNorm's running statistics anew, as plain means over batches; in place.

    Args:
        model: in eval mode, as it is given back.
        images: (N, C, H, W), float in [0, 1] or uint8, at least two.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    device = next(model.parameters()).device
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    parts = max(1, len(images) // batch_size)  # no small last batch
    for batch in images.tensor_split(parts):
        model(as_float(batch, device))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


def crossing(ts: Sequence[float], rates: Sequence[float]) -> float | None:
    """The last t <= 1 at which a rate passes `HALF` on its way down, between two points linearly.

    Args:
        ts: ascending.
        rates: at each t.

    Returns:
        None if the rate at t = 1 is at least `HALF`, or if it was nowhere that large.
    """
    before = [(t, rate) for t, rate in zip(ts, rates, strict=True) if t <= 1]
    if before[-1][1] >= HALF:
        return None
    for (t, rate), (later, lower) in reversed(list(itertools.pairwise(before))):
        if rate >= HALF > lower:
            return t + (later - t) * (rate - HALF) / (rate - lower)
    return None


def barrier(ts: Sequence[float], rates: Sequence[float]) -> float:
    """How far a rate falls, from t = 0 to 1, below the straight line between its two ends; >= 0."""
    first, last = rates[ts.index(0.0)], rates[ts.index(1.0)]
    return max(
        first + t * (last - first) - rate for t, rate in zip(ts, rates, strict=True) if 0 <= t <= 1
    )


def places(t_end: float, t_steps: int) -> list[float]:
    """t from 0 in steps of 1 / t_steps, and t_end; 0 and 1 are exactly these."""
    steps = [number / t_steps for number in range(int(t_end * t_steps + 1e-9) + 1)]
    return steps if t_end - steps[-1] < 1e-9 else [*steps, t_end]


def look(subject: Subject, config: Config, results: Results) -> None:
    """Scores of w(t) for each defense, and for a clean model.

    Tables: `path` (defense, t, rates with counts, bn). Headline of each of them: `t_half`, the t at
    which ASR passes 50 % (see `crossing`; None if the attack had failed, or the model at t = 1 has
    collapsed), and `acc_barrier`.
    """
    results.lack_of_control(
        subject.clean, "how the path to a model without a backdoor looks is not known"
    )
    ts = places(config.t_end, config.t_steps)
    start = {key: value.clone() for key, value in subject.model.state_dict().items()}
    images = None
    if config.bn == "reestimate":
        images = subject.clean_images(config.ratio, config.random_seed).images
    rows: list[dict[str, Any]] = []
    summaries = {purified.name: purified.summary for purified in subject.purified}
    loaders: dict[str, Callable[[], Classifier | None]] = {
        p.name: functools.partial(subject.same_network, results, p) for p in subject.purified
    }
    loaders[CLEAN] = lambda: subject.same_clean_network(results)
    for name, load in loaders.items():
        model = load()
        if model is None:
            continue
        if model is subject.clean:
            model = copied(model)  # other analyses use it, too
        end = {key: value.clone() for key, value in model.state_dict().items()}

        def scores_at(
            t: float, model: nn.Module = model, end: Mapping[str, torch.Tensor] = end
        ) -> dict[str, float | int]:
            model.load_state_dict(interpolated(start, end, t))
            with evaluating(model):
                if images is not None:
                    reestimate(model, images)
                return subject.score(model).counts()

        points = [results.step(f"{name}, t = {t:g}", functools.partial(scores_at, t)) for t in ts]
        rows += [
            {"defense": name, "t": t, "bn": config.bn, **point}
            for t, point in zip(ts, points, strict=True)
        ]
        if images is None and name in summaries:
            _compare(results, name, 0, points[0], summaries[name].get("before"))
            _compare(results, name, 1, points[ts.index(1.0)], summaries[name].get("after"))
        accuracies = [point["acc"] for point in points]
        numbers: dict[str, Any] = {"acc_barrier": barrier(ts, accuracies)}
        if "asr" in points[0]:
            rates = [point["asr"] for point in points]
            says_something = rates[0] >= HALF and name not in results.collapsed
            numbers = {"t_half": crossing(ts, rates) if says_something else None, **numbers}
            if name not in results.collapsed:
                results.conclude(_read(name, ts, rates, float(accuracies[0]), numbers))
        results.headline[name] = numbers
    results.tables["path"] = rows
    if rows:
        results.figures["path"] = lambda: draw(rows, config.bn)


def draw(rows: Sequence[Mapping[str, Any]], bn: str) -> "Figure":
    """path.png: ACC, ASR and RA over t, a curve for each defense."""
    import pandas as pd

    from utils import charts

    table = pd.DataFrame(rows)
    panels = {
        rate.upper(): 100 * table.pivot(index="t", columns="defense", values=rate)
        for rate in ("asr", "acc", "ra")
        if rate in table
    }
    statistics = "interpolated" if bn == "interpolate" else "measured at each t"
    return charts.curves_of(
        panels,
        "t: 0 backdoored, 1 purified",
        f"Between the backdoored and the purified weights, and beyond; BatchNorm's statistics are "
        f"{statistics}",
        controls=(CLEAN,),
        marks=(0, 1),
    )


def _compare(results: Results, name: str, t: int, point: Mapping[str, Any], summary: Any) -> None:
    """Warns if the scores at t = 0 or 1 are not those that the defense has written."""
    written = summary if isinstance(summary, Mapping) else {}
    differing = [key for key, value in point.items() if written.get(key, value) != value]
    if differing:
        results.warn(
            f"{name}: {', '.join(differing)} at t = {t} differ from its summary; it was run with "
            "another device or precision"
        )


def _read(
    name: str,
    ts: Sequence[float],
    rates: Sequence[float],
    acc: float,
    numbers: Mapping[str, Any],
) -> str:
    """What a curve says, in a sentence."""
    at_end, half = rates[ts.index(1.0)], numbers["t_half"]
    if rates[0] < HALF:
        return f"{name}: ASR is only {percent(rates[0])} before, so the path says nothing"
    if at_end >= HALF:
        return f"{name}: ASR is {percent(at_end)} after the defense; the backdoor is still there"
    separate = (
        f"; ACC falls by {percent(numbers['acc_barrier'])} in between, so the two models are in "
        "different basins"
        if numbers["acc_barrier"] > 0.1 * acc
        else ""
    )
    where = "just over the edge" if half is not None and half > 0.8 else "well past the edge"
    again = max(rate for t, rate in zip(ts, rates, strict=True) if t >= 1)
    beyond = f"; beyond t = 1 it rises again to {percent(again)}" if again >= HALF else ""
    return f"{name}: ASR passes 50 % at t = {half:.2f}, {where}{separate}{beyond}"


if __name__ == "__main__":
    run(Config, look)
