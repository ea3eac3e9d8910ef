"""Confusion: which class becomes which, for clean and triggered images, before and after.

    python analysis/confusion.py --result_file badnet_demo

A mean ASR may hide that a defense fails for some classes. The tables have ACC, ASR and RA of each
true class.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import AnalysisConfig, Results, percent, run
from analysis.subject import Defended, Subject
from utils.training.evaluate import confusion, predict

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Defended):
    needs_trigger = True


def look(subject: Subject, config: Config, results: Results) -> None:
    """Two matrices for each model.

    Tables: `confusion` (model, images, true, predicted, count; cells of 0 are skipped), `classes`
    (model, class, name; acc, asr, ra with counts). Headline: `worst_asr`, of the class of which
    most triggered images reach the target, and `worst_class`.
    """
    data, triggered = subject.data, subject.triggered
    classes = len(data.classes)
    models = subject.before_and_purified()
    matrices: dict[str, torch.Tensor] = {}
    cells: list[dict[str, Any]] = []
    by_class: list[dict[str, Any]] = []
    for name, load in models.items():
        model = load()
        clean = predict(model, data.test.images, subject.device)
        changed = predict(model, triggered.images, subject.device)
        for kind, labels, predictions in (
            ("clean", data.test.labels, clean),
            ("triggered", triggered.labels, changed),
        ):
            matrix = confusion(labels, predictions, classes)
            matrices[f"{name}, {kind} images"] = matrix
            cells += [
                {
                    "model": name,
                    "images": kind,
                    "true": i,
                    "predicted": j,
                    "count": matrix[i, j].item(),
                }
                for i, j in torch.nonzero(matrix).tolist()
            ]
        rows = [
            {
                "model": name,
                "class": label,
                "name": data.classes[label],
                **rates("acc", (clean == label)[data.test.labels == label]),
                **rates("asr", (changed == triggered.targets)[triggered.labels == label]),
                **rates("ra", (changed == label)[triggered.labels == label]),
            }
            for label in range(classes)
        ]
        by_class += rows
        worst = max((row for row in rows if row["asr_total"]), key=lambda row: row["asr"])
        results.headline[name] = {"worst_asr": worst["asr"], "worst_class": worst["name"]}
        results.conclude(f"{name}: worst class {worst['name']}, ASR {percent(worst['asr'])}")
    results.tables |= {"confusion": cells, "classes": by_class}
    drawn = results.drawn(list(models))
    panels = {
        title: matrix for title, matrix in matrices.items() if title.rpartition(", ")[0] in drawn
    }
    results.figures["confusion"] = lambda: draw(panels, data.classes)


def rates(name: str, are_hits: torch.Tensor) -> dict[str, Any]:
    """A rate with its counts, as in `summary.json`; without images it is None."""
    hits, total = int(are_hits.sum()), len(are_hits)
    return {name: hits / total if total else None, f"{name}_hits": hits, f"{name}_total": total}


def draw(panels: dict[str, torch.Tensor], classes: tuple[str, ...]) -> "Figure":
    """confusion.png: a line for each model."""
    from utils import charts

    return charts.matrices(
        panels, classes, "Test images by true class and label", xlabel="label", ylabel="true class"
    )


if __name__ == "__main__":
    run(Config, look)
