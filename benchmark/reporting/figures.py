"""Figures of a report, from a table and its runs."""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd

from benchmark import gallery
from benchmark.reporting.means import Grid, Table, seeds_of
from benchmark.reporting.stored import UNDEFENDED, StoredRun, file_stem
from benchmark.reporting.summaries import METRICS, is_clean
from utils import plot
from utils.errors import UserError
from utils.plot import Figure
from utils.process.script import logger
from utils.records.attack import load_attack
from utils.records.contents import ATTACK_RESULT, POISON, SUMMARY
from utils.records.folders import RunFolder
from utils.training import ending

_TRIGGERS = "Triggers, and the amplified change"


def draw(
    table: Table,
    folder: RunFolder,
    formats: Collection[str] = ("png", "svg"),
    only: Collection[str] | None = None,
) -> dict[str, Path]:
    """Writes a table's figures.

    Args:
        formats: "png", "svg" or both.
        only: names of the files, without their suffix, that are written; None for all.

    Returns:
        Caption -> PNG, of those that are written, and of a gallery of triggers from before.
    """
    written = {}
    earlier = folder.path / f"{_stem(table, 'triggers')}.png"
    for name, caption, figure in _figures(table, has_gallery=earlier.exists()):
        stem = _stem(table, name)
        if only is not None and stem not in only:
            continue
        if "svg" in formats:
            with matplotlib.rc_context({"svg.hashsalt": "report"}):  # the same bytes each time
                folder.write(f"{stem}.svg", partial(figure.savefig, metadata={"Date": None}))
        if "png" in formats:
            written[caption] = ending.save_figure(folder, f"{stem}.png", figure)
    if _TRIGGERS not in written and earlier.exists():  # drawn when the records were there
        written[_TRIGGERS] = earlier
    return written


def _stem(table: Table, name: str) -> str:
    return file_stem(f"{table.name}-{name}")


def _figures(table: Table, has_gallery: bool) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of each figure for which a table's runs have data.

    Args:
        has_gallery: whether there is a gallery of triggers already, which must not be replaced by a
            less complete one.
    """
    plain = table.runs[table.runs["label"].isin(table.labels()) & ~table.runs["row"].map(is_clean)]
    rates = ["acc_before", "asr_before", "acc", "asr", "der", "seconds"]
    points = plain.groupby(["label", "row"], as_index=False)[rates].mean()
    points = points.rename(columns={"label": "defense", "row": "attack"})
    seeds = {str(label): seeds_of(group) for label, group in plain.groupby("label")}
    for metric, which in (("asr", "lower"), ("ra", "higher")):
        values = _by_attack(table, metric)
        if values.shape[1] > 1:
            name = f"{metric.upper()} by attack and defense ({which} is better)"
            yield f"heat-{metric}", name, plot.heat_map(values, f"{name}, {table.title}")
    relearned = _relearned(table, plain)
    if relearned.shape[1] > 1:
        name = "ASR after five poisoned images (lower is better)"
        yield "heat-relearned", name, plot.heat_map(relearned, f"{name}, {table.title}")
    arrows = points.dropna(subset=rates[:4])
    if len(arrows):
        yield (
            "before-after",
            "What each defense does",
            plot.before_after(arrows, seeds, table.title),
        )
    for label, group in plain.groupby("label"):
        panels = {str(row): m for row, g in group.groupby("row") if (m := _metrics(g)) is not None}
        if panels:
            count = seeds_of(group)
            title = f"{label}, {table.title}: " + (
                f"mean, and lowest to highest of up to {count} seeds" if count > 1 else "one seed"
            )
            yield f"curves-{label}", f"{label} by round", plot.curves_with_bands(panels, title)
    for method, grid in table.ablations.items():
        for attack in grid.columns:
            values, deviations = _variants(grid, attack)
            title = f"Variants of {method} against {attack}, {table.title}"
            figure = plot.variants(values, deviations, method, title)
            yield f"variants-{method}-{attack}", f"Variants of {method} against {attack}", figure
    costs = points[points["seconds"] > 0].dropna(subset=["der"])
    if len(costs):
        yield "cost", "Time and effect, one point per attack", plot.cost(costs, table.title)
    triggers = _gallery(table, has_gallery)
    if triggers is not None:
        yield "triggers", _TRIGGERS, triggers


def _by_attack(table: Table, metric: str) -> pd.DataFrame:
    """A metric of the main table: a row for each attack, a column for each result that has any."""
    by_attack = {
        row.name: {heading: n.mean for (heading, of), n in row.numbers.items() if of == metric}
        for row in table.main.body
    }
    values = pd.DataFrame.from_dict(by_attack, orient="index", dtype=float)
    return values[[heading for heading in table.main.columns if heading in values]]


def _relearned(table: Table, runs: pd.DataFrame) -> pd.DataFrame:
    """Means of what `analysis/retune.py` measured: rows as in the main table, the control first."""
    means = runs.groupby(["row", "label"])[["asr_retuned", "asr_retuned_clean"]].mean()
    if means["asr_retuned"].isna().all():
        return pd.DataFrame()
    values = means["asr_retuned"].dropna().unstack()
    order = [heading for heading in table.main.columns if heading in values]
    clean = means["asr_retuned_clean"].groupby("row").mean()
    rows = [row.name for row in table.main.body if row.name in values.index]
    return values[order].assign(**{"a clean model": clean})[["a clean model", *order]].loc[rows]


def _metrics(runs: pd.DataFrame) -> pd.DataFrame | None:
    metrics = [run.metrics for run in runs["run"] if run.metrics is not None]
    return pd.concat(metrics) if metrics else None


def _variants(grid: Grid, attack: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means and deviations, one row per variant, one column per metric."""
    means, deviations = {}, {}
    for row in grid.body:
        numbers = {metric: row.numbers.get((attack, metric)) for metric in METRICS}
        means[row.name] = {m: n.mean if n else None for m, n in numbers.items()}
        deviations[row.name] = {m: n.sd if n else None for m, n in numbers.items()}
    return tuple(  # type: ignore[return-value]
        pd.DataFrame.from_dict(values, orient="index", dtype=float)
        for values in (means, deviations)
    )


def _gallery(table: Table, has_one: bool) -> Figure | None:
    """Triggers of the first record of each attack whose tensors are there.

    None if there is a gallery already and some attack has no such record.
    """
    undefended = table.runs[(table.runs["label"] == UNDEFENDED) & ~table.runs["row"].map(is_clean)]
    is_whole = [_has_tensors(run) for run in undefended["run"]]
    firsts = undefended.loc[is_whole].drop_duplicates("attack")
    if has_one and len(firsts) < undefended["attack"].nunique():
        logger.info("the gallery of triggers stays: tensors of some attacks are not there")
        return None
    by_kind: dict[tuple[object, ...], list[Path]] = {}
    for folder in (run.folder for run in firsts["run"]):
        try:
            attack = load_attack(folder)
        except UserError as error:
            logger.warning("warning: no picture of its trigger: %s", error)
            continue
        by_kind.setdefault((attack.image_shape, attack.dataset_path), []).append(folder)
    if not by_kind:
        return None
    try:  # one kind of images fits into a picture
        dataset, clean, triggered = gallery.load_rows(max(by_kind.values(), key=len))
    except UserError as error:
        logger.warning(
            "warning: no picture of the triggers of %s, which benchmark/gallery.py also draws: %s",
            table.title,
            error,
        )
        return None
    title = f"Triggers on {dataset}: test images, and the amplified change"
    return plot.image_grid(gallery.gallery_rows(clean, triggered), {}, title)


def _has_tensors(run: StoredRun) -> bool:
    needed = (ATTACK_RESULT, POISON, SUMMARY)
    return run.folder is not None and all((run.folder / name).is_file() for name in needed)
