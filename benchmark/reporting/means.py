"""Means over seeds: one row per attack, columns for each defense, and flags as warnings."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from benchmark.reporting.stored import UNDEFENDED
from benchmark.reporting.summaries import METRICS, is_clean
from utils.errors import counted
from utils.metrics import FAILED_ASR, has_collapsed

HIGHER_IS_BETTER = {"acc": True, "asr": False, "ra": True, "der": True}
SMALL_TEST_SET = 1000  # images

FLAGS = {
    "a": "the attack failed: for a seed, ASR is under 50 % undefended; ASR and DER say little",
    "c": "the defense collapsed: for a seed, ACC is under half of what it was",
    "g": "another commit than most of this table",
    "m": "mean over fewer attacks than without a defense, or without models that another one has",
    "n": "the defense sees no images",
    "p": "the defense sees a part of the poisoned training set, which the others do not see",
    "s": "one seed only",
    "v": "other versions, precision or kind of device than most of this table",
}


def any_collapsed(runs: pd.DataFrame) -> bool:
    """Whether one of some runs has lost more than half of its ACC."""
    return any(map(has_collapsed, runs["acc"], runs["acc_before"]))


def seeds_of(runs: pd.DataFrame) -> int:
    """How many seeds the attack with most of them has: of the models, not of the defense."""
    return int(runs.groupby("row")["record"].nunique().max())


def percent(rate: float) -> float:
    """A rate as it is printed: percent with two decimals."""
    return round(100 * float(rate), 2)


@dataclass(frozen=True)
class Number:
    """A mean over seeds in [0, 1], with its sample standard deviation (None for one seed)."""

    mean: float
    sd: float | None
    seeds: int
    flags: str = ""
    is_best: bool = False
    records: frozenset[str] = field(default=frozenset(), compare=False)  # of the models

    def rounded(self) -> float:
        """The number as it is printed: percent with two decimals."""
        return percent(self.mean)


@dataclass(frozen=True)
class Row:
    """A line of a grid: numbers by (heading, metric).

    `seeds` is None if it has no number. `attacks` is that of a row of means over attacks; the
    `seeds` of a number in it are the attacks that have the number.
    """

    name: str
    seeds: int | None
    flags: str
    numbers: Mapping[tuple[str, str], Number]
    attacks: int | None = None


@dataclass(frozen=True)
class Grid:
    """One table's content: headings with their metrics, lines, and lines that are not sorted."""

    corner: str
    columns: Mapping[str, tuple[str, ...]]
    body: tuple[Row, ...]
    foot: tuple[Row, ...] = ()

    def flags(self) -> list[str]:
        """The flags that it has, for the legend."""
        rows = [*self.body, *self.foot]
        used = {f for row in rows for n in row.numbers.values() for f in n.flags}
        return sorted(used | {flag for row in rows for flag in row.flags})


@dataclass(frozen=True)
class Table:
    """Everything about one dataset and model; `row` of `runs` is the row of the main grid."""

    name: str
    title: str
    runs: pd.DataFrame
    main: Grid
    ablations: Mapping[str, Grid]
    notes: tuple[str, ...]

    def labels(self) -> list[str]:
        """Results that are no variant of another result's method: the columns of the main grid."""
        return [label for label in self.main.columns if label != UNDEFENDED]


def summarize(runs: pd.DataFrame) -> list[Table]:
    """A table for each dataset (recognised by its name and sizes) and model.

    If an attack was run with several pratios, there is a table for each; if not, the row has it.
    What counts is the pratio that was asked for: an attack may poison a little less.
    """
    tables: list[Table] = []
    setting = ["dataset", "image_size", "train_images", "test_images", "model"]
    for _, group in runs.groupby(setting, dropna=False):
        without = group["attack"].map(is_clean)
        attacks = group[~without]
        if attacks.groupby("attack")["asked"].nunique(dropna=False).max() > 1:
            parts = [
                pd.concat([p, group[without]]) for _, p in attacks.groupby("asked", dropna=False)
            ]
        else:
            parts = [group]
        for part in parts:
            tables.append(_table(part, [table.name for table in tables]))
    return tables


def is_variant(label: str, method: str) -> bool:
    """Whether a result's name says that it is its method with something changed."""
    return method != "" and label.startswith(f"{method}-")


def _table(runs: pd.DataFrame, names: list[str]) -> Table:
    first = runs.iloc[0]
    usual = runs.loc[~runs["attack"].map(is_clean), "pratio"].mode()
    runs = runs.assign(row=runs["attack"])
    if len(usual):
        is_other = runs["pratio"].notna() & (runs["pratio"] != usual.max())
        share = runs["pratio"].map(lambda p: f" ({100 * p:.3g} %)")
        runs = runs.assign(row=runs["attack"].where(~is_other, runs["attack"] + share))
    title = f"{first['dataset']}, {first['model']}"
    title += f", {first['image_size']:.0f} px" if pd.notna(first["image_size"]) else ""
    title += f", pratio {100 * usual.max():.3g} %" if len(usual) else ""
    name = re.sub(r"[^a-z0-9.]+", "-", title.lower().replace(" %", "")).strip("-.")[:60] or "table"
    if name in names:
        name += f"-{sum(n == name or n.startswith(name + '-') for n in names) + 1}"
    return _filled(name, title, runs)


def attacks_of(table: Table) -> list[str]:
    """The rows of a table that are no clean models, sorted."""
    return sorted(name for name in set(table.runs["row"]) if not is_clean(name))


def narrowed(table: Table, attacks: Collection[str]) -> Table | None:
    """A table of some of its attacks alone, which its title says; None if it has none of them.

    The names of rows and the pratio in the title are those of the table of all attacks. Clean
    models stay.

    Args:
        attacks: names of rows.
    """
    all_of_it = attacks_of(table)
    chosen = [name for name in all_of_it if name in attacks]
    if not chosen:
        return None
    title = table.title
    if chosen != all_of_it:
        title += f", {len(chosen)} of {counted(len(all_of_it), 'attack')}"
    is_kept = table.runs["row"].isin(chosen) | table.runs["row"].map(is_clean)
    return _filled(table.name, title, table.runs[is_kept])


def _filled(name: str, title: str, runs: pd.DataFrame) -> Table:
    """A table of runs that have their `row`."""
    cells = _cells(runs)
    variant = [is_variant(*pair) for pair in zip(runs["label"], runs["method"], strict=True)]
    plain = [UNDEFENDED, *sorted(set(runs.loc[[not v for v in variant], "label"]) - {UNDEFENDED})]
    ablations = {
        str(method): _ablation(str(method), sorted(set(group["label"])), cells)
        for method, group in runs[variant].groupby("method")
    }
    return Table(name, title, runs, _main(plain, runs, cells), ablations, _notes(runs))


def _notes(runs: pd.DataFrame) -> tuple[str, ...]:
    """How many images were counted, how much one counts if they are few, and what made the numbers.

    The last is said only if no commit or no environment has a majority, so no flag can say it.
    """
    sizes = [
        f"{int(n):,}" for n in (runs["train_images"].iloc[0], runs["test_images"].iloc[0]) if n == n
    ]
    made_by = runs["versions"] + runs["precision"] + runs["device"]
    mixed = [
        f"{values.nunique()} {what}"
        for what, values in (("commits", runs["commit"]), ("environments", made_by))
        if _majority(values) is None
    ]
    mixture = (f"Made by {' and '.join(mixed)}.",) if mixed else ()
    if len(sizes) < 2:
        return mixture
    text = f"{sizes[0]} training and {sizes[1]} test images"
    counts = sorted({int(n) for n in runs["asr_total"].dropna()})
    if counts:
        text += f", {' or '.join(f'{n:,}' for n in counts)} of them triggered for ASR and RA"
    smallest = min([int(runs["test_images"].iloc[0]), *counts])
    if 0 < smallest < SMALL_TEST_SET:
        text += f". Small test set: one image is up to {100 / smallest:.2f} points"
    return (text + ".", *mixture)


Cells = dict[tuple[str, str], dict[str, Number]]


def _cells(runs: pd.DataFrame) -> Cells:
    """Numbers with their flags by (attack, label)."""
    made_by = runs["versions"] + runs["precision"] + runs["device"]
    usual, commit = _majority(made_by), _majority(runs["commit"])
    cells: Cells = {}
    for (attack, label), group in runs.groupby(["row", "label"]):
        general = "g" if commit is not None and (group["commit"] != commit).any() else ""
        for flag, kind in (("n", "nothing"), ("p", "poisoned")):
            general += flag if (group["sees"] == kind).any() else ""
        general += "v" if usual is not None and (made_by[group.index] != usual).any() else ""
        failed = "a" if (group["asr_before"] < FAILED_ASR).any() else ""
        collapsed = "c" if any_collapsed(group) else ""
        flags = {"acc": collapsed + general, "asr": failed, "ra": "", "der": failed}
        cells[str(attack), str(label)] = {
            metric: _number(having, metric, f)
            for metric, f in flags.items()
            if len(having := group.dropna(subset=[metric]))
        }
    return cells


def _majority(values: pd.Series) -> str | None:
    """The value of more than half of the runs, if there is one."""
    counts = values.value_counts()
    return str(counts.index[0]) if 2 * counts.iloc[0] > len(values) else None


def _main(labels: list[str], runs: pd.DataFrame, cells: Cells) -> Grid:
    columns = {label: METRICS[:3] if label == UNDEFENDED else METRICS for label in labels}
    attacks = sorted(name for name in set(runs["row"]) if not is_clean(name))
    rows = [_row_of(a, {label: cells.get((a, label), {}) for label in labels}) for a in attacks]
    rows = [_with_best_in_row(row) for row in rows]
    foot = [_with_best_in_row(_mean_row(rows, columns, runs))] if len(rows) > 1 else []
    for name in sorted(filter(is_clean, set(runs["row"]))):
        clean = {label: cells.get((name, label), {}) for label in labels}
        if any(clean.values()):
            foot.append(_with_best_in_row(_row_of(name, clean)))
    return Grid("attack", columns, tuple(rows), tuple(foot))


def _ablation(method: str, labels: list[str], cells: Cells) -> Grid:
    """The rows are the method and its variants; the columns are the attacks and their mean."""
    attacks = sorted({attack for attack, label in cells if label in labels})
    rows = []
    for label in [method, *labels]:
        groups = {attack: cells.get((attack, label), {}) for attack in attacks}
        if any(groups.values()):
            rows.append(_row_of(label, groups))
    columns = dict.fromkeys(attacks, METRICS)
    for heading, metric in _keys(columns):
        named = {row.name: row.numbers for row in rows if (heading, metric) in row.numbers}
        best = _best({(name, heading): numbers for name, numbers in named.items()}, metric)
        rows = [
            _marked(row, {(heading, metric)} if (row.name, heading) in best else ()) for row in rows
        ]
    return Grid("variant", columns, tuple(rows))


def _keys(columns: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(heading, metric) for heading, metrics in columns.items() for metric in metrics]


def _row_of(name: str, groups: Mapping[str, Mapping[str, Number]]) -> Row:
    """A row's seeds are those of its first cell; a single seed is flagged there, or elsewhere."""
    seeds = next(n.seeds for numbers in groups.values() for n in numbers.values())
    numbers = {
        (heading, metric): replace(
            n, flags=f"{n.flags}s" if metric == "acc" and n.seeds == 1 < seeds else n.flags
        )
        for heading, group in groups.items()
        for metric, n in group.items()
    }
    return Row(name, seeds, "s" if seeds == 1 else "", numbers)


def _mean_row(rows: list[Row], columns: Mapping[str, tuple[str, ...]], runs: pd.DataFrame) -> Row:
    """Means of the attacks' means.

    A column says so if it has fewer attacks than without a defense, or lacks models of one that
    another defense has.
    The deviation is that of the seeds' means over the attacks, if every attack has every seed.
    """
    numbers = {}
    for heading, metric in _keys(columns):
        cells = [row.numbers[heading, metric] for row in rows if (heading, metric) in row.numbers]
        of = (UNDEFENDED, "asr" if metric == "der" else metric)
        if cells:
            flags = "".join(f for f in "acgnpv" if any(f in n.flags for n in cells))
            lacks_models = any(
                n.records - row.numbers[heading, metric].records
                for row in rows
                if heading != UNDEFENDED and (heading, metric) in row.numbers
                for (other, its), n in row.numbers.items()
                if other != UNDEFENDED and its == metric
            )
            if lacks_models or len(cells) < sum(of in row.numbers for row in rows):
                flags += "m"
            if metric == "acc" and all(n.seeds == 1 for n in cells):
                flags += "s"
            mean = sum(n.mean for n in cells) / len(cells)
            attacked = runs[(runs["label"] == heading) & ~runs["row"].map(is_clean)]
            by_seed = attacked.pivot_table(metric, "model_seed", "row")
            is_whole = (
                len(by_seed) > 1
                and by_seed.shape[1] == len(cells)
                and bool(by_seed.notna().to_numpy().all() and attacked["model_seed"].notna().all())
            )
            sd = float(by_seed.mean(axis=1).std()) if is_whole else None
            numbers[heading, metric] = Number(
                mean, sd, len(cells), flags, records=frozenset().union(*(n.records for n in cells))
            )
    attacks = len({row.name.partition(" (")[0] for row in rows})
    text = (
        f"{len(rows)} attacks" if attacks == len(rows) else f"{len(rows)} rows, {attacks} attacks"
    )
    return Row(f"mean of {text}", None, "", numbers, attacks=len(rows))


def _with_best_in_row(row: Row) -> Row:
    """Marks the best defense of each metric, and those that print the same, among several."""
    for metric in METRICS:
        rivals = {
            ("", heading): row.numbers
            for heading, of in row.numbers
            if of == metric and heading != UNDEFENDED
        }
        row = _marked(row, {(heading, metric) for _, heading in _best(rivals, metric)})
    return row


def _marked(row: Row, keys: Iterable[tuple[str, str]]) -> Row:
    best = {key: replace(row.numbers[key], is_best=True) for key in keys}
    return replace(row, numbers={**row.numbers, **best})


def _best(
    rivals: Mapping[tuple[str, str], Mapping[tuple[str, str], Number]], metric: str
) -> list[tuple[str, str]]:
    """Which of several rivals, (anything, heading) -> numbers, is best; all that print the same.

    These do not compete: numbers of fewer or other models than most of the rivals have, those of a
    failed attack or a collapsed defense, and those of a defense that sees poisoned images.
    """
    numbers = {key: of[key[1], metric] for key, of in rivals.items()}
    sets = Counter(number.records for number in numbers.values())
    most = max(((len(records), count) for records, count in sets.items()), default=(0, 0))
    same = [records for records, count in sets.items() if (len(records), count) == most]
    fair = {
        key: number.rounded()
        for key, number in numbers.items()
        if same == [number.records]
        and "m" not in number.flags
        and "a" not in rivals[key].get((key[1], "asr"), number).flags
        and not set("cp") & set(rivals[key].get((key[1], "acc"), number).flags)
    }
    if len(fair) < 2:
        return []
    best = (max if HIGHER_IS_BETTER[metric] else min)(fair.values())
    return [key for key, value in fair.items() if value == best]


def _number(runs: pd.DataFrame, metric: str, flags: str) -> Number:
    values = runs[metric]
    sd = float(values.std()) if len(values) > 1 else None  # of a sample: divides by n - 1
    return Number(float(values.mean()), sd, len(values), flags, records=frozenset(runs["record"]))
