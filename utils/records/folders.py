"""Folders of runs under `record/`: claimed, locked, written file by file, resumed and found."""

import atexit
import contextlib
import csv
import glob
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import locks
from utils.config import parse_yaml, read_yaml
from utils.errors import NothingToDo, UserError, shown
from utils.files import ROOT, TABLE, as_path, not_written, read_text, remove_strays, replaced
from utils.process import distributed
from utils.process.script import logger
from utils.records.checkpoint import CHECKPOINT, Origin
from utils.records.contents import (
    MARK,
    NAME,
    Contents,
    is_file_name,
    replaced_name,
    write_mark,
)
from utils.tensors import explained, load_tensors

LONGEST_NAME = 200  # letters; what is put before and after it has room in a file system's names
# What Windows takes for a device, or for another name.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|.*\.", re.IGNORECASE)
# In tables and figures, models beside those that defenses purified: the model before the defense, a
# model without a backdoor, and the backdoored model tuned with the true labels.
BEFORE, CLEAN, EXACT = "before", "clean model", "exact purification"
# Flags that say where a run writes, and when, but not what comes out.
FREE_TO_CHANGE = ("resume", "overwrite", "checkpoint_every", "record_path", "save_folder_name")
_PLACES = ("result_file", "dataset_path", "device", "eval_every")  # of a finished run, may change
# By the lock's path: the open file, and the folders that were made for it.
_LOCKS: dict[str, tuple[int, list[Path]]] = {}


class RunFolder:
    """The folder that a run writes; every file appears whole or not at all.

    `run.json` lists the files of the run, each before it is first written, so that nothing else is
    ever removed; see `utils.records.contents`. `summary.json` is written last, so its presence says
    that the run is done. A folder without it is from a failed run, and may be written again. If
    there are several processes, only the first one writes.

    A finished run that is overwritten is kept as `.<name>.replaced` beside the folder until the new
    one is finished. It is put back if that one ends without a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._added: dict[str, Any] = {}  # to each checkpoint
        self._origin = Origin()
        self._names: list[str] | None = None  # what run.json lists, once this process has begun

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").exists()

    def claim(
        self,
        overwrite: bool,
        resume: bool = False,
        record: "RunFolder | None" = None,
        config: str | None = None,
    ) -> None:
        """Keeps the folder for this process until it ends.

        Everything is decided while this process has the lock. If there are several processes, the
        first one decides for all.

        Args:
            record: the folder that the run will read, and that no other process may write.
            config: of the run, as YAML; a finished run is resumed only with the same one.

        Raises:
            UserError: if the content of the folder may not be replaced, or another process has the
                folder. A finished or interrupted run needs `overwrite`; a folder with any file that
                no run wrote is never touched.
            NothingToDo: if the run that is to be resumed is finished, as when a process was killed
                after its last file.
        """
        if overwrite and resume:
            raise UserError("--resume: goes on with a run, which --overwrite deletes; give one")
        with distributed.main_alone() as is_mine:
            is_over = is_mine and self._claimed(overwrite, resume, record, config)
        if distributed.from_main(is_over):
            raise NothingToDo(f"{self.path} is finished; nothing is left to do")

    def _claimed(
        self, overwrite: bool, resume: bool, record: "RunFolder | None", config: str | None
    ) -> bool:
        """Takes the lock, or releases it again; returns whether there is nothing to resume."""
        with writable(self.path):
            self._refuse_links()
            self.lock()
            try:
                is_over = self._is_over(overwrite, resume)
                if is_over and config is not None:
                    self._check_same(config)
                if record is not None and record.is_taken:
                    raise UserError(
                        f"{record.path}: another process is writing it; wait for it, or give "
                        "another record"
                    )
            except BaseException:
                self.release()
                raise
        if is_over:
            self.release()
        return is_over

    def _is_over(self, overwrite: bool, resume: bool) -> bool:
        """Whether the run to resume is finished; raises UserError if the folder is not free."""
        if self.is_done:
            self._drop_replaced()
        elif overwrite or not self._checkpoint.exists():
            self._put_back()
        contents = self._own_contents()
        if self.is_done and resume:
            self._checkpoint.unlink(missing_ok=True)
            contents.remove_strays()
            return True
        if (self.is_done or contents.has_finished_results) and not overwrite:
            raise UserError(f"{self.path} exists; give --overwrite to replace it, or another name")
        if self._checkpoint.exists() and not (overwrite or resume):
            raise UserError(
                f"{self.path} is an interrupted run; give --resume to go on, or --overwrite to "
                "start anew"
            )
        for lock in contents.locks:
            if _is_locked(lock):
                name = lock.name.removeprefix(".").removesuffix(".lock")
                raise UserError(
                    f"{self.path}: another process is writing {lock.parent.name}/{name} in it; "
                    "wait for it, or give another name"
                )
        return False

    def _check_same(self, config: str) -> None:
        """Raises UserError if the finished run had other flags; a value that is found later counts.

        Args:
            config: as YAML.
        """
        try:
            before = read_yaml(self.path / "config.yaml")
        except UserError:
            return  # of an earlier version, or gone; the summary says that the run is finished
        now = parse_yaml(config, "the configuration")
        differing = [
            name
            for name, value in _recipe(now).items()
            if name not in _PLACES and value is not None and before.get(name, value) != value
        ]
        if differing:
            given = ", ".join(f"--{name} {shown(before[name], 200)}" for name in differing[:20])
            raise UserError(
                f"--resume: {self.path} is finished, and was run with {given}; give the same, or "
                "--overwrite to replace it"
            )

    def _own_contents(self) -> Contents:
        """The content of the folder.

        Raises:
            UserError: if anything of it was not written by a run.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} exists and is no folder; give another name")
        contents = Contents(self.path)
        if contents.foreign:
            names = ", ".join(shown(name, 60) for name in contents.foreign[:3])
            more = ", ..." if len(contents.foreign) > 3 else ""
            raise UserError(
                f"{self.path} exists and is no record (it holds {names}{more}); give another name, "
                "or move it away"
            )
        return contents

    @property
    def _lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def _replaced(self) -> "RunFolder":
        """What this run replaces, until it is finished."""
        return RunFolder(self.path.with_name(replaced_name(self.path.name)))

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside, a run writes the claimed folder; at the end, what it replaced is gone.

        If it ends in another way, and without a checkpoint, what it replaced is there again. With
        one it can be resumed, and what it replaced is kept.
        """
        try:
            yield
        except BaseException:
            if distributed.is_main():
                if not self.is_done and not self._checkpoint.exists():
                    with contextlib.suppress(UserError, OSError):  # the error itself is told
                        self._put_back()
                if self._replaced.path.is_dir():
                    logger.warning(
                        "warning: the run that was to be replaced is kept in %s",
                        self._replaced.path,
                    )
            raise
        if distributed.is_main():
            self._drop_replaced()

    def _set_aside(self) -> None:
        """Empties the folder; a finished run stays beside it."""
        replaced_one = self._replaced.path
        with writable(self.path):
            contents = self._own_contents()  # refuses
            if os.path.lexists(replaced_one) and not replaced_one.is_dir():
                raise UserError(f"{replaced_one} is in the way; move it")
            is_worth_it = self.is_done or contents.has_finished_results
            if is_worth_it and not replaced_one.exists():
                locks.patiently(lambda: os.rename(self.path, replaced_one))
            else:
                contents.remove()

    def _put_back(self) -> None:
        """Gives the folder its earlier content, if a run was to replace it."""
        if self._replaced.path.is_dir():
            self._own_contents().remove()
            if self.path.exists():
                self.path.rmdir()
            locks.patiently(lambda: os.rename(self._replaced.path, self.path))

    def _drop_replaced(self) -> None:
        """Removes what a finished run has replaced; if it cannot, a warning says so."""
        if not self._replaced.path.is_dir():
            return
        try:
            self._replaced._own_contents().remove()
            self._replaced.path.rmdir()
        except (UserError, OSError) as error:
            logger.warning("warning: what this run replaced was not removed: %s", error)

    def _refuse_links(self) -> None:
        """Raises UserError if a write would go elsewhere; a stranger may have made the folder."""
        inside = self.path.iterdir() if self.path.is_dir() else ()
        for path in (self.path, self._replaced.path, *inside):
            _refuse_link(path)

    def lock(self) -> bool:
        """Takes the lock beside the folder, which the system releases when this process ends.

        Returns:
            Whether it is the lock of a process that was killed.

        Raises:
            UserError: if another process has it, or something else stands in its place.
        """
        path = self._lock
        held = _LOCKS.get(os.path.realpath(path))
        if held is not None and os.fstat(held[0]).st_nlink:
            return False
        tries_until = time.monotonic() + 0.5  # somebody may just ask whether it is taken
        created: list[Path] = []
        try:
            with writable(self.path):
                while (taken := self._try_lock(created)) is None:
                    if time.monotonic() > tries_until:
                        raise UserError(
                            f"{self.path}: another process is writing it; wait for it, or give "
                            "another name"
                        )
                    time.sleep(0.05)
        except BaseException:
            _remove_empty(created)
            raise
        handle, is_left = taken
        _LOCKS[os.path.realpath(path)] = (handle, created)
        atexit.register(self.release)
        return is_left

    def _try_lock(self, created: list[Path]) -> tuple[int, bool] | None:
        """The open lock, and whether it was there before; None if another process has it.

        Args:
            created: gets the folders that are made for it, the innermost first.
        """
        path = self._lock
        absent = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        created.extend(parent for parent in absent if parent not in created)
        is_left = False
        try:
            try:
                handle = locks.open_no_link(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                handle, is_left = locks.open_no_link(path, os.O_RDWR), True
        except FileNotFoundError:  # the process before has just removed it, or its folder
            return None
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            os.close(handle)
            raise UserError(f"{path}: is no lock of this program; move it away")
        try:
            if locks.lock(handle) and os.fstat(handle).st_nlink:
                return handle, is_left
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # another process has it, or has just removed it
        return None

    def release(self) -> None:
        """Gives the lock back, and removes its file and the folders that were made for it."""
        handle, created = _LOCKS.pop(os.path.realpath(self._lock), (None, []))
        if handle is None:
            return
        if locks.WINDOWS:  # an open file cannot be removed, by which nobody loses a lock either
            os.close(handle)
        with contextlib.suppress(OSError):  # its folder may be gone, or read-only by now
            # Without a name by now, the file of that name is another process's.
            if locks.WINDOWS or os.fstat(handle).st_nlink:
                locks.patiently(self._lock.unlink)
        if not locks.WINDOWS:
            os.close(handle)
        _remove_empty(created)

    @property
    def is_taken(self) -> bool:
        """Whether another process is writing it."""
        return _is_locked(self._lock)

    def start(
        self,
        config: str,
        resume: bool = False,
        model_sha256: str | None = None,
        origin: Origin | None = None,
    ) -> dict[str, Any] | None:
        """Empties the folder and writes the resolved configuration into it; see `replacing`.

        Args:
            config: as YAML.
            resume: continue where the folder's run was interrupted, if it was.
            model_sha256: of the user's file that makes the network; None for any other.
            origin: what the run depends on, in addition to its flags; a checkpoint keeps it.

        Returns:
            What `write_checkpoint` was given; None for a fresh run.

        Raises:
            UserError: if the folder cannot be written, if by now it holds a file that no run wrote,
                or if the run had another configuration, or read files with another content.
        """
        self._origin = origin or Origin()
        self._added = {
            "flags": parse_yaml(config, "the configuration"),
            "conditions": {"threads": torch.get_num_threads(), **self._origin.conditions},
            "model_sha256": model_sha256,
        }
        if resume and distributed.from_main(self._checkpoint.exists()):
            checkpoint = self._resumed(config)
            self._begin([*dict.fromkeys([*Contents(self.path).names, self.log.name])])
            return checkpoint
        with distributed.main_alone() as is_mine:
            if is_mine:
                self._set_aside()
                with writable(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                self._begin(["config.yaml", self.log.name])
                self.write_text("config.yaml", config)
        return None

    def empty(self) -> None:
        """Removes what runs have written; the folder is claimed.

        Raises:
            UserError: if it cannot be removed, or if the folder holds a file that no run wrote.
        """
        with writable(self.path):
            self._own_contents().remove()

    def _begin(self, names: Sequence[str]) -> None:
        """Lists the files of the run."""
        self._names = list(names)
        if distributed.is_main():
            try:
                write_mark(self.path, self._names)
            except OSError as error:
                raise not_written(self.path / MARK, error) from None

    def _resumed(self, config: str) -> dict[str, Any]:
        remove_strays(self.path)
        with explained(
            self._checkpoint, "a checkpoint of this program", "give --overwrite to start anew"
        ):
            content: dict[str, Any] = {**CHECKPOINT.validate_python(load_tensors(self._checkpoint))}
        added = {name: content.pop(name, None) for name in (*self._added, "sources")}
        now = self._added["flags"]
        before = added["flags"] or read_yaml(self.path / "config.yaml")  # earlier ones had none
        differing = [  # a flag that did not exist when the run began has its default
            name
            for name in sorted(set(before) - set(FREE_TO_CHANGE))
            if before[name] != now.get(name)
        ]
        if differing:
            raise UserError(
                f"--resume: {self.path} was run with "
                + ", ".join(
                    f"--{shown(name, 60)} {shown(before[name], 200)}" for name in differing[:20]
                )
                + "; give the same"
            )
        others = [
            what
            for what, sha256 in (added["sources"] or {}).items()
            if self._origin.sources.get(what) != sha256
        ]
        if added["model_sha256"] not in (None, self._added["model_sha256"]):
            others.append(str(now.get("model", "the network")))
        if others:
            named = ", ".join(shown(what, 100) for what in others[:10])
            raise UserError(
                f"--resume: {self.path} was run with another content of {named}; give "
                "it as it was, or --overwrite to start anew"
            )
        conditions = self._added["conditions"]
        changed = [
            f"{shown(name, 60)} {shown(value, 60)}, now {conditions.get(name)}"
            for name, value in (added["conditions"] or {}).items()
            if conditions.get(name) != value
        ]
        if changed:
            logger.warning(
                "warning: --resume: begun with %s; the last digits may differ", "; ".join(changed)
            )
        with contextlib.suppress(UserError):
            if _recipe(read_yaml(self.path / "config.yaml")) == _recipe(before):
                return content
        self.write_text("config.yaml", config)  # somebody has changed or emptied it
        return content

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Keeps plain data and tensors from which the run can go on, in place of earlier ones."""
        sources = {"sources": self._origin.sources} if self._added else {}
        self.write_tensors(self._checkpoint.name, {**content, **self._added, **sources})

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
            self._list(name)
            with replaced(path) as partial:
                writer(partial)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise not_written(path, error) from None
        return path

    def _list(self, name: str) -> None:
        """Adds a file to those of the run before it is first written.

        In a folder that no run began, e.g. a report's, it removes unfinished copies of that file
        from killed processes.
        """
        if self._names is None:
            remove_strays(self.path, glob.escape(Path(name).stem))
        elif name not in self._names:
            if not is_file_name(name):
                raise UserError(
                    f"{self.path}: {name} is no name for a file; give at most {LONGEST_NAME} "
                    "letters, digits and _ . , = ( ) + -"
                )
            write_mark(self.path, [*self._names, name])
            self._names.append(name)

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: _write_text(path, text))

    def write_tensors(self, name: str, content: Mapping[str, Any]) -> None:
        """Plain data and CPU tensors, which `torch.load(..., weights_only=True)` reads."""
        self.write(name, lambda path: save_plain(path, dict(content)))

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], name: str = "metrics.csv") -> None:
        """A table as CSV, one line per row; a cell without a value, or NaN, is empty."""
        columns = list(dict.fromkeys(name for row in rows for name in row))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                for row in rows:
                    table.writerow({k: v for k, v in row.items() if v == v})  # no NaN

        self.write(name, write)

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


def _is_locked(lock: Path) -> bool:
    """Whether another process has a lock."""
    if os.path.realpath(lock) in _LOCKS:
        return False
    try:
        handle = locks.open_no_link(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not locks.lock(handle, shared=True)
    except OSError:
        return False
    finally:
        os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, from the innermost on, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
    if name == BEFORE:
        raise UserError(
            f"--save_folder_name: {name} is what tables call the model before the defense; give "
            "another name"
        )
    return RunFolder(record / "defense" / _checked_name(name))


def analysis_folder(record: Path, name: str) -> RunFolder:
    """The folder of an analysis's result, inside the record that it looks at.

    Raises:
        UserError: if the name could leave that folder, or the folder is elsewhere.
    """
    _refuse_link(record / "analysis")
    return RunFolder(record / "analysis" / _checked_name(name))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link; give another name, or remove it")


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"--save_folder_name: {name} is not a name; give letters, digits, _ . + - and no "
            "folders"
        )
    if locks.WINDOWS and _DEVICE.fullmatch(name):
        raise UserError(f"--save_folder_name: {name} is no name on Windows; give another one")
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"--save_folder_name: has {len(name):,} letters; give at most {LONGEST_NAME}"
        )
    return name


def existing_folder(name: str, root: Path | None, flag: str) -> Path | None:
    """The folder of a record's name, or an existing folder; None if there is neither.

    Raises:
        UserError: naming the flag, if the record is a link.
    """
    folder = (root or ROOT / "record") / name
    if NAME.fullmatch(name) and os.path.isdir(folder):
        if folder.is_symlink():
            raise UserError(f"{flag}: {folder} is a link; give the folder that it leads to")
        return folder
    return Path(name) if os.path.isdir(name) else None  # also for a name that cannot be one


def find_record(name: str, root: Path | None) -> Path:
    """The folder of a `--result_file` value: a record's name, or an existing folder.

    Raises:
        UserError: if there is none, naming those that exist.
    """
    folder = existing_folder(name, root, "--result_file")
    if folder is not None:
        return folder
    records = root or ROOT / "record"
    found = (path.parent.name for path in records.glob("[!.]*/attack_result.pt"))
    names = sorted(name for name in found if NAME.fullmatch(name))  # others are given as folders
    raise UserError(
        f"--result_file: {name} is no record in {records}; "
        + (
            f"give one of {', '.join(names)}"
            if names
            else "run an attack first, e.g. attack/badnet.py"
        )
    )


def _recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags on which a run's numbers may depend."""
    return {name: value for name, value in flags.items() if name not in FREE_TO_CHANGE}


def save_plain(path: Path, content: Any) -> None:
    """`torch.save`, with a file that depends only on the content."""
    with path.open("wb") as file:  # given a path, torch would put its name into the file
        torch.save(content, file)


def _write_text(path: Path, text: str) -> None:
    # Names of bytes that are no UTF-8 have halves of characters, in JSON and YAML \udc80.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def free_folder(
    name: str | None,
    root: str | None,
    overwrite: bool,
    resume: bool = False,
    config: str | None = None,
) -> RunFolder:
    """The folder of a new record, or of one to continue; only this process may write it.

    Args:
        config: see `RunFolder.claim`.

    Raises:
        UserError: if there is no name, or the content of the folder may not be replaced.
    """
    if name is None:
        raise UserError("--save_folder_name: a value is needed; give the record a name")
    folder = attack_folder(name, as_path(root))
    folder.claim(overwrite, resume, config=config)
    return folder


def made_folder(path: Path, flag: str = "--to") -> RunFolder:
    """The folder that a flag names, which is made if it is not there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag}: {path} cannot be made ({error.strerror}); give a folder"
        ) from None
    return RunFolder(path)


def refuse_foreign(path: Path, start: str, flag: str) -> None:
    """That a table is not there yet, or is an earlier one of the same script.

    Args:
        start: what the script's tables begin with.
        flag: that names the place.

    Raises:
        UserError: if there is another file.
    """
    try:
        if not os.path.lexists(path) or read_text(path, TABLE).startswith(start):
            return
    except (OSError, ValueError):
        pass
    raise UserError(f"{flag}: {path} is no table of this script; give another place")
