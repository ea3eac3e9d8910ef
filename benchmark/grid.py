"""A grid of runs in one YAML: datasets x models x attacks x pratio x seeds, and defenses on each.

    datasets: [digits]
    models: [preactresnet18]
    attacks:
      badnet:
      badnet_all2all: {script: badnet, attack_label_trans: all2all}
    defenses:
      ft:
      sau_short: {script: sau, n_rounds: 2}
    analyses:
      retune:
    seeds: [0, 1, 2]

The entries under a name are flags of its script; without `script`, the name is that of the script.
`attack_flags` are for all attacks, and `defense_flags` for all defenses that have these flags.
`pratios: [0.1, 0.05]` is one more axis; an attack with its own `pratio` ignores it. A defense that
looks at the poisoned training set is not run on a clean model, because that has no such set.

An analysis of a record runs when all of the record's defenses are done. Clean models of the grid
(`prototype`) with the same dataset and network are its controls, if it has some and its flags name
none: that of the same seed, or all of them. Of a clean model, only analyses run that need no
trigger.
"""

import dataclasses
import importlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from analysis import names as analyses
from attack import names as attacks
from defense import names as defenses
from models import is_user_file
from utils.config import Config, read_yaml
from utils.errors import UserError, listed, quoted, suggestion
from utils.files import read_object
from utils.records import places
from utils.records.checkpoint import files_of
from utils.records.contents import NAME
from utils.records.folders import FREE_TO_CHANGE, is_same
from utils.records.places import CLEAN
from utils.training.ending import paths_of

_OF_GRID = ("save_folder_name", "record_path", "result_file", "random_seed", "resume", "overwrite")
_FILES = ("index", "trigger_image")  # flags that name one
_FREE = (*FREE_TO_CHANGE, "result_file", "eval_every")  # do not change what comes out


def _unique(values: Any) -> Any:
    """Raises ValueError if an item of a list is there twice."""
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]} is there twice; give it once")
    return values


def _as_mapping(value: Any) -> Any:
    """A list of names as a mapping from names to no flags; a name without a value likewise."""
    if isinstance(value, list):
        if any(isinstance(name, dict | list) for name in value):
            raise ValueError("a list has names alone; leave out the dashes where names have flags")
        return {name: {} for name in _unique(value)}
    if isinstance(value, str):
        raise ValueError("give names in a list, like [badnet, blended], or names with flags")
    if isinstance(value, dict):
        return {name: {} if flags is None else flags for name, flags in value.items()}
    return value


def _not_of_grid(flags: dict[str, Any]) -> dict[str, Any]:
    for name in _OF_GRID:
        if name in flags:
            raise ValueError(f"{name} is set by the grid itself; remove it")
    return flags


Single = bool | int | float | str
Flags = Annotated[dict[str, Single | list[Single] | None], AfterValidator(_not_of_grid)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Axis = Annotated[dict[Name, Flags], BeforeValidator(_as_mapping), Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slurm(_Part):
    """The resources that a SLURM job of this grid asks for."""

    partition: str | None = None
    timeout_min: int = Field(60, ge=1)
    mem_gb: float | None = Field(None, gt=0)
    cpus_per_task: int = Field(2, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    array: bool = False
    cells_per_job: int = Field(1, ge=1)
    parallelism: int = Field(256, ge=1)
    directives: dict[str, bool | int | str] = {}

    @model_validator(mode="after")
    def _has_one_kind_of_jobs(self) -> "Slurm":
        if self.array and self.cells_per_job > 1:
            raise ValueError("array: true needs cells_per_job: 1; drop one of them")
        return self


class Grid(_Part):
    """The YAML file."""

    datasets: Axis
    models: Annotated[list[str], AfterValidator(_unique)] = Field(min_length=1)
    attacks: Axis
    pratios: Annotated[list[float], AfterValidator(_unique)] = []
    defenses: Annotated[dict[Name, Flags], BeforeValidator(_as_mapping)] = {}
    analyses: Annotated[dict[Name, Flags], BeforeValidator(_as_mapping)] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_unique)] = Field(
        min_length=1
    )
    attack_flags: Flags = {}
    defense_flags: Flags = {}
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _has_axes_that_count(self) -> "Grid":
        """An axis is in the names of records, so that no flag may say something else."""
        for_attacks = {
            "attack_flags": self.attack_flags,
            **{f"datasets.{name}": flags for name, flags in self.datasets.items()},
        }
        of_attacks = {f"attacks.{name}": flags for name, flags in self.attacks.items()}
        axes = {"dataset": "datasets", "model": "models"}
        for where, flags in {**for_attacks, **of_attacks}.items():
            for name, axis in axes.items():
                if name in flags:
                    raise ValueError(f"{where}: {name} is an axis of the grid; give it in {axis}")
        for name, flags in self.analyses.items():
            if "defenses" in flags:
                raise ValueError(f"analyses.{name}: defenses is set by the grid itself; remove it")
        for where, flags in for_attacks.items():
            if self.pratios and "pratio" in flags:
                raise ValueError(f"{where}: pratio is an axis of the grid; leave one of them out")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a script: an attack, or a defense or an analysis of an attack's record.

    Args:
        name: `<record>`, or `<record>/<result>`.
        script: `attack/badnet.py`, below the checkout.
        flags: name -> value.
        folder: where the run writes.
        attack: for a defense or an analysis, the cell whose record it reads.
        others: for an analysis, more cells whose results it reads.
    """

    name: str
    script: str
    flags: Mapping[str, Any]
    folder: Path
    attack: "Cell | None" = None
    others: tuple["Cell", ...] = ()

    @property
    def needed(self) -> tuple["Cell", ...]:
        """The cells that have to be done before it."""
        return self.others if self.attack is None else (self.attack, *self.others)

    @property
    def lacks(self) -> str | None:
        """What the cell needs and is not done: "attack", or a cell's name; None if nothing is."""
        missing = next((needed for needed in self.needed if not needed.is_done), None)
        if missing is None:
            return None
        return "attack" if missing is self.attack else missing.name

    def arguments(self) -> list[str]:
        """The script's arguments; the same for a fresh run and for the continuation of one."""
        values = {**self.flags, "resume": True}
        return [f"--{name}={_as_text(value)}" for name, value in values.items()]

    @property
    def is_done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def is_clean(self) -> bool:
        """Whether it trains a model without a backdoor."""
        return self.script == "attack/prototype.py"

    @property
    def kind(self) -> str:
        """The same for cells that take about as long: all but the seed and what is read."""
        attacked = self.attack or self
        where = [attacked.flags.get(name) for name in ("dataset", "model")]
        other = (*_OF_GRID, "defenses", "clean_record", "clean_records")
        flags = {name: value for name, value in self.flags.items() if name not in other}
        return f"{self.script} {where} {flags}"

    @property
    def seconds(self) -> float | None:
        """How long it took; None if it is not done, or does not say it."""
        seconds = _summary(self.folder).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def is_begun(self) -> bool:
        return (self.folder / "config.yaml").exists() and not self.is_done


def read_grid(path: Path) -> Grid:
    """Reads and checks a grid's file, except the flags.

    Raises:
        UserError: naming every key that is missing, unknown, or has a value that is not allowed.
    """
    try:
        return Grid.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(*(f"{path}: {_problem(problem)}" for problem in error.errors())) from None


def _problem(problem: Any) -> str:
    """What pydantic found at a place of the file, or in the file as a whole."""
    said = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return str(said)
    value = "" if problem["type"] == "missing" else f", not {_told(problem['input'])}"
    return f"{'.'.join(map(quoted, problem['loc']))}: {said}{value}"


def cells_of(grid: Grid, root: Path) -> list[Cell]:
    """Every run of a grid, each attack followed by its defenses.

    Args:
        root: folder of the grid's records.

    Raises:
        UserError: naming every flag that its script does not take, and every record there that was
            made with other flags.
    """
    cells = list(_cells(grid, root))
    cells += list(_analyses(grid, cells))
    taken = {
        name
        for result, flags in grid.defenses.items()
        for name in _fields("defense", str(flags.get("script", result)))
    }
    problems = [
        f"defense_flags: {name}: no defense of the grid takes it{suggestion(name, taken)}"
        for name in grid.defense_flags
        if name not in taken
    ]
    checked: set[str] = set()  # a defense is given the same flags for every attack
    for cell in cells:
        given = {name: value for name, value in cell.flags.items() if name not in _OF_GRID}
        key = f"{cell.script} {given}"
        problems += _problems(cell) if key not in checked else []
        checked.add(key)
        problems += [] if cell.is_done else [*_problems_of_name(cell), *_lacking_files(cell)]
        problems += _differences(cell)
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


def _cells(grid: Grid, root: Path) -> Iterator[Cell]:
    pratios: list[float | None] = [*grid.pratios] or [None]
    for dataset, model, attack, seed, pratio in itertools.product(
        grid.datasets, grid.models, grid.attacks, grid.seeds, pratios
    ):
        of_attack = dict(grid.attacks[attack])
        script = of_attack.pop("script", attack)
        if "pratio" in of_attack or script == "prototype":
            if pratio != pratios[0]:
                continue  # one record, whatever the axis
            pratio = None
        axes = [dataset, re.sub(r"[^A-Za-z0-9_.+]", "_", model), attack]
        axes += [] if pratio is None else [f"p{pratio:g}"]
        record = "-".join([*axes, f"s{seed}"])
        where: dict[str, str | int] = {"record_path": str(root), "random_seed": seed}
        attacked = Cell(
            record,
            f"attack/{script}.py",
            {
                "dataset": dataset,
                "model": model,
                **({} if pratio is None else {"pratio": pratio}),
                **grid.datasets[dataset],
                **grid.attack_flags,
                **of_attack,
                **where,
                "save_folder_name": record,
            },
            root / record,
        )
        yield attacked
        for result, flags in grid.defenses.items():
            flags = dict(flags)
            script = flags.pop("script", result)
            flags |= {"model": model} if ":" in model else {}  # the user's file is named again
            taken = _fields("defense", str(script))
            flags = {**{k: v for k, v in grid.defense_flags.items() if k in taken}, **flags}
            if attacked.is_clean and _sees(str(script), flags) == "poisoned":
                continue  # a clean model has no poisoned set to look at
            flags |= where
            flags |= {"result_file": record, "save_folder_name": result}
            folder = root / record / "defense" / result
            yield Cell(f"{record}/{result}", f"defense/{script}.py", flags, folder, attacked)


def _analyses(grid: Grid, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Every analysis of the records that some cells make; last, because they need the others."""
    attacked = [cell for cell in cells if cell.attack is None]
    for cell, (result, given) in itertools.product(attacked, grid.analyses.items()):
        flags: dict[str, Any] = dict(given)
        script = str(flags.pop("script", result))
        config = _config_class("analysis", script)
        results = [other for other in cells if other.attack is cell]
        if config is not None and (
            (cell.is_clean and getattr(config, "needs_trigger", False))
            or (not results and getattr(config, "needs_defenses", False))
        ):
            continue
        clean = [
            other
            for other in attacked
            if other is not cell
            and other.is_clean
            and all(other.flags[axis] == cell.flags[axis] for axis in ("dataset", "model"))
        ]
        same = [other for other in clean if other.flags["random_seed"] == cell.flags["random_seed"]]
        taken = _fields("analysis", script)
        controls: list[Cell] = []
        if "clean_records" in taken and "clean_records" not in flags and clean:
            controls, flags["clean_records"] = clean, [other.name for other in clean]
        elif "clean_record" in taken and "clean_record" not in flags and same:
            controls, flags["clean_record"] = same[:1], same[0].name
        model = str(cell.flags["model"])
        flags |= {"model": model} if ":" in model else {}
        flags |= {
            "defenses": [other.name.rpartition("/")[2] for other in results],
            "record_path": cell.flags["record_path"],
            "random_seed": cell.flags["random_seed"],
            "result_file": cell.name,
            "save_folder_name": result,
        }
        folder = cell.folder / "analysis" / result
        name = f"{cell.name}/analysis/{result}"
        others = (*results, *controls)
        yield Cell(name, f"analysis/{script}.py", flags, folder, cell, others)


def _problems(cell: Cell) -> list[str]:
    """The errors that the cell's script would report about its flags."""
    folder, _, name = cell.script.removesuffix(".py").partition("/")
    config = _config_class(folder, name)
    if config is None:
        names = ", ".join(_scripts(folder))
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
        for flag in _FILES
        if cell.flags.get(flag) is not None and not os.path.isfile(str(cell.flags[flag]))
    ]


def _scripts(folder: str) -> list[str]:
    names = {"defense": defenses, "analysis": analyses}
    return names[folder]() if folder in names else sorted([*attacks(), "prototype"])


def _config_class(folder: str, name: str) -> type[Config] | None:
    """The configuration of a script; None if there is no such script."""
    if name not in _scripts(folder):
        return None
    module = importlib.import_module(f"{folder}.{name}")
    config: type[Config] = getattr(module, "Config", None) or module.TrainingConfig
    return config


def _fields(folder: str, name: str) -> set[str]:
    """The flags that a script takes; none if there is no such script."""
    config = _config_class(folder, name)
    return set() if config is None else {field.name for field in dataclasses.fields(config)}


def _sees(name: str, flags: Mapping[str, Any]) -> str | None:
    """Which images a defense is given with these flags; None if the flags are not allowed."""
    config = _config_class("defense", name)
    try:
        return None if config is None else config.load(**flags).sees  # type: ignore[attr-defined]
    except UserError:
        return None  # said elsewhere


def _differences(cell: Cell) -> list[str]:
    """How a finished record differs from what the grid asks for."""
    if not cell.is_done:
        return []
    before = read_yaml(cell.folder / "config.yaml")
    differing = {
        name: value
        for name, value in cell.flags.items()
        if name not in _FREE
        and name in before
        and not is_same(cell.folder, name, value, before[name])
    }
    shown = ", ".join(f"{name} {before[name]}, not {value}" for name, value in differing.items())
    if shown:
        return [f"{cell.folder}: was made with {shown}; delete it, or give the grid another name"]
    changed = [
        f"{flag} {cell.flags[flag.removeprefix('--')]}"
        for flag, sha256 in _inputs(cell).items()
        if _inputs_of_record(cell.folder).get(flag, sha256) != sha256
    ]
    if changed:
        return [
            f"{cell.folder}: was made with another content of {', '.join(changed)}; delete it, or "
            "give the grid another name"
        ]
    if cell.attack is not None and _sha256s(cell.folder) != _sha256s(cell.attack.folder):
        return [f"{cell.folder}: is of another attack than the record that is there; delete it"]
    models = _summary(cell.folder).get("models")
    if not isinstance(models, dict):
        if not cell.others:
            return []
        return [f"{cell.folder}: does not say what it was made with; delete it"]
    renewed = [
        other.folder.name
        for other in cell.others
        for name in (other.folder.name, *([CLEAN] if other.is_clean else []))
        if other.is_done and models.get(name, _model_sha256(other)) != _model_sha256(other)
    ]
    if renewed:
        return [
            f"{cell.folder}: was made with another {listed(renewed)} than is there now; delete it"
        ]
    return []


def _inputs(cell: Cell) -> dict[str, str]:
    """sha256 of the files that a cell's flags name, as they are now, by flag."""
    folder, _, name = cell.script.removesuffix(".py").partition("/")
    config = _config_class(folder, name)
    names = set() if config is None else paths_of(config)
    named = {flag: value for flag, value in cell.flags.items() if flag in names}
    model = str(cell.flags.get("model"))
    if is_user_file(model):
        named["model"] = model.rpartition(":")[0]
    return files_of(named)


def _inputs_of_record(folder: Path) -> dict[str, Any]:
    """sha256 of the files that a finished run has read; empty if its summary does not say it."""
    inputs = _summary(folder).get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _sha256s(folder: Path) -> str | None:
    """sha256 of the attack's model, which a defense's summary also has."""
    summary = _summary(folder)
    try:
        return summary.get("attack_sha256") or summary["files"]["attack_result.pt"]
    except (KeyError, TypeError):
        return None


def _model_sha256(cell: Cell) -> str | None:
    """sha256 of the model of an attack or a defense, as its summary has it."""
    files = _summary(cell.folder).get("files")
    name = "attack_result.pt" if cell.attack is None else "defense_result.pt"
    return files.get(name) if isinstance(files, dict) else None


def _summary(folder: Path) -> dict[str, Any]:
    """A run's summary; empty if it cannot be read."""
    try:
        return read_object(folder / "summary.json")
    except (OSError, ValueError):
        return {}


def _told(value: Any) -> str:
    """As `quoted`; a text between quotation marks."""
    return f"'{quoted(value)}'" if isinstance(value, str) else quoted(value)


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
