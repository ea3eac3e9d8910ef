"""What stopping by held-out images costs and saves: `sau.py --stop auto` beside all rounds.

    python benchmark/run.py benchmark/grids/stop.yaml --jobs 2
    python benchmark/stops.py --under record/stop --to stop

Of each record under a folder that has two results of SAU, `sau_auto` and `sau`, it says what ACC
and ASR they reached, in how many rounds, and in which share of the seconds. Its figure has, for
each record, what SAU measured on the held-out images (their error, plus the share of them that
still has a shared adversarial example) beside the true ASR on the test images. SAU stops by the
former alone, and never sees the ASR.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser
from utils.errors import UserError, first_line
from utils.files import read_object
from utils.process.script import logger, run_script
from utils.records.contents import METRICS_FILE, SUMMARY
from utils.records.places import made_folder, no_records, refuse_foreign
from utils.training import ending

AUTO, ALL = "sau_auto", "sau"
SIGNAL, ASR, ASR_ALL = "held-out error + share", "ASR (auto)", "ASR (all rounds)"


@dataclass(frozen=True)
class Pair:
    """The two results of a record.

    Attributes:
        auto, all_rounds: plain data of their summaries.
        curves: by round from 1; `SIGNAL`, `ASR` and `ASR_ALL` in [0, 1].
    """

    name: str
    auto: dict[str, Any]
    all_rounds: dict[str, Any]
    curves: pd.DataFrame

    @property
    def row(self) -> dict[str, Any]:
        """A row of the table; rates in [0, 1]."""
        kept = self.auto["findings"].get("best_round")
        held_out = self.curves[SIGNAL].dropna()
        row: dict[str, Any] = {"record": self.name, "kept": kept, "ended": int(held_out.index[-1])}
        row["rounds"] = int(self.curves.index[-1])
        for score in ("acc", "asr", "ra"):
            row[f"{score}_auto"] = self.auto["after"][score]
            row[score] = self.all_rounds["after"][score]
        seconds = self.auto["purify_seconds"], self.all_rounds["purify_seconds"]
        return {**row, "time": seconds[0] / seconds[1]}


def _by_round(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str).astype(float).set_index("round")  # exact


def read_pair(record: Path) -> Pair | None:
    """The two results of a record; None without both, or, with a warning, if one is damaged."""
    homes = [record / "defense" / name for name in (AUTO, ALL)]
    if not all((home / SUMMARY).exists() for home in homes):
        return None
    try:
        auto, all_rounds = (read_object(home / SUMMARY) for home in homes)
        if auto.get("attack_sha256") != all_rounds.get("attack_sha256"):
            raise ValueError("they purified two models")
        watched, full = (_by_round(home / METRICS_FILE)["asr"] for home in homes)
        held_out = _by_round(homes[0] / "held_out.csv")
        if not held_out[["acc", "share"]].apply(lambda rates: rates.between(0, 1)).all(axis=None):
            raise ValueError("held_out.csv has other values than rates")
        signal = 1 - held_out["acc"] + held_out["share"]
        curves = pd.DataFrame({SIGNAL: signal, ASR: watched, ASR_ALL: full}).loc[1:]
        curves.index = curves.index.astype(int)
        pair = Pair(record.name, auto, all_rounds, curves)
        _ = markdown([pair])  # raises an error if something that must be a number is none
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ZeroDivisionError,
    ) as error:
        logger.warning(
            "warning: %s: skipped; its results lack what is compared (%s)",
            record,
            first_line(error),
        )
        return None
    return pair


def read(under: Path) -> list[Pair]:
    """The pairs of all records of a folder, by name.

    Raises:
        UserError: if there is none.
    """
    if not under.is_dir():
        raise no_records(under)
    pairs = [read_pair(path) for path in sorted(under.glob("[!.]*")) if path.is_dir()]
    complete = [pair for pair in pairs if pair is not None]
    if not complete:
        raise UserError(
            f"--under: no record of {under} has usable results {AUTO} and {ALL}; run "
            "benchmark/grids/stop.yaml"
        )
    return complete


def markdown(pairs: Sequence[Pair]) -> str:
    """The table, in percent; ACC / ASR / RA in a cell."""
    lines = ["| record | all rounds | stop auto | kept round | ended after | share of the time |"]
    lines.append("|---|---|---|---:|---:|---:|")
    for pair in pairs:
        row = pair.row
        scores = [
            " / ".join(f"{100 * row[f'{score}{suffix}']:.2f}" for score in ("acc", "asr", "ra"))
            for suffix in ("", "_auto")
        ]
        ended = f"{row['ended']} of {row['rounds']}"
        cells = [pair.name, *scores, str(row["kept"]), ended, f"{100 * row['time']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def titles(pairs: Sequence[Pair]) -> list[str]:
    """The titles of the panels.

    A record that a grid has named is called by its attack and seed, if no other one has both.
    """
    short = ["-".join(pair.name.split("-")[-2:]) for pair in pairs]
    return [
        title if short.count(title) == 1 else pair.name
        for title, pair in zip(short, pairs, strict=True)
    ]


def main() -> None:
    """Prints the table, and writes it with its figure."""
    parser = Parser(__doc__)
    parser.add_argument("--under", type=Path, required=True, help="folder of the records")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    flags = parser.parse_args()
    pairs = read(flags.under)
    folder = made_folder(flags.to)
    refuse_foreign(flags.to / "stops.csv", "record,kept,ended,", "--to")
    refuse_foreign(flags.to / "curves.csv", "record,round,", "--to")
    from utils import charts

    print(markdown(pairs), end="")
    folder.write_metrics([pair.row for pair in pairs], "stops.csv")
    rows = [
        {"record": pair.name, "round": number, **{str(k): v for k, v in values.items()}}
        for pair in pairs
        for number, values in pair.curves.to_dict("index").items()
    ]
    folder.write_metrics(rows, "curves.csv")
    highest = max(100, *(100 * float(pair.curves.max().max()) for pair in pairs))  # the sum of two
    figure = charts.curves_of(
        {title: 100 * pair.curves for title, pair in zip(titles(pairs), pairs, strict=True)},
        "round",
        "What SAU measures on held-out images, and the true ASR",
        ylim=(-3, highest + 3),
    )
    ending.save_figure(folder, "stops.png", figure)
    logger.info("tables and figure: %s", flags.to)


if __name__ == "__main__":
    run_script(main)
