"""The runs of a grid as `results/` keeps them: a few files for all of them.

`runs.jsonl` has a JSON object on each line:

    {"record": "badnet-s0", "summary": {...}, "config": {...}}
    {"record": "badnet-s0", "defense": "sau", "summary": {...}, "config": {...}}

`defense` is the name of the result's folder; the attack itself has no such key. A defense whose
record was analysed also has `analyses`, its headline numbers, and `analysed`, which says how they
were made (not in lines of earlier versions). `summary` and `config` are the content of the run's
`summary.json` and `config.yaml`, without the machine's paths.
`curves.csv` has the rows of every `metrics.csv` after the columns `record` and `defense`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from benchmark.reporting.stored import (
    HEADLINES,
    RATES,
    WIDEST,
    Analysed,
    Key,
    StoredRun,
    below,
    cell_text,
    checked_headline,
    checked_metrics,
    first_fault,
    read_table,
    without_places,
)
from utils.errors import UserError, listed, one_line, reason_of, shown
from utils.files import read_text
from utils.process.script import logger
from utils.records.folders import RunFolder

RUNS, CURVES = "runs.jsonl", "curves.csv"
_LARGEST_GRID = 64 << 20  # bytes of a runs.jsonl, and of a curves.csv


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    record: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    defense: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    summary: dict[str, Any]
    config: dict[str, Any] | None = None
    analyses: dict[str, Any] = {}
    analysed: list[Analysed] = []


@dataclass(frozen=True, eq=False)
class RunInGrid(StoredRun):
    """A run that is a line of a grid's `runs.jsonl`."""

    line: _Line
    curves: "_Curves"

    @property
    def cells(self) -> tuple[str, str]:
        """How the `curves.csv` beside its line calls it: without the folder of the grid."""
        return _cells((self.line.record, self.line.defense))

    def read_summary(self) -> Any:
        return self.line.summary

    @cached_property
    def analyses(self) -> dict[str, float]:
        return checked_headline(self.line.analyses)

    @cached_property
    def analysed(self) -> list[Analysed]:
        return [
            analysed.model_copy(update={"numbers": [n for n in analysed.numbers if n in HEADLINES]})
            for analysed in self.line.analysed
        ]

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        rows = self.curves.tables.get(self.cells)
        if rows is None:
            return None
        return checked_metrics(rows.loc[:, (rows != "").any()], self.unit, self.where)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        return None if self.line.config is None else without_places(self.line.config)


@dataclass(frozen=True, eq=False)
class _Curves:
    """The rows of a `curves.csv`, read when the first run asks for its own."""

    path: Path

    @cached_property
    def tables(self) -> Mapping[tuple[str, str], pd.DataFrame]:
        """Rows by the cells of their run; none, and a message, if they cannot be read."""
        if not os.path.lexists(self.path):
            return {}
        try:
            return read_curves(self.path)
        except (OSError, ValueError) as error:
            logger.warning("warning: %s: no table (%s); drawn without", self.path, reason_of(error))
            return {}


def read_lines(grid: Path, under: Path) -> tuple[list[RunInGrid], list[str]]:
    """The runs of a grid's `runs.jsonl`; a record is named by the grid's folder and its own name.

    Args:
        under: the folder from which names of folders are counted.

    Returns:
        The runs in the order of the lines, and a message for each line that is skipped.
    """
    path = grid / RUNS
    name = below(path, under)
    if path.is_symlink():
        return [], [f"{name}: is a link; skipped"]
    try:
        text = read_text(path, _LARGEST_GRID)
    except (OSError, ValueError) as error:
        return [], [f"{name}: cannot be read ({reason_of(error)}); skipped"]
    runs: dict[Key, RunInGrid] = {}
    problems: list[str] = []
    curves = _Curves(grid / CURVES)
    prefix = Path(below(grid, under))
    for number, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        where = f"{name}:{number}"
        try:
            line = _Line.model_validate(json.loads(written))
        except ValidationError as error:
            problems.append(f"{where}: is no run ({first_fault(error)}); skipped")
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: is no run (Invalid JSON: {one_line(error)}); skipped")
            continue
        record = shown(prefix / line.record)
        defense = None if line.defense is None else shown(line.defense)
        run = RunInGrid(record, defense, where, line, curves)
        if run.key in runs:
            problems.append(f"{where}: is of the same run as {runs[run.key].where}; skipped")
            continue
        runs[run.key] = run
    return list(runs.values()), problems


def read_curves(path: Path) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of a `curves.csv` by their first two cells, which name the run.

    Raises:
        OSError: if it cannot be read, or is a link.
        ValueError: if it is no such table.
    """
    if path.is_symlink():
        raise OSError(0, "it is a link")
    read = read_table(path, _LARGEST_GRID)
    if list(read)[:2] != ["record", "defense"]:
        raise ValueError("its first columns are not record and defense")
    return {
        (str(record), str(defense)): rows.drop(columns=["record", "defense"])
        for (record, defense), rows in read.groupby(["record", "defense"], sort=False)
    }


def _cells(key: Key) -> tuple[str, str]:
    """How `curves.csv` calls a run."""
    record, defense = key
    return cell_text(record), "" if defense is None else cell_text(defense)


def check_kept(to: Path, runs: Sequence[StoredRun]) -> None:
    """Checks that writing these runs into a grid's files would lose nothing.

    Raises:
        UserError: if they have another run, or something that cannot be read, or if the curves of a
            grid that was read cannot be kept.
    """
    read = {run.key: run for run in runs}
    for line in check_readable(to):
        where = f"{to}{os.sep}{line.where}: {_name(line.key)}"
        if line.key not in read:
            raise UserError(
                f"{where} is not among the runs that were read; give --under {to}, too, or remove "
                "the line"
            )
        if lacking := _lacking(read[line.key], line):
            raise UserError(
                f"{where} has {listed(lacking)}, and {read[line.key].where}, which is of the same "
                "model, has not; bring it there, or remove the line"
            )
    _check_curves(to / CURVES, {_cells(run.key): run for run in runs})
    for path in sorted({run.curves.path for run in runs if isinstance(run, RunInGrid)}):
        lines, _ = read_lines(path.parent, path.parent)
        _check_curves(path, {line.cells: line for line in lines})


def _check_curves(path: Path, runs: Mapping[tuple[str, str], StoredRun]) -> None:
    """Checks that each row of a `curves.csv` is one of these runs' metrics.

    Args:
        runs: by the cells that name them.

    Raises:
        UserError: if one is not, or the file cannot be read.
    """
    if not os.path.lexists(path):
        return
    try:
        tables = read_curves(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: is no table of curves ({reason_of(error)}); mend it, or remove it"
        ) from None
    for record, defense in sorted(tables):
        run = runs.get((record, defense))
        if run is None or run.metrics is None:
            raise UserError(
                f"{path}: has rows of {_name((record, defense or None))}, and no run with metrics "
                "of that name was read; give its folder, too, or remove the rows"
            )


def check_readable(grid: Path) -> list[RunInGrid]:
    """The runs of a grid that is kept.

    Raises:
        UserError: if one of its lines is no run: without it, its tables would say something else.
    """
    if not os.path.lexists(grid / RUNS):
        return []
    lines, problems = read_lines(grid, grid)
    if problems:
        problem = problems[0].removesuffix("; skipped")
        raise UserError(f"{grid}{os.sep}{problem}; mend it, or remove it")
    return lines


def _lacking(run: StoredRun, kept: RunInGrid) -> list[str]:
    """What a kept run has and a run that replaces it lacks, if both are of one model."""
    if _files(run) != _files(kept):
        return []
    lost = [f"{name} of its analyses" for name in kept.analyses if name not in run.analyses]
    return [*lost, *(["a configuration"] if kept.config and not run.config else [])]


def _files(run: StoredRun) -> Any:
    """The sha256 of a run's files, as its summary has them."""
    try:
        return run.read_summary().get("files")
    except (OSError, ValueError, AttributeError):
        return None


def _name(key: Key) -> str:
    return shown("/".join(filter(None, key)), 200)


def keep(runs: Iterable[StoredRun], folder: RunFolder) -> None:
    """Writes runs as `runs.jsonl` and `curves.csv`: no weights, no pictures, no machine's paths.

    Raises:
        UserError: if they are too many to be read again, or cannot be written.
    """
    lines: list[str] = []
    tables: list[pd.DataFrame] = []
    for run in runs:
        try:
            summary = without_places(run.read_summary())
        except FileNotFoundError:
            continue
        facts = {"record": run.record, "defense": run.defense, "summary": summary}
        facts |= {"analyses": run.analyses} if run.analyses else {}
        facts |= {"analysed": [of.model_dump() for of in run.analysed]} if run.analysed else {}
        present = {n: v for n, v in {**facts, "config": run.config}.items() if v is not None}
        lines.append(json.dumps(present, ensure_ascii=False) + "\n")
        if run.metrics is not None:
            record, defense = _cells(run.key)
            tables.append(run.metrics.assign(record=record, defense=defense))
    texts = {RUNS: "".join(lines), CURVES: _curves_text(tables)}
    head = texts[CURVES].partition("\n")[0]
    largest = max(len(text.encode(errors="backslashreplace")) for text in texts.values())
    if largest > _LARGEST_GRID or len(head) > WIDEST:
        raise UserError(
            f"--keep: {len(lines):,} runs are too many for {folder.path}; keep them in several"
        )
    for name, text in texts.items():
        folder.write_text(name, text)


def _curves_text(tables: Iterable[pd.DataFrame]) -> str:
    tables = list(tables)
    first = ["record", "defense", "epoch", "round", "seconds", *RATES]
    names = dict.fromkeys(name for table in tables for name in table)
    columns = [*(n for n in first if n in names), *(n for n in names if n not in first)]
    if not tables:
        return "record,defense\n"
    rows = pd.concat([table.reindex(columns=columns) for table in tables], ignore_index=True)
    for unit in {"epoch", "round"} & set(columns):
        if (rows[unit].dropna() % 1 == 0).all():
            rows[unit] = rows[unit].astype("Int64")
    return str(rows.to_csv(index=False, lineterminator="\n"))
