"""What a checkpoint of an interrupted run holds, and what the run depends on."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from models import is_user_file, model_identity
from utils.data.batches import release
from utils.files import file_sha256
from utils.tensors import text_up_to

_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")
_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Origin:
    """What the numbers of a run depend on, in addition to its flags.

    Attributes:
        method: its name.
        files: what was read -> sha256 of its content.
        tensors: what they are -> tensors, whose content counts.
        conditions: what may change the last digits, such as the number of threads, or versions. A
            run that continues under other conditions says so.
    """

    method: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    conditions: Mapping[str, str | int] = field(default_factory=dict)

    @cached_property
    def sources(self) -> dict[str, str]:
        """What -> sha256. Computed at the first use, because short runs have no checkpoint."""
        return {
            "the method": hashlib.sha256(self.method.encode()).hexdigest(),
            **self.files,
            **{what: digest(values) for what, values in self.tensors.items()},
        }


def files_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files that flags name, by the names of the flags.

    A network of the user's own is named by its file and a function: `my_net.py:build`. The files
    that it imports count with it.
    """
    hashes = {}
    for name, value in flags.items():
        with contextlib.suppress(OSError, ValueError):  # what is no path names no file
            if name == "model" and isinstance(value, str) and is_user_file(value):
                hashes["--model"] = str(model_identity(value)[1])
            elif isinstance(value, str) and Path(value).is_file():
                hashes[f"--{name}"] = file_sha256(Path(value))
    return hashes


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the values of tensors on the CPU, part by part, so that a mapped file stays one."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in tensor.split(4096) if tensor.dim() else (tensor,):
            hasher.update(part.contiguous().numpy().data)
        release(tensor)
    return hasher.hexdigest()


def _row(value: Any) -> dict[str, Any]:
    """A row of metrics: names of columns, and numbers or the name of a phase.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, dict):
        raise ValueError("a row is no dictionary")
    for name, cell in value.items():
        if not isinstance(name, str) or not _COLUMN.fullmatch(name):
            raise ValueError("a column has no name that a run would give")
        if name == "phase":
            if not isinstance(cell, str) or len(cell) > 200:
                raise ValueError("a phase has no name")
        elif type(cell) not in (int, float):
            raise ValueError(f"{name}: is no number")
    return value


def _flags(value: Any) -> dict[str, Any]:
    """Names and plain values of flags."""
    kinds = (str, int, float, bool, type(None), list, tuple)
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(flag, kinds) for name, flag in value.items()
    ):
        raise ValueError("is no configuration")
    return value


def _few(rows: list[Any]) -> list[Any]:
    if len(rows) > _MOST_ROWS:
        raise ValueError("has too many rows")
    return rows


_Rows = Annotated[list[Annotated[dict, PlainValidator(_row)]], AfterValidator(_few)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_What = Annotated[str, text_up_to(5000)]


class Checkpoint(TypedDict):
    """What `RunFolder.write_checkpoint` is given, and what it adds."""

    loop: Annotated[dict, PlainValidator(lambda value: dict(value))]
    rows: _Rows
    seconds: _Seconds
    phase_rows: NotRequired[_Rows]
    training_seconds: NotRequired[_Seconds]
    # What is added; earlier versions had none of it but for the sha256.
    flags: NotRequired[Annotated[dict[str, Any], PlainValidator(_flags)]]
    sources: NotRequired[dict[_What, _What]]
    conditions: NotRequired[dict[_What, _What | int]]
    warnings: NotRequired[list[_What]]
    model_sha256: NotRequired[str | None]


CHECKPOINT = TypeAdapter(Checkpoint)
