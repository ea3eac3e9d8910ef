"""Files of plain data and tensors; the only module that calls `torch.load`."""

import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError


def load_plain(path: Path, allowed: Sequence[Callable[..., Any]] = ()) -> Any:
    """What `torch.save` wrote, tensors on the CPU; nothing that the file names is run.

    Args:
        allowed: functions and classes that a format needs beside tensors and plain data. A file
            names them by their `__module__` and `__qualname__`.

    Raises:
        ValueError: if the file names anything else. A damaged file can raise anything.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own text, which tells how to load the file all the same.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else "something"
        raise ValueError(f"it holds {what}, which is no plain data and is not read") from error


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
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: is not {expected} ({reason})") from error
