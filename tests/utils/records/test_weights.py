"""Checkpoints of other programs: wrappers, prefixes, missing counts, and what is left over."""

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import Classifier
from utils.errors import UserError
from utils.records.weights import WRAPPERS, fill, read_state_dict


class Net(nn.Module):
    """A convolution, BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)


def model() -> Classifier:
    return Classifier(Net(), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def good() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    network = Net()
    network.bn.num_batches_tracked.fill_(7)
    return dict(network.state_dict())


def filled(path: Path, content: Any) -> Classifier:
    torch.save(content, path)
    made = model()
    fill(made, read_state_dict(path), "net")
    return made


def assert_same(made: Classifier, good: dict[str, torch.Tensor]) -> None:
    for name, value in made.network.state_dict().items():
        assert torch.equal(value, good[name])


PREFIXES = [
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."),
    *("model.", "net.", "ema.", "model.module.", "model._orig_mod.", "module.model.", "a.b.c."),
    "backbone._orig_mod.module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_taken_off(tmp_path: Path, good: dict[str, torch.Tensor], prefix: str) -> None:
    content = {f"{prefix}{name}": value for name, value in good.items()}
    assert_same(filled(tmp_path / "x.pt", content), good)


class Around(nn.Module):
    """A network under a name that torch gives, too, and a weight beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.scale = Net(), nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize(
    "build",
    [
        Around,
        lambda: nn.DataParallel(Net()),
        lambda: nn.DataParallel(Around()),
        lambda: torch.compile(Net()),
        lambda: nn.Sequential(torch.compile(Net())),
    ],
)
def test_a_network_takes_its_own_names_also_if_they_are_torch_s(
    tmp_path: Path, build: Callable[[], nn.Module], prefix: str
) -> None:
    good = build()
    content = {f"{prefix}{name}": value for name, value in good.state_dict().items()}
    torch.save(content, tmp_path / "x.pt")
    made = Classifier(build(), (0.0,) * 3, (1.0,) * 3)
    fill(made, read_state_dict(tmp_path / "x.pt"), "net")
    assert_same(made, good.state_dict())


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_network_takes_the_names_of_what_it_is_made_around(
    tmp_path: Path, good: dict[str, torch.Tensor], wrap: Callable[[nn.Module], Any], prefix: str
) -> None:
    torch.save({f"{prefix}{name}": value for name, value in good.items()}, tmp_path / "x.pt")
    inside = Net()
    fill(
        Classifier(wrap(inside), (0.0,) * 3, (1.0,) * 3), read_state_dict(tmp_path / "x.pt"), "net"
    )
    for name, value in inside.state_dict().items():
        assert torch.equal(value, good[name])


def test_a_compiled_part_keeps_its_place(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    content = {
        name.replace("bn.", "bn._orig_mod.").replace("head.", "head._orig_mod."): value
        for name, value in good.items()
    }
    assert_same(filled(tmp_path / "x.pt", content), good)


def test_a_prefix_of_a_framework_is_said(
    tmp_path: Path, good: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Lightning puts the weights under the model's attribute, beside those of a loss."""
    content = {f"model.{name}": value for name, value in good.items()}
    content["criterion.weight"] = torch.ones(3)
    with caplog.at_level(logging.INFO, logger="sau"):
        assert_same(filled(tmp_path / "x.pt", {"state_dict": content, "epoch": 3}), good)
    assert caplog.messages == [
        "the weights are those under 'model.'; skipped beside them: criterion.weight"
    ]


def test_an_averaged_model_is_read(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    """torch.optim.swa_utils keeps a count beside the weights."""
    torch.manual_seed(1)
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    averaged.module.load_state_dict(good)
    state = averaged.state_dict()
    assert "n_averaged" in state
    with pytest.raises(UserError, match="n_averaged is not in the network"):
        filled(tmp_path / "x.pt", {**state, **{"other": torch.ones(1)}})
    content = {f"ema.{name}": value for name, value in state.items()}
    assert_same(filled(tmp_path / "x.pt", content), good)


def test_weights_that_are_there_twice_are_refused(
    tmp_path: Path, good: dict[str, torch.Tensor]
) -> None:
    content = {f"{prefix}{n}": v for prefix in ("model.", "ema.") for n, v in good.items()}
    with pytest.raises(UserError, match=r"all weights 2 times, under model\., ema\.; give"):
        filled(tmp_path / "x.pt", content)


def other(good: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that are near to others, as an average is."""
    return {name: value + 1 for name, value in good.items()}


@pytest.mark.parametrize(
    ("wrap", "places"),
    [
        (lambda one, two: {"model": one, "ema": two}, r"model\., ema\."),
        (lambda one, two: {"state_dict": one, "net": two}, r"state_dict\., net\."),
        (lambda one, two: {"net": two, "state_dict": one}, r"state_dict\., net\."),
        (lambda one, two: {"model": one, "teacher": two}, r"model\., teacher\."),
        (lambda one, two: {"state_dict": {"model": one, "ema": two}}, r"state_dict\.model\., st"),
        (lambda one, two: {"model": one, "ema": {"net": two, "decay": 0.9}}, r"model\., ema\.net"),
        (
            lambda one, two: {
                "state_dict": {f"model.{name}": value for name, value in one.items()},
                "ema": {f"module.{name}": value for name, value in two.items()},
            },
            r"state_dict\.model\., ema\.module\.",
        ),
        (
            lambda one, two: {
                "state_dict": {f"model.{name}": value for name, value in one.items()},
                "average": {f"net.{name}": value for name, value in two.items()},
            },
            r"state_dict\.model\., average\.net\.",
        ),
        (
            lambda one, two: {
                "model": {f"module.{name}": value for name, value in one.items()} | COUNTED,
                "ema": two,
            },
            r"model\.module\., ema\.",
        ),
    ],
)
def test_different_weights_in_two_places_are_refused(
    tmp_path: Path,
    good: dict[str, torch.Tensor],
    wrap: Callable[[dict, dict], dict],
    places: str,
) -> None:
    with pytest.raises(UserError, match=rf"has all weights 2 times, under {places}.*; give a file"):
        filled(tmp_path / "x.pt", {"epoch": 3, **wrap(good, other(good))})


MORE = {"more.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "beside",
    [
        lambda two: two | MORE,  # which the first one has not
        lambda two: {n: v for n, v in two.items() if "num_batches" not in n} | MORE,
    ],
)
def test_a_second_set_may_have_more_weights_and_no_counts(
    tmp_path: Path, good: dict[str, torch.Tensor], beside: Callable[[dict], dict]
) -> None:
    with pytest.raises(UserError, match=r"has all weights 2 times, under model\., ema\.; give"):
        filled(tmp_path / "x.pt", {"model": good, "ema": beside(other(good))})


def test_a_prefix_ends_with_a_dot(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    """Layers of other names are other layers, as those of a student and a teacher."""
    content = {f"my_{name}": value for name, value in good.items()}
    with pytest.raises(UserError, match=r"conv\.weight is missing; my_conv\.weight is not in"):
        filled(tmp_path / "x.pt", content)


def test_two_sets_of_names_without_a_dot_are_refused(tmp_path: Path) -> None:
    torch.save(
        {"model": nn.Linear(2, 3).state_dict(), "ema": nn.Linear(2, 3).state_dict()},
        tmp_path / "x.pt",
    )
    with pytest.raises(UserError, match=r"has all weights 2 times, under model\., ema\.; give"):
        fill(
            Classifier(nn.Linear(2, 3), (0.0,) * 3, (1.0,) * 3),
            read_state_dict(tmp_path / "x.pt"),
            "net",
        )


COUNTED = {"n_averaged": torch.tensor(3)}


def test_what_is_beside_the_weights_and_no_second_set_is_no_hindrance(
    tmp_path: Path, good: dict[str, torch.Tensor]
) -> None:
    """The same weights again, an optimizer's state, other networks, parts of the same names."""
    named = {f"module.{name}": value.clone() for name, value in good.items()}
    optimizer = torch.optim.Adam(Net().parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for beside in (
        {"ema": named, "model": good},
        {"optimizer": optimizer.state_dict(), "scaler": {"scale": torch.ones(1)}},
        {"net": {"generator.weight": torch.ones(2)}},
        {"criterion": {"weight": torch.ones(3)}},
        {"params": {}},
    ):
        assert_same(filled(tmp_path / "x.pt", {"state_dict": good, **beside}), good)


def test_counts_of_batches_may_be_missing(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    content = {name: v for name, v in good.items() if "num_batches" not in name}
    made = filled(tmp_path / "x.pt", content)
    assert made.network.state_dict()["bn.num_batches_tracked"] == 0
    assert_same(made, good | {"bn.num_batches_tracked": torch.tensor(0)})
    assert filled(tmp_path / "x.pt", good).network.state_dict()["bn.num_batches_tracked"] == 7


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_is_found_under_the_usual_names(
    tmp_path: Path, good: dict[str, torch.Tensor], wrapper: str
) -> None:
    assert_same(filled(tmp_path / "x.pt", {"epoch": 3, wrapper: good}), good)
    assert_same(filled(tmp_path / "x.pt", {"state_dict": {wrapper: good}}), good)


BESIDE = [
    *(np.float32(0.9), np.float64(0.9), np.int32(3), np.int64(3), np.bool_(True), np.float16(1)),
    *(
        np.arange(3),
        np.zeros((2, 2), np.float32),
        np.array([True]),
        [np.int8(1)],
        {"a": np.uint8(1)},
    ),
]


@pytest.mark.parametrize("value", BESIDE, ids=repr)
def test_numpy_beside_the_weights_is_no_hindrance(
    tmp_path: Path, good: dict[str, torch.Tensor], value: Any
) -> None:
    assert_same(filled(tmp_path / "x.pt", {"state_dict": good, "best": value}), good)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (Path("x"), "pathlib."),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.array(["text"]), "text (U4)"),
        (np.array([object()]), "objects (O8)"),
    ],
)
def test_a_refusal_names_the_type_and_the_way_out(
    tmp_path: Path, good: dict[str, torch.Tensor], value: Any, named: str
) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        filled(path, {"state_dict": good, "args": value})
    first, second = (
        f'content = torch.load("{path}", weights_only=False)',
        'torch.save(content["state_dict"], "weights.pt")',
    )
    assert f"{first}; {second}" in str(caught.value)
    content: dict[str, Any] = {}
    exec(first, {"torch": torch}, content)
    torch.save(content["content"]["state_dict"], tmp_path / "weights.pt")
    made = model()
    fill(made, read_state_dict(tmp_path / "weights.pt"), "net")
    assert_same(made, good)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {f"x{n}": torch.ones(1) for n in range(500)},
        lambda state: state | {f"x{n}": torch.ones(1) for n in range(500)},
        lambda state: {f"x{n}": torch.full((1,), float("nan")) for n in range(500)},
        lambda state: {f"x{n}": "text" for n in range(500)},
        lambda state: {f"{'x' * 3000}{n}": torch.ones(1) for n in range(500)},
    ],
)
def test_a_refusal_is_short(
    tmp_path: Path, good: dict[str, torch.Tensor], change: Callable[[dict], dict]
) -> None:
    with pytest.raises(UserError, match=r"and \d+ more") as caught:
        filled(tmp_path / "x.pt", change(good))
    assert len(str(caught.value)) < 3000


def test_complex_weights_are_refused(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    content = good | {"head.bias": good["head.bias"].to(torch.complex64)}
    with pytest.raises(UserError, match=r"head\.bias is torch\.complex64, no real number") as told:
        filled(tmp_path / "x.pt", content)
    assert "instead of floats" not in str(told.value)  # one weight, one problem


def test_weights_that_are_stored_as_integers_are_refused(
    tmp_path: Path, good: dict[str, torch.Tensor]
) -> None:
    """BatchNorm's count is one, and stays one."""
    assert good["bn.num_batches_tracked"].dtype == torch.int64
    for dtype in (torch.int32, torch.int8, torch.uint8, torch.bool):
        content = good | {"head.bias": good["head.bias"].to(dtype)}
        with pytest.raises(UserError, match=rf"head\.bias is {dtype} instead of floats; give its"):
            filled(tmp_path / "x.pt", content)


def test_half_weights_are_read(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    content = {name: v.half() if v.is_floating_point() else v for name, v in good.items()}
    made = filled(tmp_path / "x.pt", content).network.state_dict()
    assert torch.equal(made["conv.weight"], good["conv.weight"].half().float())
