"""The nearest classes of features by hand, and a perplexity that is lowered."""

from types import SimpleNamespace

import pytest
import torch

from analysis import features
from analysis.base import Results
from models import build_model
from utils.data.labelled import Dataset, Labelled, Triggered


def test_the_nearest_class_in_features() -> None:
    queries = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    points = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    assert features.nearest_classes(queries, points, torch.tensor([7, 3])).tolist() == [7, 3]


@pytest.mark.parametrize("target", [2, 3])
def test_the_share_near_a_class_without_a_clean_image_is_no_number(target: int) -> None:
    """Clean images of classes 0 to 2; of class 3 there is none."""
    torch.manual_seed(0)
    model = build_model("tiny", 4).eval()
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    clean = Labelled(images, torch.arange(30) % 3)
    index = torch.tensor([0, 3, 6])
    targets = torch.full((3,), target)
    triggered = Triggered(images[:3], targets, torch.zeros(3, dtype=torch.int64), index)
    data = Dataset("d", clean, clean, tuple("abcd"), (0.5,) * 3, (0.5,) * 3)
    subject = SimpleNamespace(
        data=data, triggered=triggered, before_and_purified=lambda: {"before": lambda: model}
    )
    results = Results()
    features.look(subject, features.Config.load(), results)
    share = results.headline["before"]["nearest_is_target"]
    said = "\n".join(results.conclusion)
    assert (share is None) == (target == 3)
    assert ("no clean test image is of the target class" in said) == (target == 3)
    assert ("is of the target class in" in said) == (target == 2)
    assert "true class in" in said


@pytest.mark.parametrize("perplexity", [19, 10_000])
def test_a_perplexity_that_is_lowered_is_told(perplexity: float) -> None:
    """30 clean images and 30 triggered ones allow 59 / 3 neighbours."""
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    clean = Labelled(images, torch.arange(30) % 3)
    triggered = Triggered(images, torch.zeros_like(clean.labels), clean.labels, torch.arange(30))
    subject = SimpleNamespace(
        data=Dataset("d", clean, clean, tuple("abc"), (0.5,) * 3, (0.5,) * 3),
        triggered=triggered,
        before_and_purified=lambda: {"before": lambda: model},
    )
    results = Results()
    features.look(subject, features.Config.load(perplexity=perplexity), results)
    said = "--perplexity: 10000 is too many neighbours of 60 images; 19.6667 is used"
    assert results.warnings == [said] * (perplexity > 19)
