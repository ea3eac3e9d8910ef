"""Where a report's runs are: folders of records, or the few files of a grid in `results/`.

Results of analyses (`analysis/` in a record) are no runs: their headline numbers are facts of the
defenses that they are of.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import RETUNED_WITH
from benchmark.reporting.kept import RUNS, read_lines
from benchmark.reporting.stored import (
    UNKNOWN,
    Analysed,
    StoredRun,
    below,
    checked_headline,
    checked_metrics,
    is_plain,
    read_table,
    without_places,
)
from utils.errors import UserError, listed, one_line, reason_of, shown
from utils.files import CONFIG_FILE, MARK, read_object, read_text
from utils.plain import read_yaml
from utils.process.script import logger
from utils.records.contents import ATTACK_RESULT, DEFENSE_RESULT, METRICS_FILE, SUMMARY, object_in
from utils.records.places import CLEAN, EXACT, is_usual
from utils.records.recipe import NOT_OF_RECIPE, SETS

LARGEST = 1 << 20  # bytes of a summary.json
_LARGEST_METRICS = 4 << 20  # bytes of a metrics.csv
# Flags of an analysis that say what it looks at, where and in what, but not how.
_OF_RECORD = (*NOT_OF_RECIPE, *SETS, "clean_record", "precision", "dataset", "model")


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
    def _analyses(self) -> list[tuple[dict[str, float], Analysed]]:
        return [] if self.defense is None else read_analyses(self.path)

    @cached_property
    def analyses(self) -> dict[str, float]:
        return {name: value for numbers, _ in self._analyses for name, value in numbers.items()}

    @cached_property
    def analysed(self) -> list[Analysed]:
        return [made for _, made in self._analyses]

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        return read_metrics(self.path, self.unit)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        return read_config(self.path)


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
            if CONFIG_FILE in files and MARK in files:
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
        where = below(folder, under)
        name = shown(folder.resolve().name if where == "." else where)
        runs.append(RunInFolder(name, None, where, folder))
        for result in sorted(results):
            runs.append(RunInFolder(name, shown(result.name), below(result, under), result))
    problems = []
    if unfinished:
        names = [
            below(folder, under) + (f" (with its {listed(sorted(results))})" if results else "")
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
    is_record = any((record / name).exists() for name in (MARK, ATTACK_RESULT))
    return is_record or kind in _read_plain(folder)


def analysis_folders(record: Path) -> list[Path]:
    """The folders of a record's analyses, by name; none that is a link, or behind one."""
    home = record / "analysis"
    if home.is_symlink() or not home.is_dir():
        return []
    return sorted(path for path in home.glob("[!.]*") if path.is_dir() and not path.is_symlink())


def read_analyses(result: Path) -> list[tuple[dict[str, float], Analysed]]:
    """The headline numbers of a defense, of the analyses of its record that are finished; and how
    each of them was made.

    Only those with the usual settings count, see `is_usual`. An analysis of
    another model than the defense's present one is skipped with a warning. A number of a control
    has an ending: `_clean` of a clean model, `_exact` of exact purification.

    Args:
        result: the folder of the defense's result, in the record's `defense/`.
    """
    record, facts = result.parent.parent, _read_plain(result)
    hashes, triggers = object_in(facts, "files"), facts.get("triggers_sha256")
    analyses: list[tuple[dict[str, float], Analysed]] = []
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
        if summary.get("triggers_sha256", triggers) != triggers:
            logger.warning(
                "warning: %s: skipped; it looked at other triggered images than %s was scored on",
                shown(folder),
                shown(result.name),
            )
            continue
        numbers: dict[str, Any] = {}
        for name, ending in ((result.name, ""), (CLEAN, "_clean"), (EXACT, "_exact")):
            of_model = headline.get(name)
            if isinstance(of_model, dict):
                values = {f"{key}{ending}": value for key, value in of_model.items()}
                if of_model.get("poisoned_images", RETUNED_WITH) != RETUNED_WITH:
                    values.pop(f"asr_retuned{ending}", None)
                numbers |= values
        if checked := checked_headline(numbers):
            analyses.append((checked, _made(folder, summary, [*checked])))
    return analyses


def _made(folder: Path, summary: Mapping[str, Any], numbers: list[str]) -> Analysed:
    """How a finished analysis was made, as its folder says."""
    config = read_config(folder)
    if config is not None:
        config = {name: value for name, value in config.items() if name not in _OF_RECORD}
    versions = " ".join(f"{name} {of}" for name, of in object_in(summary, "versions").items())
    device = str(summary.get("device", "")).partition(":")[0]
    made_by = " ".join(filter(None, (versions, str(summary.get("precision", "")), device)))
    return Analysed(
        kind=folder.name,
        numbers=numbers,
        config=config or None,
        commit=shown(str(summary.get("commit") or UNKNOWN), 100),
        made_by=shown(made_by or UNKNOWN, 300),
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run, without the machine's paths; None without one."""
    path = folder / CONFIG_FILE
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


def _read_plain(folder: Path) -> dict[str, Any]:
    """The summary of a run; empty if it is a link, too large or cannot be read."""
    path = folder / SUMMARY
    try:
        return read_object(path, LARGEST) if is_plain(path, LARGEST) else {}
    except (OSError, ValueError):
        return {}


def read_metrics(folder: Path, unit: str) -> pd.DataFrame | None:
    """A run's `metrics.csv`: numbers only, rates in [0, 1]; None if there is nothing to draw.

    Args:
        unit: name of its first column, "epoch" or "round".
    """
    path = folder / METRICS_FILE
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise OSError(0, "it is a link")
        read = read_table(path, _LARGEST_METRICS)
    except (OSError, ValueError) as error:
        logger.warning("warning: %s: no table (%s); drawn without", path, reason_of(error))
        return None
    return checked_metrics(read, unit, str(path))
