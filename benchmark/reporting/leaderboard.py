"""Leaderboards: a row for each defense, over attacks that all of the defenses in it were run on.

A mean over other attacks is no comparison: it may be better because the attacks are easier. So
each set of attacks that some defense was run on has a leaderboard, of all defenses that were run
on every one of them, from the same backdoored models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from benchmark.reporting import tables
from benchmark.reporting.means import FLAGS, Number, Table, any_collapsed, percent
from benchmark.reporting.stored import HEADLINES
from benchmark.reporting.summaries import is_clean
from utils.errors import counted
from utils.metrics import FAILED_ASR

RESAMPLES = 100_000
CONFIDENCE = 0.95
FEW_ATTACKS = 6  # with fewer, resamples vary less than attacks do: by a factor of (n - 1) / n
COLUMNS = {  # heading -> whether it is sorted as a text
    "defense": True,
    "rank": False,
    "differs from": False,  # sorted by how many they are
    "DER": False,
    "ASR": False,
    "worst ASR": False,
    "RA": False,
    "ACC lost": False,
    "clean model ACC lost": False,
    "purify seconds": False,
    "sees": True,
}
_COLUMNS_MEAN = (
    "Percent; mean ± sample standard deviation of the seeds' means. Worst ASR: of the attack that "
    "the defense does worst against. ACC lost: before minus after, negative where it is gained. "
    "Purify seconds: by the clock, of the purification alone. In brackets: of how many models a "
    "number is, if not of all."
)
_ANALYSES_MEAN = (
    "Of analyses (docs/analysis.md). ASR re-learned: after a short fine-tuning with five poisoned "
    "images. t at ASR 50 %: on the straight line from the backdoored weights (0) to the purified "
    "ones (1); near 1 is near the edge. ASR re-activated: with one small perturbation. S: how much "
    "of the backdoor's features is left. Clean model: the same for a model without a backdoor. "
    "Exact purification: the same for the backdoored model after it was tuned with true labels. "
    "Clean images: those that the same perturbation sends to the target. In brackets: how many of "
    "the analysed models have the number; t has one only where the ASR falls below 50 %."
)
_RANK_MEANS = (
    f"Rank: by mean DER. In brackets: its {100 * CONFIDENCE:.0f} % interval over {RESAMPLES:,} "
    "resamples of the attacks and of the seeds, which are the same for all attacks. Differs from: "
    f"ranks of the defenses with another mean DER. For these, the {100 * CONFIDENCE:.0f} % "
    "interval of the difference, over the same resamples, is without 0. It is the interval of one "
    "pair: it is not corrected for many pairs, of which some differ by chance. Brackets that "
    "overlap do not say that two defenses are alike. Bold: differs from none of a better rank, so "
    "it may be the first, whatever its bracket begins with."
)
_NOTHING = "No two defenses were run on the same backdoored models: there is nothing to compare."


@dataclass(frozen=True)
class Rank:
    """A place among some defenses, 1 for the best, with its interval.

    `low` and `high` are None where there is one attack, which says nothing about others. `differs`
    has the names of those defenses whose mean is another one; then it is empty, too.
    """

    place: int
    low: int | None
    high: int | None
    differs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.place) if self.low is None else f"{self.place} ({self.low} to {self.high})"


@dataclass(frozen=True)
class Entry:
    """A row of a leaderboard: means over the attacks' means, in [0, 1].

    Attributes:
        rank: None for a defense that sees poisoned images, or is the only one.
        differs_from: the ranks of the defenses that it differs from, as text; empty without an
            interval.
        is_first: whether it may be the best one.
        ra: None where there is none.
        clean_acc_lost: of models without a backdoor; None where there is none.
        purify_seconds: None where no run says it.
        sees: "clean", "poisoned" or "nothing".
        flags: keys of `means.FLAGS`.
        analyses: means of the numbers of `stored.HEADLINES` over the models that have them, and
            how many these are.
    """

    defense: str
    rank: Rank | None
    differs_from: str
    is_first: bool
    der: Number
    asr: Number
    worst_asr: float
    worst_attack: str
    ra: Number | None
    acc_lost: Number
    clean_acc_lost: Number | None
    purify_seconds: Number | None
    sees: str
    flags: str
    analyses: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Leaderboard:
    """Some defenses on the same models, the best DER first.

    Attributes:
        notes: whole sentences.
        analysed: by name of `stored.HEADLINES`, how many models have the number for some defense.
        clean_models: on how many models without a backdoor some of the defenses was run.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    analysed: dict[str, int] = field(default_factory=dict)
    clean_models: int = 0


@dataclass(frozen=True)
class Cell:
    """A number as it is printed, what stands under it, and what it is sorted by."""

    text: str
    detail: str = ""
    sort: str = ""


def leaderboards(table: Table) -> list[Leaderboard]:
    """The leaderboards of a table, that of the most attacks first.

    One with a single defense is there only if it is the only one. Variants of a method are in none.
    A model whose attack has failed is not used, because there is no backdoor to remove; if all have
    failed, all are used, and flagged.
    """
    is_plain = table.runs["label"].isin(table.labels())
    runs = table.runs[is_plain & ~table.runs["row"].map(is_clean)]
    runs = runs.dropna(subset=["acc", "asr", "der"])
    has_failed = runs["asr_before"] < FAILED_ASR
    failed = runs[has_failed] if not has_failed.all() else runs[:0]
    runs = runs.drop(failed.index)
    attacks_of = {str(label): frozenset(group["row"]) for label, group in runs.groupby("label")}
    sets = sorted(set(attacks_of.values()), key=lambda names: (-len(names), sorted(names)))
    boards: dict[frozenset[str], Leaderboard] = {}
    for attacks in sets:
        same = shared = runs[runs["row"].isin(attacks)]
        asked, covered = attacks, frozenset[str]()
        # Defenses of the same attacks may share no model of some of them, and so fewer attacks.
        while len(shared) and covered != attacks:
            covered = attacks
            labels = [label for label, names in attacks_of.items() if names >= covered]
            same = runs[runs["row"].isin(covered) & runs["label"].isin(labels)]
            shared = same[same.groupby("record")["label"].transform("nunique") == len(labels)]
            attacks = frozenset(shared["row"])
        if len(shared) and (len(labels) > 1 or len(sets) == 1):
            skipped = len(same) - len(shared)
            lost = sorted(asked - attacks)
            boards.setdefault(attacks, _leaderboard(table, shared, skipped, lost, failed))
    return list(boards.values())


def rank(der: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Rank]:
    """Ranks of some defenses by their mean DER, with intervals, and which of them differ.

    A resample draws as many attacks as there are, with replacement, and once, for all attacks, as
    many seeds as there are: a seed draws the same clean images and first weights for each attack
    (Owen. *The pigeonhole bootstrap.* 2007). An attack's mean is that over the drawn seeds that it
    has. If it has none of them, all of its own count: to drop it would draw fewer attacks than
    there are. So a single seed, of the grid or of an attack, stays as it is, and what its own seed
    does to an attack varies with the attacks.

    All defenses share the draws, since they purified the same models. Defenses that print the same
    DER, percent with two decimals, share a place; in a resample each of them may have any of the
    places that they share. Two defenses differ if one prints more than the other in more than
    97.5 % of the resamples. So a defense whose interval begins with 1 differs from none above it.

    Args:
        der: DER in [0, 1] without gaps: a row for each model, with the attack and the seed as the
            index; a column for each defense.
        resamples: how many, at least 1.
        seed: of the draws.

    Returns:
        Defense -> its rank.
    """
    seeds, distinct = pd.factorize(der.index.get_level_values(1))
    groups = [
        (seeds[rows], der.to_numpy(dtype=float)[rows])
        for rows in der.groupby(level=0).indices.values()
    ]
    count = len(groups)
    names = [str(name) for name in der.columns]
    means = der.groupby(level=0).mean().mean().to_numpy(dtype=float)  # as they are printed
    best, _, _ = _compared(np.vectorize(percent)(means)[:, None])
    places = dict(zip(names, best[:, 0].tolist(), strict=True))
    if count == 1:
        return {name: Rank(place, None, None) for name, place in places.items()}
    generator = np.random.default_rng(seed)
    drawn, drawn_seeds = (
        generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (count, len(distinct))
    )
    resampled = np.zeros((resamples, der.shape[1]))
    for times, (its_seeds, values) in zip(drawn.T, groups, strict=True):
        weights = drawn_seeds[:, its_seeds]
        weights[~weights.any(axis=1)] = 1
        shares = times[:, None] * weights / weights.sum(axis=1, keepdims=True) / count
        resampled += shares @ values
    best, worst, above = _compared(np.ascontiguousarray((100 * resampled).round(2).T))
    outside = (1 - CONFIDENCE) / 2
    low = np.quantile(best, outside, axis=1, method="inverted_cdf")
    high = np.quantile(worst, 1 - outside, axis=1, method="inverted_cdf")
    is_other = np.maximum(above, above.T) > 1 - outside
    differs = [
        frozenset(name for name, differs in zip(names, row, strict=True) if differs)
        for row in is_other
    ]
    return {
        name: Rank(places[name], int(lowest), int(highest), others)
        for name, lowest, highest, others in zip(names, low, high, differs, strict=True)
    }


def differing(name: str, ranks: Mapping[str, Rank]) -> str:
    """The ranks of those defenses that one differs from, such as `1, 7 to 21`, or `none`.

    Of defenses that share a rank, those that it differs from are named, unless these are all.
    """
    others: dict[int, list[str]] = {}
    for other, its in sorted(ranks.items()):
        if other != name:
            others.setdefault(its.place, []).append(other)
    mine, parts, following = ranks[name], list[str](), list[int]()
    for place in sorted({its.place for its in ranks.values()}):
        names = [other for other in others.get(place, []) if other in mine.differs]
        if names and names == others[place] and place != mine.place:
            following.append(place)
            continue
        parts += _spans(following)
        following = []
        if names:
            parts.append(f"{place} ({', '.join(names)})")
    return ", ".join([*parts, *_spans(following)]) or "none"


def _spans(places: Sequence[int]) -> list[str]:
    """Places without another one between them, as text: three or more are `first to last`."""
    return [f"{places[0]} to {places[-1]}"] if len(places) > 2 else [str(place) for place in places]


def _compared(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some defenses in each of some resamples.

    Args:
        means: (defenses, resamples), as they are printed.

    Returns:
        The best and the worst place of each, both (defenses, resamples): they differ where
        defenses are equal. And the share of resamples in which each (row) is above each (column).
    """
    count = len(means)
    best = np.ones(means.shape, dtype=np.int32)
    worst = np.full(means.shape, count, dtype=np.int32)
    above = np.empty((count, count))
    for index, mean in enumerate(means):
        is_above = means > mean
        best[index] += is_above.sum(axis=0, dtype=np.int32)
        worst -= is_above
        above[:, index] = is_above.mean(axis=1)
    return best, worst, above


def _leaderboard(
    table: Table, runs: pd.DataFrame, skipped: int, lost: Sequence[str], failed: pd.DataFrame
) -> Leaderboard:
    """Of runs that have each defense on each record.

    Args:
        skipped: how many runs were left out, because another defense lacks their model.
        lost: attacks of which no model has all the defenses.
        failed: runs on models whose attack failed.
    """
    groups = {str(label): group for label, group in runs.groupby("label")}
    flags = {label: _flags(table, label, group) for label, group in groups.items()}
    rivals = [label for label in groups if "p" not in flags[label]]
    ranks: dict[str, Rank] = {}
    if len(rivals) > 1:
        # A model without a seed, which was trained elsewhere, shares its draws with no other.
        seeds = runs["model_seed"].astype(object).where(runs["model_seed"].notna(), runs["record"])
        der = runs.assign(seed=seeds).pivot_table("der", ["row", "record", "seed"], "label")
        ranks = rank(der.droplevel("record")[rivals])
    entries = [_entry(table, g, ranks, flags[label]) for label, g in groups.items()]
    entries.sort(key=lambda entry: (-entry.der.rounded(), entry.defense))
    measured = [name for name in HEADLINES if name in runs]
    analysed = {name: runs.dropna(subset=[name])["record"].nunique() for name in measured}
    notes = _notes(table, runs, skipped, lost, failed)
    some = runs[runs[measured].notna().any(axis=1)]
    if len(some):
        names = ", ".join(sorted(set(some["row"])))
        notes.append(f"Analysed: {some['record'].nunique()} of these models ({names}).")
    clean = [entry.clean_acc_lost for entry in entries]
    clean_models = frozenset().union(*(number.records for number in clean if number))
    return Leaderboard(tuple(entries), tuple(notes), analysed, len(clean_models))


def _entry(table: Table, runs: pd.DataFrame, ranks: Mapping[str, Rank], flags: str) -> Entry:
    label = str(runs["label"].iloc[0])
    place = ranks.get(label)
    is_resampled = place is not None and place.low is not None
    clean = table.runs[(table.runs["label"] == label) & table.runs["row"].map(is_clean)]
    runs, clean = (part.assign(acc_lost=part["acc_before"] - part["acc"]) for part in (runs, clean))
    by_attack = runs.groupby("row")["asr"].mean()
    der, asr, ra, acc_lost = (_mean(runs, name) for name in ("der", "asr", "ra", "acc_lost"))
    if der is None or asr is None or acc_lost is None:
        raise ValueError(f"{label} has no scores")
    return Entry(
        defense=label,
        rank=place,
        differs_from=differing(label, ranks) if is_resampled else "",
        is_first=is_resampled and not set("ac") & set(flags) and not _is_below(label, ranks),
        der=der,
        asr=asr,
        worst_asr=float(by_attack.max()),
        worst_attack=str(by_attack.idxmax()),
        ra=ra,
        acc_lost=acc_lost,
        clean_acc_lost=_mean(clean, "acc_lost"),
        purify_seconds=_mean(runs, "purify_seconds"),
        sees=", ".join(sorted(set(runs["sees"]))),
        flags=flags,
        analyses=_analyses(runs),
    )


def _is_below(name: str, ranks: Mapping[str, Rank]) -> bool:
    """Whether a defense differs from one of a better rank."""
    return any(ranks[other].place < ranks[name].place for other in ranks[name].differs)


def _analyses(runs: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Means over the attacks' means of what analyses measured, and of how many models."""
    means = {name: _mean(runs, name) for name in HEADLINES if name in runs}
    return {
        name: (float(mean.mean), runs.dropna(subset=[name])["record"].nunique())
        for name, mean in means.items()
        if mean is not None
    }


def _flags(table: Table, label: str, runs: pd.DataFrame) -> str:
    """Those of a defense's numbers in the table by attack, and whether it has one seed only."""
    rows = set(runs["row"])
    numbers = [
        number
        for row in table.main.body
        if row.name in rows
        for (heading, _), number in row.numbers.items()
        if heading == label
    ]
    flags = {flag for number in numbers for flag in number.flags} - {"s"}
    flags |= {flag for of_run in runs["analysis_flags"] for flag in of_run}
    if not (runs["asr_before"] < FAILED_ASR).any():
        flags.discard("a")  # that of models that are not used
    if not any_collapsed(runs):
        flags.discard("c")  # likewise
    return "".join(sorted(flags | ({"s"} if runs.groupby("row").size().max() == 1 else set())))


def _mean(runs: pd.DataFrame, metric: str) -> Number | None:
    """The mean of the attacks' means.

    Its deviation is that of the seeds' means over the attacks, where each attack has each seed.
    """
    runs = runs.dropna(subset=[metric])
    if runs.empty:
        return None
    by_seed = runs.pivot_table(metric, "model_seed", "row")
    is_whole = by_seed.notna().all(axis=None) and runs["model_seed"].notna().all()
    has_all = len(by_seed) > 1 and is_whole
    sd = float(by_seed.mean(axis=1).std()) if has_all else None
    mean = float(runs.groupby("row")[metric].mean().mean())
    return Number(mean, sd, len(runs), records=frozenset(runs["record"]))


def _notes(
    table: Table, runs: pd.DataFrame, skipped: int, lost: Sequence[str], failed: pd.DataFrame
) -> list[str]:
    attacks, labels = sorted(set(runs["row"])), set(runs["label"])
    models = runs["record"].nunique()
    by_attack = runs.groupby("row")["record"]
    alone = [str(row) for row, records in by_attack if records.nunique() == 1]
    notes = [f"Attacks: {', '.join(attacks)}. Backdoored models: {models}."]
    if rows_of_one := [row for row in attacks if " (" in row and row.partition(" (")[0] in attacks]:
        notes.append(f"Counted as attacks of their own: {', '.join(rows_of_one)}.")
    if others := [label for label in table.labels() if label not in labels]:
        notes.append(f"Not run on all of these attacks: {', '.join(others)}.")
    if skipped:
        runs_skipped = counted(skipped, "run")
        notes.append(f"Not used, since some of these defenses lack their models: {runs_skipped}.")
    if lost:
        names = ", ".join(lost)
        notes.append(f"Not used, since none of their models has all of these defenses: {names}.")
    if len(failed):
        models_of = failed.groupby("row")["record"].nunique()
        names = ", ".join(f"{attack} ({count})" for attack, count in models_of.items())
        notes.append(
            f"Not used, since the attack failed (ASR under {100 * FAILED_ASR:.0f} % without a "
            f"defense; models in brackets): {names}."
        )
    if len(attacks) == 1 and len(labels) > 1:
        notes.append("One attack says nothing about others: the ranks have no interval.")
    elif alone and len(labels) > 1:
        of = "each attack" if len(alone) == len(attacks) else ", ".join(alone)
        notes.append(f"One model for {of}: the intervals do not say what other seeds change there.")
    if len(labels) > 1 and 1 < len(attacks) < FEW_ATTACKS:
        notes.append("The attacks are few: true intervals are wider.")
    return notes


def columns(board: Leaderboard) -> dict[str, bool]:
    """Heading of each column -> whether it is sorted as a text; analyses where there are some."""
    return {**COLUMNS, **{HEADLINES[name][0]: False for name in _measured(board)}}


def _measured(board: Leaderboard) -> list[str]:
    return [name for name in HEADLINES if any(name in entry.analyses for entry in board.entries)]


def cells(entry: Entry, board: Leaderboard) -> list[Cell]:
    """What stands in the columns after the defense's name."""
    place = "" if entry.rank is None else str(entry.rank.place)
    interval = "" if entry.rank is None else str(entry.rank).removeprefix(place).strip()
    differs = str(len(entry.rank.differs)) if entry.rank and entry.differs_from else ""
    seconds, clean = entry.purify_seconds, _number_cell(entry.clean_acc_lost)
    worst = Number(entry.worst_asr, None, 1)
    return [
        Cell(place, interval, place),
        Cell(entry.differs_from, "", differs),
        _number_cell(entry.der),
        _number_cell(entry.asr),
        Cell(_percent(worst), entry.worst_attack, repr(entry.worst_asr)),
        _number_cell(entry.ra),
        _number_cell(entry.acc_lost),
        _with_count(clean, entry.clean_acc_lost, board.clean_models),
        Cell("")
        if seconds is None
        else _with_count(
            Cell(_seconds(seconds.mean), "", repr(seconds.mean)), seconds, entry.der.seeds
        ),
        Cell(entry.sees, "", entry.sees),
        *(_analysis_cell(name, entry, board) for name in _measured(board)),
    ]


def _analysis_cell(name: str, entry: Entry, board: Leaderboard) -> Cell:
    if name not in entry.analyses:
        return Cell("")
    value, models = entry.analyses[name]
    total = board.analysed[re.sub("_(clean|exact)$", "", name)]  # of a control: as of the others
    _, is_share = HEADLINES[name]
    detail = "" if models == total else f"({models} of {total})"
    return Cell(f"{100 * value:.2f}" if is_share else f"{value:.2f}", detail, repr(value))


def _with_count(cell: Cell, number: Number | None, total: int) -> Cell:
    """The cell, and of how many models its number is, if there are more."""
    if number is None or number.seeds == total:
        return cell
    return replace(cell, detail=f"{cell.detail} ({number.seeds} of {total})".strip())


def _number_cell(number: Number | None) -> Cell:
    if number is None:
        return Cell("")
    deviation = "" if number.sd is None else f"± {100 * number.sd:.2f}"
    return Cell(_percent(number), deviation, repr(float(number.mean)))


def _percent(number: Number) -> str:
    return f"{number.rounded() + 0.0:.2f}"  # no -0.00


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def legend(boards: Sequence[Leaderboard]) -> list[str]:
    """What columns and flags of some leaderboards mean, one line for each."""
    entries = [entry for board in boards for entry in board.entries]
    lines = [_COLUMNS_MEAN]
    if any(entry.analyses for entry in entries):
        lines.append(_ANALYSES_MEAN)
    if any(entry.rank is not None for entry in entries):
        lines.append(_RANK_MEANS)
    used = {flag for entry in entries for flag in entry.flags}
    return [*lines, *(f"{flag}: {FLAGS[flag]}." for flag in sorted(used))]


def markdown(all_tables: Sequence[Table]) -> str:
    """The leaderboards of some tables; no headings, so that they fit into any page."""
    parts: list[str] = []
    for table in all_tables:
        boards = leaderboards(table)
        if not boards:
            continue
        parts.append(f"**{tables.markdown_text(table.title)}**")
        for board in boards:
            parts += [" ".join(tables.markdown_text(note) for note in board.notes), _rows(board)]
        parts.append("  \n".join(tables.markdown_text(line) for line in legend(boards)))
    return "\n\n".join(parts or [_NOTHING]) + "\n"


def _rows(board: Leaderboard) -> str:
    headings = columns(board)
    lines = [tables.pipes(list(headings))]
    lines.append(tables.pipes(["---" if is_text else "---:" for is_text in headings.values()]))
    for entry in board.entries:
        name = tables.markdown_text(entry.defense)
        name = (f"**{name}**" if entry.is_first else name) + tables.raised(entry.flags)
        texts = [tables.markdown_text(f"{c.text} {c.detail}".strip()) for c in cells(entry, board)]
        lines.append(tables.pipes([name, *texts]))
    return "\n".join(lines)


def backdoorbench_csv(all_tables: Sequence[Table]) -> str:
    """CSV in the columns of BackdoorBench's results: a row for each attack and defense.

    Rates are means over seeds in [0, 1], not rounded. Models without a backdoor are not in it. If
    rows differ only in the sizes of images or sets, the columns that tell them apart follow.
    """
    columns = {"model": "backbone", "acc": "test_acc", "asr": "test_asr", "ra": "test_ra"}
    keys = ["dataset", "model", "attack", "label", "pratio"]
    rates = ["acc", "asr", "ra"]
    attacked = [table.runs[~table.runs["attack"].map(is_clean)] for table in all_tables]
    sizes = ["image_size", "train_images", "test_images"]
    means = pd.concat(
        runs.groupby([*keys, *sizes], as_index=False, dropna=False)[rates].mean()
        for runs in attacked
    )
    of_one = means.groupby(keys, dropna=False)[sizes].nunique(dropna=False).max()
    shown = means[[*keys, *rates, *(size for size in sizes if of_one[size] > 1)]]
    return tables.as_csv(shown.rename(columns={**columns, "label": "defense"}))
