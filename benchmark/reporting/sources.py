"""The text files of records, for curves and for copies that regenerate a report.

Records may be a stranger's: links are not followed, sizes have limits, and nothing is believed.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import yaml

from benchmark.reporting.summaries import LARGEST, UNDEFENDED, without_places
from utils.config import read_yaml
from utils.errors import UserError, one_line
from utils.files import read_bytes, read_text
from utils.process.script import logger
from utils.records.folders import RunFolder

RATES = ("acc", "asr", "ra", "cross_acc")
_LARGEST = 4 << 20  # bytes of a metrics.csv
_WIDEST = 10_000  # characters of its first line


def is_plain(path: Path, largest: int) -> bool:
    """Whether a path is an ordinary file of bounded size, and no link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= largest


def file_stem(text: str) -> str:
    """A name of a file for a name of anything; different ones for names that differ much."""
    stem = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    if len(stem) > 120 or not text.isascii():
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        stem = f"{stem[:100]}-{digest[:8]}"
    return stem


def read_metrics(folder: Path, unit: str) -> pd.DataFrame | None:
    """A run's `metrics.csv`: numbers only, rates in [0, 1]; None where there is nothing to draw.

    Args:
        unit: name of its first column, "epoch" or "round".
    """
    path = folder / "metrics.csv"
    if not is_plain(path, _LARGEST):
        return None
    try:
        text = read_text(path, _LARGEST)
        if len(text.partition("\n")[0]) > _WIDEST:
            raise ValueError("too many columns")
        read = pd.read_csv(io.StringIO(text))
    except (OSError, ValueError) as error:
        logger.warning("warning: %s: no table (%s); drawn without", path, one_line(error))
        return None
    names = [n for n in map(str, read) if n in (unit, *RATES) or re.fullmatch(r"loss\w{0,40}", n)]
    metrics = read[names].apply(pd.to_numeric, errors="coerce").astype(float)
    if unit not in metrics:
        logger.warning("warning: %s: has no column %s; drawn without", path, unit)
        return None
    for rate in set(RATES) & set(names):
        metrics[rate] = metrics[rate].where(metrics[rate].between(0, 1))
    metrics = metrics[metrics[unit].between(0, 1e9)]
    return None if metrics.empty else metrics


def config_text(folder: Path) -> str | None:
    """A run's configuration as YAML, without the machine's paths; None where there is none."""
    path = folder / "config.yaml"
    if not is_plain(path, 1 << 16):
        return None
    try:
        values = read_yaml(path)
    except UserError as error:
        logger.warning("warning: %s", one_line(error))
        return None
    values = {name: without_places(value) for name, value in values.items()}
    if "record_path" in values:
        values["record_path"] = None
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def check_kept(to: Path, records: Iterable[str]) -> None:
    """Raises UserError if copies stand in `to` of records that are not among these.

    They would be in the next report from there, and are not in this one.
    """
    known = {(to / "records" / name).resolve() for name in records}
    for summary in sorted((to / "records").rglob("summary.json")):
        folder = summary.parent
        record = folder.parent.parent if folder.parent.name == "defense" else folder
        if record.resolve() not in known:
            raise UserError(f"{record}: is not among the records; remove it, or give another --to")


def keep(runs: pd.DataFrame, to: Path) -> None:
    """Copies summaries, metrics and configurations of runs into `to/records`, as records have them.

    No weights, no logs, no pictures, and no paths of this machine.
    """
    for run in runs.to_dict("records"):
        source, target = Path(run["folder"]), to / "records" / run["record"]
        if run["label"] != UNDEFENDED:
            target = target / "defense" / source.name
        if source.resolve() != target.resolve():
            _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    texts = {"config.yaml": config_text(source)}
    summary, metrics = source / "summary.json", source / "metrics.csv"
    if is_plain(summary, LARGEST):
        plain = without_places(json.loads(read_text(summary, LARGEST)))
        texts["summary.json"] = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    if is_plain(metrics, _LARGEST):
        texts["metrics.csv"] = read_bytes(metrics, _LARGEST).decode("utf-8", errors="replace")
    for name, text in texts.items():
        if text is not None:
            target.mkdir(parents=True, exist_ok=True)
            RunFolder(target).write_text(name, text)
