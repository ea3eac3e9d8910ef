"""bfloat16 on a CPU: convolutions whose gradient torch gets wrong there.

A tap of a kernel may meet nothing but padding, as the outer ones of 3x3 on a map of one pixel. Its
gradient is 0. torch (2.14 and before, by oneDNN) does not write it for some shapes in bfloat16, so
that it is whatever was in memory, NaN or 1e30 among it. Such a convolution is computed in float32.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

_NAMES = tuple(f"{kind}{sides}d" for kind in ("conv", "conv_transpose") for sides in (1, 2, 3))
_LOCK = threading.Lock()
_USERS: list[int] = []  # one for each `sound_gradients` that is entered, of all threads
_REPLACED: dict[tuple[ModuleType, str], Any] = {}


def has_idle_tap(
    size: int, taps: int, stride: int, padding: int, dilation: int, count: int
) -> bool:
    """Whether a tap of a kernel meets nothing but padding, along one side of the maps.

    Args:
        size: of the map, pixels.
        taps: of the kernel.
        count: of its places: the size of the output.
    """
    for tap in range(taps):
        offset = tap * dilation - padding
        first = max(0, -(offset // stride))  # the first place where it is not before the map
        if first >= count or first * stride + offset >= size:
            return True
    return False


def _is_unsound(
    maps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution in bfloat16 has a tap that meets nothing but padding."""
    sides = weight.dim() - 2
    sizes, kernel = maps.shape[-sides:], weight.shape[2:]
    strides, dilations = _each(stride, sides), _each(dilation, sides)
    if padding == "valid":
        return False
    if padding == "same":  # has stride 1
        counts = list(sizes)
        paddings = [d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)]
    else:
        paddings = _each(padding, sides)
        counts = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(sizes, kernel, strides, paddings, dilations, strict=True)
        ]
    return any(map(has_idle_tap, sizes, kernel, strides, paddings, dilations, counts))


def _is_unsound_transposed(
    maps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> bool:
    """The same of a transposed convolution, whose output is the map that taps meet."""
    sides = weight.dim() - 2
    counts, kernel = maps.shape[-sides:], weight.shape[2:]
    strides, paddings = _each(stride, sides), _each(padding, sides)
    dilations, more = _each(dilation, sides), _each(output_padding, sides)
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, k, s, p, d, extra in zip(
            counts, kernel, strides, paddings, dilations, more, strict=True
        )
    ]
    return any(map(has_idle_tap, sizes, kernel, strides, paddings, dilations, counts))


def _each(value: Any, sides: int) -> list[int]:
    """One number for each side, of a number or of several."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * sides if len(numbers) == 1 else numbers


@functools.cache  # a network's every call asks for the same
def _sound(func: Callable[..., torch.Tensor], asked: Callable[..., bool]) -> Any:
    """A convolution that is computed in float32 where it is unsound; the result is bfloat16."""

    @functools.wraps(func)
    def convolution(*args: Any, **kwargs: Any) -> torch.Tensor:
        named = {"maps" if key == "input" else key: value for key, value in kwargs.items()}
        maps = args[0] if args else named["maps"]
        # Autocast leaves float64 as it is.
        is_cast = torch.is_autocast_enabled("cpu") and maps.dtype != torch.float64
        kind = torch.get_autocast_dtype("cpu") if is_cast else maps.dtype
        is_half = kind == torch.bfloat16 and maps.device.type == "cpu"
        if not (is_half and asked(*args, **named)):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            result = func(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})
        return result.bfloat16()

    return convolution


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


@contextmanager
def sound_gradients(is_needed: bool) -> Iterator[None]:
    """Inside, convolutions in bfloat16 on a CPU have gradients that are numbers of theirs.

    torch's functions are replaced meanwhile, so code that has imported `conv2d` by its bare name is
    not reached. A `TorchFunctionMode` would not reach what gradient checkpointing computes again,
    since it is off within `backward`.
    """
    if not is_needed:
        yield
        return
    with _LOCK:
        _USERS.append(1)
        if len(_USERS) == 1:
            for name in _NAMES:
                asked = _is_unsound_transposed if "transpose" in name else _is_unsound
                for module in (torch, F):
                    _REPLACED[module, name] = getattr(module, name)
                    setattr(module, name, _sound(_REPLACED[module, name], asked))
    try:
        yield
    finally:
        with _LOCK:
            _USERS.pop()
            if not _USERS:
                for (module, name), func in _REPLACED.items():
                    setattr(module, name, func)
                _REPLACED.clear()
