"""Tables, figures and a page from the records under a folder.

    python benchmark/report.py --to report                          # all of record/
    python benchmark/report.py --under digits --to results/digits --keep
    python benchmark/report.py --rebuild RESULTS.md

Numbers come from the `summary.json` files alone: a row an attack, a column a defense, means and
sample standard deviations over seeds. Writes `table.md`, `table.tex`, `table.csv` (tidy, rates in
[0, 1], not rounded), `runs.csv` (a row a run), `figures/` and `report.html`, which needs no other
file. `--keep` copies the summaries, metrics and configurations into `<to>/records/`, from which the
same command makes the same tables again. `--rebuild` does that for each folder that a text names,
and puts the tables between its marks:

    <!-- begin results/digits/table.md -->
    <!-- end results/digits/table.md -->
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import gallery
from benchmark.reporting import page, sources, tables
from benchmark.reporting.means import Grid, Table, summarize
from benchmark.reporting.summaries import METRICS, UNDEFENDED, is_clean, read_runs
from utils import plot
from utils.config import Parser
from utils.errors import UserError, one_line
from utils.files import ROOT, read_text
from utils.process.script import logger, run_script
from utils.records.attack import load_attack
from utils.records.folders import RunFolder

_TRIGGERS = "Triggers, and the amplified change"
_MARK = re.compile(r"<!-- (begin|end) ([^\s<>]+) -->\s*")


def write(under: Path, to: Path, is_kept: bool) -> None:
    """Writes a report of the records under a folder into another one, or the same.

    Raises:
        UserError: if there is no finished record, or the folder cannot be written.
    """
    found, runs, problems = read(under, to)
    if is_kept:
        sources.check_kept(to, runs["record"])
    folder = made_folder(to)
    write_tables(found, runs, folder)
    pictures = {table.name: draw(table, made_folder(to / "figures")) for table in found}
    if is_kept:
        sources.keep(runs, to)
    title = f"Backdoors and defenses: {', '.join(sorted(set(runs['dataset'])))}"
    folder.write_text("report.html", page.render(title, found, pictures, problems))
    logger.info("%d records, %d runs", runs["record"].nunique(), len(runs))
    logger.info("page: %s", to / "report.html")


def read(under: Path, to: Path) -> tuple[list[Table], pd.DataFrame, list[str]]:
    """Tables and runs of a folder; what is left out is said.

    Raises:
        UserError: if nothing is left.
    """
    is_inside = to.resolve() != under.resolve() and to.resolve().is_relative_to(under.resolve())
    runs, problems = read_runs(under, without=to if is_inside else None)
    for problem in problems:
        logger.warning("warning: %s", problem)
    if runs.empty:
        raise UserError(f"{under}: has no finished record; run an attack, or name another --under")
    return summarize(runs), runs, problems


def write_tables(found: list[Table], runs: pd.DataFrame, folder: RunFolder) -> None:
    """Writes the tables in every format."""
    folder.write_text("table.md", tables.markdown(found))
    folder.write_text("table.tex", tables.latex(found))
    folder.write_text("table.csv", tables.tidy(found))
    folder.write_text("runs.csv", tables.runs_csv(runs))


def draw(table: Table, folder: RunFolder) -> dict[str, Path]:
    """Writes a table's figures as PNG and SVG.

    Returns:
        Caption -> PNG.
    """
    written = {}
    earlier = folder.path / f"{_stem(table, 'triggers')}.png"
    for name, caption, figure in _figures(table, has_gallery=earlier.exists()):
        stem = _stem(table, name)
        with matplotlib.rc_context({"svg.hashsalt": "report"}):  # the same bytes each time
            folder.write(f"{stem}.svg", partial(figure.savefig, metadata={"Date": None}))
        written[caption] = folder.write(f"{stem}.png", partial(figure.savefig, dpi=160))
    if _TRIGGERS not in written and earlier.exists():  # drawn when the records were there
        written[_TRIGGERS] = earlier
    return written


def _stem(table: Table, name: str) -> str:
    return sources.file_stem(f"{table.name}-{name}")


def _figures(table: Table, has_gallery: bool) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of all that a table's runs have something for.

    Args:
        has_gallery: whether there is a gallery of triggers, which a less complete one does not
            replace.
    """
    plain = table.runs[table.runs["label"].isin(table.labels()) & ~table.runs["row"].map(is_clean)]
    rates = ["acc_before", "asr_before", "acc", "asr", "der", "seconds"]
    points = plain.groupby(["label", "row"], as_index=False)[rates].mean()
    points = points.rename(columns={"label": "defense", "row": "attack"})
    seeds = {str(label): group["seed"].nunique() for label, group in plain.groupby("label")}
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
            count = int(group["seed"].nunique())
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
        yield "cost", "Time and effect, a point an attack", plot.cost(costs, table.title)
    triggers = _gallery(table, has_gallery)
    if triggers is not None:
        yield "triggers", _TRIGGERS, triggers


def _metrics(runs: pd.DataFrame) -> pd.DataFrame | None:
    read = [sources.read_metrics(Path(folder), "round") for folder in runs["folder"]]
    found = [metrics for metrics in read if metrics is not None]
    return pd.concat(found) if found else None


def _variants(grid: Grid, attack: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means and deviations, a row a variant, a column a metric."""
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

    Where there is a gallery and some attack has no such record: None.
    """
    undefended = table.runs[(table.runs["label"] == UNDEFENDED) & ~table.runs["row"].map(is_clean)]
    needed = ("attack_result.pt", "poison.pt", "summary.json")
    is_whole = [all((Path(f) / name).is_file() for name in needed) for f in undefended["folder"]]
    firsts = undefended.loc[is_whole].drop_duplicates("attack")
    if has_one and len(firsts) < undefended["attack"].nunique():
        logger.info("the gallery of triggers stays: tensors of some attacks are not there")
        return None
    by_kind: dict[tuple[object, ...], list[Path]] = {}
    for folder in map(Path, firsts["folder"]):
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
        logger.warning("warning: no picture of the triggers of %s: %s", table.title, error)
        return None
    title = f"Triggers on {dataset}: test images, and the amplified change"
    return plot.image_grid(gallery.gallery_rows(clean, triggered), {}, title)


def rebuild(text: Path) -> None:
    """Makes the tables that a text names again, from the records beside them, and puts them in.

    Raises:
        UserError: if a mark has no other half, or names what is not there.
    """
    try:
        before = read_text(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"--rebuild: {text} cannot be read ({reason}); give a text file") from None
    parts: dict[str, str] = {}
    for name in _marked(text, before):
        path = text.parent / name
        if not path.resolve().is_relative_to(text.parent.resolve()) or path.name != "table.md":
            raise UserError(
                f"{text}: {name} is no table.md beside it; name results/<grid>/table.md"
            )
        if not path.parent.is_dir():
            raise UserError(f"{text}: {path.parent} is no folder; write it with --to and --keep")
        found, runs, _ = read(path.parent, path.parent)
        write_tables(found, runs, RunFolder(path.parent))
        parts[name] = tables.markdown(found)
    RunFolder(text.parent).write_text(text.name, filled(text, before, parts))
    logger.info("tables of %s: %s", text, ", ".join(parts) or "none")


def _marked(text: Path, content: str) -> list[str]:
    """Names between marks, each opened and closed, none inside another."""
    names: list[str] = []
    opened: str | None = None
    for number, line in enumerate(content.splitlines(), start=1):
        mark = _MARK.fullmatch(line)
        if mark is None:
            continue
        kind, name = mark.groups()
        if (kind == "begin") != (opened is None) or (kind == "end" and name != opened):
            raise UserError(
                f"{text}:{number}: {line.strip()} has no other half; write begin and end"
            )
        opened = name if kind == "begin" else None
        names += [name] * (kind == "begin")
    if opened is not None:
        raise UserError(f"{text}: begin {opened} has no end; write <!-- end {opened} -->")
    return names


def filled(text: Path, content: str, parts: dict[str, str]) -> str:
    """A text with what stands between its marks replaced."""
    lines: list[str] = []
    is_inside = False
    for line in content.splitlines():
        mark = _MARK.fullmatch(line)
        if mark is not None and mark[1] == "begin":
            lines += [line, "", *parts[mark[2]].rstrip("\n").splitlines(), ""]
        is_inside = mark[1] == "begin" if mark is not None else is_inside
        if not is_inside:
            lines.append(line)
    return "\n".join(lines) + "\n"


def made_folder(path: Path) -> RunFolder:
    """A folder to write into, which is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: {path} cannot be made ({error.strerror}); give a folder") from None
    return RunFolder(path)


def records_folder(under: str | None, record_path: Path | None) -> Path:
    """The folder of `--under`: an existing one, or one below the folder of all records."""
    records = record_path or ROOT / "record"
    for folder in [records] if under is None else [records / under, Path(under)]:
        if folder.is_dir():
            return folder
    raise UserError(f"--under: {under or records} is no folder; give one that holds records")


def main() -> None:
    """Parses the flags and writes the report."""
    parser = Parser(__doc__)
    parser.add_argument("--under", help="folder of records, or one below record/; all of record/")
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument("--to", type=Path, help="folder to write into")
    parser.add_argument("--keep", action="store_true", help="copy the records' texts there too")
    parser.add_argument("--rebuild", type=Path, help="text whose marked tables are made again")
    flags = parser.parse_args()
    if flags.rebuild is not None:
        if flags.to or flags.under or flags.record_path or flags.keep:
            raise UserError("--rebuild: goes with no other flag; leave them out")
        rebuild(flags.rebuild)
    elif flags.to is None:
        raise UserError("--to: a value is needed; give the folder to write into")
    else:
        write(records_folder(flags.under, flags.record_path), flags.to, flags.keep)


if __name__ == "__main__":
    run_script(main)
