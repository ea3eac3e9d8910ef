"""The runs under some folders, read only from their summaries.

A run is a model without a defense, or the result of a defense on it.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic import ValidationError as NotAsDescribed

from benchmark.reporting.analysed import analysed_alike
from benchmark.reporting.repeats import told_apart, without_repeats
from benchmark.reporting.sources import find
from benchmark.reporting.stored import (
    HEADLINES,
    OF_BACKDOOR,
    UNDEFENDED,
    UNKNOWN,
    StoredRun,
    first_fault,
    without_places,
)
from utils.errors import UserError, listed, one_line, shown
from utils.metrics import has_collapsed, rating
from utils.records.attack import load_attack
from utils.records.contents import ATTACK_RESULT
from utils.records.places import CLEAN, name_in_tables

METRICS = ("acc", "asr", "ra", "der")


def _in_lines(value: Any) -> Any:
    """The same plain data, each text as one line that can be printed."""
    if isinstance(value, dict):
        return {shown(key): _in_lines(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_lines(item) for item in value]
    return shown(value) if isinstance(value, str) else value


Text = Annotated[
    str,
    StringConstraints(max_length=300),
    AfterValidator(without_places),
]
Line = Annotated[str, AfterValidator(lambda text: text[:300])]  # cut, not refused
Place = Annotated[str, AfterValidator(lambda text: Path(without_places(text)).name[:300])]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
MOST = 1 << 53  # beyond it, tables of floats would round whole numbers
Count = Annotated[int, Field(ge=0, le=MOST)]


class _Scores(BaseModel):
    model_config = ConfigDict(strict=True)

    acc: Share
    acc_total: Count | None = None
    asr: Share | None = None
    asr_total: Count | None = None
    ra: Share | None = None


class _Facts(BaseModel):
    """The facts in both kinds of summary; a summary that is not ours may lack most of them."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    attack: Text
    dataset: Text
    model: Text | None = None
    seed: Annotated[int, Field(ge=-MOST, le=MOST)] | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    device: Text = "-"
    device_name: Text = "-"
    precision: Text = "-"
    versions: dict[Text, Text] = {}
    commit: Text | None = None
    config_sha256: Text | None = None
    inputs: dict[Text, Text] = {}  # what was read -> sha256; none in summaries of earlier versions
    warnings: list[Line] = []
    files: dict[Text, Text] = {}


class _Attack(_Facts):
    model_name: Text | None = None  # where `model` is lacking: imported records
    attack_label_trans: Text | None = None
    pratio: Share | None = None
    train_images: Count | None = None
    image_size: Count | None = None
    dataset_path: Place | None = None
    imported_sha256: Text | None = None
    acc: Share | None = None
    acc_total: Count | None = None
    asr: Share | None = None
    asr_total: Count | None = None
    ra: Share | None = None


class _Defense(_Facts):
    defense: Text
    before: _Scores
    after: _Scores
    der: Share | None = None
    sees: Text | None = None
    purify_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    attack_sha256: Text | None = None
    triggers_sha256: Text | None = None

    @model_validator(mode="after")
    def _has_its_der(self) -> "_Defense":
        """A DER that is not that of its own scores says that one of the numbers was changed."""
        if self.der is not None:
            before, after = self.before, self.after
            if before.asr is None or after.asr is None:
                raise ValueError("there is a DER, but no ASR before and after")
            der = rating(before.acc - after.acc, before.asr - after.asr)
            if abs(self.der - der) > 1e-6:
                raise ValueError(
                    f"DER is {self.der:g}, but {der:g} of ACC and ASR before and after"
                )
        return self


S = TypeVar("S", bound=BaseModel)


def is_clean(attack: str) -> bool:
    """Whether a row's name is that of models without a backdoor."""
    return attack == CLEAN or attack.startswith(f"{CLEAN} (")


def read_runs(*under: Path, without: Path | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The runs of all records under some folders, at any depth; links are not followed.

    Runs are repeats if they differ only in seed, time and place; a table gives their mean. If
    datasets, networks or recipes of one name differ, each gets a name of its own.

    Args:
        under: folders of records, or of grids that are kept; see `benchmark.reporting.sources`.
            Results of records of one name are put together. If two results have one name, that of
            the later folder is used.
        without: a folder below them whose content is not looked at.

    Returns:
        One row per run, in the order of the records' names: `record` (its name), `run` (how it is
        stored), `attack`, `label` (`UNDEFENDED` or the name of the result's folder), scores in [0,
        1] (NaN if there is none), and the facts about how it was made: `asked` is the pratio that
        was asked for, `seed` is that of the run, and `model_seed` that of the record, by which
        repeats are counted. And one message for each file, and for each line of a file, that is
        skipped.

    Raises:
        UserError: if two folders have different models in records of one name.
    """
    records: dict[str, _Record] = {}
    problems: list[str] = []
    for folder in under:
        runs, wrong = find(folder, without)
        problems += wrong
        for record in _records(runs, problems):
            earlier = records.get(record.name)
            records[record.name] = (
                record if earlier is None else _together(earlier, record, problems)
            )
    all_rows: list[dict[str, Any]] = []
    for record in sorted(records.values(), key=lambda record: Path(record.name)):
        results = _comparable(record, problems)
        rows = list(_rows(record, results))
        if not rows:
            problems.append(f"{record.run.where}: has no scores; skipped")
        elif record.lacks_scores:
            first = results[0][0].defense
            problems.append(f"{record.run.where}: has no acc; what {first} had before is used")
        all_rows += rows
    table = pd.DataFrame(all_rows)
    if not table.empty:
        table, problems = without_repeats(told_apart(_numeric(table)), problems)
        table = analysed_alike(table, problems)
        table = table.drop(columns=[name for name in table if str(name).startswith("_")])
    return table, problems


@dataclass(frozen=True)
class _Record:
    """The stored facts of a record.

    Attributes:
        run: the record itself.
        attack: the content of its summary; None without one.
        results: of defenses, by their names.
    """

    run: StoredRun
    attack: _Attack | None
    results: Mapping[str | None, tuple[StoredRun, _Defense]]

    @property
    def name(self) -> str:
        return self.run.record

    @property
    def lacks_scores(self) -> bool:
        """Whether its summary should have scores, and has none; an import scores nothing."""
        attack = self.attack
        return attack is not None and attack.acc is None and attack.imported_sha256 is None

    @property
    def model_sha256(self) -> str | None:
        return self.attack.files.get(ATTACK_RESULT) if self.attack else None


def _records(runs: Iterable[StoredRun], problems: list[str]) -> Iterable[_Record]:
    """The records of some runs; a record that cannot be read is skipped, with its results."""
    by_record: dict[str, dict[str | None, StoredRun]] = {}
    for run in runs:
        same = by_record.setdefault(run.record, {})
        if run.defense in same:
            problems.append(
                f"{run.where}: is of the same run as {same[run.defense].where}; skipped"
            )
        else:
            same[run.defense] = run
    for name, stored in by_record.items():
        itself = stored.pop(None, None) or StoredRun(name, None, name)
        try:
            attack = _read(itself, _Attack, problems)
        except _Unreadable:  # without it, nothing says which attack this was
            continue
        results = {}
        for key, run in stored.items():
            with contextlib.suppress(_Unreadable):
                defense = _read(run, _Defense, problems)
                if defense is not None:
                    results[key] = run, defense
        yield _Record(itself, attack, results)


def _together(earlier: _Record, later: _Record, problems: list[str]) -> _Record:
    """One record of two of the same name; a line in `problems` names curves that are left out.

    Raises:
        UserError: if their models differ.
    """
    if None not in (digests := {earlier.model_sha256, later.model_sha256}) and len(digests) > 1:
        raise UserError(
            f"--under: {earlier.name} stands for two models, in {earlier.run.where} and "
            f"{later.run.where}; give one of them another name, or remove it"
        )
    first = earlier if later.attack is None else later
    results = {**earlier.results, **later.results}
    used = {None: first.run, **{name: run for name, (run, _) in results.items()}}
    for run in (earlier.run, *(run for run, _ in earlier.results.values())):
        now = used[run.defense]
        if now.metrics is None and run.metrics is not None:
            problems.append(
                f"{run.where}: has curves, and {now.where}, which is used in its place, has none; "
                "left out"
            )
    return _Record(first.run, first.attack, results)


class _Unreadable(Exception):
    """There is a summary, but it is not one of such a run."""


def _read(run: StoredRun, kind: type[S], problems: list[str]) -> S | None:
    """The content of a run's summary; None without one.

    Raises:
        _Unreadable: if it is no such summary; a line is added to `problems`.
    """
    where = run.summary_name
    try:
        values = run.read_summary()
        if isinstance(values, dict):
            return kind.model_validate(_in_lines(values))
        problems.append(f"{where}: is no summary of a run (it is no object); skipped")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{where}: cannot be read ({error.strerror}); skipped")
    except NotAsDescribed as error:
        problems.append(f"{where}: is no summary of a run ({first_fault(error)}); skipped")
    except (ValueError, RecursionError) as error:
        reason = f"Invalid JSON: {one_line(error)}"
        problems.append(f"{where}: is no summary of a run ({reason}); skipped")
    raise _Unreadable


def _comparable(record: _Record, problems: list[str]) -> list[tuple[StoredRun, _Defense]]:
    """A record's results, by name; a line in `problems` names each that is skipped.

    They purified the model that the record has now, and were scored on the same triggered images.
    """
    model = record.model_sha256
    results = []
    for run, defense in sorted(record.results.values(), key=lambda result: result[0].key[1:]):
        if None not in (model, defense.attack_sha256) and model != defense.attack_sha256:
            problems.append(
                f"{run.where}: purified another model than this record has now; skipped"
            )
            continue
        results.append((run, defense))
    digests = {defense.triggers_sha256 for _, defense in results} - {None}
    if len(digests) < 2:
        return results
    present = _present_triggers([record.run, *(run for run, _ in results)])
    skipped = [run for run, of in results if of.triggers_sha256 not in (None, present)]
    why = (
        "were scored on several triggered images, and nothing says which are the record's"
        if present is None
        else "were scored on other triggered images than the record has now"
    )
    names = listed([str(run.defense) for run in skipped], limit=200)
    problems.append(f"{record.run.where}: its results {names} {why}; skipped")
    return [result for result in results if result[0] not in skipped]


def _present_triggers(runs: Iterable[StoredRun]) -> str | None:
    """sha256 of the triggered images that a record has now; None if its folder is not there.

    Args:
        runs: the record and its results, of which some may be kept without their folders.
    """
    for run in runs:
        if run.folder is not None:
            with contextlib.suppress(UserError):
                record = run.folder if run.defense is None else run.folder.parent.parent
                return load_attack(record).triggers_sha256
    return None


def _rows(
    record: _Record, defenses: Sequence[tuple[StoredRun, _Defense]]
) -> Iterable[dict[str, Any]]:
    """A record's runs; if the attack's summary has no scores, those before a defense are used."""
    attack = record.attack
    facts = attack or (defenses[0][1] if defenses else None)
    before: _Attack | _Scores | None = attack if attack and attack.acc is not None else None
    if before is None and defenses:
        before = defenses[0][1].before
    if facts is None or before is None:
        return
    name = name_in_tables(facts.attack, attack.attack_label_trans if attack else None)
    model = facts.model or (attack and attack.model_name) or "-"
    made_of = attack.files.get(ATTACK_RESULT) if attack else defenses[0][1].attack_sha256
    hashes = [attack.config_sha256, attack.imported_sha256] if attack else []
    is_described = bool(attack and (attack.seed is not None or attack.inputs))
    shared = {
        "record": record.name,
        "model_seed": attack.seed if attack else None,  # a defense may have another one
        "_dataset": facts.inputs.get("dataset", UNKNOWN),
        "_place": (attack and attack.dataset_path) or "",
        "_model": facts.inputs.get("--model", UNKNOWN),
        # Without a seed, or flags that say what was read, it is the model that tells records apart.
        "_recipe": " ".join(filter(None, hashes if is_described else [made_of, *hashes]))
        or UNKNOWN,
        "attack": CLEAN if facts.attack == "prototype" else name,
        "dataset": facts.dataset,
        "model": model,
        "pratio": float(f"{attack.pratio:.3g}") if attack and attack.pratio else float("nan"),
        "asked": _asked(record),
        "train_images": attack.train_images if attack else None,
        "image_size": attack.image_size if attack else None,
        "test_images": before.acc_total,
        "acc_before": before.acc,
        "asr_before": before.asr,
    }
    itself = facts if before is attack else None
    yield _row(shared, record.run, UNDEFENDED, itself, before, None)
    for run, defense in defenses:
        label = f"{run.defense} (result)" if run.defense == UNDEFENDED else str(run.defense)
        row = _row(shared, run, label, defense, defense.after, defense.der)
        yield {**row, "acc_before": defense.before.acc, "asr_before": defense.before.asr}


def _asked(record: _Record) -> float | None:
    """The share of poisoned training images that an attack was asked for, with three digits."""
    asked = (record.run.config or {}).get("pratio")
    if not isinstance(asked, float | int):
        asked = record.attack and record.attack.pratio
    return float(f"{asked:.3g}") if asked else None


def _row(
    shared: Mapping[str, Any],
    run: StoredRun,
    label: str,
    facts: _Facts | None,
    scores: "_Scores | _Attack",
    der: float | None,
) -> dict[str, Any]:
    versions = " ".join(f"{k} {v}" for k, v in facts.versions.items()) if facts else ""
    analyses = run.analyses
    if isinstance(facts, _Defense) and has_collapsed(facts.after.acc, facts.before.acc):
        analyses = {name: value for name, value in analyses.items() if name not in OF_BACKDOOR}
    return {
        **shared,
        "run": run,
        "label": label,
        "method": facts.defense if isinstance(facts, _Defense) else "",
        "sees": (facts.sees or "clean") if isinstance(facts, _Defense) else "",
        "seed": facts.seed if facts else None,
        "acc": scores.acc,
        "asr": scores.asr,
        "ra": scores.ra,
        "der": der,
        "acc_total": scores.acc_total,
        "asr_total": scores.asr_total,
        "seconds": facts.seconds if facts else None,
        "purify_seconds": facts.purify_seconds if isinstance(facts, _Defense) else None,
        **{name: analyses.get(name) for name in HEADLINES},
        "config": (facts.config_sha256 if facts else None) or "-",
        "commit": (facts.commit if facts else None) or "-",
        "versions": versions or "-",
        "device": facts.device.partition(":")[0] if facts else "-",
        "device_name": facts.device_name if facts else "-",
        "precision": facts.precision if facts else "-",
        "warnings": list(facts.warnings) if facts else [],
    }


def _numeric(runs: pd.DataFrame) -> pd.DataFrame:
    """The same runs, with columns of numbers."""
    numbers = ["pratio", "asked", "image_size", "train_images", "test_images", *METRICS, "seconds"]
    numbers += ["seed", "model_seed", "purify_seconds", *HEADLINES]
    numbers += ["acc_before", "asr_before", "acc_total", "asr_total"]
    return runs.assign(**{name: pd.to_numeric(runs[name]) for name in numbers})
