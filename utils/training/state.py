"""The state of a run's objects for a checkpoint, and back: checked before it is put into them.

A checkpoint may be damaged, or come from a stranger. Optimizers and schedulers of torch do not
check a state: with a momentum of another size, a fused step writes into memory that is not its own,
and a scheduler sets any attribute that a file names. So each part must be a state that this run
itself could have kept: the same names, shapes, types, and constants.
"""

import inspect
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from models.outside import buffers_outside, put_buffers
from utils.errors import shown
from utils.tensors import not_finite

# What moves while a schedule goes on; all else in a scheduler's state is constant.
_MOVING = frozenset(
    (
        *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"),
        *("best", "num_bad_epochs", "cooldown_counter"),
    )
)
_MOST_STEPS = 2.0**53  # of an optimizer
_OUTSIDE = "outside the state dict"  # under which a network's non-persistent buffers are


def state_of(name: str, value: Any) -> Any:
    """What a checkpoint keeps of an object.

    Args:
        name: of the object, for messages.
        value: a generator, a tensor, a dictionary of tensors, or an object with a `state_dict`.

    Raises:
        TypeError: if it is of another kind.
    """
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, nn.Module):
        return {**value.state_dict(), _OUTSIDE: buffers_outside(value)}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict()
    if isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values()):
        return {key: tensor.detach() for key, tensor in value.items()}
    raise TypeError(
        f"{name}: {type(value).__name__} is no state that can be kept; give what has a state_dict, "
        "a generator, a tensor, or a dictionary of tensors"
    )


@torch.no_grad()
def restore(name: str, value: Any, state: Any) -> None:
    """Puts a state from `state_of` back into the same object, or one made like it.

    Raises:
        ValueError: if the state is not of such an object.
    """
    try:
        _restore(name, value, state)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name}: {error or type(error).__name__}") from error


def _restore(name: str, value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)  # torch checks it
    elif isinstance(value, torch.Tensor):
        _require_like(name, value, state, may_be_infinite=True)
        value.copy_(state)
    elif isinstance(value, dict):
        _restore_tensors(name, value, state)
        if hasattr(value, "load_state_dict"):  # not every process starts with all of it
            value.load_state_dict(state)
    elif isinstance(value, nn.Module):
        _restore_module(name, value, state)
    elif isinstance(value, torch.optim.Optimizer):
        _check_optimizer(name, value, state)
        value.load_state_dict(state)
    elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        _check_scheduler(name, value.state_dict(), state)
        value.load_state_dict(state)
    else:
        value.load_state_dict(state)


def _restore_module(name: str, module: nn.Module, state: Any) -> None:
    """Restores weights and buffers; earlier checkpoints lack the non-persistent buffers.

    Code of the user's own may have made such a buffer in a call, or in another shape. It is a cache
    as often as it is state, so its values may be anything.
    """
    outside: Mapping[str, Any] = {}
    if isinstance(state, dict) and _OUTSIDE in state:
        state = dict(state)
        outside = state.pop(_OUTSIDE)
    expected = module.state_dict()
    _require_names(name, expected, state)
    for key, tensor in expected.items():
        _require_like(f"{name}: {key}", tensor, state[key])
    present = buffers_outside(module)
    for key, tensor in outside.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != present.get(key, tensor).dtype:
            raise ValueError(f"{name}: {shown(key, 100)} is no such buffer")
    module.load_state_dict(state)
    put_buffers(module, outside)


def _restore_tensors(name: str, value: dict[str, torch.Tensor], state: Any) -> None:
    """Restores a dictionary of tensors; rounds may have changed its entries."""
    device = device_of(value)
    if not isinstance(state, dict):
        raise ValueError(f"{name} is no dictionary")
    for key, tensor in state.items():
        if type(key) not in (str, int) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: {shown(key, 100)} is no tensor")
        if key in value and value[key].dtype != tensor.dtype:
            raise ValueError(f"{name}: {shown(key, 100)} is of {tensor.dtype}")
        _require_numbers(f"{name}: {shown(key, 100)}", tensor)
    for key in [key for key in value if key not in state]:
        del value[key]
    for key, tensor in state.items():
        if key in value and value[key].shape == tensor.shape:
            value[key].copy_(tensor)
        else:
            value[key] = tensor.to(device).clone()


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raises ValueError unless each weight's state is what this optimizer makes for such a weight.

    Learning rates may differ, since schedules change them; nothing else of a group may.
    """
    expected = optimizer.state_dict()["param_groups"]
    groups, states = state["param_groups"], state["state"]
    if not isinstance(groups, list) or not isinstance(states, dict) or len(state) != 2:
        raise ValueError(f"{name}: is no state of an optimizer")
    if len(groups) != len(expected):
        raise ValueError(f"{name}: has {len(groups)} groups of weights instead of {len(expected)}")
    places: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
    for group, now, live in zip(groups, expected, optimizer.param_groups, strict=True):
        _require_names(f"{name}: a group", now, group)
        for key, constant in now.items():
            if key == "lr":
                _require_number(f"{name}: lr", group["lr"], 0)
            elif not _is_same(group[key], constant):
                raise ValueError(f"{name}: {key} is not that of this run")
        example = _state_after_a_step(optimizer, live)
        places |= {
            place: (weight, example)
            for place, weight in zip(now["params"], live["params"], strict=True)
        }
    for place, entries in states.items():
        if place not in places or not isinstance(entries, dict):
            raise ValueError(f"{name}: has a state of weight {shown(place, 100)}, which is not")
        weight, example = places[place]
        where = f"{name}: weight {place}"
        _require_names(where, example, entries)
        for key, usual in example.items():
            if usual is None:
                if entries[key] is not None:
                    raise ValueError(f"{where}: has a {key}")
            elif usual.dim() == 0:
                _require_like(f"{where}: {key}", usual, entries[key])
                _require_number(f"{where}: {key}", entries[key].item(), 0)
            else:
                _require_like(f"{where}: {key}", weight, entries[key])


@torch.enable_grad()
def _state_after_a_step(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Any]:
    """What an optimizer of this kind keeps of a weight of two values after a step."""
    flags = inspect.signature(type(optimizer).__init__).parameters
    like = group["params"][0]
    weight = torch.zeros(2, dtype=like.dtype, device=like.device, requires_grad=True)
    settings = {key: group[key] for key in flags if key in group and key != "params"}
    other = type(optimizer)([weight], **settings)
    weight.grad = torch.zeros_like(weight)
    other.step()
    return dict(other.state[weight])


def _check_scheduler(name: str, expected: Mapping[str, Any], state: Any) -> None:
    """Raises ValueError unless the state has the scheduler's names, and constants as they are."""
    _require_names(name, expected, state)
    for key, now in expected.items():
        if key not in _MOVING:
            if not _is_same(state[key], now):
                raise ValueError(f"{name}: {key} is not that of this run")
            continue
        values, usual = (x if isinstance(x, list) else [x] for x in (state[key], now))
        if len(values) != len(usual):
            raise ValueError(f"{name}: {key} has {len(values)} values instead of {len(usual)}")
        for value, like in zip(values, usual, strict=True):
            if isinstance(like, bool) and type(value) is not bool:
                raise ValueError(f"{name}: {key} is neither true nor false")
            if not isinstance(like, bool) and not (key == "best" and value == math.inf):
                _require_number(f"{name}: {key}", value, -math.inf)


def restore_random(states: Any) -> None:
    """Puts back the states of the global generators, see `utils.process.seeds.random_states`.

    Raises:
        ValueError: if they are no such states. NumPy itself would accept a position beyond its
            memory.
    """
    try:
        torch.set_rng_state(states["torch"])  # torch checks it
        _restore_python(states["python"])
        _restore_numpy(states["numpy"])
        cuda = states["cuda"]
        if cuda and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        mps = states.get("mps")  # which earlier checkpoints lack
        if mps and torch.backends.mps.is_available():
            torch.mps.set_rng_state(mps[0])
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"random generators: {error or type(error).__name__}") from error


def _restore_python(state: Any) -> None:
    version, numbers, gauss = state
    if (
        version != 3
        or len(numbers) != 625
        or not all(type(number) is int and 0 <= number < 1 << 32 for number in numbers)
        or numbers[-1] > 624
    ):
        raise ValueError("the state of Python's generator is none")
    if gauss is not None:
        _require_number("the state of Python's generator", gauss, -math.inf)
    random.setstate((3, tuple(numbers), gauss))


def _restore_numpy(state: Any) -> None:
    keys, position, has_gauss, gauss = state
    if (
        not isinstance(keys, torch.Tensor)
        or keys.dtype != torch.int64
        or keys.shape != (624,)
        or not 0 <= int(keys.min()) <= int(keys.max()) < 1 << 32
        or type(position) is not int
        or not 0 <= position <= 624
        or has_gauss not in (0, 1)
    ):
        raise ValueError("the state of NumPy's generator is none")
    _require_number("the state of NumPy's generator", gauss, -math.inf)
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), position, int(has_gauss), gauss)
    )


def device_of(state: Mapping[str, Any]) -> torch.device:
    """The device of the tensors of a state; the CPU if it has no tensors."""
    for value in state.values():
        if isinstance(value, nn.Module):
            value = next(value.parameters(), None)
        elif isinstance(value, dict):
            value = next(iter(value.values()), None)
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def _require_names(name: str, expected: Mapping[str, Any], value: Any) -> None:
    if not isinstance(value, dict) or value.keys() != expected.keys():
        odd = sorted(map(str, set(value) ^ set(expected))) if isinstance(value, dict) else value
        raise ValueError(f"{name}: has other names ({shown(odd, 100)})")


def _require_like(
    name: str, expected: torch.Tensor, value: Any, may_be_infinite: bool = False
) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: is no tensor")
    if (value.dtype, value.shape) != (expected.dtype, expected.shape):
        raise ValueError(
            f"{name}: is {value.dtype} of {tuple(value.shape)} instead of {expected.dtype} of "
            f"{tuple(expected.shape)}"
        )
    if may_be_infinite:
        _require_numbers(name, value)
    elif not_finite({name: value}):
        raise ValueError(f"{name}: is not finite")


def _require_numbers(name: str, tensor: torch.Tensor) -> None:
    """A method's own tensors may hold an infinity, such as the best value before there is one."""
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise ValueError(f"{name}: is no number")


def _require_number(name: str, value: Any, least: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: is no number")
    if not least <= value <= _MOST_STEPS:
        raise ValueError(f"{name}: is {value:g}")


def _is_same(value: Any, expected: Any) -> bool:
    """Whether two plain values are the same; 1 and 1.0 are, 1 and True are not."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(_is_same(a, b) for a, b in zip(value, expected, strict=True))
        )
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(value) is type(expected) and value == expected
    return type(value) in (int, float) and bool(value == expected)
