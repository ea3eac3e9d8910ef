"""Similarity: CKA, dead channels and the channels that the trigger changes, by hand."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from analysis import similarity
from analysis.base import Results
from models import build_model
from tests.networks import Forked
from utils.data.labelled import Dataset, Triggered


def test_cka_is_1_with_itself_and_does_not_change_under_rotation_and_scale() -> None:
    torch.manual_seed(0)
    features_, other = torch.randn(20, 6), torch.randn(20, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    first, moved = similarity.gram(features_), similarity.gram(3 * features_ @ rotation + 5)
    assert similarity.cka(first, first) == pytest.approx(1)
    assert similarity.cka(first, moved) == pytest.approx(1)
    x, y = (values.double() - values.double().mean(0) for values in (features_, other))
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert similarity.cka(first, similarity.gram(other)) == pytest.approx(float(expected))


def test_dead_channels_have_nothing_left() -> None:
    """Of the other model, they are different; of the backdoored one, they are no reference."""
    torch.manual_seed(0)
    alive = similarity.gram(torch.randn(10, 3))
    dead = similarity.gram(torch.full((10, 3), 0.1))
    assert not dead.any()
    assert similarity.cka(alive, dead) == 0
    assert math.isnan(similarity.cka(dead, alive))
    assert math.isnan(similarity.cka(dead, dead))


def test_a_model_whose_backdoor_channels_are_cut_is_not_similar(tiny_data: Dataset) -> None:
    """`cut` is dead in the only layer. Where the record's model itself is, a line says so."""
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    cut = copy.deepcopy(model)
    cut.network.conv.weight.data.zero_()
    index = torch.arange(len(tiny_data.test))
    changed = 255 - tiny_data.test.images
    triggered = Triggered(changed, torch.zeros_like(index), tiny_data.test.labels, index)

    def seen(backdoored: nn.Module) -> Results:
        subject = SimpleNamespace(
            model=backdoored,
            triggered=triggered,
            data=tiny_data,
            purified=[SimpleNamespace(name=name) for name in ("cut", "same")],
            same_network=lambda _, purified: {"cut": cut, "same": model}[purified.name],
            clean=None,
            same_clean_network=lambda _: None,
        )
        results = Results()
        similarity.look(subject, similarity.Config.load(), results)
        return results

    results = seen(model)
    assert results.headline["cut"] == {"similarity": 0, "bec": 0}
    assert results.headline["same"] == {"similarity": pytest.approx(1), "bec": pytest.approx(1)}
    assert not any(line.startswith("skipped") for line in results.warnings)
    results = seen(cut)
    assert results.headline == {}
    (line,) = [line for line in results.warnings if line.startswith("skipped")]
    assert line.startswith(
        "skipped: conv: the channels that the trigger changes most give the same"
    )


def test_bec_is_relative_to_the_least_similar_model() -> None:
    """(0.8 - 0.6) / (1 - 0.6) = 0.5."""
    bec = similarity.backdoor_existence({"a": 0.8, "b": 0.6})
    assert bec == {"a": pytest.approx(0.5), "b": 0}
    assert similarity.backdoor_existence({"a": 1.0}) == {"a": None}
    assert similarity.backdoor_existence({"a": 0.9}) == {"a": None}  # nothing to compare it with
    assert similarity.backdoor_existence({}) == {}


@pytest.mark.parametrize("seed", range(10))
def test_a_model_that_nothing_has_changed_has_no_bec(seed: int) -> None:
    """CKA of a matrix with itself is 1 up to rounding, now a little less, now a little more."""
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
    same = similarity.cka(similarity.gram(features), similarity.gram(features))
    bec = similarity.backdoor_existence({"a": same, "b": 1.0, "c": 1 - 1e-14})
    assert bec == {"a": None, "b": None, "c": None}


def test_the_convolutions_inside_the_blocks() -> None:
    """PreAct-ResNet18 has two in each of eight blocks; its first one and shortcuts do not count."""
    names = similarity.compared_layers(build_model("preactresnet18", 10))
    assert len(names) == 16
    assert names[0] == "layer1.0.conv1"
    assert similarity.compared_layers(build_model("tiny", 10)) == ["conv"]


def test_channels_that_the_trigger_changes() -> None:
    """A convolution that copies red, blue and green, of which the trigger moves red and blue.

    Red rises by 51 / 255 in one of two pixels and falls by as much in the other one: 0.2. Blue
    falls by 51 / 255 in one pixel of two of the images, and rises in that of the third: 0.1.
    """
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    model[0].weight.data = torch.eye(3)[[0, 2, 1]].view(3, 3, 1, 1)
    clean = torch.full((3, 3, 1, 2), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[:, 0, 0] = torch.tensor([151, 49])
    triggered[:, 2, 0, 0] = torch.tensor([49, 49, 151])
    change = similarity.changes(model, ["0"], clean, triggered, size=2)["0"]
    assert change.tolist() == pytest.approx([0.2, 0.1, 0])
    assert similarity.top_channels(change, 0.4).tolist() == [0]
    assert similarity.top_channels(torch.tensor([1.0, 3, 2]), 0.67).tolist() == [1, 2]
    assert similarity.top_channels(torch.tensor([1.0, 3, 2]), 0.1).tolist() == [1]


def test_convolutions_that_are_never_called_are_not_compared() -> None:
    model, images = Forked(), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    layers = similarity.compared_layers(model)
    assert layers == ["block.idle", "block.used"]
    change = similarity.changes(model, layers, images, 255 - images, size=2)
    assert list(change) == ["block.used"]


def test_the_similarity_of_a_model_is_its_mean_over_layers_of_one_share() -> None:
    """(0.25 + 0.75) / 2; neither the other share nor the layer without a number counts."""
    rows = [("a", 0.01, 0.25), ("a", 0.01, 0.75), ("a", 0.01, math.nan), ("a", 0.05, 1.0)]
    rows += [("b", 0.05, 0.5)]
    table = [{"model": name, "share": share, "cka": value} for name, share, value in rows]
    assert similarity.mean_by_model(table, 0.01) == {"a": 0.5}
    assert similarity.mean_by_model(table, 0.05) == {"a": 1.0, "b": 0.5}
