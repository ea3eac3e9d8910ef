"""report.html: tables, figures and records on one page that needs nothing else."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from PIL import Image

from benchmark.reporting import leaderboard, sources, tables
from benchmark.reporting.means import FLAGS, Grid, Row, Table
from benchmark.reporting.stored import StoredRun, is_plain
from utils import plot
from utils.plain import as_yaml

LARGEST_FILE = 8 << 20  # bytes of a picture that is looked at
LARGEST_PIXELS = 30_000_000
LARGEST_INLINED = 400 << 10  # bytes of a picture on the page
LARGEST_PAGE = 16 << 20  # bytes of all of them
_PICTURES = {
    "curves.png": "curves",
    "trigger.png": "trigger",
    "before_after.png": "labels before and after",
    "perturbations.png": "shared adversarial examples",
    "triggers.png": "the smallest triggers, by class",
    "perturbation.png": "one perturbation for all images",
    "generated.png": "generated triggers",
}

# Rows are put in the order of a column, empty cells last; once more turns the order around.
_SCRIPT = """
for (const button of document.querySelectorAll(".numbers thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const heads = [...table.querySelectorAll("thead th")].filter(th => th.querySelector("button"));
    const column = heads.indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(th => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.sort;
    const isText = column === 0 || "text" in head.dataset;
    const order = (a, b) => isText ? a.localeCompare(b) : a - b;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return up ? order(x, y) : order(y, x);
    });
    body.append(...rows);
  });
}
"""


@dataclass(frozen=True)
class Shown:
    """A picture on the page, or why it is not there."""

    caption: str
    address: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""


class Pictures:
    """Pictures made small enough to stand in a page, until the page is full."""

    def __init__(self, largest_page: int = LARGEST_PAGE) -> None:
        self._left = largest_page

    def from_file(self, path: Path, caption: str, width: int = 1200) -> Shown | None:
        """A PNG as it is shown; None if there is no file."""
        if not path.is_file():
            return None
        if not is_plain(path, LARGEST_FILE):
            return Shown(caption, reason=f"{path.name} is a link, or too large to be shown")
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.width * image.height > LARGEST_PIXELS:
                    return Shown(caption, reason=f"{path.name} has too many pixels to be shown")
                return self._shown(image.convert("RGB"), caption, path.name, width)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return Shown(caption, reason=f"{path.name} cannot be read as a PNG")

    def from_metrics(self, metrics: pd.DataFrame, unit: str, caption: str) -> Shown:
        """Curves of a record whose own picture is not there."""
        drawn = io.BytesIO()
        rows = [
            {str(name): value for name, value in row.items()} for row in metrics.to_dict("records")
        ]
        plot.curves(rows, unit, "").savefig(drawn, dpi=100)
        return self._shown(Image.open(drawn).convert("RGB"), caption, "curves", 1200)

    def _shown(self, image: Image.Image, caption: str, name: str, width: int) -> Shown:
        image.thumbnail((width, 4000))
        packed = io.BytesIO()
        image.save(packed, "WEBP", quality=85, method=2)
        data = packed.getvalue()
        if len(data) > LARGEST_INLINED:
            return Shown(caption, reason=f"{name} is skipped, it is too large for the page")
        if len(data) > self._left:
            return Shown(caption, reason=f"{name} is skipped, the page is large enough")
        self._left -= len(data)
        address = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        return Shown(caption, address, *image.size)


def _source() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def start() -> str:
    """What every page begins with, and hardly another one: the head up to its first value."""
    source = _source()
    return source[source.index("<!DOCTYPE") :].partition("{{")[0]


def render(
    title: str,
    all_tables: Sequence[Table],
    figures: Mapping[str, Mapping[str, Path]],
    problems: Sequence[str],
) -> str:
    """The page as HTML.

    Args:
        title: its heading.
        figures: name of a table -> caption -> PNG.
        problems: one line for each thing that was skipped.
    """
    pictures = Pictures()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_source())
    runs = pd.concat([table.runs for table in all_tables]).drop_duplicates("run")
    count = runs["record"].nunique()
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return template.render(
        title=title,
        counts=f"Records: {count}. Results of defenses: {len(runs) - count}.",
        tables=[_table(table, figures.get(table.name, {}), pictures) for table in all_tables],
        records=[
            _record(str(name), group, pictures) for name, group in runs.groupby("record", sort=True)
        ],
        problems=problems,
        meanings=FLAGS,
        script=Markup(_SCRIPT),
        script_hash=f"sha256-{digest}",
    )


def _table(table: Table, figures: Mapping[str, Path], pictures: Pictures) -> dict[str, Any]:
    facts, note = tables.made_by(table)
    boards = leaderboard.leaderboards(table)
    shown = [pictures.from_file(path, caption, 1800) for caption, path in figures.items()]
    return {
        "name": table.name,
        "title": table.title,
        "notes": table.notes,
        "boards": [_board(board) for board in boards],
        "board_legend": leaderboard.legend(boards),
        "main": _grid(table.main),
        "ablations": [(name, _grid(grid)) for name, grid in table.ablations.items()],
        "legend": tables.legend([table.main, *table.ablations.values()]),
        "made_by_note": note,
        "made_by_head": list(facts),
        "made_by": facts.to_numpy().tolist(),
        "figures": [picture for picture in shown if picture is not None],
    }


def _board(board: leaderboard.Leaderboard) -> dict[str, Any]:
    return {
        "notes": board.notes,
        "columns": list(leaderboard.columns(board).items()),
        "rows": [(entry, leaderboard.cells(entry, board)) for entry in board.entries],
    }


def _grid(grid: Grid) -> dict[str, Any]:
    columns = tables.headings(grid)
    starts = [index == 0 or columns[index - 1][0] != key[0] for index, key in enumerate(columns)]

    def cells(row: Row) -> list[dict[str, Any]]:
        row_cells = []
        for key, is_first in zip(columns, starts, strict=True):
            number = row.numbers.get(key)
            cell = {"text": "", "sd": "", "flags": "", "is_best": False, "sort": ""}
            cell["starts"] = is_first
            if number is not None:
                text, _, deviation = tables.value_text(number, row).partition(" ± ")
                cell |= {"text": text, "sd": deviation, "flags": number.flags}
                cell |= {"is_best": number.is_best, "sort": repr(float(number.mean))}
            row_cells.append(cell)
        return row_cells

    def lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {
                "name": row.name,
                "seeds": "" if row.seeds is None else row.seeds,
                "flags": row.flags,
                "cells": cells(row),
            }
            for row in rows
        ]

    return {
        "corner": grid.corner,
        "headings": [(heading, len(metrics)) for heading, metrics in grid.columns.items()],
        "metrics": [(key[1].upper(), first) for key, first in zip(columns, starts, strict=True)],
        "body": lines(grid.body),
        "foot": lines(grid.foot),
    }


def _record(name: str, runs: pd.DataFrame, pictures: Pictures) -> dict[str, Any]:
    first = runs.iloc[0]
    return {
        "name": name,
        "about": f"{first['row']} on {first['dataset']}, {first['model']}",
        "runs": [_run(run, pictures) for _, run in runs.iterrows()],
    }


def _run(run: pd.Series, pictures: Pictures) -> dict[str, Any]:
    stored: StoredRun = run["run"]
    rates = [f"{m.upper()} {100 * run[m]:.2f} %" for m in tables.METRICS if run[m] == run[m]]
    facts = [
        ", ".join(rates),
        "" if run["seed"] != run["seed"] else f"seed {int(run['seed'])}",
        "" if run["seconds"] != run["seconds"] else f"{run['seconds']:.0f} s",
        f"{run['device']} ({run['device_name']}), {run['precision']}",
        str(run["versions"]),
        f"commit {run['commit']}",
        f"config {run['config']}",
    ]
    shown = []
    if stored.folder is not None:
        shown = [pictures.from_file(stored.folder / n, text) for n, text in _PICTURES.items()]
        if stored.defense is None:
            shown += [
                pictures.from_file(path, f"analysis: {path.stem}")
                for folder in sources.analysis_folders(stored.folder)
                for path in sorted(folder.glob("*.png"))
            ]
    if stored.metrics is not None and not (shown and shown[0]):
        shown[:1] = [pictures.from_metrics(stored.metrics, stored.unit, "curves")]
    return {
        "label": run["label"],
        "about": "; ".join(filter(None, facts)),
        "warnings": run["warnings"],
        "pictures": [picture for picture in shown if picture is not None],
        "config": None if stored.config is None else as_yaml(stored.config),
    }
