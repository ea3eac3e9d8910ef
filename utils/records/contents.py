"""The files in a run's folder, and which of them a run of this program wrote.

`run.json`, the mark, lists the names of the files that a run has written or is about to write. All
other files belong to the user, and are never removed. Runs of earlier versions have no mark; their
files are recognised by their content.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from utils.errors import UserError
from utils.files import CONFIG_FILE, MARK, is_stray, read_object, read_text, replaced
from utils.plain import read_yaml

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # of a run
_REPLACED = re.compile(rf"\.{NAME.pattern}\.replaced")
# The files of a run that others read; the summary is of every kind of run.
ATTACK_RESULT, POISON, DEFENSE_RESULT = "attack_result.pt", "poison.pt", "defense_result.pt"
SUMMARY, METRICS_FILE, CHECKPOINT_FILE = "summary.json", "metrics.csv", "checkpoint.pt"
RESULTS = ("defense", "analysis")  # folders in an attack's record that hold results
_LARGEST = 1 << 16  # bytes of a mark
_FILE = r"^[\w][\w .,=()+-]{0,199}$"


@with_config(ConfigDict(extra="forbid", strict=True))
class _Mark(TypedDict):
    """The content of `run.json`."""

    written_by: Literal["sau"]
    files: Annotated[list[Annotated[str, Field(pattern=_FILE)]], Field(max_length=500)]


_MARK = TypeAdapter(_Mark)

# All that was written by versions without a mark.
_EARLIER = frozenset(
    (
        *("config.yaml", "log.txt", "summary.json", "checkpoint.pt", "metrics.csv", "phases.csv"),
        *("attack_result.pt", "poison.pt", "curves.png", "trigger.png"),
        *("defense_result.pt", "clean_index.txt", "poisoned_index.txt", "before_after.png"),
        *("perturbations.png", "triggers.png", "norms.csv", "levels.csv", "pruned.csv"),
    )
)
_EARLIER_RESULTS = ("attack_result.pt", "defense_result.pt")


class Contents:
    """The files in a run's folder; links are not followed.

    Args:
        folder: of the run; it need not exist.
        is_result: whether it is a result inside of a record; a result holds no other results.

    Attributes:
        names: of the files that the run has written or was about to write, without the mark.
        locks: of the results inside, also those of killed processes.
        foreign: files that no run wrote, by path in the folder; if there are any, nothing may be
            removed.

    Raises:
        OSError: if the folder cannot be read, or is none.
    """

    def __init__(self, folder: Path, is_result: bool = False) -> None:
        self.folder = folder
        self.locks: list[Path] = []
        self.foreign: list[str] = []
        self._files: list[Path] = []
        self._results: list[Contents] = []
        self._homes: list[Path] = []
        entries = _entries(folder)
        files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        listed = _listed(folder) if MARK in files else None
        self._is_marked = listed is not None
        self.names: list[str] = _of_earlier(folder, files) if listed is None else listed
        expected = {*self.names, MARK} if self._is_marked else set(self.names)
        for entry in entries:
            path = folder / entry.name
            if entry.name in files and (
                entry.name in expected or is_stray(entry.name, {*self.names, MARK})
            ):
                self._files.append(path)
            elif (
                self.names
                and not is_result
                and entry.name in RESULTS
                and entry.is_dir(follow_symlinks=False)
            ):
                self._look_into(path)
            else:
                self.foreign.append(entry.name)

    def _look_into(self, home: Path) -> None:
        """Looks at a folder that holds results, and their locks."""
        self._homes.append(home)
        for entry in _entries(home):
            path = home / entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder and (NAME.fullmatch(entry.name) or _REPLACED.fullmatch(entry.name)):
                result = Contents(path, is_result=True)
                self._results.append(result)
                self.foreign += [f"{home.name}/{entry.name}/{name}" for name in result.foreign]
            elif _is_lock(entry):
                self.locks.append(path)
            else:
                self.foreign.append(f"{home.name}/{entry.name}")

    @property
    def has_finished_results(self) -> bool:
        """Whether a result inside, e.g. a defense's, is finished."""
        return any((result.folder / SUMMARY).exists() for result in self._results)

    def remove(self) -> None:
        """Removes all files of the run, and of the results inside, one by one.

        The mark is removed last, so if this process is killed in between, the remaining files still
        belong to a run. The summary is removed first, so the rest is no finished run.

        Raises:
            OSError: if the system refuses.
        """
        if self.names and not self._is_marked:
            write_mark(self.folder, self.names)
        for path in sorted(self._files, key=lambda path: path.name != SUMMARY):
            if path.name != MARK:
                path.unlink(missing_ok=True)
        for result in self._results:
            result.remove()
            result.folder.rmdir()
        for lock in self.locks:
            lock.unlink(missing_ok=True)
        for home in self._homes:
            home.rmdir()
        (self.folder / MARK).unlink(missing_ok=True)

    def remove_strays(self) -> None:
        """Removes what killed processes were writing, of the run's own files.

        Raises:
            OSError: if the system refuses.
        """
        for path in self._files:
            if path.name not in (*self.names, MARK):
                path.unlink(missing_ok=True)


def replaced_name(name: str) -> str:
    """The name of the folder that keeps a finished run until another one has replaced it."""
    return f".{name}.replaced"


def said_of_replaced(folder: Path) -> str:
    """For the message that a run is not finished: where the one is that it replaces, if any."""
    kept = folder.with_name(replaced_name(folder.name))
    return f" (the run that it replaces is kept in {kept})" if os.path.isdir(kept) else ""


def incomplete_copy(folder: Path) -> UserError:
    """The error about files of a record without those that say what they are."""
    return UserError(
        f"{folder}: has no summary.json, so it is no whole record; if it is a copy of one, copy "
        "the whole folder, else give another one"
    )


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's summary; empty if it cannot be read."""
    try:
        return read_object(folder / SUMMARY)
    except (OSError, ValueError):
        return {}


def object_in(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object in a run's summary; empty if it is none."""
    content = summary.get(name)
    return content if isinstance(content, dict) else {}


def is_file_name(name: str) -> bool:
    """Whether a mark may list a name."""
    return re.match(_FILE, name) is not None and not name.endswith("\n")


def write_mark(folder: Path, names: Sequence[str]) -> None:
    """Writes the mark of a run.

    Raises:
        OSError: if it cannot be written.
    """
    with replaced(folder / MARK) as partial:
        text = json.dumps({"written_by": "sau", "files": list(names)}, indent=2, ensure_ascii=False)
        partial.write_text(f"{text}\n", encoding="utf-8")


def _listed(folder: Path) -> list[str] | None:
    """The names that the mark lists; None if the file is no mark."""
    try:
        return _MARK.validate_json(read_text(folder / MARK, _LARGEST))["files"]
    except (OSError, ValueError):
        return None


def _of_earlier(folder: Path, files: Collection[str]) -> list[str]:
    """The files of a run without a mark; none unless its own files say that it is one.

    A finished one has a summary with the sha256 of its result, an interrupted one a checkpoint and
    a configuration with our flags.

    Args:
        files: names of all regular files in the folder.
    """
    is_run = False
    if SUMMARY in files:
        is_run = _has_hashes(folder)
    elif {CONFIG_FILE, CHECKPOINT_FILE} <= set(files):
        try:
            values = read_yaml(folder / CONFIG_FILE)
        except UserError:
            values = {}
        is_run = {"checkpoint_every", "save_folder_name", "record_path"} <= set(values)
    return sorted(_EARLIER & set(files)) if is_run else []


def _has_hashes(folder: Path) -> bool:
    files = object_in(summary_of(folder), "files")
    return any(name in files for name in _EARLIER_RESULTS) and all(
        re.fullmatch(r"[0-9a-f]{64}", str(digest)) for digest in files.values()
    )


def _is_lock(entry: os.DirEntry[str]) -> bool:
    """Whether it is the lock of a run: an empty file `.NAME.lock`."""
    name = re.fullmatch(r"\.(.+)\.lock", entry.name)
    return (
        name is not None
        and NAME.fullmatch(name[1]) is not None
        and entry.is_file(follow_symlinks=False)
        and entry.stat(follow_symlinks=False).st_size == 0
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; nothing if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
