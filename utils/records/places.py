"""Where records are, and what they may be called."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import locks
from utils.errors import UserError, listed, nearest
from utils.files import ROOT, TABLE, as_path, read_text, refuse_link
from utils.records.contents import ATTACK_RESULT, NAME, said_of_replaced
from utils.records.folders import LONGEST_NAME, RunFolder

# What Windows takes for a device, or for another name.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|.*\.", re.IGNORECASE)
# In tables and figures, models beside those that defenses purified: the model before the defense, a
# model without a backdoor, and the backdoored model tuned with the true labels.
BEFORE, CLEAN, EXACT = "before", "clean model", "exact purification"


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
    refuse_link(record / "defense")
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
    refuse_link(record / "analysis")
    return RunFolder(record / "analysis" / _checked_name(name))


def is_usual(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether an analysis stands under its own name; one under another name has other settings."""
    return bool(summary.get("analysis") == folder.name)


def name_in_tables(attack: str, label_map: str | None) -> str:
    """What tables and figures call an attack; all-to-all is another attack."""
    return f"{attack}_all2all" if label_map == "all2all" else attack


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

    Returns:
        A path that ends with the folder's own name, by which it is locked.

    Raises:
        UserError: naming the flag, if the record is a link, or if only the one is there that it was
            about to replace when its process was killed.
    """
    name = name.rstrip("/" + os.sep) or name
    folder = (root or ROOT / "record") / name
    if not (NAME.fullmatch(name) and os.path.isdir(folder)):
        if not os.path.isdir(name):  # also for a name that cannot be one
            _refuse_replaced(folder, flag)
            _refuse_replaced(Path(name), flag)
            return None
        folder = Path(name)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if folder.is_symlink():
        raise UserError(f"{flag}: {folder} is a link; give the folder that it leads to")
    return folder if folder.name else None


def _refuse_replaced(folder: Path, flag: str) -> None:
    """Raises UserError if a folder is not there, but the finished run that it was to replace is."""
    if NAME.fullmatch(folder.name) and (kept := said_of_replaced(folder)):
        raise UserError(
            f"{flag}: {folder} was about to be replaced, and is not there{kept}; the command of "
            "its attack with --resume puts it back"
        )


def find_record(name: str, root: Path | None, flag: str = "--result_file") -> Path:
    """The folder of a record's name, or an existing folder.

    Args:
        flag: or argument that names it, for messages.

    Raises:
        UserError: if there is none, naming those that exist.
    """
    folder = existing_folder(name, root, flag)
    if folder is not None:
        return folder
    records = root or ROOT / "record"
    folders = [path.parent for path in records.glob(f"[!.]*/{ATTACK_RESULT}")]
    # Others are given as folders.
    names = sorted(x.name for x in folders if NAME.fullmatch(x.name) and not x.is_symlink())
    is_name = NAME.fullmatch(name) or os.path.isdir(name)
    where = "" if is_name else f", and there is no folder {os.path.abspath(name)}"
    raise UserError(
        f"{flag}: {name} is no record in {records}{where}; "
        + (
            f"give one of {listed(nearest(name, names), limit=LONGEST_NAME)}"
            if names
            else "run an attack first, e.g. attack/badnet.py"
        )
    )


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


def no_records(under: object) -> UserError:
    """The error that `--under` names no folder."""
    return UserError(f"--under: {under} is no folder; give one that holds records")


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


def refuse_foreign(path: Path, start: str | tuple[str, ...], flag: str) -> None:
    """Checks that a file is not there yet, or is an earlier one of the same script.

    Args:
        start: what the script's files begin with, in one way or several.
        flag: that names the place.

    Raises:
        UserError: if there is another file.
    """
    try:
        if not os.path.lexists(path) or read_text(path, TABLE).startswith(start):
            return
    except (OSError, ValueError):
        pass
    raise UserError(f"{flag}: {path} was not written by this script; give another place")
