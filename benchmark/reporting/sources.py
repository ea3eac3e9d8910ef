"""Where a report's runs are: folders of records, or the few files of a grid in `results/`.

Results of analyses (`analysis/` in a record) are no runs: their headline numbers are facts of the
defenses that they are of.

A grid keeps its runs in two files. `runs.jsonl` has a JSON object on each line:

    {"record": "badnet-s0", "summary": {...}, "config": {...}}
    {"record": "badnet-s0", "defense": "sau", "summary": {...}, "config": {...}}

`defense` is the name of the result's folder; the attack itself has no such key. A defense whose
record was analysed also has `analyses`, its headline numbers. `summary` and
`config` are the content of the run's `summary.json` and `config.yaml`, without the machine's paths.
`curves.csv` has the rows of every `metrics.csv` after the columns `record` and `defense`.

Both forms may come from a stranger: links are not followed, sizes have limits, and every value is
checked.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from analysis import RETUNED_WITH
from utils.errors import UserError, listed, one_line, shown
from utils.files import read_bytes, read_object, read_text
from utils.plain import read_yaml
from utils.process.script import logger
from utils.records.contents import ATTACK_RESULT, DEFENSE_RESULT, SUMMARY, object_in
from utils.records.folders import RunFolder
from utils.records.places import CLEAN, EXACT, is_usual

RUNS, CURVES = "runs.jsonl", "curves.csv"
RATES = ("acc", "asr", "ra", "cross_acc")
LARGEST = 1 << 20  # bytes of a summary.json
# Of analyses: heading of a column of leaderboards, and whether it is a share, printed as percent.
HEADLINES = {
    "asr_retuned": ("ASR re-learned", True),
    "asr_retuned_clean": ("clean model re-learned", True),
    "asr_retuned_exact": ("exact purification re-learned", True),
    "t_half": ("t at ASR 50 %", False),
    "asr_reactivated": ("ASR re-activated", True),
    "asr_reactivated_clean": ("clean model re-activated", True),
    "clean_as_target": ("clean images re-activated", True),
    "similarity": ("S", False),
    "similarity_clean": ("clean model S", False),
}
# Those that say nothing of a model that has collapsed.
OF_BACKDOOR = ("asr_retuned", "t_half", "asr_reactivated", "clean_as_target")
_LARGEST_METRICS = 4 << 20  # bytes of a metrics.csv
_LARGEST_GRID = 64 << 20  # bytes of a runs.jsonl, and of a curves.csv
_WIDEST = 10_000  # characters of the first line of a table
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\)")

Key = tuple[str, str | None]  # names of a record and of a result in it


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run that is stored in one of the two forms.

    Attributes:
        record: the record's name: its folder below the one that was searched. One line.
        defense: name of the folder of a defense's result; None for the record itself. One line.
        where: what a message calls it.
    """

    record: str
    defense: str | None
    where: str

    @property
    def key(self) -> Key:
        """The key of a run, which no two runs of a grid share."""
        return self.record, self.defense

    @property
    def summary_name(self) -> str:
        """What a message calls its summary."""
        return self.where

    @property
    def unit(self) -> str:
        """The unit that the rows of its metrics count."""
        return "epoch" if self.defense is None else "round"

    @property
    def folder(self) -> Path | None:
        """Its folder, with pictures and tensors; None if it has none."""
        return None

    def read_summary(self) -> Any:
        """The plain data of its summary, of any kind.

        Raises:
            FileNotFoundError: if it has none.
            OSError: if it cannot be read.
            ValueError: if it is no JSON.
        """
        raise FileNotFoundError(self.where)

    @cached_property
    def analyses(self) -> dict[str, float]:
        """Headline numbers of analyses, by name; see `HEADLINES`."""
        return {}

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """Its rows by epoch or round, see `read_metrics`; None if there is nothing to draw."""
        return None

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Its configuration, as JSON has it, without the machine's paths; None without one."""
        return None


@dataclass(frozen=True, eq=False)
class RunInFolder(StoredRun):
    """A run in a folder of its own."""

    path: Path

    @property
    def folder(self) -> Path | None:
        return self.path

    @property
    def summary_name(self) -> str:
        return str(Path(self.where) / SUMMARY)

    def read_summary(self) -> Any:
        path = self.path / SUMMARY
        if path.is_symlink():
            raise OSError(0, "it is a link")
        return json.loads(read_text(path, LARGEST))

    @cached_property
    def analyses(self) -> dict[str, float]:
        return {} if self.defense is None else read_analyses(self.path)

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        return read_metrics(self.path, self.unit)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        path = self.path / "config.yaml"
        if not is_plain(path, 1 << 16):
            return None
        try:
            values = {name: without_places(value) for name, value in read_yaml(path).items()}
            if "record_path" in values:
                values["record_path"] = None
            as_json: dict[str, Any] = json.loads(json.dumps(values, default=str, skipkeys=True))
            return as_json
        except (UserError, ValueError, RecursionError) as error:
            logger.warning("warning: %s", one_line(error))
            return None


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    record: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    defense: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    summary: dict[str, Any]
    config: dict[str, Any] | None = None
    analyses: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class RunInGrid(StoredRun):
    """A run that is a line of a grid's `runs.jsonl`."""

    line: _Line
    curves: "_Curves"

    def read_summary(self) -> Any:
        return self.line.summary

    @cached_property
    def analyses(self) -> dict[str, float]:
        return checked_headline(self.line.analyses)

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        rows = self.curves.tables.get(_cells(self.key))
        if rows is None:
            return None
        return _checked_metrics(rows.loc[:, (rows != "").any()], self.unit, self.where)

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
            logger.warning("warning: %s: no table (%s); drawn without", self.path, _reason(error))
            return {}


def find(under: Path, without: Path | None = None) -> tuple[list[StoredRun], list[str]]:
    """The runs of all records under a folder, in both forms, at any depth.

    Args:
        without: a folder below it whose content is not looked at.

    Returns:
        The runs: for each record first itself, then its results; none of a record that is not
        finished. And one message for each line of a `runs.jsonl` that is skipped.
    """
    records: dict[Path, list[Path]] = {}
    grids: list[Path] = []
    unfinished: dict[Path, list[str]] = {}  # with the results that are in them
    excluded = without.resolve() if without is not None else None
    for path, folders, files in os.walk(under):
        here = Path(path)
        folders[:] = [n for n in folders if n[0] != "." and here.joinpath(n).resolve() != excluded]
        if RUNS in files:
            grids.append(here)
        if _is_in_record(here, "analysis"):
            continue
        if SUMMARY not in files:
            if "config.yaml" in files and "run.json" in files:
                unfinished[here] = []
            continue
        if _is_in_record(here, "defense") and here.parent.parent in unfinished:
            unfinished[here.parent.parent].append(here.name)
        elif _is_in_record(here, "defense"):
            records.setdefault(here.parent.parent, []).append(here)
        else:
            records.setdefault(here, [])
    runs: list[StoredRun] = []
    for folder, results in sorted(records.items()):
        where = _below(folder, under)
        name = shown(folder.resolve().name if where == "." else where)
        runs.append(RunInFolder(name, None, where, folder))
        for result in sorted(results):
            runs.append(RunInFolder(name, shown(result.name), _below(result, under), result))
    problems = []
    if unfinished:
        names = [
            _below(folder, under) + (f" (with its {listed(sorted(results))})" if results else "")
            for folder, results in sorted(unfinished.items())
        ]
        problems.append(f"left out, because not finished: {listed(names, limit=200)}")
    for grid in sorted(grids):
        lines, wrong = read_lines(grid, under)
        runs += lines
        problems += wrong
    return runs, problems


def _is_in_record(folder: Path, kind: str) -> bool:
    """Whether a folder is a result inside a record: of a defense, or of an analysis.

    A folder of records may have such a name, too; then what is above it is no record.

    Args:
        kind: "defense" or "analysis".
    """
    if folder.parent.name != kind:
        return False
    record = folder.parent.parent
    is_record = any((record / name).exists() for name in ("run.json", ATTACK_RESULT))
    return is_record or kind in _read_plain(folder)


def analysis_folders(record: Path) -> list[Path]:
    """The folders of a record's analyses, by name; none that is a link, or behind one."""
    home = record / "analysis"
    if home.is_symlink() or not home.is_dir():
        return []
    return sorted(path for path in home.glob("[!.]*") if path.is_dir() and not path.is_symlink())


def read_analyses(result: Path) -> dict[str, float]:
    """The headline numbers of a defense, of the analyses of its record that are finished.

    Only those with the usual settings count, see `is_usual`. An analysis of
    another model than the defense's present one is skipped with a warning. A number of a control
    has an ending: `_clean` of a clean model, `_exact` of exact purification.

    Args:
        result: the folder of the defense's result, in the record's `defense/`.
    """
    record, hashes = result.parent.parent, object_in(_read_plain(result), "files")
    numbers: dict[str, Any] = {}
    for folder in analysis_folders(record):
        summary = _read_plain(folder)
        headline, models = object_in(summary, "headline"), object_in(summary, "models")
        is_of_defense = isinstance(headline.get(result.name), dict)
        if not is_usual(folder, summary) or not is_of_defense:
            continue
        if models.get(result.name) != hashes.get(DEFENSE_RESULT):
            logger.warning(
                "warning: %s: skipped; it is of another %s than is there now",
                shown(folder),
                shown(result.name),
            )
            continue
        for name, ending in ((result.name, ""), (CLEAN, "_clean"), (EXACT, "_exact")):
            of_model = headline.get(name)
            if isinstance(of_model, dict):
                values = {f"{key}{ending}": value for key, value in of_model.items()}
                if of_model.get("poisoned_images", RETUNED_WITH) != RETUNED_WITH:
                    values.pop(f"asr_retuned{ending}", None)
                numbers |= values
    return checked_headline(numbers)


def _read_plain(folder: Path) -> dict[str, Any]:
    """The summary of a run; empty if it is a link, too large or cannot be read."""
    path = folder / SUMMARY
    try:
        return read_object(path, LARGEST) if is_plain(path, LARGEST) else {}
    except (OSError, ValueError):
        return {}


def checked_headline(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those of some numbers that reports show."""
    return {
        name: float(numbers[name])
        for name in HEADLINES
        if isinstance(numbers.get(name), int | float) and -10 <= numbers[name] <= 10
    }


def _below(folder: Path, under: Path) -> str:
    return str(folder.relative_to(under)) if folder.is_relative_to(under) else folder.name


def read_lines(grid: Path, under: Path) -> tuple[list[RunInGrid], list[str]]:
    """The runs of a grid's `runs.jsonl`; a record is named by the grid's folder and its own name.

    Args:
        under: the folder from which names of folders are counted.

    Returns:
        The runs in the order of the lines, and a message for each line that is skipped.
    """
    path = grid / RUNS
    name = _below(path, under)
    if path.is_symlink():
        return [], [f"{name}: is a link; skipped"]
    try:
        text = read_text(path, _LARGEST_GRID)
    except (OSError, ValueError) as error:
        return [], [f"{name}: cannot be read ({_reason(error)}); skipped"]
    runs: dict[Key, RunInGrid] = {}
    problems: list[str] = []
    curves = _Curves(grid / CURVES)
    prefix = Path(_below(grid, under))
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


def first_fault(error: ValidationError) -> str:
    """The first fault of plain data, compared with a description, as one short line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return shown(": ".join(filter(None, (where, what))), 200)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def without_places(value: Any) -> Any:
    """The same plain data, absolute paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def is_plain(path: Path, largest: int) -> bool:
    """Whether a path is an ordinary file of bounded size, and no link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= largest


def file_stem(text: str) -> str:
    """A file name for any name; names that differ much get different file names."""
    stem = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    if len(stem) > 120 or not text.isascii():
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        stem = f"{stem[:100]}-{digest[:8]}"
    return stem


def cell_text(value: Any) -> Any:
    """A text as one line of a CSV file, which no spreadsheet computes; anything else as it is."""
    if not isinstance(value, str):
        return value
    line = shown(value)
    return f"'{line}" if re.match(r"\s*[=+@]|-.", line) else line


def read_metrics(folder: Path, unit: str) -> pd.DataFrame | None:
    """A run's `metrics.csv`: numbers only, rates in [0, 1]; None if there is nothing to draw.

    Args:
        unit: name of its first column, "epoch" or "round".
    """
    path = folder / "metrics.csv"
    if not is_plain(path, _LARGEST_METRICS):
        return None
    try:
        read = _read_table(path, _LARGEST_METRICS)
    except (OSError, ValueError) as error:
        logger.warning("warning: %s: no table (%s); drawn without", path, one_line(error))
        return None
    return _checked_metrics(read, unit, str(path))


def _read_table(path: Path, largest: int) -> pd.DataFrame:
    """A CSV file, each cell as the text that it is: a record may be called NA.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no table, or too wide.
    """
    text = read_bytes(path, largest).decode("utf-8")
    if len(text.partition("\n")[0]) > _WIDEST:
        raise ValueError("too many columns")
    return pd.read_csv(io.StringIO(text), dtype=object, na_filter=False)


def _checked_metrics(read: pd.DataFrame, unit: str, where: str) -> pd.DataFrame | None:
    names = [n for n in map(str, read) if n in (unit, *RATES, "seconds") or _is_loss(n)]
    if unit not in names:
        logger.warning("warning: %s: has no column %s; drawn without", where, unit)
        return None
    metrics = read[names].map(_number).astype(float)
    for rate in set(RATES) & set(names):
        metrics[rate] = metrics[rate].where(metrics[rate].between(0, 1))
    metrics = metrics[metrics[unit].between(0, 1e9)]
    return None if metrics.empty else metrics


def _number(cell: object) -> float:
    """The number that was written, to the last bit; NaN for any other text."""
    try:
        return float(str(cell))
    except ValueError:
        return float("nan")


def _is_loss(name: str) -> bool:
    return re.fullmatch(r"loss\w{0,40}", name) is not None


def read_curves(path: Path) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of a `curves.csv` by their first two cells, which name the run.

    Raises:
        OSError: if it cannot be read, or is a link.
        ValueError: if it is no such table.
    """
    if path.is_symlink():
        raise OSError(0, "it is a link")
    read = _read_table(path, _LARGEST_GRID)
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
        UserError: if they have another run, or something that cannot be read.
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
    path = to / CURVES
    if os.path.lexists(path):
        try:
            lost = set(read_curves(path)) - {_cells(r.key) for r in runs if r.metrics is not None}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: is no table of curves ({_reason(error)}); mend it, or remove it"
            ) from None
        for record, defense in sorted(lost):
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
    if run is kept or _files(run) != _files(kept):
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
        present = {n: v for n, v in {**facts, "config": run.config}.items() if v is not None}
        lines.append(json.dumps(present, ensure_ascii=False) + "\n")
        if run.metrics is not None:
            record, defense = _cells(run.key)
            tables.append(run.metrics.assign(record=record, defense=defense))
    texts = {RUNS: "".join(lines), CURVES: _curves_text(tables)}
    head = texts[CURVES].partition("\n")[0]
    if max(map(len, texts.values())) > _LARGEST_GRID or len(head) > _WIDEST:
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
