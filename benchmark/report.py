"""Tables, figures and a page from runs: from folders of records, or from what `results/` keeps.

    python benchmark/report.py --to report                          # all of record/
    python benchmark/report.py --under digits --to results/digits --keep
    python benchmark/report.py --under results/digits mine --to results/digits --keep
    python benchmark/report.py --under results/digits --to report   # all forms of a kept grid
    python benchmark/report.py --under results/digits --to report --attacks wanet "sig (9.85 %)"
    python benchmark/report.py --rebuild RESULTS.md README.md

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

`--attacks` takes the names of rows, as the tables show them, in quotes where they have a space.
Tables, figures and leaderboards then have these attacks alone, and clean models. The titles say
that it is a part. It is not for `--keep`, which keeps all runs.

`--keep` also writes the runs themselves, beside their tables (md), in two files from which the same
command makes the same tables again: `runs.jsonl`, a line for each run with its summary and its
configuration, and `curves.csv` with the rows of every metrics.csv. It refuses to drop a run that is
already there: the third command above adds the runs of record/mine to the grid. Without
`results/digits` under `--under`, it would write nothing and say which runs are missing.

`--rebuild` makes table.md and leaderboard.md again for each folder that texts name in marks like
the ones below, puts the named table between the marks, and draws the figures of these folders that
the texts show:

    <!-- begin results/digits/table.md -->
    <!-- end results/digits/table.md -->
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser
from utils.errors import UserError, listed
from utils.files import ROOT
from utils.process.script import run_script
from utils.records.places import no_records

FORMATS = ("md", "tex", "csv", "png", "svg", "html")
KEPT_FORMATS = ("md", "png")  # beside the runs


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
            raise no_records(under)
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
    # The tables that stand beside the runs are of these runs.
    return (*names, "md") if is_kept and "md" not in names else names


def main() -> None:
    """Parses the flags and writes the report."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--under",
        nargs="+",
        action="extend",
        help="folders of records, some below record/, or of kept grids; all of record/",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="only these attacks, called as the rows of the tables; all",
    )
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument("--to", type=Path, help="folder to write into")
    parser.add_argument("--keep", action="store_true", help="write the runs there, too")
    parser.add_argument(
        "--formats",
        help=f"some of {','.join(FORMATS)}; all, or with --keep {','.join(KEPT_FORMATS)}",
    )
    parser.add_argument(
        "--rebuild", nargs="+", type=Path, help="texts whose marked tables are made again"
    )
    flags = parser.parse_args()
    from benchmark.reporting import files  # here, because it takes seconds

    if flags.rebuild is not None:
        others = ("to", "under", "attacks", "record_path", "keep", "formats")
        if any(getattr(flags, name) for name in others):
            raise UserError("--rebuild: takes no other flag; drop the others")
        files.rebuild(flags.rebuild)
    elif flags.to is None:
        raise UserError("--to: a value is needed; give the folder to write into")
    elif flags.keep and flags.attacks:
        raise UserError("--attacks: is not for --keep, which keeps all runs; drop one of the two")
    else:
        formats = formats_of(flags.formats, flags.keep)
        folders = folders_of(flags.under, flags.record_path)
        files.write(folders, flags.to, flags.keep, formats, flags.attacks)


if __name__ == "__main__":
    run_script(main)
