"""Distances of weights by hand; `analysis/weights.py`."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from analysis import weights
from analysis.base import Results
from models import build_model


def test_distances_of_weights() -> None:
    """From (3, 4) to (3, 9): 5 of 5. Channels: (3,) stays, (4,) moves by 5."""
    before, after = torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [9.0]])
    assert weights.distance([before], [after]) == 1
    assert weights.distance([before, torch.zeros(1)], [before, torch.zeros(1)]) == 0
    assert weights.channel_distances(before, after).tolist() == [0, 1.25]
    assert list(weights.layers_of(build_model("tiny", 3))) == ["conv", "bn", "linear"]


def test_complex_weights_move_in_both_directions() -> None:
    """From 3 to 3 + 3j, of length 3."""
    moved = []
    for end in (3 + 0j, 3 + 3j):
        model = nn.Module()
        model.w = nn.Parameter(torch.tensor([end]))
        moved.append(weights.layers_of(model)[""])
    assert weights.distance(*moved) == 1


@pytest.mark.parametrize("name", ["conv", "bn", "linear"])
def test_a_layer_that_was_0_is_not_the_farthest(name: str) -> None:
    """Its distance is no number. Of the others, the weights of one are doubled."""
    torch.manual_seed(0)
    model = build_model("tiny", 3)
    moved = {"conv": "bn", "bn": "linear", "linear": "conv"}[name]
    for weight in model.network.get_submodule(name).parameters():
        weight.data.zero_()
    purified = copy.deepcopy(model)
    for weight in purified.network.get_submodule(moved).parameters():
        weight.data *= 2
    subject = SimpleNamespace(
        model=model,
        purified=[SimpleNamespace(name="ft")],
        same_network=lambda *_: purified,
    )
    results = Results()
    weights.look(subject, weights.Config.load(), results)
    assert results.headline["ft"]["farthest_layer"] == moved
    assert results.conclusion[0].endswith(f"most in {moved} (100.0 %)")


def test_of_weights_that_have_not_moved_none_has_moved_most() -> None:
    """As of a defense that has found nothing to prune."""
    model = build_model("tiny", 3)
    subject = SimpleNamespace(
        model=model,
        purified=[SimpleNamespace(name="clp")],
        same_network=lambda *_: copy.deepcopy(model),
    )
    results = Results()
    weights.look(subject, weights.Config.load(), results)
    assert results.headline["clp"] == {"distance": 0, "farthest_layer": None}
    assert results.conclusion == ["clp: no weight has moved"]
