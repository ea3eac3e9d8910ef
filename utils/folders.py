"""Folders of runs under `record/`: claimed, locked, written file by file, resumed and found."""

import atexit
import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import pandas as pd
import torch
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from utils import distributed
from utils.config import parse_yaml, read_yaml
from utils.errors import NothingToDo, UserError
from utils.files import not_written, remove_strays, replaced
from utils.runtime import ROOT
from utils.tensors import explained, load_tensors

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# Flags that say where a run writes, and when, but not what comes out.
FREE_TO_CHANGE = ("resume", "overwrite", "checkpoint_every", "record_path", "save_folder_name")
_LOCKS: dict[Path, IO[str]] = {}  # open files, for as long as this process lives


class _Checkpoint(TypedDict):
    """What `RunFolder.write_checkpoint` is given, and the network's file that it adds."""

    loop: dict[str, Any]
    rows: list[dict[str, float | int]]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    phase_rows: NotRequired[list[dict[str, str | float | int]]]
    training_seconds: NotRequired[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    model_sha256: NotRequired[str | None]


_CHECKPOINT = TypeAdapter(_Checkpoint)


class RunFolder:
    """The folder that a run writes; every file appears whole or not at all.

    `summary.json` is written last, so its presence means that the run is done. A folder without it
    is what a failed run left, and may be written again. Of several processes the first one alone
    writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model_sha256: str | None = None

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").exists()

    def claim(self, overwrite: bool, resume: bool = False) -> None:
        """Keeps the folder for this process until it ends.

        Raises:
            UserError: if what stands here may not be replaced, or another process has the folder. A
                finished or interrupted run needs `overwrite`; a folder that no run wrote is never
                touched.
            NothingToDo: if the run that is to be resumed is finished, as when a process was killed
                after its last file.
        """
        if overwrite and resume:
            raise UserError("--resume: goes on with a run, which --overwrite deletes; give one")
        with writable(self.path):
            self._check_free(overwrite, resume)
        if distributed.is_main():
            self.lock()

    def _check_free(self, overwrite: bool, resume: bool) -> None:
        self._refuse_links()
        if self.path.exists() and not (self.path / "config.yaml").exists() and self._holds_files():
            raise UserError(
                f"{self.path} exists and is no record; give another name, or move it away"
            )
        if self.is_done and resume:
            raise NothingToDo(f"{self.path} is finished; nothing is left to do")
        if self.is_done and not overwrite:
            raise UserError(f"{self.path} exists; give --overwrite to replace it, or another name")
        if self._checkpoint.exists() and not (overwrite or resume):
            raise UserError(
                f"{self.path} is an interrupted run; give --resume to go on, or --overwrite to "
                "start anew"
            )

    @property
    def _lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def _refuse_links(self) -> None:
        """Raises UserError where a write would end elsewhere; anybody may have made the folder."""
        inside = self.path.iterdir() if self.path.is_dir() else ()
        for path in (self.path, *inside):
            _refuse_link(path)

    def lock(self) -> None:
        """Takes the lock beside the folder, which the system takes back when this process ends.

        Raises:
            UserError: if another process has it.
        """
        path = self._lock
        if self.path in _LOCKS:
            return
        tries_until = time.monotonic() + 0.5  # somebody may just ask whether it is taken
        with writable(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644), "w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    if time.monotonic() < tries_until:
                        time.sleep(0.05)
                        continue
                    raise UserError(
                        f"{self.path}: another process is writing it; wait for it, or give another "
                        "name"
                    ) from None
                if os.fstat(file.fileno()).st_nlink:
                    break  # else the process before has just removed it
        atexit.register(_remove, path)
        _LOCKS[self.path] = file

    @property
    def is_taken(self) -> bool:
        """Whether another process is writing it."""
        if self.path in _LOCKS:
            return False
        try:
            with os.fdopen(os.open(self._lock, os.O_RDONLY | os.O_NOFOLLOW)) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _holds_files(self) -> bool:
        return not self.path.is_dir() or any(self.path.iterdir())

    def start(
        self, config: str, resume: bool = False, model_sha256: str | None = None
    ) -> dict[str, Any] | None:
        """Empties the folder and writes the resolved configuration into it.

        Args:
            resume: go on where the folder's run was interrupted, if it was.
            model_sha256: of the user's file that makes the network; None for any other.

        Returns:
            What `write_checkpoint` was given; None for a fresh run.

        Raises:
            UserError: if the folder cannot be written, or the run had another configuration or
                another content of that file.
        """
        self._model_sha256 = model_sha256
        if resume and distributed.from_main(self._checkpoint.exists()):
            return self._resumed(config)
        if not distributed.is_main():
            return None
        with writable(self.path):
            if self.path.exists():
                # First, so that a half-emptied folder does not pass for a finished run.
                (self.path / "summary.json").unlink(missing_ok=True)
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
        self.write_text("config.yaml", config)
        return None

    def _resumed(self, config: str) -> dict[str, Any]:
        before = read_yaml(self.path / "config.yaml")
        now = parse_yaml(config, "the configuration")
        differing = [  # a flag that did not exist when the run began has its default
            name
            for name in sorted(set(before) - set(FREE_TO_CHANGE))
            if before[name] != now.get(name)
        ]
        if differing:
            raise UserError(
                f"--resume: {self.path} was run with "
                + ", ".join(f"--{name} {before[name]}" for name in differing)
                + "; give the same"
            )
        remove_strays(self.path)
        with explained(self._checkpoint, "a checkpoint of this program"):
            content = dict(_CHECKPOINT.validate_python(load_tensors(self._checkpoint)))
        before_sha256 = content.pop("model_sha256", self._model_sha256)  # earlier ones had none
        if before_sha256 != self._model_sha256:
            raise UserError(
                f"--resume: {self.path} was run with another content of {now['model']}; give the "
                "file as it was, or --overwrite to start anew"
            )
        return content

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Keeps plain data and tensors from which the run can go on, in place of earlier ones."""
        content = {**content, "model_sha256": self._model_sha256}
        self.write_tensors(self._checkpoint.name, content)

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def write(self, name: str, writer: Callable[[Path], None]) -> Path:
        """Lets `writer` write a file under a temporary name, then gives it its own.

        Raises:
            UserError: if the disk is full or the folder is not writable; earlier files stay intact.
        """
        path = self.path / name
        if not distributed.is_main():
            return path
        try:
            with replaced(path) as partial:
                writer(partial)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise not_written(path, error) from None
        return path

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: _write_text(path, text))

    def write_tensors(self, name: str, content: Mapping[str, Any]) -> None:
        """Plain data and CPU tensors, which `torch.load(..., weights_only=True)` reads."""
        self.write(name, lambda path: _save(path, content))

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], name: str = "metrics.csv") -> None:
        """A table as CSV, a line a row."""
        self.write(name, lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Says that the run is done."""
        self.write_text("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        self._checkpoint.unlink(missing_ok=True)


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises UserError, naming the path, if the system refuses something inside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make it writable") from None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be gone, or read-only by now
        path.unlink()


def attack_folder(name: str, root: Path | None) -> RunFolder:
    """The folder of an attack's record.

    Args:
        name: letters, digits, `_ . + -`; not a path.
        root: folder of all records; None for `record/` of this checkout.

    Raises:
        UserError: if the name could leave the folder of records.
    """
    return RunFolder((root or ROOT / "record") / _checked_name(name))


def defense_folder(record: Path, name: str) -> RunFolder:
    """The folder of a defense's result, inside the record that it read.

    Raises:
        UserError: if the name could leave that folder, or the folder is elsewhere.
    """
    _refuse_link(record / "defense")
    return RunFolder(record / "defense" / _checked_name(name))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link; give another name, or remove it")


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"--save_folder_name: {name} is not a name; give letters, digits, _ . + - and no "
            "folders"
        )
    return name


def existing_folder(name: str, root: Path | None, flag: str) -> Path | None:
    """The folder of a record's name, or an existing folder; None where there is neither.

    Raises:
        UserError: naming the flag, if the record is a link.
    """
    folder = (root or ROOT / "record") / name
    if NAME.fullmatch(name) and folder.is_dir():
        if folder.is_symlink():
            raise UserError(f"{flag}: {folder} is a link; give the folder that it leads to")
        return folder
    return Path(name) if Path(name).is_dir() else None


def find_record(name: str, root: Path | None) -> Path:
    """The folder of a `--result_file` value: a record's name, or an existing folder.

    Raises:
        UserError: if there is none, naming those that exist.
    """
    found = existing_folder(name, root, "--result_file")
    if found is not None:
        return found
    records = root or ROOT / "record"
    known = sorted(path.parent.name for path in records.glob("*/attack_result.pt"))
    raise UserError(
        f"--result_file: {name} is no record in {records}; "
        + (
            f"give one of {', '.join(known)}"
            if known
            else "run an attack first, e.g. attack/badnet.py"
        )
    )


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("wb") as file:  # given a path, torch would put its name into the file
        torch.save(dict(content), file)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
