"""Features: t-SNE of the penultimate features of clean and triggered images, before and after.

van der Maaten, Hinton. *Visualizing Data using t-SNE.* JMLR 2008.

In a backdoored model, triggered images of all classes form a cluster beside the target class. After
a good defense they lie among the images of their true classes. t-SNE is that of scikit-learn. It is
computed for each model alone, so distances of two panels cannot be compared. The numbers beside it
are from the features themselves: the class of the nearest clean image.

    python analysis/features.py --result_file badnet_demo
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import AnalysisConfig, Results, percent, run
from analysis.subject import Defended, Subject
from utils.data.batches import spread
from utils.training.evaluate import head_features

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Defended):
    clean_images: Annotated[int, Field(ge=10, description="clean test images, at most")]
    triggered_images: Annotated[int, Field(ge=1, description="triggered test images, at most")]
    perplexity: Annotated[float, Field(gt=1, description="of t-SNE: neighbours that count")]

    needs_trigger = True


def nearest_classes(
    queries: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The class of the nearest feature: float (M, D), float (N, D), int64 (N,) -> int64 (M,)."""
    return labels[torch.cdist(queries.double(), features.double()).argmin(1)]


def embedded(features: torch.Tensor, perplexity: float, seed: int) -> torch.Tensor:
    """t-SNE in the plane: float (N, D) -> float (N, 2)."""
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=perplexity, init="random", random_state=seed % 2**31)
    return torch.from_numpy(tsne.fit_transform(features.numpy()))


def look(subject: Subject, config: Config, results: Results) -> None:
    """A map for each model.

    Tables: `features` (model, x, y, label, is_triggered). Headline: `nearest_is_target` and
    `nearest_is_true`: of the triggered images, the share whose nearest clean one is of that class;
    the first is None where there is no clean image of a target class.
    """
    data, triggered = subject.data, subject.triggered
    clean = spread(len(data.test), config.clean_images)
    chosen = spread(len(triggered.index), config.triggered_images)
    labels = torch.cat([data.test.labels[clean], triggered.labels[chosen]])
    images = torch.cat([data.test.images[clean], triggered.images[chosen]])
    has_target = bool(torch.isin(triggered.targets[chosen], labels[: len(clean)]).any())
    perplexity = min(config.perplexity, (len(images) - 1) / 3)
    if perplexity < config.perplexity:
        results.warn(
            f"--perplexity: {config.perplexity:g} is too many neighbours of {len(images)} images; "
            f"{perplexity:g} is used"
        )
    models = subject.before_and_purified()
    rows = []
    for name, load in models.items():
        model = load()
        features = head_features(model, images).cpu().reshape(len(images), -1)
        nearest = nearest_classes(
            features[len(clean) :], features[: len(clean)], labels[: len(clean)]
        )
        results.headline[name] = {
            "nearest_is_target": float((nearest == triggered.targets[chosen]).double().mean())
            if has_target
            else None,
            "nearest_is_true": float((nearest == triggered.labels[chosen]).double().mean()),
        }
        places = embedded(features, perplexity, config.random_seed).tolist()
        rows += [
            {"model": name, "x": x, "y": y, "label": label, "is_triggered": number >= len(clean)}
            for number, ((x, y), label) in enumerate(zip(places, labels.tolist(), strict=True))
        ]
    results.tables["features"] = rows
    if not has_target:
        results.conclude("no clean test image is of the target class, so none can be the nearest")
    for name, numbers in results.headline.items():
        of_target = numbers["nearest_is_target"]
        results.conclude(
            f"{name}: the nearest clean image of a triggered one is of the "
            + (f"target class in {percent(of_target)}, of the " if has_target else "")
            + f"true class in {percent(numbers['nearest_is_true'])}"
        )
    names = results.drawn(list(models))
    results.figures["features"] = lambda: draw(rows, names, data.classes)


def draw(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], classes: Sequence[str]
) -> "Figure":
    """features.png: a map for each model."""
    import pandas as pd

    from utils import charts

    table = pd.DataFrame(rows)
    return charts.points(
        {name: table[table["model"] == name] for name in names},
        classes,
        "Penultimate features of test images (t-SNE, each panel by itself)",
    )


if __name__ == "__main__":
    run(Config, look)
