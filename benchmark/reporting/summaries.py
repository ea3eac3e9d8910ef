"""The runs under a folder, told by their `summary.json` files alone.

A run is a model without a defense, or what a defense made of it.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as NotAsDescribed

from utils.errors import one_line, shown
from utils.files import read_text

UNDEFENDED = "no defense"
CLEAN = "clean model"
METRICS = ("acc", "asr", "ra", "der")
LARGEST = 1 << 20  # bytes of a summary.json
_UNKNOWN = "-"
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\)")


def _in_lines(value: Any) -> Any:
    """The same plain data, each text as one line that can be printed."""
    if isinstance(value, dict):
        return {shown(key): _in_lines(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_lines(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def without_places(value: Any) -> Any:
    """The same plain data, absolute paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


Text = Annotated[
    str,
    StringConstraints(max_length=300),
    AfterValidator(without_places),
]
Line = Annotated[str, AfterValidator(lambda text: text[:300])]  # cut, not refused
Place = Annotated[str, AfterValidator(lambda text: Path(without_places(text)).name[:300])]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Scores(BaseModel):
    model_config = ConfigDict(strict=True)

    acc: Share
    acc_total: Count | None = None
    asr: Share | None = None
    asr_total: Count | None = None
    ra: Share | None = None


class _Facts(BaseModel):
    """What both kinds of summary say of a run; what is not ours may lack most of it."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    attack: Text
    dataset: Text
    model: Text | None = None
    seed: int | None = None
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


S = TypeVar("S", bound=BaseModel)


def is_clean(attack: str) -> bool:
    """Whether a row's name is that of models without a backdoor."""
    return attack == CLEAN or attack.startswith(f"{CLEAN} (")


def read_runs(under: Path, without: Path | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The runs of all records under a folder, at any depth; links are not followed.

    Runs are repeats, of which a table gives the mean, if they differ in nothing but seed, time and
    place. Where datasets, networks or recipes of one name differ, each has a name of its own.

    Args:
        without: a folder whose content is not looked at.

    Returns:
        A row a run, in the order of the folders' names: `record` (its folder, relative), `folder`,
        `attack`, `label` (`UNDEFENDED` or the name of the result's folder), scores in [0, 1] (NaN
        where there is none), and what it was made by. And a line for each file that is left out.
    """
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for folder, results in sorted(_find(under, without).items()):
        name = str(folder.relative_to(under)) if folder.is_relative_to(under) else folder.name
        name = folder.resolve().name if name == "." else name.removeprefix("records/")
        name = shown(name)
        attack = _read(folder / "summary.json", _Attack, problems)
        defenses = []
        for result in sorted(results):
            defense = _read(result / "summary.json", _Defense, problems)
            if defense is None:
                continue
            made_of = attack.files.get("attack_result.pt") if attack else None
            if None not in (made_of, defense.attack_sha256) and made_of != defense.attack_sha256:
                problems.append(
                    f"{result}: purified another model than this record has now; left out"
                )
                continue
            defenses.append((result, defense))
        if (folder / "summary.json").exists() and attack is None:
            continue  # without it, nothing says which attack this was
        rows = list(_rows(folder, attack, defenses))
        if not rows:
            problems.append(f"{folder}: has no scores; left out")
        found += [{"record": name, **row} for row in rows]
    runs = pd.DataFrame(found)
    if not runs.empty:
        runs, problems = _without_repeats(_told_apart(_numeric(runs)), problems)
        runs = runs.drop(columns=[name for name in runs if str(name).startswith("_")])
    return runs, [problem.removeprefix(f"{under}{os.sep}") for problem in problems]


def _find(under: Path, without: Path | None) -> dict[Path, list[Path]]:
    """Folders of attacks, and for each those of its defenses' results."""
    found: dict[Path, list[Path]] = {}
    excluded = without.resolve() if without is not None else None
    for path, folders, files in os.walk(under):
        here = Path(path)
        folders[:] = [n for n in folders if n[0] != "." and here.joinpath(n).resolve() != excluded]
        if "summary.json" not in files:
            continue
        if here.parent.name == "defense":
            found.setdefault(here.parent.parent, []).append(here)
        else:
            found.setdefault(here, [])
    return found


def _read(path: Path, kind: type[S], problems: list[str]) -> S | None:
    try:
        if path.is_symlink():
            problems.append(f"{path}: is a link; left out")
            return None
        values = json.loads(read_text(path, LARGEST))
        if isinstance(values, dict):
            return kind.model_validate(_in_lines(values))
        problems.append(f"{path}: is no summary of a run (it is no object); left out")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); left out")
    except NotAsDescribed as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = shown(": ".join(filter(None, (where, first["msg"]))), 200)
        problems.append(f"{path}: is no summary of a run ({reason}); left out")
    except (ValueError, RecursionError) as error:
        reason = f"Invalid JSON: {one_line(error)}"
        problems.append(f"{path}: is no summary of a run ({reason}); left out")
    return None


def _rows(
    folder: Path, attack: _Attack | None, defenses: Iterable[tuple[Path, _Defense]]
) -> Iterable[dict[str, Any]]:
    """A record's runs; the scores before a defense stand in where the attack's summary has none."""
    defenses = list(defenses)
    facts = attack or (defenses[0][1] if defenses else None)
    before: _Attack | _Scores | None = attack if attack and attack.acc is not None else None
    if before is None and defenses:
        before = defenses[0][1].before
    if facts is None or before is None:
        return
    all2all = "_all2all" if attack and attack.attack_label_trans == "all2all" else ""
    model = facts.model or (attack and attack.model_name) or "-"
    made_of = attack.files.get("attack_result.pt") if attack else defenses[0][1].attack_sha256
    known = [attack.config_sha256, attack.imported_sha256] if attack else []
    is_described = bool(attack and (attack.seed is not None or attack.inputs))
    shared = {
        "_at": str(folder),
        "_dataset": facts.inputs.get("dataset", _UNKNOWN),
        "_place": (attack and attack.dataset_path) or "",
        "_model": facts.inputs.get("--model", _UNKNOWN),
        # Without a seed, or flags that say what was read, it is the model that tells records apart.
        "_recipe": " ".join(filter(None, known if is_described else [made_of, *known])) or _UNKNOWN,
        "attack": CLEAN if facts.attack == "prototype" else facts.attack + all2all,
        "dataset": facts.dataset,
        "model": model,
        "pratio": float(f"{attack.pratio:.3g}") if attack and attack.pratio else float("nan"),
        "train_images": attack.train_images if attack else None,
        "image_size": attack.image_size if attack else None,
        "test_images": before.acc_total,
        "acc_before": before.acc,
        "asr_before": before.asr,
    }
    yield _row(shared, folder, UNDEFENDED, facts if before is attack else None, before, None)
    for path, defense in defenses:
        label = shown(path.name)
        label += " (result)" * (label == UNDEFENDED)
        row = _row(shared, path, label, defense, defense.after, defense.der)
        yield {**row, "acc_before": defense.before.acc, "asr_before": defense.before.asr}


def _row(
    shared: Mapping[str, Any],
    folder: Path,
    label: str,
    facts: _Facts | None,
    scores: "_Scores | _Attack",
    der: float | None,
) -> dict[str, Any]:
    versions = " ".join(f"{k} {v}" for k, v in facts.versions.items()) if facts else ""
    return {
        **shared,
        "folder": folder,
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
        "config": (facts.config_sha256 if facts else None) or "-",
        "commit": (facts.commit if facts else None) or "-",
        "versions": versions or "-",
        "device": facts.device.partition(":")[0] if facts else "-",
        "device_name": facts.device_name if facts else "-",
        "precision": facts.precision if facts else "-",
        "warnings": list(facts.warnings) if facts else [],
    }


def _numeric(runs: pd.DataFrame) -> pd.DataFrame:
    """The same runs, their numbers as such."""
    numbers = ["pratio", "image_size", "train_images", "test_images", "seed", *METRICS, "seconds"]
    numbers += ["purify_seconds"]
    numbers += ["acc_before", "asr_before", "acc_total", "asr_total"]
    return runs.assign(**{name: pd.to_numeric(runs[name]) for name in numbers})


_SETTING = ["dataset", "image_size", "train_images", "test_images", "model"]
_CELL = [*_SETTING, "attack", "pratio"]


def _told_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with different names for datasets, networks, attacks and results that differ.

    What a summary does not say tells nothing apart.
    """
    runs = _renamed(runs, "dataset", ["dataset", "image_size"], _by_dataset)
    runs = _renamed(runs, "model", ["model"], _by_model)
    undefended = runs[runs["label"] == UNDEFENDED]
    names = _renamed(undefended, "attack", _CELL, _by_recipe).set_index("_at")["attack"]
    runs = runs.assign(attack=runs["_at"].map(names))
    results = runs[runs["label"] != UNDEFENDED]
    for _, group in results.groupby([*_SETTING, "label"], dropna=False, sort=False):
        counts = Counter(group["method"] + " " + group["config"])
        suffixes = partial(_by_result, usual=counts.most_common(1)[0][0])
        renamed = _renamed(group, "label", ["attack", "pratio"], suffixes)
        runs.loc[group.index, "label"] = renamed["label"]
    return runs


def _renamed(
    runs: pd.DataFrame, column: str, by: list[str], suffixes: Callable[[pd.DataFrame], pd.Series]
) -> pd.DataFrame:
    """The runs with a suffix in brackets added to a column.

    Args:
        by: columns; of each group of runs that agree in them, `suffixes` gives a text a run, which
            is empty for those that keep their name.
    """
    names = runs[column].copy()
    for _, group in runs.groupby(by, dropna=False, sort=False):
        found = suffixes(group)
        found = found[found != ""]
        names[found.index] = runs.loc[found.index, column] + " (" + found + ")"
    return runs.assign(**{column: names})


def _by_dataset(runs: pd.DataFrame) -> pd.Series:
    """Several contents of one name are called after their folders."""
    return runs["_dataset"].map(_names(runs["_dataset"], runs["_place"]))


def _by_model(runs: pd.DataFrame) -> pd.Series:
    """Several contents of a user's file are called after their sha256."""
    return runs["_model"].map(_names(runs["_model"], pd.Series("", runs.index)))


def _by_recipe(runs: pd.DataFrame) -> pd.Series:
    """Several recipes are called after their records; the first one with a seed keeps its name.

    What has no seed was trained elsewhere, and is no repeat of anything.
    """
    recipes, has_seed = runs["_recipe"], runs["seed"].notna()
    records = runs["record"].map(lambda name: re.sub(r"-s\d+$", "", name.rpartition("/")[2]))
    names = _names(recipes, records, is_mixed=bool(has_seed.any() and not has_seed.all()))
    first = recipes[has_seed & (recipes != _UNKNOWN)].head(1)
    return recipes.map(names | dict.fromkeys(first, ""))


def _by_result(runs: pd.DataFrame, usual: str) -> pd.Series:
    """Results of one name by several methods or recipes are called after them.

    One keeps its name: that of most runs of the column, or the first.
    """
    known = runs["config"] != _UNKNOWN
    whole = runs["method"] + " " + runs["config"]
    recipes = whole.where(known | (runs["method"].nunique() > 1), _UNKNOWN)
    kept = usual if usual in set(recipes) else next(iter(recipes[recipes != _UNKNOWN]), _UNKNOWN)
    is_own = (runs["method"] != kept.partition(" ")[0]) & (runs["method"].nunique() > 1)
    return recipes.map(_names(recipes, runs["method"].where(is_own, "")) | {kept: ""})


def _names(keys: pd.Series, hints: pd.Series, is_mixed: bool = False) -> dict[str, str]:
    """A text for each key of several, the first hint that stands beside it.

    Where others have the same hint, as many letters of the key as tell it apart follow, at least
    six. A key that is not known has an empty text, and so has a single one.

    Args:
        is_mixed: whether a single key needs a text, too.
    """
    texts = dict.fromkeys(keys, "")
    known = [key for key in texts if key != _UNKNOWN]
    if len(known) < 2 and not is_mixed:
        return texts
    first: dict[str, str] = {}
    for key, hint in zip(keys, hints, strict=True):
        first[key] = first.get(key) or hint
    shared = Counter(first.values())
    digests = {key: key.rpartition(" ")[2] for key in known}
    if len(set(digests.values())) < len(known):
        digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in known}
    length = 6
    while len({digest[:length] for digest in digests.values()}) < len(known):
        length += 2
    for key in known:
        is_own = bool(first[key]) and shared[first[key]] == 1
        texts[key] = first[key] if is_own else f"{first[key]} {digests[key][:length]}".strip()
    return texts


def _without_repeats(runs: pd.DataFrame, problems: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Two records of one cell and seed would pass for two seeds: the first by name is taken.

    Likewise of two records of one model that was trained elsewhere.
    """
    undefended = runs[runs["label"] == UNDEFENDED]
    seeds = undefended["seed"].astype(object)
    seeds = seeds.where(undefended["seed"].notna(), undefended["_recipe"])
    known = undefended.assign(_same=seeds)[seeds != _UNKNOWN]
    for _, same in known.groupby([*_CELL, "_same"], dropna=False, sort=False):
        first = same.iloc[0]
        what = "attack and seed" if pd.notna(first["seed"]) else "model"
        for repeat, folder in zip(same["record"].iloc[1:], same["_at"].iloc[1:], strict=True):
            problems.append(f"{repeat}: is of the same {what} as {first['record']}; left out")
            runs = runs[runs["_at"] != folder]
    return runs.reset_index(drop=True), problems
