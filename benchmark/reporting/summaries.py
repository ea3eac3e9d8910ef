"""The runs under some folders, read only from their summaries.

A run is a model without a defense, or the result of a defense on it.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from benchmark.reporting.sources import (
    HEADLINES,
    OF_BACKDOOR,
    StoredRun,
    find,
    first_fault,
    without_places,
)
from utils.errors import UserError, listed, one_line, shown
from utils.metrics import has_collapsed, rating
from utils.records.contents import ATTACK_RESULT
from utils.records.recipe import NOT_OF_RECIPE

UNDEFENDED = "no defense"
CLEAN = "clean model"
METRICS = ("acc", "asr", "ra", "der")
_UNKNOWN = "-"
_NOT_OF_METHOD = (*NOT_OF_RECIPE, "precision", "dataset", "model")


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
            records[record.name] = record if earlier is None else _together(earlier, record)
    all_rows: list[dict[str, Any]] = []
    for record in sorted(records.values(), key=lambda record: Path(record.name)):
        made_of = record.model_sha256
        results = []
        for run, defense in sorted(record.results.values(), key=lambda result: result[0].key[1:]):
            if None not in (made_of, defense.attack_sha256) and made_of != defense.attack_sha256:
                problems.append(
                    f"{run.where}: purified another model than this record has now; skipped"
                )
                continue
            results.append((run, defense))
        rows = list(_rows(record, results))
        if not rows:
            problems.append(f"{record.run.where}: has no scores; skipped")
        all_rows += rows
    table = pd.DataFrame(all_rows)
    if not table.empty:
        table, problems = _without_repeats(_told_apart(_numeric(table)), problems)
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
    attack: "_Attack | None"
    results: "Mapping[str | None, tuple[StoredRun, _Defense]]"

    @property
    def name(self) -> str:
        return self.run.record

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


def _together(earlier: _Record, later: _Record) -> _Record:
    """One record of two of the same name.

    Raises:
        UserError: if their models differ.
    """
    if None not in (digests := {earlier.model_sha256, later.model_sha256}) and len(digests) > 1:
        raise UserError(
            f"--under: {earlier.name} stands for two models, in {earlier.run.where} and "
            f"{later.run.where}; give one of them another name, or remove it"
        )
    first = earlier if later.attack is None else later
    return _Record(first.run, first.attack, {**earlier.results, **later.results})


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
    all2all = "_all2all" if attack and attack.attack_label_trans == "all2all" else ""
    model = facts.model or (attack and attack.model_name) or "-"
    made_of = attack.files.get(ATTACK_RESULT) if attack else defenses[0][1].attack_sha256
    hashes = [attack.config_sha256, attack.imported_sha256] if attack else []
    is_described = bool(attack and (attack.seed is not None or attack.inputs))
    shared = {
        "record": record.name,
        "model_seed": attack.seed if attack else None,  # a defense may have another one
        "_dataset": facts.inputs.get("dataset", _UNKNOWN),
        "_place": (attack and attack.dataset_path) or "",
        "_model": facts.inputs.get("--model", _UNKNOWN),
        # Without a seed, or flags that say what was read, it is the model that tells records apart.
        "_recipe": " ".join(filter(None, hashes if is_described else [made_of, *hashes]))
        or _UNKNOWN,
        "attack": CLEAN if facts.attack == "prototype" else facts.attack + all2all,
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


_SETTING = ["dataset", "image_size", "train_images", "test_images", "model"]
_CELL = [*_SETTING, "attack", "pratio"]


def _told_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with different names for datasets, networks, attacks and results that differ.

    If a summary lacks a fact, this fact is not used to tell runs apart.
    """
    runs = _renamed(runs, "dataset", ["dataset", "image_size"], _by_dataset)
    runs = _renamed(runs, "model", ["model"], _by_model)
    undefended = runs[runs["label"] == UNDEFENDED]
    names = _renamed(undefended, "attack", _CELL, _by_recipe).set_index("record")["attack"]
    runs = runs.assign(attack=runs["record"].map(names))
    results = runs[runs["label"] != UNDEFENDED]
    renamed = _renamed(results, "label", [*_SETTING, "label"], _by_result)
    runs.loc[results.index, "label"] = renamed["label"]
    return runs


def _renamed(
    runs: pd.DataFrame, column: str, by: list[str], suffixes: Callable[[pd.DataFrame], pd.Series]
) -> pd.DataFrame:
    """The runs with a suffix in brackets added to a column.

    Args:
        by: columns; for each group of runs that agree in them, `suffixes` gives one text per run,
            which is empty for those that keep their name.
    """
    names = runs[column].copy()
    for _, group in runs.groupby(by, dropna=False, sort=False):
        suffix = suffixes(group)
        suffix = suffix[suffix != ""]
        names[suffix.index] = runs.loc[suffix.index, column] + " (" + suffix + ")"
    return runs.assign(**{column: names})


def _by_dataset(runs: pd.DataFrame) -> pd.Series:
    """Several contents of one name are called after their folders."""
    return runs["_dataset"].map(_names(runs["_dataset"], runs["_place"]))


def _by_model(runs: pd.DataFrame) -> pd.Series:
    """Several contents of a user's file are called after their sha256."""
    return runs["_model"].map(_names(runs["_model"], pd.Series("", runs.index)))


def _by_recipe(runs: pd.DataFrame) -> pd.Series:
    """Several recipes are called after their records; the first one with a seed keeps its name.

    A model without a seed was trained elsewhere, and is not a repeat of any other model.
    """
    recipes, has_seed = runs["_recipe"], runs["model_seed"].notna()
    records = runs["record"].map(lambda name: re.sub(r"-s\d+$", "", name.rpartition("/")[2]))
    names = _names(recipes, records, is_mixed=bool(has_seed.any() and not has_seed.all()))
    first = recipes[has_seed & (recipes != _UNKNOWN)].head(1)
    return recipes.map(names | dict.fromkeys(first, ""))


def _by_result(runs: pd.DataFrame) -> pd.Series:
    """Results of one name by several methods or recipes are called after them, in all attacks.

    The recipe of most runs, or the first, keeps its name. In an attack without it, so does one that
    differs from it in nothing that changes the method, as far as the configurations tell.
    """
    is_told = (runs["config"] != _UNKNOWN) | (runs["method"].nunique() > 1)
    recipes = (runs["method"] + " " + runs["config"]).where(is_told, _UNKNOWN)
    counts = Counter(recipes[recipes != _UNKNOWN])
    if len(counts) < 2:
        return pd.Series("", runs.index)
    usual = counts.most_common(1)[0][0]
    is_own = runs["method"] != usual.partition(" ")[0]
    names = _names(recipes, runs["method"].where(is_own, "")) | {usual: ""}
    first = runs[~is_own].groupby(recipes, sort=False)["run"].first()
    alike = {recipe for recipe, run in first.items() if _is_same_recipe(run, first[usual])}

    def suffixes(of_attack: pd.Series) -> pd.Series:
        known = [recipe for recipe in of_attack if recipe in alike]
        kept = usual if usual in known else next(iter(known), usual)
        return of_attack.map(names | {kept: ""})

    by_attack = recipes.groupby([runs["attack"], runs["pratio"]], dropna=False)
    return by_attack.transform(suffixes)


def _is_same_recipe(run: StoredRun, other: StoredRun) -> bool:
    """Whether two runs of a method have the same flags, but for those that only one of them has.

    A flag may have come later. The precision is not compared: a flag of the table tells it.
    """
    flags = [
        {name: v for name, v in (of.config or {}).items() if name not in _NOT_OF_METHOD}
        for of in (run, other)
    ]
    common = flags[0].keys() & flags[1].keys()
    return run is other or bool(common and all(flags[0][n] == flags[1][n] for n in common))


def _names(keys: pd.Series, hints: pd.Series, is_mixed: bool = False) -> dict[str, str]:
    """A text for each of several keys: the first hint beside it.

    If other keys have the same hint, the first letters of the key follow, at least six, and as many
    as make it unique. An unknown key has an empty text, and so has a single key.

    Args:
        is_mixed: whether a single key needs a text, too.
    """
    texts = dict.fromkeys(keys, "")
    distinct = [key for key in texts if key != _UNKNOWN]
    if len(distinct) < 2 and not is_mixed:
        return texts
    first: dict[str, str] = {}
    for key, hint in zip(keys, hints, strict=True):
        first[key] = first.get(key) or hint
    shared = Counter(first.values())
    digests = {key: key.rpartition(" ")[2] for key in distinct}
    if len(set(digests.values())) < len(distinct):
        digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in distinct}
    length = 6
    while len({digest[:length] for digest in digests.values()}) < len(distinct):
        length += 2
    for key in distinct:
        is_own = bool(first[key]) and shared[first[key]] == 1
        texts[key] = first[key] if is_own else f"{first[key]} {digests[key][:length]}".strip()
    return texts


def _without_repeats(runs: pd.DataFrame, problems: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Two records of one cell and seed would look like two seeds: one is used.

    It is the one with the most results, and of these the first by name. The same holds for two
    records of one model that was trained elsewhere.
    """
    undefended = runs[runs["label"] == UNDEFENDED]
    seeds = undefended["model_seed"].astype(object)
    seeds = seeds.where(undefended["model_seed"].notna(), undefended["_recipe"])
    comparable = undefended.assign(_same=seeds)[seeds != _UNKNOWN]
    results = runs[runs["label"] != UNDEFENDED].groupby("record")["label"].agg(list)
    for _, same in comparable.groupby([*_CELL, "_same"], dropna=False, sort=False):
        names = sorted(same["record"], key=lambda name: -len(results.get(name, [])))  # is stable
        what = "attack and seed" if pd.notna(same["model_seed"].iloc[0]) else "model"
        for repeat in names[1:]:
            its = f", with its {listed(results[repeat])}" if repeat in results else ""
            problems.append(f"{repeat}: is of the same {what} as {names[0]}; skipped{its}")
            runs = runs[runs["record"] != repeat]
    return runs.reset_index(drop=True), problems
