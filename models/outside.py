"""What a network keeps outside its state dict, where neither records nor other networks find it."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from models.classifier import Classifier
from models.copies import copied
from models.modes import uncompiled

_STEPS = 3  # calls in train mode, after which state that is carried on has moved
_FAR = 1_000_000  # calls after which whatever waits for a number of calls has happened
_ELSEWHERE = "something that is no attribute of its modules"
_OF_MODULES = frozenset(vars(nn.Module()))
Logits = list[torch.Tensor]


def buffers_outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that were registered with `persistent=False`, by name; not copied."""
    return {
        f"{path}.{name}" if path else name: part._buffers[name]
        for path, part in model.named_modules()
        for name in sorted(part._non_persistent_buffers_set)
        if isinstance(part._buffers.get(name), torch.Tensor)
    }


@torch.no_grad()
def put_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Puts what `buffers_outside` gave into a network that was made like the first one.

    A buffer that has another shape there, or that only a call makes, becomes a copy on the device
    of the model's weights.

    Raises:
        AttributeError, KeyError: if the network has no such module, or something else of that name.
    """
    present = buffers_outside(model)
    for name, value in buffers.items():
        old = present.get(name)
        if old is not None and (old.shape, old.dtype) == (value.shape, value.dtype):
            old.copy_(value)
            continue
        path, _, attribute = name.rpartition(".")
        part = model.get_submodule(path)
        if attribute in part._buffers and attribute not in part._non_persistent_buffers_set:
            raise KeyError(f"{name} is in the state dict")
        device = next((weight.device for weight in model.parameters()), value.device)
        part.register_buffer(attribute, value.detach().to(device).clone(), persistent=False)


class Outside(NamedTuple):
    """What logits depend on, and the state dict lacks, by name."""

    buffers: list[str]
    """Non-persistent buffers, without which the logits in eval mode are others."""
    attributes: list[str]
    """State of Python, without which the logits in eval or train mode are others."""


def state_outside(model: Classifier, fresh: Classifier, image_size: int) -> Outside:
    """What a network's logits depend on after some training, and its state dict lacks.

    The network is called a few times in train mode. Then another one gets its state dict, and has
    to give the same logits. So what changes without an effect, such as the features of the last
    call, does not count. Of a number that has moved, such as a count of calls, it is also tried
    whether it would have an effect after very many calls.

    Args:
        model: takes (N, 3, S, S), with S the image size; it is called in train mode.
        fresh: another one from the same constructor; it gets the state of `model`.
    """
    images = torch.rand(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with uncompiled():
        for _ in range(_STEPS):
            with _same_draws():
                model.train()
                model(images)
        expected = _logits(model, images)
        if not _are_same(expected, _logits(model, images)):  # a copy has all that modules have
            return Outside([], [_ELSEWHERE])
        fresh.network.load_state_dict(model.network.state_dict())
        in_eval_mode, _ = _logits(fresh, images)
        buffers, others = buffers_outside(model), buffers_outside(fresh)
        differing = [name for name, v in buffers.items() if not _is_same(v, others.get(name))]
        put_buffers(fresh, buffers)
        with_buffers = _logits(fresh, images)
        lost = [] if torch.equal(in_eval_mode, with_buffers[0]) else differing
        attributes = _differing(model, fresh)
        if not _are_same(expected, with_buffers):
            return Outside(lost, attributes or [_ELSEWHERE])
        return Outside(
            lost, [name for name in attributes if _acts_later(model, fresh, name, images, expected)]
        )


def _logits(model: nn.Module, images: torch.Tensor) -> Logits:
    """Of a copy in eval mode, and then in train mode; the draws of all calls are the same."""
    model = copied(model)
    logits = []
    for is_training in (False, True):
        with torch.no_grad(), _same_draws():
            model.train(is_training)
            logits.append(model(images))
    return logits


def _are_same(one: Logits, other: Logits) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def _same_draws() -> Iterator[None]:
    """Inside, the global generators of the CPU begin anew; they are restored at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _differing(model: nn.Module, fresh: nn.Module) -> list[str]:
    """The attributes of modules that differ, but for weights, buffers and hooks."""
    others = dict(fresh.named_modules())
    return [
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if name not in _OF_MODULES
        and not (path in others and _is_same(value, vars(others[path]).get(name)))
    ]


def _is_same(value: Any, other: Any, depth: int = 0) -> bool:
    """Whether two values are the same, as far as can be told: objects by their attributes."""
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return value.shape == other.shape and bool(torch.equal(value, other))
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, other))
    if isinstance(value, torch.Generator):
        return bool(torch.equal(value.get_state(), other.get_state()))
    if isinstance(value, (bool, int, float, str, set, type(None))):
        return bool(value == other)
    if isinstance(value, (nn.Module, type)) or callable(value) or depth > 3:
        return True
    (leaves, places), (others, same_places) = tree_flatten(value), tree_flatten(other)
    if len(leaves) == 1 and leaves[0] is value:
        values, of_other = (getattr(x, "__dict__", {}) for x in (value, other))
        return _is_same(values, of_other, depth + 1)
    return places == same_places and all(
        _is_same(a, b, depth + 1) for a, b in zip(leaves, others, strict=True)
    )


def _acts_later(
    model: nn.Module, fresh: nn.Module, name: str, images: torch.Tensor, expected: Logits
) -> bool:
    """Whether a number that each call moves changes the logits after very many calls."""
    path, _, attribute = name.rpartition(".")
    far = copied(model)
    now = getattr(far.get_submodule(path), attribute)
    start: Any = getattr(fresh.get_submodule(path), attribute, None)
    if type(now) not in (int, float) or type(start) is not type(now):
        return False
    setattr(far.get_submodule(path), attribute, start + (now - start) * _FAR)
    try:
        return not _are_same(expected, _logits(far, images))
    except Exception:  # such as an index beyond the end of a list
        return True
