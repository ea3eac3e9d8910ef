"""A run that a report reads, in whatever form it is stored, and how its values are checked.

Both forms may come from a stranger: links are not followed, sizes have limits, and every value is
checked.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from utils.errors import shown
from utils.files import read_text
from utils.process.script import logger

UNDEFENDED = "no defense"  # label of the record itself
UNKNOWN = "-"  # a fact that a summary lacks
RATES = ("acc", "asr", "ra", "cross_acc")
# Of analyses: heading of a column of leaderboards, and whether it is a share, printed as percent.
HEADLINES = {
    "asr_retuned": ("ASR re-learned", True),
    "asr_retuned_clean": ("clean model re-learned", True),
    "asr_retuned_exact": ("exact purification re-learned", True),
    "t_half": ("t at ASR 50 %", False),
    "asr_reactivated": ("ASR re-activated", True),
    "asr_reactivated_clean": ("clean model re-activated", True),
    "clean_as_target": ("clean images re-activated", True),
    "similarity": ("S", False),
    "similarity_clean": ("clean model S", False),
}
# Those that say nothing of a model that has collapsed.
OF_BACKDOOR = ("asr_retuned", "t_half", "asr_reactivated", "clean_as_target")
WIDEST = 10_000  # characters of the first line of a table
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\)")

Key = tuple[str, str | None]  # names of a record and of a result in it


class Analysed(BaseModel):
    """What an analysis measured of a defense's result, and how it was made.

    Attributes:
        kind: the analysis's name.
        numbers: names of headline numbers, see `HEADLINES`.
        config: the flags on which they depend; None if nothing says them.
        made_by: versions, precision and kind of device.
    """

    model_config = ConfigDict(strict=True)

    kind: str
    numbers: list[str]
    config: dict[str, Any] | None = None
    commit: str = UNKNOWN
    made_by: str = UNKNOWN


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run that is stored in one of the two forms.

    Attributes:
        record: the record's name: its folder below the one that was searched. One line.
        defense: name of the folder of a defense's result; None for the record itself. One line.
        where: what a message calls it.
    """

    record: str
    defense: str | None
    where: str

    @property
    def key(self) -> Key:
        """The key of a run, which no two runs of a grid share."""
        return self.record, self.defense

    @property
    def summary_name(self) -> str:
        """What a message calls its summary."""
        return self.where

    @property
    def unit(self) -> str:
        """The unit that the rows of its metrics count."""
        return "epoch" if self.defense is None else "round"

    @property
    def folder(self) -> Path | None:
        """Its folder, with pictures and tensors; None if it has none."""
        return None

    def read_summary(self) -> Any:
        """The plain data of its summary, of any kind.

        Raises:
            FileNotFoundError: if it has none.
            OSError: if it cannot be read.
            ValueError: if it is no JSON.
        """
        raise FileNotFoundError(self.where)

    @cached_property
    def analyses(self) -> dict[str, float]:
        """Headline numbers of analyses, by name; see `HEADLINES`."""
        return {}

    @cached_property
    def analysed(self) -> list[Analysed]:
        """How these numbers were made; empty if nothing says it."""
        return []

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """Its rows by epoch or round, see `checked_metrics`; None if there is nothing to draw."""
        return None

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Its configuration, as JSON has it, without the machine's paths; None without one."""
        return None


def checked_headline(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those of some numbers that reports show."""
    return {
        name: float(numbers[name])
        for name in HEADLINES
        if isinstance(numbers.get(name), int | float) and -10 <= numbers[name] <= 10
    }


def below(folder: Path, under: Path) -> str:
    """How a message calls a folder: from the one that was searched, if it is in it."""
    return str(folder.relative_to(under)) if folder.is_relative_to(under) else folder.name


def first_fault(error: ValidationError) -> str:
    """The first fault of plain data, compared with a description, as one short line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return shown(": ".join(filter(None, (where, what))), 200)


def without_places(value: Any) -> Any:
    """The same plain data, absolute paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def is_plain(path: Path, largest: int) -> bool:
    """Whether a path is an ordinary file of bounded size, and no link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= largest


def file_stem(text: str) -> str:
    """A file name for any name; names that differ much get different file names."""
    stem = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    if len(stem) > 120 or not text.isascii():
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        stem = f"{stem[:100]}-{digest[:8]}"
    return stem


def cell_text(value: Any) -> Any:
    """A text as one line of a CSV file, which no spreadsheet computes; anything else as it is."""
    if not isinstance(value, str):
        return value
    line = shown(value)
    return f"'{line}" if re.match(r"\s*[=+@]|-.", line) else line


def read_table(path: Path, largest: int) -> pd.DataFrame:
    """A CSV file, each cell as the text that it is: a record may be called NA.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no table, or too wide.
    """
    text = read_text(path, largest)
    if len(text.partition("\n")[0]) > WIDEST:
        raise ValueError("too many columns")
    return pd.read_csv(io.StringIO(text), dtype=object, na_filter=False)


def checked_metrics(read: pd.DataFrame, unit: str, where: str) -> pd.DataFrame | None:
    """The columns of a table that are drawn, as numbers; see `sources.read_metrics`."""
    names = [n for n in map(str, read) if n in (unit, *RATES, "seconds") or _is_loss(n)]
    if unit not in names:
        logger.warning("warning: %s: has no column %s; drawn without", where, unit)
        return None
    metrics = read[names].map(_number).astype(float)
    for rate in set(RATES) & set(names):
        metrics[rate] = metrics[rate].where(metrics[rate].between(0, 1))
    metrics = metrics[metrics[unit].between(0, 1e9)]
    return None if metrics.empty else metrics


def _number(cell: object) -> float:
    """The number that was written, to the last bit; NaN for any other text."""
    try:
        return float(str(cell))
    except ValueError:
        return float("nan")


def _is_loss(name: str) -> bool:
    return re.fullmatch(r"loss\w{0,40}", name) is not None
