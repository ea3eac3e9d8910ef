"""Files of plain data and tensors; the only module that calls `torch.load`."""

import _codecs
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError, first_line


def _spelled(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the name that one version of numpy gives it: 1 "core", 2 "_core"."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__module__, call.__name__ = module, function.__name__
    call.__qualname__ = function.__name__
    return call


# What arrays and numbers of int64 and float64 are rebuilt with, by either name, and no more: to be
# `allowed` in the formats of others.
_REBUILD: tuple[Any, ...] = (np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0])
NUMPY: tuple[Callable[..., Any], ...] = (
    *(_spelled("numpy.core.multiarray", function) for function in _REBUILD),
    *(_spelled("numpy._core.multiarray", function) for function in _REBUILD),
    *(np.ndarray, np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64))),
    _codecs.encode,
)


def load_plain(path: Path, allowed: Sequence[Callable[..., Any]] = ()) -> Any:
    """What `torch.save` wrote, tensors on the CPU; nothing that the file names is run.

    Args:
        allowed: functions and classes that a format needs beside tensors and plain data. A file
            names them by their `__module__` and `__qualname__`.

    Raises:
        ValueError: if the file names anything else, or would take more memory than its own size. A
            damaged file can raise anything.
    """
    _refuse_expanding(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own text, which tells how to load the file all the same.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else "something"
        raise ValueError(f"it holds {what}, which is no plain data and is not read") from error

    _refuse_hollow(content)
    return content


def _refuse_expanding(path: Path) -> None:
    """Raises ValueError unless a file is an archive that is as large as what is in it."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive of torch.save; torch before 1.6 wrote another format")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its parts claim to be larger than the file")


def _refuse_hollow(content: Any) -> None:
    """Raises ValueError if a tensor claims more values than are stored, or is not a plain one."""
    seen: set[int] = set()  # a part may stand in many places
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds a sparse, quantized or empty-shelled tensor")
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of {tuple(value.shape)} is stored in fewer values")
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or no number.

    Raises:
        ValueError: for a type of which torch cannot tell.
    """
    found = []
    for name, value in state.items():
        is_small_float = value.is_floating_point() and value.element_size() == 1
        try:  # torch cannot ask 8-bit floats themselves
            if not (value.float() if is_small_float else value).isfinite().all():
                found.append(name)
        except NotImplementedError:
            raise ValueError(f"{name} is of {value.dtype}, which is not read") from None
    return found


def load_tensors(path: Path, allowed: Sequence[Callable[..., Any]] = ()) -> dict[str, Any]:
    """A dictionary of plain data and tensors.

    Args:
        allowed: see `load_plain`.

    Raises:
        ValueError: if the file names anything else or holds no dictionary.
    """
    content = load_plain(path, allowed)
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")
    return content


@contextmanager
def explained(path: Path, expected: str) -> Iterator[None]:
    """Any failure to read a file as a UserError: '<path>: is not <expected> (<reason>)'."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file raises anything from zipfile's to unpickling errors
        reason = first_line(error)
        raise UserError(f"{path}: is not {expected} ({reason})") from error
