"""Recipes: the flags and files on which a run's numbers depend, and whether two runs have one."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from utils.config import OF_ONE_RUN
from utils.errors import UserError, shown
from utils.files import read_object
from utils.records.checkpoint import files_of
from utils.records.contents import SUMMARY, object_in, summary_of

# Flags that say where a run writes, and when, but not what comes out.
FREE_TO_CHANGE = (*OF_ONE_RUN, "checkpoint_every", "record_path", "save_folder_name")
# Flags that say where a run reads and writes, or what is drawn by chance.
NOT_OF_RECIPE = (
    *FREE_TO_CHANGE,
    *("random_seed", "result_file", "dataset_path", "device", "eval_every", "deterministic"),
)
# Lists of names whose order says nothing of what comes out.
SETS = ("defenses", "clean_records")
# Flags that earlier results lack, with the value that they would have there.
_LATER = {"exact_sar": False}


def recipe_sha256(values: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> str:
    """Of a configuration without its seed, and without flags that say where it runs and writes.

    A flag that came later does not count at the value that all runs before it had: those before and
    after are of one recipe.

    Args:
        inputs: as `ending.inputs_of` gives them; if a flag names a file, its content counts, and
            not its place.
    """
    recipe = {
        name: value
        for name, value in values.items()
        if name not in NOT_OF_RECIPE and not (name in _LATER and value == _LATER[name])
    }
    for flag, sha256 in (inputs or {}).items():
        name = flag.removeprefix("--")
        if flag.startswith("--") and recipe.get(name) is not None:
            # The name of a user's file may be that of several networks.
            function = recipe[name].rpartition(":")[2] if name == "model" else ""
            recipe[name] = f"{sha256} {function}".strip()
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def require_method(folder: Path, before: object, name: str, what: str = "a result") -> None:
    """Raises UserError if a finished run to resume is of another method.

    Args:
        before: the method that its summary names.
        name: the one that is to be run.
        what: the folder is, for the message.
    """
    if before != name:
        raise UserError(
            f"--resume: {folder} is {what} of {shown(before, 60)}; give another "
            "--save_folder_name, or --overwrite to replace it"
        )


def is_same(folder: Path, name: str, given: Any, before: Any) -> bool:
    """Whether a finished run had the value of a flag that is given now.

    The order of `SETS` does not count.

    Args:
        before: as the run's config.yaml has it, where a target that was given by the name of its
            class is a label; summary.json has the name.
    """
    if _unordered(name, given) == _unordered(name, before):
        return True
    if name != "attack_target":
        return False
    try:
        return given == read_object(folder / SUMMARY).get("attack_target_name", str(before))
    except (OSError, ValueError):
        return False


def changed_files(folder: Path, flags: Mapping[str, Any]) -> list[str]:
    """The flags, and the files that they name, whose content a finished run did not read.

    A run whose summary does not say what it read has read the same.
    """
    read = object_in(summary_of(folder), "inputs")
    now = files_of({name: value for name, value in flags.items() if f"--{name}" in read})
    return [
        f"{flag} {shown(flags[flag.removeprefix('--')], 200)}"
        for flag, sha256 in now.items()
        if read[flag] != sha256
    ]


def same_contents(folder: Path, flags: Mapping[str, Any]) -> set[str]:
    """What has the content that a finished run read, wherever it is now.

    The record and the models are compared by those who call `RunFolder.claim`.
    """
    summary = summary_of(folder)
    read = object_in(summary, "inputs")
    now = files_of({name: value for name, value in flags.items() if f"--{name}" in read})
    return {
        "the record",
        *(f"the {name}" for name in object_in(summary, "models")),
        *(flag for flag, sha256 in now.items() if read[flag] == sha256),
    }


def differing_flags(
    now: Mapping[str, Any], before: Mapping[str, Any], same: Collection[str]
) -> list[str]:
    """The flags whose value is another one than before, so that the run would be another one.

    A flag that did not exist before has its default.

    Args:
        same: what has the same content as before.
    """
    return [
        name
        for name in sorted(recipe_of(before))
        if _unordered(name, before[name]) != _unordered(name, now.get(name))
        and not _may_be_same(name, now.get(name), before[name], same)
    ]


def _may_be_same(name: str, given: Any, before: Any, same: Collection[str]) -> bool:
    """Whether another value of a flag stands for what it did before; see `differing_flags`."""
    if name in ("result_file", "dataset_path"):
        return bool(same)
    if given is None or before is None:
        return name in ("dataset", "model")  # found in the record, and compared with it
    if name == "clean_record":
        return "the clean model" in same
    if name == "clean_records":  # tables have the names, and steps the content
        return sorted(_last_parts(given)) == sorted(_last_parts(before))
    if name == "model":  # file and function
        return "--model" in same and _last_parts(given) == _last_parts(before)
    return f"--{name}" in same


def _unordered(name: str, value: Any) -> Any:
    """The value of a flag, by which it is compared."""
    return sorted(map(str, value)) if name in SETS and isinstance(value, list) else value


def _last_parts(value: Any) -> list[str]:
    """The names at the ends of paths."""
    return [Path(str(path)).name for path in (value if isinstance(value, list) else [value])]


def recipe_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags on which a run's numbers may depend."""
    return {name: value for name, value in flags.items() if name not in FREE_TO_CHANGE}
