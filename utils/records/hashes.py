"""sha256 of a run's files: written into its summary, and compared with it."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, reason_of, shown
from utils.files import file_sha256, read_text
from utils.records import schema
from utils.records.contents import DEFENSE_RESULT, SUMMARY
from utils.records.folders import RunFolder


def file_hashes(folder: RunFolder, *names: str) -> dict[str, str]:
    """sha256 of those of the named files that exist, for `summary.json`."""
    paths = [folder.path / name for name in names]
    return {path.name: file_sha256(path) for path in paths if path.exists()}


@contextlib.contextmanager
def unchanged(path: Path, sha256: str | None) -> Iterator[None]:
    """Inside, a file is read again, which has to be the one that the run began with.

    Args:
        sha256: of its content when the run began.

    Raises:
        UserError: if it is another one by now, or gone, also in place of what was raised inside.
    """

    def check() -> None:
        try:
            is_same = file_sha256(path) == sha256
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(f"{path}: was changed since the run began; run it again")

    try:
        yield
    except (OSError, UserError):
        check()
        raise
    check()


def checked_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of the named files of a finished run that exist; `summary.json` says the same.

    Raises:
        UserError: if a file is missing or another one than the summary says, or cannot be read; if
            it is a run of another kind, which has no such file.
    """
    try:
        summary = json.loads(read_text(folder / SUMMARY))
        hashes = {
            name: file_sha256(folder / name) for name in names if os.path.lexists(folder / name)
        }
        files = schema.check_files(summary)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: has no readable summary.json or files ({reason_of(error)}), so it is no "
            "finished run; run it again, or give another folder"
        ) from None
    if names[0] not in files and names[0] not in hashes:
        _refuse_other_kind(folder, summary, names[0])
    for name in names:
        if name in files and name not in hashes:
            raise UserError(
                f"{folder / name}: is missing, though summary.json has it; put it back, or run it "
                "again"
            )
        if hashes.get(name) != files.get(name) or names[0] not in hashes:
            raise UserError(
                f"{folder / name}: is not the file that summary.json describes; run it again"
            )
    return hashes


def _refuse_other_kind(folder: Path, summary: Any, wanted: str) -> None:
    """Raises UserError if the summary is of a run that has no such file."""
    kinds = {"analysis": "the result of an analysis", "defense": "the result of a defense"}
    kinds["attack"] = "the record of an attack"  # which the other ones name, too
    said = summary if isinstance(summary, Mapping) else {}
    name = next((name for name in kinds if isinstance(said.get(name), str)), None)
    if name is None or f"{name}_result.pt" == wanted:
        return
    record = folder if name == "attack" else Path(os.path.abspath(folder)).parents[1]
    give = record / "defense" / "<name>" if wanted == DEFENSE_RESULT else record
    raise UserError(
        f"{folder}: is {kinds[name]} ({shown(said[name], 60)}), which has no {wanted}; give {give}"
    )
