"""The cells of a grid: each run of a script that it asks for, with its flags and its folder."""

import dataclasses
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import names as analyses
from attack import names as attacks
from benchmark.grid import OF_GRID, Grid
from defense import names as defenses
from utils.config import Config
from utils.errors import UserError
from utils.files import CONFIG_FILE
from utils.plain import read_yaml
from utils.records.contents import ATTACK_RESULT, DEFENSE_RESULT, SUMMARY, object_in, summary_of
from utils.records.places import CLEAN
from utils.records.recipe import is_same

# Flags of an analysis that the grid sets, and that name results which it makes.
_INPUTS = ("defenses", "clean_record", "clean_records")


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
        inputs: for an analysis, the flags that name them.
    """

    name: str
    script: str
    flags: Mapping[str, Any]
    folder: Path
    attack: "Cell | None" = None
    others: tuple["Cell", ...] = ()
    inputs: tuple[str, ...] = ()

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
        """The script's arguments; the same for a fresh run and for the continuation of one.

        What is outdated is made anew, and is replaced when that is finished.
        """
        values = {**self.flags, "overwrite" if self.is_outdated else "resume": True}
        return [f"--{name}={_as_text(value)}" for name, value in values.items()]

    @property
    def is_finished(self) -> bool:
        """Whether its last run has come to its end; an analysis may be outdated since."""
        return (self.folder / SUMMARY).exists()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do: finished, and of all that it has to read, as it is now."""
        if not self.is_finished or not all(other.is_done for other in self.others):
            return False
        return not self.is_outdated

    @property
    def is_outdated(self) -> bool:
        """Whether an analysis was made or begun without some of the models that it has to read.

        One that looked at more models than that is not outdated.
        """
        if not self.is_finished:
            before = _config_of(self.folder) if self.inputs else {}
            return any(
                name in self.flags
                and name in before
                and not is_same(self.folder, name, self.flags[name], before[name])
                for name in self.inputs
            )
        models = summary_of(self.folder).get("models") if self.others else None
        if not isinstance(models, dict):
            return False
        is_one = "clean_record" in self.flags
        return any(
            models.get(CLEAN if other.is_clean and is_one else other.folder.name) != other.sha256
            for other in self.others
        )

    @property
    def sha256(self) -> str | None:
        """That of the model of an attack or a defense, as its summary has it."""
        name = ATTACK_RESULT if self.attack is None else DEFENSE_RESULT
        return object_in(summary_of(self.folder), "files").get(name)

    @property
    def is_clean(self) -> bool:
        """Whether it trains a model without a backdoor."""
        return self.script == "attack/prototype.py"

    @property
    def kind(self) -> str:
        """The same for cells that take about as long: all but the seed and what is read."""
        attacked = self.attack or self
        where = [attacked.flags.get(name) for name in ("dataset", "model")]
        other = (*OF_GRID, "defenses", "clean_record", "clean_records")
        flags = {name: value for name, value in self.flags.items() if name not in other}
        return f"{self.script} {where} {flags}"

    @property
    def seconds(self) -> float | None:
        """How long it took; None if it is not done, or does not say it."""
        seconds = summary_of(self.folder).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def is_begun(self) -> bool:
        return (self.folder / CONFIG_FILE).exists() and not self.is_finished


def cells_in(grid: Grid, root: Path) -> list[Cell]:
    """Every run of a grid, each attack followed by its defenses, and then the analyses; unchecked.

    Args:
        root: folder of the grid's records.
    """
    cells = list(_cells(grid, root))
    return cells + list(_analyses(grid, cells))


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
            taken = fields("defense", str(script))
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
        config = config_class("analysis", script)
        taken = fields("analysis", script)
        # One that does not look at defenses waits for none of them.
        results = [other for other in cells if other.attack is cell and "defenses" in taken]
        if config is not None and (
            (cell.is_clean and getattr(config, "needs_trigger", False))
            or (not results and getattr(config, "needs_defenses", False))
        ):
            continue
        inputs = tuple(name for name in _INPUTS if name in taken and name not in flags)
        clean = [
            other
            for other in attacked
            if other is not cell
            and other.is_clean
            and all(other.flags[axis] == cell.flags[axis] for axis in ("dataset", "model"))
        ]
        same = [other for other in clean if other.flags["random_seed"] == cell.flags["random_seed"]]
        controls: list[Cell] = []
        if "clean_records" in taken and "clean_records" not in flags and clean:
            controls, flags["clean_records"] = clean, [other.name for other in clean]
        elif "clean_record" in taken and "clean_record" not in flags and same:
            controls, flags["clean_record"] = same[:1], same[0].name
        model = str(cell.flags["model"])
        flags |= {"model": model} if ":" in model else {}
        if "defenses" in taken:
            flags["defenses"] = [other.name.rpartition("/")[2] for other in results]
        flags |= {
            "record_path": cell.flags["record_path"],
            "random_seed": cell.flags["random_seed"],
            "result_file": cell.name,
            "save_folder_name": result,
        }
        folder = cell.folder / "analysis" / result
        name = f"{cell.name}/analysis/{result}"
        others = (*results, *controls)
        yield Cell(name, f"analysis/{script}.py", flags, folder, cell, others, inputs)


def scripts(folder: str) -> list[str]:
    """Names of the scripts of `attack`, `defense` or `analysis`."""
    names = {"defense": defenses, "analysis": analyses}
    return names[folder]() if folder in names else sorted([*attacks(), "prototype"])


def config_class(folder: str, name: str) -> type[Config] | None:
    """The configuration of a script; None if there is no such script."""
    if name not in scripts(folder):
        return None
    module = importlib.import_module(f"{folder}.{name}")
    config: type[Config] = getattr(module, "Config", None) or module.TrainingConfig
    return config


def fields(folder: str, name: str) -> set[str]:
    """The flags that a script takes; none if there is no such script."""
    config = config_class(folder, name)
    return set() if config is None else {field.name for field in dataclasses.fields(config)}


def _sees(name: str, flags: Mapping[str, Any]) -> str | None:
    """Which images a defense is given with these flags; None if the flags are not allowed."""
    config = config_class("defense", name)
    try:
        return None if config is None else config.load(**flags).sees  # type: ignore[attr-defined]
    except UserError:
        return None  # said elsewhere


def _config_of(folder: Path) -> dict[str, Any]:
    """The configuration of a run; empty without one that can be read."""
    try:
        return read_yaml(folder / CONFIG_FILE)
    except UserError:
        return {}


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
