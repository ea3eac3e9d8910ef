"""A checkpoint's state is put only into objects that could have kept it."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.process.seeds import Draws, generator, random_states
from utils.tensors import load_tensors
from utils.training.findings import Findings, Picture, Verdict
from utils.training.loop import Loop
from utils.training.sgd import Scheduler
from utils.training.state import _require_names, device_of, restore, restore_random, state_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-4),
    "fused sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, fused=True),
    "plain sgd": lambda weights: torch.optim.SGD(weights, 0.1),
    "adam": lambda weights: torch.optim.Adam(weights, 1e-3),
    "fused adam": lambda weights: torch.optim.Adam(weights, 1e-3, fused=True, amsgrad=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, 1e-3),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, 1e-3, momentum=0.9),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, 1e-3),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def trained(
    make: Callable[[Any], torch.optim.Optimizer],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after two steps; one of its weights never gets a gradient."""
    model = network()
    model[3].bias.requires_grad_(False)
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(5, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_s_state_comes_back(name: str) -> None:
    _, before = trained(OPTIMIZERS[name])
    kept = copy.deepcopy(before.state_dict())
    after = OPTIMIZERS[name](network().parameters())
    restore("optimizer", after, kept)
    found = after.state_dict()
    assert found["param_groups"] == kept["param_groups"]
    assert found["state"].keys() == kept["state"].keys()
    for place, entries in kept["state"].items():
        for key, value in entries.items():
            same = found["state"][place][key]
            assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value


def first_tensor(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    entries = state["state"][0]
    return entries, next(key for key, value in entries.items() if value.dim() > 0)


def change_tensor(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        entries, key = first_tensor(state)
        entries[key] = change(entries[key])

    return apply


def put_group(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["param_groups"][0].update({key: value})


HOSTILE_OPTIMIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "one value": change_tensor(lambda value: value.flatten()[:1].clone()),
    "no value": change_tensor(lambda value: value.flatten()[:0].clone()),
    "a scalar": change_tensor(lambda value: value.flatten()[0]),
    "another shape": change_tensor(lambda value: value.transpose(0, 1)),
    "doubles": change_tensor(torch.Tensor.double),
    "integers": change_tensor(torch.Tensor.int),
    "not finite": change_tensor(lambda value: value * math.nan),
    "a list": change_tensor(torch.Tensor.tolist),
    "nothing": change_tensor(lambda value: None),
    "a missing entry": lambda state: first_tensor(state)[0].pop(first_tensor(state)[1]),
    "one more entry": lambda state: state["state"][0].update(other=torch.zeros(1)),
    "a state of no weight": lambda state: state["state"].update({99: state["state"][0]}),
    "a state by a text": lambda state: state["state"].update({"0": {}}),
    "a state of another weight": lambda state: state["state"].update({0: state["state"][1]}),
    "no entries": lambda state: state["state"].update({0: 3}),
    "no states": lambda state: state.update(state=[]),
    "no groups": lambda state: state.update(param_groups=[]),
    "two groups": lambda state: state["param_groups"].append(state["param_groups"][0]),
    "one more part": lambda state: state.update(more=1),
    "a rate of text": put_group("lr", "0.1"),
    "a rate that is none": put_group("lr", math.nan),
    "a rate without end": put_group("lr", math.inf),
    "a negative rate": put_group("lr", -0.1),
    "a rate that is a tensor": put_group("lr", torch.tensor(0.1)),
    "a true rate": put_group("lr", True),
    "other weights": put_group("params", [0, 1]),
    "weights twice": put_group("params", [0, 0, 2, 3, 4, 5]),
    "another decay": put_group("weight_decay", 0.5),
    "another kind of step": put_group("maximize", True),
    "a foreign setting": put_group("hook", "x"),
    "a missing setting": lambda state: state["param_groups"][0].pop("weight_decay"),
}


@pytest.mark.parametrize("change", HOSTILE_OPTIMIZERS)
@pytest.mark.parametrize("name", ["sgd", "fused sgd", "adam", "fused adam"])
def test_another_state_is_refused_before_it_is_loaded(name: str, change: str) -> None:
    _, before = trained(OPTIMIZERS[name])
    kept = copy.deepcopy(before.state_dict())
    HOSTILE_OPTIMIZERS[change](kept)
    model = network()
    after = OPTIMIZERS[name](model.parameters())
    with pytest.raises(ValueError, match=r"^optimizer"):
        restore("optimizer", after, kept)
    assert not after.state
    assert after.param_groups[0]["lr"] == before.param_groups[0]["lr"]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e30])
def test_a_number_of_steps_is_one(value: float) -> None:
    _, before = trained(OPTIMIZERS["adam"])
    kept = copy.deepcopy(before.state_dict())
    kept["state"][0]["step"].fill_(value)
    with pytest.raises(ValueError, match="weight 0: step"):
        restore("optimizer", OPTIMIZERS["adam"](network().parameters()), kept)


def test_a_scheduler_s_rate_goes_on() -> None:
    for schedule in ("cosine", "one_cycle", "reduce_on_plateau"):
        _, optimizer = trained(OPTIMIZERS["sgd"])
        before = Scheduler(optimizer, schedule, 5, 2)
        for _ in range(3):
            before.after_step()
        before.after_epoch(1.0)
        other = Scheduler(trained(OPTIMIZERS["sgd"])[1], schedule, 5, 2)
        other.load_state_dict(copy.deepcopy(before.state_dict()))
        assert other.state_dict() == before.state_dict()


@pytest.mark.parametrize("schedule", ["cosine", "reduce_on_plateau"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", None),
        ("step", "x"),
        ("get_last_lr", 1),
        ("last_epoch", "1"),
        ("last_epoch", math.nan),
        ("last_epoch", True),
        ("last_epoch", [1, 2]),
        ("_last_lr", 3),
        ("_last_lr", []),
        ("_last_lr", [0.1, 0.1]),
        ("_last_lr", ["a"]),
        (3, 3),
    ],
)
def test_a_scheduler_takes_no_other_attributes(schedule: Any, name: Any, value: Any) -> None:
    _, optimizer = trained(OPTIMIZERS["sgd"])
    scheduler = Scheduler(optimizer, schedule, 5, 2)
    kept = scheduler.state_dict() | {name: value}
    if (name == "_last_lr" and value == 3) or (name == "last_epoch" and isinstance(value, list)):
        kept = scheduler.state_dict() | {name: value if isinstance(value, list) else [value, value]}
    with pytest.raises(ValueError, match=r"^scheduler"):
        scheduler.load_state_dict(kept)


def test_a_scheduler_s_constants_stay(tmp_path: Path) -> None:
    _, optimizer = trained(OPTIMIZERS["sgd"])
    scheduler = Scheduler(optimizer, "cosine", 5, 2)
    kept = scheduler.state_dict()
    for name, value in (("base_lrs", [5.0]), ("lr_lambdas", ["x"])):
        with pytest.raises(ValueError, match=f"{name} is not that of this run"):
            scheduler.load_state_dict(kept | {name: value})
    plateau = Scheduler(optimizer, "reduce_on_plateau", 5, 2)
    with pytest.raises(ValueError, match="patience is not that of this run"):
        plateau.load_state_dict(plateau.state_dict() | {"patience": 0})


class Following(nn.Linear):
    """Follows its inputs in a buffer that is in no state dict, and has a cache of its calls."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + x.mean(0)
        self.table = torch.full((len(x),), math.nan)
        return super().forward(x - self.mean)


def test_a_module_s_buffers_outside_its_state_dict_come_back() -> None:
    """In place where there is one; the cache of NaN is as it was."""
    before, after = (nn.Sequential(Following()) for _ in range(2))
    before(torch.rand(2, 3))
    kept, mean = state_of("model", before), after[0].mean
    restore("model", after, copy.deepcopy(kept))
    assert after[0].mean is mean
    assert torch.equal(mean, before[0].mean)
    assert mean.sum() > 0
    assert torch.equal(after[0].weight, before[0].weight)
    assert after[0].table.isnan().tolist() == [True, True]
    x = torch.rand(4, 3)
    assert torch.equal(after(x), before(x))


def test_a_checkpoint_of_earlier_versions_has_only_the_state_dict() -> None:
    before, after = (nn.Sequential(Following()) for _ in range(2))
    before(torch.rand(2, 3))
    restore("model", after, before.state_dict())
    assert torch.equal(after[0].weight, before[0].weight)
    assert after[0].mean.tolist() == [0, 0, 0]


OUTSIDE = "outside the state dict"
HOSTILE_BUFFERS: dict[str, Any] = {
    "none": None,
    "a list": [("0.mean", torch.zeros(3))],
    "a text": {"0.mean": "x"},
    "another type": {"0.mean": torch.zeros(3, dtype=torch.int64)},
    "a weight": {"0.weight": torch.zeros(3, 3)},
    "a method": {"0.forward": torch.zeros(3)},
    "another module": {"1.mean": torch.zeros(3)},
    "a number": {3: torch.zeros(3)},
    "no name": {"0.": torch.zeros(3)},
}


@pytest.mark.parametrize("buffers", HOSTILE_BUFFERS)
def test_a_module_takes_buffers_of_its_own_alone(buffers: str) -> None:
    model = nn.Sequential(Following())
    state = {**model.state_dict(), OUTSIDE: HOSTILE_BUFFERS[buffers]}
    with pytest.raises(ValueError, match=r"^model"):
        restore("model", model, state)
    assert model[0].mean.tolist() == [0, 0, 0]


HOSTILE_MODULES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a missing weight": lambda state: state.pop("0.weight"),
    "one more weight": lambda state: state.update(other=torch.zeros(1)),
    "another shape": lambda state: state.update({"0.bias": torch.zeros(5)}),
    "one value": lambda state: state.update({"0.weight": torch.zeros(1)}),
    "another type": lambda state: state.update({"0.bias": torch.zeros(4, dtype=torch.int64)}),
    "doubles": lambda state: state.update({"0.bias": torch.zeros(4, dtype=torch.float64)}),
    "not finite": lambda state: state["0.bias"].fill_(math.inf),
    "a number": lambda state: state.update({"0.bias": 3}),
    "a text": lambda state: state.update({"0.bias": "x"}),
}


@pytest.mark.parametrize("change", HOSTILE_MODULES)
def test_a_module_takes_its_own_weights_alone(change: str) -> None:
    model = network()
    kept = copy.deepcopy(dict(model.state_dict()))
    HOSTILE_MODULES[change](kept)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model"):
        restore("model", model, kept)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "state", [torch.zeros(1), torch.zeros(2, 3).int(), torch.full((2, 3), math.nan), [1], None, "x"]
)
def test_a_tensor_takes_another_of_its_kind_alone(state: Any) -> None:
    value = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^delta"):
        restore("delta", value, state)
    assert (value == 1).all()


@pytest.mark.parametrize(
    "state", [{"a": [1]}, {"a": torch.zeros(2).int()}, {"a": torch.tensor(math.nan)}, [1], {(): 1}]
)
def test_a_dictionary_takes_tensors_alone(state: Any) -> None:
    value = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=r"^masks"):
        restore("masks", value, state)
    assert torch.equal(value["a"], torch.ones(2))


def test_a_method_s_own_tensors_may_hold_infinities() -> None:
    """NC keeps the smallest norm so far, which is infinite before there is one."""
    kept = {"best": torch.tensor([math.inf, -math.inf])}
    value = {"best": torch.zeros(2)}
    restore("theta", value, kept)
    assert value["best"].tolist() == [math.inf, -math.inf]
    single = torch.zeros(2)
    restore("best", single, kept["best"])
    assert single.tolist() == [math.inf, -math.inf]


def test_a_dictionary_may_have_got_other_entries() -> None:
    value = {"a": torch.ones(2), "b": torch.ones(1)}
    restore("masks", value, {"a": torch.zeros(2), "c": torch.zeros(3)})
    assert {name: tensor.tolist() for name, tensor in value.items()} == {"a": [0, 0], "c": [0] * 3}


@pytest.mark.parametrize("state", [torch.zeros(3), torch.zeros(5056, dtype=torch.uint8), None, "x"])
def test_a_generator_takes_a_state_of_its_own_alone(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^order"):
        restore("order", generator(0, "x"), state)


class Two(Draws):
    """An object of two generators."""

    def __init__(self) -> None:
        self.a, self.b = generator(0, "a"), generator(0, "b")


def test_an_object_s_generators_have_its_names() -> None:
    step = Two()
    kept = state_of("step", step)
    restore("step", Two(), kept)
    for other in ({"a": kept["a"]}, kept | {"c": kept["a"]}, {}):
        with pytest.raises(ValueError, match="other names"):
            restore("step", Two(), other)


@pytest.mark.parametrize(
    ("value", "said"), [({"a": 1}, "['b']"), ({"a": 1, "b": 2, "c": 3}, "['c']"), (7, "7")]
)
def test_odd_names_are_said(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x: has other names ({said})")):
        _require_names("x", {"a": 1, "b": 2}, value)


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda states: states.update({name: change(states[name])})


HOSTILE_RANDOM: dict[str, Callable[[dict[str, Any]], object]] = {
    "torch cut": put("torch", lambda state: state[:9]),
    "torch floats": put("torch", torch.Tensor.float),
    "torch zeros": put("torch", torch.zeros_like),
    "python version": put("python", lambda state: (2, *state[1:])),
    "python cut": put("python", lambda state: (3, state[1][:9], None)),
    "python place": put("python", lambda state: (3, (*state[1][:-1], 625), None)),
    "python large": put("python", lambda state: (3, (1 << 40, *state[1][1:]), None)),
    "python negative": put("python", lambda state: (3, (-1, *state[1][1:]), None)),
    "python text": put("python", lambda state: "abc"),
    "python gauss": put("python", lambda state: (*state[:2], "x")),
    "numpy place": put("numpy", lambda state: [state[0], 10**6, *state[2:]]),
    "numpy negative place": put("numpy", lambda state: [state[0], -1, *state[2:]]),
    "numpy cut": put("numpy", lambda state: [state[0][:9], *state[1:]]),
    "numpy floats": put("numpy", lambda state: [state[0].float(), *state[1:]]),
    "numpy negative": put("numpy", lambda state: [state[0] - (1 << 33), *state[1:]]),
    "numpy flag": put("numpy", lambda state: [*state[:2], 7, state[3]]),
    "numpy gauss": put("numpy", lambda state: [*state[:3], None]),
    "numpy short": put("numpy", lambda state: state[:2]),
    "no numpy": lambda states: states.pop("numpy"),
}


@pytest.mark.parametrize("change", HOSTILE_RANDOM)
def test_global_generators_take_states_of_their_own_alone(change: str) -> None:
    states = random_states()
    restore_random(states)
    HOSTILE_RANDOM[change](states)
    with pytest.raises(ValueError, match="generator"):
        restore_random(states)
    restore_random(random_states())


# --- the loop's own part ------------------------------------------------------------------------


def snapshot(path: Path) -> dict[str, Any]:
    """After the second batch of two rounds."""
    kept: list[dict[str, Any]] = []

    def after_batch(_: int) -> None:
        if loop.position == (1, 2):
            torch.save(loop.snapshot(), path)

    loop = Loop(after_batch=after_batch)
    run(loop)
    kept.append(load_tensors(path))
    return kept[0]


def run(loop: Loop) -> None:
    weight = torch.zeros(3)
    order = generator(0, "order")
    loop.findings.say("found", size=3)
    for _ in loop.rounds(2, weight=weight, order=order):
        for _index in loop.batches(6, 2, order):
            weight += 1
            loop.log(2, loss=weight.sum())


HOSTILE_LOOPS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another phase": put("phase", lambda _: "teacher"),
    "no phase": put("phase", lambda _: None),
    "round 0": put("round", lambda _: 0),
    "round 3": put("round", lambda _: 3),
    "round 1.0": put("round", float),
    "a true round": put("round", bool),
    "batch -1": put("batch", lambda _: -1),
    "a batch of text": put("batch", str),
    "no batch": lambda kept: kept.pop("batch"),
    "images -1": put("images", lambda _: -1),
    "sums of text": put("sums", lambda _: {"loss": "x"}),
    "sums of rows": put("sums", lambda _: {"loss": torch.zeros(2)}),
    "a loss of another name": put("sums", lambda _: {"lo\x1bss": torch.zeros(())}),
    "no sums": put("sums", lambda _: 3),
    "an order that is none": put("order", lambda _: torch.zeros(3)),
    "no order": put("order_after", lambda _: None),
    "an object too much": lambda kept: kept["objects"].update(more=torch.zeros(3)),
    "an object too few": lambda kept: kept["objects"].pop("weight"),
    "objects of another kind": put("objects", lambda _: [1]),
    "another weight": lambda kept: kept["objects"].update(weight=torch.zeros(4)),
    "no random states": put("random", lambda _: {}),
    "no findings": put("findings", lambda _: None),
    "phases of another kind": put("done", lambda _: [1]),
    "a fact that is a tensor": lambda kept: kept["findings"]["facts"].update(a=torch.zeros(1)),
    "a fact's name": lambda kept: kept["findings"]["facts"].update({"../x": 1}),
    "a warning that is none": lambda kept: kept["findings"].update(warnings=[3]),
    "warnings of text": lambda kept: kept["findings"].update(warnings="abc"),
    "a table of another name": lambda kept: kept["findings"]["tables"].update({"../x": []}),
    "a table of tensors": lambda kept: kept["findings"]["tables"].update(x=[{"a": torch.zeros(1)}]),
    "a table of numbers": lambda kept: kept["findings"]["tables"].update(x=[1]),
    "a verdict of text": lambda kept: kept["findings"].update(verdict="yes"),
    "a verdict of other names": lambda kept: kept["findings"].update(verdict={"a": 1}),
    "a verdict of classes": lambda kept: kept["findings"].update(
        verdict={"is_backdoored": True, "targets": (-1,), "suspicion": ()}
    ),
    "a picture of another name": lambda kept: kept["findings"]["pictures"].update(
        {"a/b": kept["findings"]["pictures"]}
    ),
    "a picture of numbers": lambda kept: kept["findings"]["pictures"].update(x=3),
}


@pytest.mark.parametrize("change", HOSTILE_LOOPS)
def test_a_loop_takes_its_own_snapshot_alone(tmp_path: Path, change: str) -> None:
    kept = snapshot(tmp_path / "x.pt")
    run(Loop(resume=copy.deepcopy(kept)))
    HOSTILE_LOOPS[change](kept)
    with pytest.raises(UserError, match=r"^--resume: the checkpoint is not of this run \("):
        run(Loop(resume=kept))


def picture(**changes: Any) -> dict[str, Any]:
    rows = {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 3, 4, 4)}
    kept = {
        "title": "t",
        "rows": rows,
        "captions": {"a": ["x", "y"]},
        "is_labelled": True,
        "is_compared": False,
    }
    return kept | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": {}},
        {"rows": {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(1, 3, 4, 4)}},
        {"rows": {"a": torch.zeros(2, 3, 4)}},
        {"rows": {"a": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}},
        {"rows": {"a": torch.full((2, 3, 4, 4), math.nan)}},
        {"rows": {"a": torch.zeros(0, 3, 4, 4)}},
        {"rows": {"a": [1]}},
        {"captions": {"a": ["x"]}},
        {"captions": {"a": [1, 2]}},
        {"title": 3},
        {"is_labelled": "x"},
        {"more": 3},
    ],
)
def test_a_picture_s_rows_are_images(changes: dict[str, Any]) -> None:
    state = Findings().state_dict() | {"pictures": {"x": picture()}}
    Findings().load_state_dict(state)
    with pytest.raises((ValueError, TypeError)):
        Findings().load_state_dict(state | {"pictures": {"x": picture(**changes)}})


def test_findings_come_back_whole() -> None:
    findings = Findings()
    findings.say("x", size=3, name="a\udcff", nested={"a": [1, None, 1.5, {"b": True}]})
    findings.warn("class \udcff")
    findings.tables["levels"] = [{"level": 0.5, "acc": 1, "name": "x", "is_best": None}]
    findings.verdict = Verdict(True, (1,), (0.5, 3.0))
    findings.pictures["p"] = Picture("t", {"a": torch.zeros(2, 3, 4, 4)}, {"a": ["", "y"]})
    other = Findings()
    other.load_state_dict(findings.state_dict())
    assert (other.facts, other.warnings, other.tables, other.verdict) == (
        findings.facts,
        findings.warnings,
        findings.tables,
        findings.verdict,
    )
    assert isinstance(other.pictures["p"], Picture)
    assert other.pictures["p"].captions == {"a": ["", "y"]}


def test_the_device_of_a_state_is_that_of_its_first_tensor() -> None:
    """In a module or a dictionary, too; what has none is passed over."""
    meta = torch.zeros(1, device="meta")
    for value in (meta, {"mask": meta}, nn.Linear(1, 1, device="meta")):
        state = {
            "order": torch.Generator(),
            "empty": {},
            "none": nn.Identity(),
            "it": value,
            "cpu": torch.ones(1),
        }
        assert device_of(state) == torch.device("meta")
    assert device_of({"order": torch.Generator()}) == torch.device("cpu")
