"""Whatever a caller's program has switched on: what is called from Python gives the same bits.

Each function of `sau.__all__` is an entry here, and so is each defense. A test runs every entry
in every mode, so a new function needs an entry, and nothing else.
"""

import ast
import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import defense
from models import Classifier, build_model
from tests.every_defense import module, shortened
from tests.networks import copied, differing
from tests.utils.records.test_load_defense import attack_of, saved
from utils.files import ROOT
from utils.records.defense import load_defense

State = dict[str, torch.Tensor]
Result = tuple[State, torch.Tensor]


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# What makes new tensors elsewhere, or of another type; then the caller's other modes.
DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # stands for a GPU
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **DEFAULTS,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Dropping(nn.Module):
    """Two convolutions, dropout and a head; other threads get a chance in each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0)
        x = self.two(self.norm(self.one(images)).relu())
        x = nn.functional.max_pool2d(self.other(x).relu(), 2).flatten(1)
        return self.head(nn.functional.dropout(x, 0.3, self.training))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Dropping()


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.rand(24, 3, 8, 8, generator=source), torch.arange(24) % 4


def purified(name: str, model: nn.Module) -> State:
    config = shortened(name, model, n_rounds=1, batch_size=8)
    result: State = module(name).purify(model, *problem(), config).state_dict()
    return result


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a defense's result."""
    torch.manual_seed(0)
    model = build_model("tiny", 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    folder: Path = saved(tmp_path_factory.mktemp("record") / "anp", model, attack_of(model))
    return folder


def built(_: Path) -> State:
    torch.manual_seed(0)
    return build_model("tiny", 3).state_dict()


# By the name in `sau.__all__`. What is prepared beforehand is not in the caller's mode.
ENTRIES: dict[str, Callable[[Path], Any]] = {
    "Config": lambda _: module("sau").Config.load("digits").dump(),
    "build_model": built,
    "load_defense": lambda folder: load_defense(folder).state_dict(),
}


def test_every_function_of_the_package_is_an_entry() -> None:
    tree = ast.parse((ROOT / "sau/__init__.py").read_text(encoding="utf-8"))
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert {*ENTRIES, "purify", "UserError"} == set(listed)  # purify: below, of each defense


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", defense.names())
def test_a_defense_gives_the_same_in_every_mode(name: str, mode: str) -> None:
    model, (images, labels) = network(), problem()
    config = shortened(name, model, n_rounds=1, batch_size=8)
    expected = purified(name, model)
    with MODES[mode]():
        if mode not in DEFAULTS:
            images = images.clone()  # as the mode makes them
        found = module(name).purify(model, images, labels, config)
    assert differing(found.state_dict(), expected) == []
    assert not any(value.is_inference() for value in found.state_dict().values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_gives_the_same_in_every_mode(name: str, mode: str, result: Path) -> None:
    entry = ENTRIES[name]
    expected = entry(result)
    with MODES[mode]():
        found = entry(result)
    if name == "build_model" and mode in DEFAULTS:  # as torch's own layers
        with MODES[mode]():
            layer = nn.Linear(1, 1)
        weight = found["network.linear.weight"]
        assert (weight.dtype, weight.device) == (layer.weight.dtype, layer.weight.device)
    elif isinstance(expected, str):
        assert found == expected
    else:
        assert differing(found, expected) == []
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}


def test_a_model_that_is_loaded_in_a_mode_can_be_trained(result: Path) -> None:
    with torch.inference_mode():
        model = load_defense(result)
    assert isinstance(model, Classifier)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    assert next(model.parameters()).grad is not None


def test_threads_do_not_change_what_others_compute(result: Path) -> None:
    """Nor the caller's generators, which are the process's."""
    model = network()
    expected, loaded = copied(purified("ft", model)), load_defense(result).state_dict()
    before = torch.get_rng_state()
    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            purifying = [pool.submit(purified, "ft", one) for one in [model, *copies(model, 3)]]
            loading = [pool.submit(load_defense, result) for _ in range(8)]
        assert [differing(work.result(), expected) for work in purifying] == [[]] * 4
        assert [differing(w.result().state_dict(), loaded) for w in loading] == [[]] * 8
        assert torch.equal(torch.get_rng_state(), before)


def test_what_is_built_meanwhile_takes_no_draws_of_a_defense() -> None:
    model = network()
    expected = copied(purified("ft", model))
    with ThreadPoolExecutor(2) as pool:
        purifying = pool.submit(purified, "ft", model)
        while not purifying.done():
            build_model("tiny", 3)
    assert differing(purifying.result(), expected) == []


def copies(model: nn.Module, count: int) -> list[nn.Module]:
    return [copy.deepcopy(model) for _ in range(count)]
