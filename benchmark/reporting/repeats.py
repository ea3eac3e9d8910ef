"""Which runs are repeats of each other: all else that shares a name gets a name of its own."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable

import pandas as pd

from benchmark.reporting.stored import UNDEFENDED, UNKNOWN, StoredRun
from utils.errors import listed
from utils.records.recipe import NOT_OF_RECIPE

_NOT_OF_METHOD = (*NOT_OF_RECIPE, "precision", "dataset", "model")
SETTING = ["dataset", "image_size", "train_images", "test_images", "model"]  # of a table
_CELL = [*SETTING, "attack", "pratio"]


def told_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with different names for datasets, networks, attacks and results that differ.

    If a summary lacks a fact, this fact is not used to tell runs apart.
    """
    runs = _renamed(runs, "dataset", ["dataset", "image_size"], _by_dataset)
    runs = _renamed(runs, "model", ["model"], _by_model)
    undefended = runs[runs["label"] == UNDEFENDED]
    names = _renamed(undefended, "attack", _CELL, _by_recipe).set_index("record")["attack"]
    runs = runs.assign(attack=runs["record"].map(names))
    results = runs[runs["label"] != UNDEFENDED]
    renamed = _renamed(results, "label", [*SETTING, "label"], _by_result)
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
    first = recipes[has_seed & (recipes != UNKNOWN)].head(1)
    return recipes.map(names | dict.fromkeys(first, ""))


def _by_result(runs: pd.DataFrame) -> pd.Series:
    """Results of one name by several methods or recipes are called after them, in all attacks.

    The recipe of most runs, or the first, keeps its name. In an attack without it, so does one that
    differs from it in nothing that changes the method, as far as the configurations tell.
    """
    is_told = (runs["config"] != UNKNOWN) | (runs["method"].nunique() > 1)
    recipes = (runs["method"] + " " + runs["config"]).where(is_told, UNKNOWN)
    counts = Counter(recipes[recipes != UNKNOWN])
    if len(counts) < 2:
        return pd.Series("", runs.index)
    usual = counts.most_common(1)[0][0]
    is_own = runs["method"] != usual.partition(" ")[0]
    names = _names(recipes, runs["method"].where(is_own, "")) | {usual: ""}
    first = runs[~is_own].groupby(recipes, sort=False)["run"].first()
    alike = {recipe for recipe, run in first.items() if _is_same_recipe(run, first[usual])}

    def suffixes(of_attack: pd.Series) -> pd.Series:
        as_usual = [recipe for recipe in of_attack if recipe in alike]
        kept = usual if usual in as_usual else next(iter(as_usual), usual)
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
    distinct = [key for key in texts if key != UNKNOWN]
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


def without_repeats(runs: pd.DataFrame, problems: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Two records of one cell and seed would look like two seeds: one is used.

    It is the one with the most results, and of these the first by name. The same holds for two
    records of one model that was trained elsewhere.
    """
    undefended = runs[runs["label"] == UNDEFENDED]
    seeds = undefended["model_seed"].astype(object)
    seeds = seeds.where(undefended["model_seed"].notna(), undefended["_recipe"])
    comparable = undefended.assign(_same=seeds)[seeds != UNKNOWN]
    results = runs[runs["label"] != UNDEFENDED].groupby("record")["label"].agg(list)
    for _, same in comparable.groupby([*_CELL, "_same"], dropna=False, sort=False):
        names = sorted(same["record"], key=lambda name: -len(results.get(name, [])))  # is stable
        what = "attack and seed" if pd.notna(same["model_seed"].iloc[0]) else "model"
        for repeat in names[1:]:
            its = f", with its {listed(results[repeat])}" if repeat in results else ""
            problems.append(f"{repeat}: is of the same {what} as {names[0]}; skipped{its}")
            runs = runs[runs["record"] != repeat]
    return runs.reset_index(drop=True), problems
