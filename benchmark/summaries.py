"""The runs under a folder, told by their `summary.json` files alone.

A run is a model without a defense, or what a defense made of it.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
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
    warnings: list[Line] = []
    files: dict[Text, Text] = {}


class _Attack(_Facts):
    model_name: Text | None = None  # where `model` is lacking: imported records
    attack_label_trans: Text | None = None
    pratio: Share | None = None
    train_images: Count | None = None
    image_size: Count | None = None
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


def read_runs(under: Path, without: Path | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The runs of all records under a folder, at any depth; links are not followed.

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
        runs, problems = _without_repeats(runs, problems)
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
    shared = {
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


def _without_repeats(runs: pd.DataFrame, problems: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Two records of one cell and seed would pass for two seeds: the first by name is taken.

    Of another recipe they are a variant, named after its record.
    """
    numbers = ["pratio", "image_size", "train_images", "test_images", "seed", *METRICS, "seconds"]
    numbers += ["purify_seconds"]
    numbers += ["acc_before", "asr_before", "acc_total", "asr_total"]
    runs = runs.assign(**{name: pd.to_numeric(runs[name]) for name in numbers})
    undefended = runs[runs["label"] == UNDEFENDED]
    cell = [
        "dataset",
        "image_size",
        "train_images",
        "test_images",
        "model",
        "attack",
        "pratio",
        "seed",
    ]
    attacks = undefended[undefended["attack"] != CLEAN]
    for _, attack in attacks.groupby(cell[:-1], dropna=False, sort=False):
        if attack[attack["seed"].notna()].groupby("seed")["config"].nunique().max() > 1:
            runs = _with_variants(runs, attack)
    known = runs[(runs["label"] == UNDEFENDED) & runs["seed"].notna()]
    for _, same in known.groupby(cell, dropna=False, sort=False):
        for repeat in same["record"].iloc[1:]:
            first = same["record"].iloc[0]
            problems.append(f"{repeat}: is of the same attack and seed as {first}; left out")
            runs = runs[runs["record"] != repeat]
    return runs.reset_index(drop=True), problems


def _with_variants(runs: pd.DataFrame, attack: pd.DataFrame) -> pd.DataFrame:
    """The runs with the recipes of an attack told apart: the first by name keeps its name.

    Another one is named after its records without their seeds, as a grid names them.
    """
    base, names = attack["config"].iloc[0], dict[str, str]()
    renamed = runs["attack"].copy()
    for record, config in zip(attack["record"], attack["config"], strict=True):
        if config == base:
            continue
        name = re.sub(r"-s\d+$", "", record.rpartition("/")[2])
        if names.setdefault(name, config) != config:
            name += f" {config[:6]}"
        of_it = runs["record"] == record
        renamed[of_it] = runs.loc[of_it, "attack"] + f" ({name})"
    return runs.assign(attack=renamed)
