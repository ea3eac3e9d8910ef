"""The files of a report: tables, figures and a page, and the marked tables of a text."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from benchmark.reporting import kept, leaderboard, page, tables
from benchmark.reporting.figures import draw
from benchmark.reporting.means import Table, attacks_of, narrowed, summarize
from benchmark.reporting.summaries import read_runs
from utils.errors import UserError, counted, listed, reason_of, shown
from utils.files import TEXT, read_bytes
from utils.process.script import logger
from utils.records.folders import RunFolder
from utils.records.places import made_folder, refuse_foreign

_MARKED = {"table.md": tables.markdown, "leaderboard.md": leaderboard.markdown}
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+\.png)\)")
_MARK = re.compile(r"<!-- (?P<kind>begin|end) (?P<name>[^\s<>]+) -->\s*")
# What somebody may have meant to be one: with a table's name, or with none.
_LIKE_A_MARK = re.compile(r"[\s>*+-]*<\s*!\s*[-–—]+\s*(begin|end)\b([^>]*\.md|\W*$)", re.IGNORECASE)


def write(
    unders: Sequence[Path],
    to: Path,
    is_kept: bool,
    formats: Collection[str],
    attacks: Sequence[str] | None = None,
) -> None:
    """Writes a report of the runs under some folders into another one, or one of them.

    Args:
        is_kept: whether the runs are written, too; not with `attacks`.
        formats: some of `report.FORMATS`.
        attacks: the rows that are in the report; None for all.

    Raises:
        UserError: if there is no finished run, one that is kept would be lost, an attack is in no
            table, or the folder cannot be written.
    """
    if attacks is not None and (to / kept.RUNS).exists():
        raise UserError(
            f"--attacks: {to} keeps all attacks, and its tables show them; give another --to"
        )
    all_tables, runs, problems = read(unders, to)
    if attacks is not None:
        all_tables, runs = of_attacks(all_tables, runs, attacks)
    if is_kept:
        kept.check_kept(to, list(runs["run"]))
    folder = made_folder(to)
    drawn = {"png", "svg"} & set(formats) | ({"png"} if "html" in formats else set())
    if drawn and (to / "figures").exists():
        made_folder(to / "figures")  # refuses a file before anything is written
    if "html" in formats:
        refuse_foreign(to / "report.html", page.start(), "--to")
    write_tables(all_tables, runs, folder, formats)
    if is_kept:
        kept.keep(runs["run"], folder)
    pictures: dict[str, dict[str, Path]] = {}
    if drawn:
        figures = made_folder(to / "figures")
        pictures = {table.name: draw(table, figures, drawn) for table in all_tables}
    records = counted(runs["record"].nunique(), "record")
    logger.info("%s, %s: %s", records, counted(len(runs), "run"), to)
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


def of_attacks(
    all_tables: Sequence[Table], runs: pd.DataFrame, attacks: Sequence[str]
) -> tuple[list[Table], pd.DataFrame]:
    """Tables and runs of some attacks alone; a table that has none of them is left out.

    Args:
        attacks: as the rows are called.

    Raises:
        UserError: if one is in no table, or is given twice.
    """
    names = sorted({name for table in all_tables for name in attacks_of(table)})
    if unknown := [name for name in attacks if name not in names]:
        raise UserError(
            f"--attacks: {listed(unknown)} is in no table; give some of "
            f"{', '.join(map(shown, names)) or 'the attacks, of which there are none'}"
        )
    if twice := [name for index, name in enumerate(attacks) if name in attacks[:index]]:
        raise UserError(f"--attacks: {twice[0]} is given twice; give it once")
    chosen = [part for table in all_tables if (part := narrowed(table, attacks)) is not None]
    is_in = runs.index.isin([index for table in chosen for index in table.runs.index])
    return chosen, runs[is_in]


def write_tables(
    all_tables: list[Table],
    runs: pd.DataFrame,
    folder: RunFolder,
    formats: Collection[str],
) -> None:
    """Writes the tables, in all chosen formats that are for tables.

    Raises:
        UserError: if a file of such a name is there that is no table.
    """
    texts: dict[str, str] = {}
    if "md" in formats:
        texts |= {name: as_markdown(all_tables) for name, as_markdown in _MARKED.items()}
    if "tex" in formats:
        texts["table.tex"] = tables.latex(all_tables)
    if "csv" in formats:
        texts["table.csv"] = tables.tidy(all_tables)
        texts["runs.csv"] = tables.runs_csv(runs)
        texts["backdoorbench.csv"] = leaderboard.backdoorbench_csv(all_tables)
    unsure = {} if (folder.path / kept.RUNS).exists() else texts
    for name, text in unsure.items():  # before any is replaced
        first = re.split(r"[,\n]", text, maxsplit=1)[0]
        refuse_foreign(folder.path / name, (first, "**") if name in _MARKED else first, "--to")
    for name, text in texts.items():
        folder.write_text(name, text)


def rebuild(texts: Sequence[Path]) -> None:
    """Makes the tables that texts name again, from the runs beside them, and puts them in.

    The figures of these folders that a text shows are drawn again, too. Each folder is read once.

    Raises:
        UserError: if a mark has no other half, is not written exactly, or names a folder that is
            not there.
    """
    folders: dict[Path, list[Table]] = {}
    for text in texts:
        _rebuild(text, folders)


def _rebuild(text: Path, folders: dict[Path, list[Table]]) -> None:
    """One text; `folders` are those that were read for others, to which its own are added."""
    try:
        whole = read_bytes(text, TEXT).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--rebuild: {text} cannot be read ({reason_of(error)}); give a text file"
        ) from None
    before = whole.removeprefix("\ufeff")  # a byte-order mark, which stays
    parts: dict[str, str] = {}
    drawn: set[Path] = set()
    names = _marked(text, before)
    if not names:
        raise UserError(
            f"--rebuild: {text} has no marks; write <!-- begin results/<grid>/table.md --> and "
            "<!-- end results/<grid>/table.md -->"
        )
    for name in names:
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
            kept.check_readable(path.parent)
            all_tables, runs, _ = read([path.parent], path.parent)
            write_tables(all_tables, runs, RunFolder(path.parent), ("md",))
            folders[path.parent] = all_tables
        if path.parent not in drawn:
            figures = path.parent / "figures"
            _draw_shown(folders[path.parent], figures, _shown(text, before, figures))
            drawn.add(path.parent)
        parts[name] = _MARKED[path.name](folders[path.parent])
    behind = text.resolve()  # of a link, the file that it leads to
    mark = whole.removesuffix(before)
    RunFolder(behind.parent).write_text(behind.name, mark + filled(text, before, parts))
    logger.info("tables of %s: %s", text, ", ".join(parts))


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
    """The names in marks; each mark must be opened and closed, and none may be inside another.

    Raises:
        UserError: if that is not so, or a line looks like a mark and is none: its table would stay
            as it is.
    """
    names: list[str] = []
    opened: str | None = None
    for number, line in enumerate(content.split("\n"), start=1):
        mark = _MARK.fullmatch(line)
        if mark is None and _LIKE_A_MARK.match(line):
            raise UserError(
                f"{text}:{number}: {shown(line.strip(), 100)} is no mark; write it alone in its "
                "line, from the first letter on, like <!-- begin results/<grid>/table.md -->"
            )
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
    """A text with new content between its marks; all else, and how its lines end, stays."""
    lines: list[str] = []
    is_inside = False
    for line in content.split("\n"):
        mark = _MARK.fullmatch(line)
        if mark is not None:
            is_inside = mark["kind"] == "begin"
            if is_inside:
                end = "\r" if line.endswith("\r") else ""
                new = ["", *parts[mark["name"]].rstrip("\n").split("\n"), ""]
                lines += [line, *(each + end for each in new)]
        if not is_inside:
            lines.append(line)
    return "\n".join(lines)
