"""What is wrong with a grid's cells, said before the first one starts."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmark.cells import Cell, cells_in, config_class, fields, scripts
from benchmark.grid import OF_GRID, Grid
from models import check_name
from utils.config import FILES
from utils.errors import UserError, listed, quoted, suggestion
from utils.files import CONFIG_FILE
from utils.plain import parse_yaml, read_yaml
from utils.records import places
from utils.records.contents import ATTACK_RESULT, SUMMARY, object_in, summary_of
from utils.records.recipe import FREE_TO_CHANGE, changed_files, is_same
from utils.values import items_of

_FREE = (*FREE_TO_CHANGE, "result_file", "eval_every")  # do not change what comes out
_OF_RECORD = ("dataset", "model")  # of a defense or an analysis, repeat what the record says


def cells_of(grid: Grid, root: Path, is_run: bool = True, is_here: bool = True) -> list[Cell]:
    """Every run of a grid, each attack followed by its defenses.

    Args:
        root: folder of the grid's records.
        is_run: whether the cells are to be run, so that what they read must be there.
        is_here: whether they are run on this machine, which must then have the devices.

    Raises:
        UserError: naming every flag that its script does not take, everything that is not there,
            and every record there that was made with other flags.
    """
    cells = cells_in(grid, root)
    attacks = {cell.name: cell for cell in cells if cell.attack is None}
    taken = {
        name
        for result, flags in grid.defenses.items()
        for name in fields("defense", str(flags.get("script", result)))
    }
    problems = [
        f"defense_flags: {name}: no defense of the grid takes it{suggestion(name, taken)}"
        for name in grid.defense_flags
        if name not in taken
    ]
    checked: set[str] = set()  # a defense is given the same flags for every attack
    resolved: dict[str, dict[str, Any]] = {}
    for cell in cells:
        given = {name: value for name, value in cell.flags.items() if name not in OF_GRID}
        key = f"{cell.script} {given}"
        problems += _problems(cell) if key not in checked else []
        checked.add(key)
        if not cell.is_done:
            problems += _problems_of_name(cell)
            if is_run:
                problems += [*_lacking_files(cell), *_lacking_inputs(cell)]
                problems += [*_lacking_controls(cell, attacks), *_lacking_device(cell, is_here)]
                problems += _lost_files(cell)
        problems += _differences(cell, resolved)
    count = Counter(cell.name for cell in cells)
    problems += [
        f"{name}: {many} cells of the grid have this name, since what tells them apart is not in "
        "it; give values that differ in their first six digits, and networks with other letters"
        for name, many in count.items()
        if many > 1
    ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return cells


def _problems(cell: Cell) -> list[str]:
    """The errors that the cell's script would report about its flags."""
    folder, name = _script(cell)
    config = config_class(folder, name)
    if config is None:
        names = ", ".join(scripts(folder))
        return [f"{cell.script}: there is no such script; {folder} has {names}"]
    flags = dict(cell.flags)
    try:
        config.load(flags.pop("dataset", None), **flags)  # a defense has it from the record
    except UserError as error:
        return [f"{cell.script}: {text.removeprefix('override: ')}" for text in error.problems]
    return []


def _problems_of_name(cell: Cell) -> list[str]:
    """The errors that the cell's script would report about the name of its folder."""
    name = cell.folder.name
    try:
        if cell.attack is None:
            places.attack_folder(name, cell.folder.parent)
        elif cell.script.startswith("defense/"):
            places.defense_folder(cell.attack.folder, name)
        else:
            places.analysis_folder(cell.attack.folder, name)
    except UserError as error:
        said = [text.removeprefix("--save_folder_name: ") for text in error.problems]
        return [f"{cell.name}: {text}" for text in said]
    return []


def _lacking_files(cell: Cell) -> list[str]:
    """The errors about files that the cell's flags name and that are not there."""
    return [
        f"{cell.script}: --{flag}: {cell.flags[flag]} is not there; give a file that is"
        for flag in sorted(FILES)
        if cell.flags.get(flag) is not None and not os.path.isfile(str(cell.flags[flag]))
    ]


def _lacking_inputs(cell: Cell) -> list[str]:
    """The errors about a network, or a folder of images, that is not there."""
    problems = []
    if "model" in cell.flags:
        try:
            check_name(str(cell.flags["model"]))
        except UserError as error:
            problems += [f"{cell.script}: {text}" for text in error.problems]
    if cell.flags.get("dataset") == "folder":
        place = cell.flags.get("dataset_path")
        if place is None or not os.path.isdir(str(place)):
            what = "a value is needed" if place is None else f"{place} is no folder"
            problems.append(
                f"{cell.script}: --dataset_path: {what}; give the one that holds train/ and test/"
            )
    return problems


def _lacking_controls(cell: Cell, attacks: Mapping[str, Cell]) -> list[str]:
    """The errors about clean models that an analysis names.

    Args:
        attacks: the records that the grid makes, by name.
    """
    problems = []
    for flag in ("clean_record", "clean_records"):
        given = cell.flags.get(flag) or []
        is_one = flag == "clean_record" and isinstance(given, str)  # a path may have commas
        for name in map(str, [given] if is_one else items_of(given)):
            where = f"{cell.script}: --{flag}: {name}"
            if name in attacks and not attacks[name].is_clean:
                problems.append(f"{where} is the record of an attack; give one of prototype")
            elif name not in attacks and not _is_record(name, str(cell.flags["record_path"])):
                problems.append(
                    f"{where} is no record; give the grid the attack prototype and leave the flag "
                    "out, or train a clean model first: attack/prototype.py"
                )
    return problems


def _lost_files(cell: Cell) -> list[str]:
    """The errors about files of finished runs that the cell will read; their content it checks."""
    paths = [
        needed.folder / name
        for needed in cell.needed
        if needed.is_done
        for name in object_in(summary_of(needed.folder), "files")
    ]
    return [
        f"{path}: is gone or empty; restore it, or delete the folder"
        for path in paths
        if not (path.is_file() and path.stat().st_size)
    ]


def _is_record(name: str, root: str) -> bool:
    try:
        return places.existing_folder(name, Path(root), "--clean_record") is not None
    except UserError:  # a link
        return False


def _lacking_device(cell: Cell, is_here: bool) -> list[str]:
    """The error about a device that torch does not know, or that is not there.

    Args:
        is_here: whether the cell will run on this machine.
    """
    name = cell.flags.get("device", "auto")
    if name == "auto" or not isinstance(name, str):
        return []
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"{cell.script}: --device: {name} is no device; give auto, cpu or cuda, or mps"]
    if is_here and device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        return [f"{cell.script}: --device: {name} is not usable here; give auto or cpu"]
    return []


def _script(cell: Cell) -> tuple[str, str]:
    """Folder and name of the cell's script."""
    folder, _, name = cell.script.removesuffix(".py").partition("/")
    return folder, name


def _resolved(cell: Cell, flags: Mapping[str, Any], resolved: dict[str, dict[str, Any]]) -> Any:
    """The whole configuration that the cell's script makes of some flags; empty if it refuses them.

    Args:
        resolved: what was resolved before, to which this is added.
    """
    dataset = (cell.attack or cell).flags["dataset"]
    given = {n: v for n, v in flags.items() if n not in (*OF_GRID, "dataset")}
    key = f"{cell.script} {dataset} {given}"
    if key not in resolved:
        config = config_class(*_script(cell))
        try:
            text = "" if config is None else config.load(dataset, **given).dump()
        except UserError:
            text = ""  # said elsewhere
        resolved[key] = parse_yaml(text, cell.script)
    return {**resolved[key], **{n: v for n, v in flags.items() if n in OF_GRID and resolved[key]}}


def _other_values(
    cell: Cell, before: Mapping[str, Any], resolved: dict[str, dict[str, Any]]
) -> list[str]:
    """The flags, also those that the grid leaves to their defaults, with which it was not made.

    A flag that the record's version did not have was at its default. `auto` leaves a choice to the
    machine, so that any choice is one of it.

    Args:
        before: the record's configuration.
    """
    free = _FREE if cell.attack is None else (*_FREE, *_OF_RECORD)
    now = _resolved(cell, cell.flags, resolved)
    if set(now) - set(before):
        before = {**_resolved(cell, {}, resolved), **before}
    return [
        f"{name} {quoted(before[name])}, not {quoted(value)}"
        for name, value in now.items()
        if name not in (*free, *cell.inputs)
        and name in before
        and value != "auto"
        and not is_same(cell.folder, name, value, before[name])
    ]


def _differences(cell: Cell, resolved: dict[str, dict[str, Any]]) -> list[str]:
    """How a finished record differs from what the grid asks for.

    An analysis of other results than those of the grid is made anew, see `Cell.is_outdated`.
    """
    if not cell.is_finished:
        return []
    path = cell.folder / CONFIG_FILE
    try:
        before = read_yaml(path)
    except UserError:
        return [f"{path}: cannot be read; restore it, or delete the folder"]
    if differing := _other_values(cell, before, resolved):
        return [
            f"{cell.folder}: was made with {listed(differing, limit=220)}; delete it, or give the "
            "grid another name"
        ]
    if changed := changed_files(cell.folder, cell.flags):
        return [
            f"{cell.folder}: was made with another content of {', '.join(changed)}; delete it, or "
            "give the grid another name"
        ]
    summary = summary_of(cell.folder)
    if not summary:
        return [f"{cell.folder / SUMMARY}: cannot be read; restore it, or delete the folder"]
    attack = None if cell.attack is None else _sha256s(cell.attack.folder)
    if attack is not None and _sha256s(cell.folder) != attack:
        return [f"{cell.folder}: is of another attack than the record that is there; delete it"]
    if cell.others and not isinstance(summary.get("models"), dict):
        return [f"{cell.folder}: does not say what it was made with; delete it"]
    return []


def _sha256s(folder: Path) -> str | None:
    """sha256 of the attack's model, which a defense's summary also has."""
    summary = summary_of(folder)
    return summary.get("attack_sha256") or object_in(summary, "files").get(ATTACK_RESULT)
