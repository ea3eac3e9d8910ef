"""The example in the docstring of every method runs, as `python -m doctest` would run it.

Examples name what users have: `images` and `labels`, `indices` of images, a `model`, a `patch`.
"""

import doctest
import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import attack
import defense
from tests.networks import conv_net

ATTACKED = {
    "images": torch.arange(2 * 3 * 32 * 32).remainder(199).to(torch.uint8).view(2, 3, 32, 32),
    "indices": torch.tensor([0, 1]),
    "patch": torch.full((3, 32, 32), 255, dtype=torch.uint8),
}


def results(module: ModuleType, given: dict[str, Any]) -> dict[str, Any]:
    """The names that the one example of a module defines; it must be two lines that all work."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    docstrings = finder.find(module, module.__name__, extraglobs=given)
    (example,) = (found for found in docstrings if found.examples)
    assert len(example.examples) == 2
    assert example.docstring is not None
    assert "Example:\n" in example.docstring
    said: list[str] = []
    outcome = doctest.DocTestRunner().run(example, out=said.append, clear_globs=False)
    assert outcome.failed == 0, "".join(said)
    return example.globs


@pytest.mark.parametrize("name", attack.names())
def test_the_example_of_an_attack_gives_as_many_images(name: str) -> None:
    triggered = results(importlib.import_module(f"attack.{name}"), dict(ATTACKED))["triggered"]
    assert triggered.shape == ATTACKED["images"].shape


@pytest.mark.slow
@pytest.mark.parametrize("name", defense.names())
def test_the_example_of_a_defense_gives_another_model(name: str) -> None:
    torch.manual_seed(0)
    model = conv_net().float()
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    module = importlib.import_module(f"defense.{name}")
    given = {"model": model, "images": images, "labels": labels}
    purified = results(module, given)["purified"]
    assert isinstance(purified, nn.Module)
    assert purified is not model
    assert purified(images).shape == (40, 4)


def test_an_example_that_rots_is_noticed() -> None:
    module = ModuleType("rotten", "Example:\n    >>> a = 1\n    >>> b = gone(a)\n")
    with pytest.raises(AssertionError, match="name 'gone' is not defined"):
        results(module, {})
