"""Numbers of analyses stand in one column only if the analyses were made alike."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from benchmark.reporting.repeats import SETTING
from benchmark.reporting.stored import UNKNOWN, Analysed
from utils.errors import listed, shown

Made = dict[int, Analysed]  # by the row of the run that was looked at


def analysed_alike(runs: pd.DataFrame, problems: list[str]) -> pd.DataFrame:
    """The runs without numbers of analyses that were made with other settings than most.

    In each dataset and network, the settings of most results of an analysis count, or of those that
    are as many the first. A line in `problems` names the others. A result that does not say its
    settings counts.

    Returns:
        The runs, and `analysis_flags`: the keys of `means.FLAGS` for what was made by another
        commit, or in another environment, than most results of the same analysis.
    """
    flags = dict.fromkeys(runs.index.tolist(), "")
    runs = runs.copy()
    for _, group in runs.groupby(SETTING, dropna=False, sort=False):
        by_kind: dict[str, Made] = {}
        for row, run in zip(group.index.tolist(), group["run"], strict=True):
            for analysed in run.analysed:
                by_kind.setdefault(analysed.kind, {})[row] = analysed
        for kind, made in sorted(by_kind.items()):
            others = _with_other_settings(made)
            for row in others:
                runs.loc[row, list(made.pop(row).numbers)] = float("nan")
            if others:
                names = [f"{run.record}/{run.defense}" for run in runs.loc[others, "run"]]
                problems.append(
                    f"{shown(kind, 60)} of {listed(names, limit=200)}: made with other settings "
                    "than most of this table; skipped"
                )
            for flag, what in (("g", "commit"), ("v", "made_by")):
                for row in _made_otherwise(made, what):
                    flags[row] += flag
    return runs.assign(analysis_flags=list(flags.values()))


def _with_other_settings(made: Made) -> list[int]:
    """The rows with other settings than most; a flag that only one of two has may be new."""
    groups: list[tuple[Mapping[str, Any], list[int]]] = []
    for row, analysed in made.items():
        if (config := analysed.config) is None:
            continue
        for of_first, rows in groups:
            if all(config[name] == of_first[name] for name in config.keys() & of_first.keys()):
                rows.append(row)
                break
        else:
            groups.append((config, [row]))
    groups.sort(key=lambda group: -len(group[1]))  # is stable
    return [row for _, rows in groups[1:] for row in rows]


def _made_otherwise(made: Made, what: str) -> list[int]:
    """The rows that differ in an attribute from more than half of those that say it."""
    values = {row: getattr(of, what) for row, of in made.items()}
    values = {row: value for row, value in values.items() if value != UNKNOWN}
    ((usual, count),) = Counter(values.values()).most_common(1) or [(None, 0)]
    return [row for row, value in values.items() if value != usual and 2 * count > len(values)]
