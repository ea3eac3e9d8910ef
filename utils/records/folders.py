"""Folders of runs under `record/`: claimed, replaced, written file by file, and resumed."""

import contextlib
import csv
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import locks
from utils.errors import Diverged, NothingToDo, PutBack, UserError, listed, shown
from utils.files import (
    CONFIG_FILE,
    MARK,
    not_written,
    refuse_link,
    remove_strays,
    replaced,
    writable,
)
from utils.plain import in_one_line, parse_yaml, read_yaml
from utils.process import distributed
from utils.process.script import defer_signals, logger
from utils.records.checkpoint import CHECKPOINT, Origin
from utils.records.contents import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    SUMMARY,
    Contents,
    is_file_name,
    replaced_name,
    write_mark,
)
from utils.records.lock import Lock, is_locked
from utils.records.recipe import changed_files, differing_flags, is_same, recipe_of, same_contents
from utils.tensors import explained, load_tensors

LONGEST_NAME = 200  # letters; what is put before and after it has room in a file system's names
_OF_UNFINISHED = ("device", "eval_every")  # of a finished run, these may change as well


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
        self.warnings: list[str] = []  # for the summary: under which other conditions it went on
        self._added: dict[str, Any] = {}  # to each checkpoint
        self._origin = Origin()
        self._names: list[str] | None = None  # what run.json lists, once this process has begun

    @property
    def is_done(self) -> bool:
        return (self.path / SUMMARY).exists()

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
            PutBack: if the run that is to be resumed was to replace another one, and has no
                checkpoint.
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
        elif not (overwrite or self.checkpoint.exists()) and self._put_back() and resume:
            raise PutBack(
                f"--resume: {self.path}: the run that was to replace it ended before its first "
                "checkpoint, and the earlier one is there again; give --overwrite to replace it"
            )
        contents = self._own_contents()
        if self.is_done and resume:
            self._drop_checkpoint()
            contents.remove_strays()
            return True
        if (self.is_done or contents.has_finished_results) and not overwrite:
            raise UserError(f"{self.path} exists; give --overwrite to replace it, or another name")
        if self.checkpoint.exists() and not (overwrite or resume):
            raise UserError(
                f"{self.path} is an interrupted run; give --resume to go on, or --overwrite to "
                "start anew"
            )
        for lock in contents.locks:
            if is_locked(lock):
                name = lock.name.removeprefix(".").removesuffix(".lock")
                raise UserError(
                    f"{self.path}: another process is writing {lock.parent.name}/{name} in it; "
                    "wait for it, or give another name"
                )
        return False

    def _check_same(self, config: str) -> None:
        """Raises UserError if the finished run had other flags, or read files with another content.

        Args:
            config: as YAML.
        """
        try:
            before = read_yaml(self.path / CONFIG_FILE)
        except UserError:
            before = {}
        if not before:
            raise UserError(
                f"--resume: {self.path} is finished, but its config.yaml, which says with which "
                "flags, is gone or damaged; put it back, or give --overwrite to replace the run"
            )
        now = parse_yaml(config, "the configuration")
        before = {name: value for name, value in before.items() if name in now}  # others are gone
        differing = [
            name
            for name in differing_flags(now, before, same_contents(self.path, now))
            if name not in _OF_UNFINISHED
            and not is_same(self.path, name, now.get(name), before[name])
        ]
        if differing:
            raise UserError(
                f"--resume: {self.path} is finished, and was run with {_flags(before, differing)}; "
                "give the same, or --overwrite to replace it"
            )
        if changed := changed_files(self.path, now):
            raise UserError(
                f"--resume: {self.path} is finished, and was run with another content of "
                f"{listed(changed)}; give it as it was, or --overwrite to replace it"
            )

    def _own_contents(self) -> Contents:
        """The content of the folder.

        Raises:
            UserError: if anything of it was not written by a run.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} exists and is no folder; give another name")
        contents = Contents(self.path)
        if contents.foreign == ["analysis"] and (self.path / "analysis/inspect" / MARK).exists():
            raise UserError(
                f"{self.path} holds the inspection of a model that has no record; give another name"
            )
        if contents.foreign:
            names = ", ".join(shown(name, 60) for name in contents.foreign[:3])
            more = ", ..." if len(contents.foreign) > 3 else ""
            raise UserError(
                f"{self.path} exists and is no record (it holds {names}{more}); give another name, "
                "or move it away"
            )
        return contents

    @property
    def _lock(self) -> Lock:
        return Lock(self.path)

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT_FILE

    @property
    def _replaced(self) -> "RunFolder":
        """What this run replaces, until it is finished."""
        return RunFolder(self.path.with_name(replaced_name(self.path.name)))

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside, a run writes the claimed folder; at the end, what it replaced is gone.

        If it ends in another way, and without a checkpoint, what it replaced is there again. With
        one it can be resumed, and what it replaced is kept. A run that has diverged cannot.
        """
        try:
            yield
        except BaseException as error:
            if distributed.is_main():
                if isinstance(error, Diverged) and self._names is not None:  # it has begun
                    with contextlib.suppress(OSError):
                        self.checkpoint.unlink(missing_ok=True)
                if not self.is_done and not self.checkpoint.exists():
                    with contextlib.suppress(UserError, OSError):  # the error itself is told
                        if self._put_back():
                            logger.warning("warning: %s: the earlier run is there again", self.path)
                if self._replaced.path.is_dir():
                    logger.warning(
                        "warning: the run that was to be replaced is kept in %s",
                        self._replaced.path,
                    )
            raise
        finally:
            defer_signals(False)  # of a method that was left in the middle of a round
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

    def _put_back(self) -> bool:
        """Gives the folder its earlier content; returns whether a run was to replace it."""
        if not self._replaced.path.is_dir():
            return False
        self._own_contents().remove()
        if self.path.exists():
            self.path.rmdir()
        locks.patiently(lambda: os.rename(self._replaced.path, self.path))
        return True

    def _drop_replaced(self) -> None:
        """Removes what a finished run has replaced; if it cannot, a warning says so."""
        if not self._replaced.path.is_dir():
            return
        try:
            self._replaced._own_contents().remove()
            self._replaced.path.rmdir()
        except (UserError, OSError) as error:
            logger.warning("warning: what this run replaced was not removed: %s", error)

    def _drop_checkpoint(self) -> None:
        """Removes the checkpoint of a finished run; if it cannot, a warning says so."""
        try:
            self.checkpoint.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("warning: %s was not removed: %s", self.checkpoint, error.strerror)

    def _refuse_links(self) -> None:
        """Raises UserError if a write would go elsewhere; a stranger may have made the folder."""
        inside = self.path.iterdir() if self.path.is_dir() else ()
        for path in (self.path, self._replaced.path, *inside):
            refuse_link(path)

    def lock(self) -> bool:
        """Keeps the folder for this process, see `Lock.take`."""
        return self._lock.take()

    def release(self) -> None:
        """Gives it back."""
        self._lock.release()

    @property
    def is_taken(self) -> bool:
        """Whether another process is writing it."""
        return self._lock.is_taken

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
            "conditions": self._origin.conditions,
            "model_sha256": model_sha256,
            "warnings": self.warnings,
        }
        if resume and distributed.from_main(self.checkpoint.exists()):
            checkpoint = self._resumed(config)
            self._begin([*dict.fromkeys([*Contents(self.path).names, self.log.name])])
            return checkpoint
        with distributed.main_alone() as is_mine:
            if is_mine:
                self._set_aside()
                with writable(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                self._begin([CONFIG_FILE, self.log.name])
                self.write_text(CONFIG_FILE, config)
        if resume:
            logger.info("--resume: %s has no checkpoint; the run starts anew", self.path)
        return None

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
            self.checkpoint, "a checkpoint of this program", "give --overwrite to start anew"
        ):
            content: dict[str, Any] = {**CHECKPOINT.validate_python(load_tensors(self.checkpoint))}
        added = {name: content.pop(name, None) for name in (*self._added, "sources")}
        now = self._added["flags"]
        before = added["flags"] or read_yaml(self.path / CONFIG_FILE)  # earlier ones had none
        sources = added["sources"] or {}
        same = {what for what in sources if self._origin.sources.get(what) == sources[what]}
        if added["model_sha256"] and added["model_sha256"] == self._added["model_sha256"]:
            same.add("--model")
        if differing := differing_flags(now, before, same):
            raise UserError(
                f"--resume: {self.path} was run with {_flags(before, differing)}; give the same"
            )
        others = [what for what in sources if what not in same]
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
            f"{shown(name, 60)} {shown(value, 60)}, now {conditions.get(name, 'unknown')}"
            for name, value in (added["conditions"] or {}).items()
            if conditions.get(name) != value
        ]
        self.warnings += added["warnings"] or []
        if changed:
            self.warnings.append(
                f"--resume: begun with {'; '.join(changed)}; the last digits may differ"
            )
            logger.warning("warning: %s", self.warnings[-1])
        with contextlib.suppress(UserError):
            expected = {name: now.get(name) for name in recipe_of(before)}
            if recipe_of(read_yaml(self.path / CONFIG_FILE)) == expected:
                return content
        self.write_text(CONFIG_FILE, config)  # it was changed or emptied, or names other places
        return content

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Keeps plain data and tensors from which the run can go on, in place of earlier ones."""
        sources = {"sources": self._origin.sources} if self._added else {}
        self.write_tensors(self.checkpoint.name, {**content, **self._added, **sources})

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

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], name: str = METRICS_FILE) -> None:
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
        """Says that the run is done. JSON has neither NaN nor infinity; they become null."""
        text = json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(SUMMARY, text + "\n")
        self._drop_checkpoint()


def _flags(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some flags as they are given: `--lr 0.1, --index null`."""
    given = [(shown(name, 60), shown(in_one_line(values[name]), 200)) for name in names[:20]]
    return ", ".join(f"--{name} {value}" for name, value in given)


def _finite(value: Any) -> Any:
    """The same with None in the place of each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_plain(path: Path, content: Any) -> None:
    """`torch.save`, with a file that depends only on the content."""
    with path.open("wb") as file:  # given a path, torch would put its name into the file
        torch.save(content, file)


def _write_text(path: Path, text: str) -> None:
    # Names of bytes that are no UTF-8 have halves of characters, in JSON and YAML \udc80.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
