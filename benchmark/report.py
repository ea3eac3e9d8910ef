"""Tables, figures and a page from runs: from folders of records, or from what `results/` keeps.

    python benchmark/report.py --to report                          # all of record/
    python benchmark/report.py --under digits --to results/digits --keep
    python benchmark/report.py --under results/digits mine --to results/digits --keep
    python benchmark/report.py --under results/digits --to report   # all forms of a kept grid
    python benchmark/report.py --rebuild RESULTS.md

Numbers come only from the runs' summaries: one row per attack, columns for each defense, means and
sample standard deviations over seeds. `--formats` says what is written:

    md      table.md, and leaderboard.md: one row per defense, with its rank
    tex     table.tex
    csv     table.csv (tidy, rates in [0, 1], not rounded), runs.csv (a row for each run), and
            backdoorbench.csv in the columns of BackdoorBench's results
    png     figures/*.png
    svg     figures/*.svg
    html    report.html, which needs no other file; and the PNG figures, which it shows

`--under` takes several folders, of both forms. If two of them have a record of the same name, their
results are put together. If both have the same result, that of the later folder is used.

`--keep` also writes the runs themselves, in two files from which the same command makes the same
tables again: `runs.jsonl`, a line for each run with its summary and its configuration, and
`curves.csv` with the rows of every metrics.csv. It refuses to drop a run that is already there: the
third command above adds the runs of record/mine to the grid. Without `results/digits` under
`--under`, it would write nothing and say which runs are missing.

`--rebuild` makes table.md and leaderboard.md again for each folder that a text names in marks like
the ones below, puts the named table between the marks, and draws the figures of these folders that
the text shows:

    <!-- begin results/digits/table.md -->
    <!-- end results/digits/table.md -->
"""

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import gallery
from benchmark.reporting import leaderboard, page, sources, tables
from benchmark.reporting.means import Grid, Table, summarize
from benchmark.reporting.summaries import METRICS, UNDEFENDED, is_clean, read_runs
from utils import plot
from utils.config import Parser
from utils.errors import UserError, listed, one_line
from utils.files import ROOT, read_text
from utils.process.script import logger, run_script
from utils.records.attack import load_attack
from utils.records.folders import RunFolder

FORMATS = ("md", "tex", "csv", "png", "svg", "html")
KEPT_FORMATS = ("md", "png")  # beside the runs
_MARKED = {"table.md": tables.markdown, "leaderboard.md": leaderboard.markdown}
_TRIGGERS = "Triggers, and the amplified change"
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+\.png)\)")
_MARK = re.compile(r"<!-- (?P<kind>begin|end) (?P<name>[^\s<>]+) -->\s*")


def write(
    unders: Sequence[Path], to: Path, is_kept: bool, formats: Collection[str] = FORMATS
) -> None:
    """Writes a report of the runs under some folders into another one, or one of them.

    Args:
        is_kept: whether the runs are written, too.
        formats: some of `FORMATS`.

    Raises:
        UserError: if there is no finished run, one that is kept would be lost, or the folder cannot
            be written.
    """
    all_tables, runs, problems = read(unders, to)
    if is_kept:
        sources.check_kept(to, list(runs["run"]))
    folder = made_folder(to)
    write_tables(all_tables, runs, folder, formats)
    if is_kept:
        sources.keep(runs["run"], folder)
    drawn = {"png", "svg"} & set(formats) | ({"png"} if "html" in formats else set())
    pictures: dict[str, dict[str, Path]] = {}
    if drawn:
        figures = made_folder(to / "figures")
        pictures = {table.name: draw(table, figures, drawn) for table in all_tables}
    logger.info("%d records, %d runs: %s", runs["record"].nunique(), len(runs), to)
    if "html" in formats:
        title = f"Backdoors and defenses: {', '.join(sorted(set(runs['dataset'])))}"
        folder.write_text("report.html", page.render(title, all_tables, pictures, problems))
        logger.info("page: %s", to / "report.html")


def read(unders: Sequence[Path], to: Path) -> tuple[list[Table], pd.DataFrame, list[str]]:
    """Tables and runs of some folders; a message names everything that is skipped.

    Raises:
        UserError: if nothing remains.
    """
    runs, problems = read_runs(*unders, without=to)
    for problem in problems:
        logger.warning("warning: %s", problem)
    if runs.empty:
        names = ", ".join(map(str, unders))
        raise UserError(f"{names}: has no finished record; run an attack, or name another --under")
    return summarize(runs), runs, problems


def write_tables(
    all_tables: list[Table],
    runs: pd.DataFrame,
    folder: RunFolder,
    formats: Collection[str] = FORMATS,
) -> None:
    """Writes the tables, in all chosen formats that are for tables."""
    if "md" in formats:
        for name, as_markdown in _MARKED.items():
            folder.write_text(name, as_markdown(all_tables))
    if "tex" in formats:
        folder.write_text("table.tex", tables.latex(all_tables))
    if "csv" in formats:
        folder.write_text("table.csv", tables.tidy(all_tables))
        folder.write_text("runs.csv", tables.runs_csv(runs))
        folder.write_text("backdoorbench.csv", leaderboard.backdoorbench_csv(all_tables))


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
            written[caption] = folder.write(f"{stem}.png", partial(figure.savefig, dpi=160))
    if _TRIGGERS not in written and earlier.exists():  # drawn when the records were there
        written[_TRIGGERS] = earlier
    return written


def _stem(table: Table, name: str) -> str:
    return sources.file_stem(f"{table.name}-{name}")


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
    seeds = {str(label): group["seed"].nunique() for label, group in plain.groupby("label")}
    for metric, which in (("asr", "lower"), ("ra", "higher")):
        values = _by_attack(table, metric)
        if values.shape[1] > 1:
            name = f"{metric.upper()} by attack and defense ({which} is better)"
            yield f"heat-{metric}", name, plot.heat_map(values, f"{name}, {table.title}")
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
        logger.warning("warning: no picture of the triggers of %s: %s", table.title, error)
        return None
    title = f"Triggers on {dataset}: test images, and the amplified change"
    return plot.image_grid(gallery.gallery_rows(clean, triggered), {}, title)


def _has_tensors(run: sources.StoredRun) -> bool:
    needed = ("attack_result.pt", "poison.pt", "summary.json")
    return run.folder is not None and all((run.folder / name).is_file() for name in needed)


def rebuild(text: Path) -> None:
    """Makes the tables that a text names again, from the runs beside them, and puts them in.

    The figures of these folders that the text shows are drawn again, too.

    Raises:
        UserError: if a mark has no other half, or names a folder that is not there.
    """
    try:
        before = read_text(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"--rebuild: {text} cannot be read ({reason}); give a text file") from None
    parts: dict[str, str] = {}
    folders: dict[Path, list[Table]] = {}
    for name in _marked(text, before):
        path = text.parent / name
        is_below = path.resolve().is_relative_to(text.parent.resolve())
        if not is_below or path.name not in _MARKED:
            raise UserError(
                f"{text}: {name} is no {' or '.join(_MARKED)} beside it; "
                "name results/<grid>/table.md"
            )
        if not path.parent.is_dir():
            raise UserError(f"{text}: {path.parent} is no folder; write it with --to and --keep")
        if path.parent not in folders:
            all_tables, runs, _ = read([path.parent], path.parent)
            write_tables(all_tables, runs, RunFolder(path.parent), ("md",))
            figures = path.parent / "figures"
            _draw_shown(all_tables, figures, _shown(text, before, figures))
            folders[path.parent] = all_tables
        parts[name] = _MARKED[path.name](folders[path.parent])
    RunFolder(text.parent).write_text(text.name, filled(text, before, parts))
    logger.info("tables of %s: %s", text, ", ".join(parts) or "none")


def _shown(text: Path, content: str, figures: Path) -> set[str]:
    """Names of the PNG files of a folder that a text in Markdown shows, without their suffix."""
    links = [text.parent / link for link in _PICTURE.findall(content)]
    return {link.stem for link in links if link.parent == figures}


def _draw_shown(all_tables: list[Table], figures: Path, shown: set[str]) -> None:
    """Draws figures of some tables; a message names figures that are still missing."""
    if not shown:
        return
    folder = made_folder(figures)
    for table in all_tables:
        draw(table, folder, ("png",), shown)
    for stem in sorted(shown):
        if not (figures / f"{stem}.png").is_file():
            logger.warning("warning: %s: cannot be drawn from the runs", figures / f"{stem}.png")


def _marked(text: Path, content: str) -> list[str]:
    """The names in marks; each mark must be opened and closed, and none may be inside another."""
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
        if kind == "begin":
            names.append(name)
    if opened is not None:
        raise UserError(f"{text}: begin {opened} has no end; write <!-- end {opened} -->")
    return names


def filled(text: Path, content: str, parts: dict[str, str]) -> str:
    """A text with new content between its marks."""
    lines: list[str] = []
    is_inside = False
    for line in content.splitlines():
        mark = _MARK.fullmatch(line)
        if mark is not None:
            is_inside = mark["kind"] == "begin"
            if is_inside:
                lines += [line, "", *parts[mark["name"]].rstrip("\n").splitlines(), ""]
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


def folders_of(unders: Sequence[str] | None, record_path: Path | None) -> list[Path]:
    """The folders of `--under`: each an existing one, or one below the folder of all records.

    Raises:
        UserError: if one is none, or is given twice.
    """
    records = record_path or ROOT / "record"
    if unders is None:
        unders = [str(records)]
    folders: dict[Path, Path] = {}
    for under in unders:
        folder = next((f for f in (records / under, Path(under)) if f.is_dir()), None)
        if folder is None:
            raise UserError(f"--under: {under} is no folder; give one that holds records")
        if folder.resolve() in folders:
            raise UserError(f"--under: {under} is given twice; give it once")
        folders[folder.resolve()] = folder
    return list(folders.values())


def formats_of(given: str | None, is_kept: bool) -> tuple[str, ...]:
    """The formats of `--formats`; without the flag, all, or those that are kept beside runs.

    Raises:
        UserError: if one is unknown.
    """
    if given is None:
        return KEPT_FORMATS if is_kept else FORMATS
    names = tuple(filter(None, given.split(",")))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UserError(
            f"--formats: {listed(unknown) or 'an empty list'} is not allowed; give some of "
            f"{','.join(FORMATS)}"
        )
    return names


def main() -> None:
    """Parses the flags and writes the report."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--under",
        nargs="+",
        action="extend",
        help="folders of records, some below record/, or of kept grids; all of record/",
    )
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument("--to", type=Path, help="folder to write into")
    parser.add_argument("--keep", action="store_true", help="write the runs there, too")
    parser.add_argument(
        "--formats",
        help=f"some of {','.join(FORMATS)}; all, or with --keep {','.join(KEPT_FORMATS)}",
    )
    parser.add_argument("--rebuild", type=Path, help="text whose marked tables are made again")
    flags = parser.parse_args()
    if flags.rebuild is not None:
        if flags.to or flags.under or flags.record_path or flags.keep or flags.formats:
            raise UserError("--rebuild: takes no other flag; drop the others")
        rebuild(flags.rebuild)
    elif flags.to is None:
        raise UserError("--to: a value is needed; give the folder to write into")
    else:
        formats = formats_of(flags.formats, flags.keep)
        write(folders_of(flags.under, flags.record_path), flags.to, flags.keep, formats)


if __name__ == "__main__":
    run_script(main)
