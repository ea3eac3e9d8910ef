"""How well the signals of `analysis/inspect.py` tell attacks from clean models.

    python benchmark/power.py --under record/leaderboard
    python benchmark/power.py --under record/leaderboard record/digits --csv power.csv

For each attack and signal: AUROC of the models of the attack against the clean models of the same
dataset and network (0.5 is chance, 1 is perfect), and how often the most suspicious class is the
target. It reads the summaries of inspections, at any depth under the folders, from the folders
`analysis/inspect`: one under another name has other settings. Models whose attack failed (ASR under
50 %) are skipped, and so is an imported model of which nobody has said that it has a backdoor.
AUROC of few models is a rough number: with three against six, chance alone gives 0.9 or more in two
of 84 cases.
"""

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser
from utils.errors import UserError, shown
from utils.files import file_sha256, read_object
from utils.metrics import FAILED_ASR
from utils.process.script import logger, run_script
from utils.records.checkpoint import digest
from utils.records.contents import ATTACK_RESULT, SUMMARY, summary_of
from utils.records.folders import RunFolder
from utils.records.places import is_usual, name_in_tables, no_records, refuse_foreign
from utils.tensors import load_tensors

CLEAN, EXTERNAL = "prototype", "external"
ALL = "all of these"


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("is no number")
    return value


class _Signal(BaseModel):
    model_config = ConfigDict(strict=True)

    statistic: Annotated[float, AfterValidator(_not_nan)]
    top: Annotated[int, Field(ge=0)] | None


class _Findings(BaseModel):
    signals: dict[str, dict[str, _Signal]]


class Inspection(BaseModel):
    """What a summary of an inspection says of the record's model."""

    model_config = ConfigDict(protected_namespaces=())

    attack: str | None
    attack_target: int | None = None
    attack_label_trans: str | None = None
    attack_sha256: str | None = None
    dataset: str
    model: str
    findings: _Findings
    inputs: dict[str, str] = {}

    @property
    def signals(self) -> dict[str, _Signal]:
        """By name."""
        return self.findings.signals.get("before", {})

    @property
    def name(self) -> str:
        """What the table calls the attack."""
        return name_in_tables(str(self.attack), self.attack_label_trans)

    def names_target(self, signal: str) -> bool:
        """Whether the class that stands out is the target; none does where the statistic is 0."""
        seen = self.signals[signal]
        return seen.statistic > 0 and seen.top == self.attack_target

    @property
    def is_unknown(self) -> bool:
        """Whether nobody knows if the model has a backdoor: an import without a target."""
        return self.attack == EXTERNAL and self.attack_label_trans is None


@dataclass(frozen=True)
class Power:
    """A row of the table.

    Attributes:
        auroc: in [0, 1]; None without clean models.
        hits, total: models whose top class is the target, of those that have one target.
        attacked, clean: how many models.
    """

    dataset: str
    model: str
    attack: str
    signal: str
    auroc: float | None
    hits: int
    total: int
    attacked: int
    clean: int


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """The share of pairs in which the positive one is larger; a tie counts half.

    Returns:
        None if one of both is empty.
    """
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(pairs) / len(pairs) if pairs else None


def _named(one: Inspection, what: Literal["dataset", "model"], all_of: Iterable[Inspection]) -> str:
    """A dataset or network by its name, and by its content where the name has several."""
    name, key = getattr(one, what), {"dataset": "dataset", "model": "--model"}[what]
    contents = {other.inputs.get(key, "") for other in all_of if getattr(other, what) == name}
    return f"{name} {one.inputs.get(key, '')[:8]}".strip() if len(contents) > 1 else str(name)


def powers(inspections: Iterable[Inspection]) -> list[Power]:
    """A row for each dataset, network, attack and signal, in this order; all attacks come last."""
    groups: dict[tuple[str, str], dict[str, list[Inspection]]] = {}
    inspections = list(inspections)
    for one in inspections:
        where = _named(one, "dataset", inspections), _named(one, "model", inspections)
        groups.setdefault(where, {}).setdefault(one.name, []).append(one)
    rows = []
    for (dataset, model), by_attack in sorted(groups.items()):
        clean = by_attack.pop(CLEAN, [])
        groups_of_models = sorted(by_attack.items())
        if len(by_attack) > 1:
            groups_of_models.append((ALL, [one for many in by_attack.values() for one in many]))
        for attack, attacked in groups_of_models:
            for signal in sorted({name for one in attacked for name in one.signals}):
                having = [one for one in attacked if signal in one.signals]
                null = [c.signals[signal].statistic for c in clean if signal in c.signals]
                targeted = [one for one in having if one.attack_label_trans == "all2one"]
                hits = [one.names_target(signal) for one in targeted]
                rows.append(
                    Power(
                        dataset=dataset,
                        model=model,
                        attack=attack,
                        signal=signal,
                        auroc=auroc([one.signals[signal].statistic for one in having], null),
                        hits=sum(hits),
                        total=len(targeted),
                        attacked=len(having),
                        clean=len(null),
                    )
                )
    return rows


def read(folders: Sequence[Path]) -> list[Inspection]:
    """The inspections of records under some folders; what is no summary of one is skipped.

    A model counts once, however often it was inspected, copied or imported; as a record of its
    attack, if there is one.

    Raises:
        UserError: if there is none.
    """
    candidates: list[tuple[Path, Inspection]] = []
    for folder in folders:
        if not folder.is_dir():
            raise no_records(folder)
        for path in sorted(folder.glob(f"**/analysis/[!.]*/{SUMMARY}")):
            one = _read_one(path)
            if one is not None:
                candidates.append((path, one))
    inspections: list[Inspection] = []
    seen: set[str] = set()
    for path, one in sorted(candidates, key=lambda pair: pair[1].attack == EXTERNAL):
        if seen.isdisjoint(of_model := _identities(path, one)):
            seen |= of_model
            inspections.append(one)
    if not inspections:
        raise UserError(
            f"--under: {folders[0]} holds no inspection; run analysis/inspect.py on its records"
        )
    return inspections


def _read_one(path: Path) -> Inspection | None:
    """An inspection that counts; None, mostly with a warning, for any other summary."""
    try:
        content: Mapping[str, Any] = read_object(path)
        if content.get("analysis") != "inspect" or not content.get("attack"):
            return None
        one = Inspection.model_validate(content)
    except (OSError, ValueError, ValidationError):
        logger.warning("warning: %s: is no summary of an inspection; skipped", path)
        return None
    if not is_usual(path.parent, content):
        reason = "only analysis/inspect counts"
    elif _has_failed(path.parents[2]):
        reason = "the attack failed"
    elif one.is_unknown:
        reason = "nothing says whether the model has a backdoor"
    else:
        return one
    logger.warning("warning: %s: skipped, %s", path, reason)
    return None


def _has_failed(record: Path) -> bool:
    """Whether the attack of a record failed, so that its model counts as no backdoored one."""
    asr = summary_of(record).get("asr")  # an inspection alone does not tell
    return isinstance(asr, int | float) and asr < FAILED_ASR


def _identities(path: Path, one: Inspection) -> set[str]:
    """What tells a model from others: its file, and its weights if the file is still there."""
    if one.attack_sha256 is None:
        return {str(path.resolve())}
    identities = {one.attack_sha256}
    file = path.parents[2] / ATTACK_RESULT
    try:
        if file_sha256(file) == one.attack_sha256:
            weights = load_tensors(file)["model"]
            identities.add(digest(weights[name] for name in sorted(weights)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # a record of another kind has no weights that can be compared
    return identities


def markdown(rows: Sequence[Power]) -> str:
    """The table: a row for each attack, two columns for each signal."""
    signals = sorted({row.signal for row in rows})
    titles = " | ".join(f"{signal} AUROC, top" for signal in signals)
    lines = [f"| dataset | network | attack | attacked, clean | {titles} |"]
    lines.append("|---|---|---|---|" + "---|" * len(signals))
    for key in dict.fromkeys((row.dataset, row.model, row.attack) for row in rows):
        by_signal = {r.signal: r for r in rows if (r.dataset, r.model, r.attack) == key}
        counts = [(row.attacked, row.clean) for row in by_signal.values()]
        most = max(counts)
        cells = [_cell(by_signal[s], most) if s in by_signal else "" for s in signals]
        about = f"{most[0]}, {most[1]}"
        texts = [shown(text).replace("|", "\\|") for text in key]
        lines.append(f"| {' | '.join([*texts, about, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(row: Power, usual: tuple[int, int]) -> str:
    """AUROC and hits of a signal; with its numbers of models, if they are not the usual ones."""
    area = "-" if row.auroc is None else f"{row.auroc:.2f}"
    of = "" if (row.attacked, row.clean) == usual else f" (of {row.attacked}, {row.clean})"
    return f"{area}, {f'{row.hits}/{row.total}' if row.total else '-'}{of}"


def as_csv(rows: Sequence[Power]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Power.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(vars, rows))
    return text.getvalue()


def check_replaceable(path: Path) -> None:
    """That a file is not there, or is an earlier table of this script.

    Raises:
        UserError: if not.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--csv: {path} cannot be written; give a file in an existing folder")
    refuse_foreign(path, as_csv([]), "--csv")


def main() -> None:
    """Prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--under", nargs="+", type=Path, required=True, help="folders of records")
    parser.add_argument("--csv", type=Path, help="file that gets the rows, too")
    flags = parser.parse_args()
    if flags.csv is not None:
        check_replaceable(flags.csv)
    rows = powers(read(flags.under))
    print(markdown(rows), end="")
    if flags.csv is not None:
        RunFolder(flags.csv.parent).write_text(flags.csv.name, as_csv(rows))


if __name__ == "__main__":
    run_script(main)
