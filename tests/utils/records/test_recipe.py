"""The sum of a recipe: what is part of it, and what is not."""

import dataclasses
import hashlib
import json
from typing import get_type_hints

import pytest

import analysis
import attack
import defense
from benchmark.cells import config_class
from utils.records.recipe import SETS, recipe_sha256
from utils.values import is_distinct

A, B, C = "1" * 64, "2" * 64, "3" * 64


def test_a_flag_that_came_later_is_no_part_of_the_recipe_at_its_old_value() -> None:
    """SAU before and after `exact_sar` came is one recipe, unless the flag is given."""
    before = recipe_sha256({"lr": 1e-4})
    assert recipe_sha256({"lr": 1e-4, "exact_sar": False}) == before
    assert recipe_sha256({"lr": 1e-4, "exact_sar": True}) != before


def test_a_recipe_s_sum_is_that_of_sorted_json() -> None:
    text = '{"lr": 0.1, "wd": 0}'
    assert recipe_sha256({"wd": 0, "lr": 0.1}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "resume",
        "overwrite",
        "checkpoint_every",
        "record_path",
        "save_folder_name",
        "random_seed",
        "result_file",
        "dataset_path",
        "device",
        "eval_every",
        "deterministic",
    ],
)
def test_what_says_where_it_runs_is_no_part_of_the_recipe(name: str) -> None:
    assert recipe_sha256({"lr": 0.1, name: "x"}) == recipe_sha256({"lr": 0.1})


@pytest.mark.parametrize("name", ["n_rounds", "dataset", "model", "precision", "ratio", "index"])
def test_everything_else_is(name: str) -> None:
    assert recipe_sha256({"lr": 0.1, name: 1}) != recipe_sha256({"lr": 0.1})


def test_the_sum_does_not_depend_on_the_order_of_the_values() -> None:
    values = json.loads('{"b": 1, "a": [2, 3]}')
    assert recipe_sha256(values) == recipe_sha256(dict(sorted(values.items())))


def test_a_recipe_has_the_content_of_files_and_not_their_places() -> None:
    def recipe(**changes: str) -> str:
        values = {"model": "/a/net.py:build", "index": "/a/index.txt", "lr": 0.1} | changes
        return recipe_sha256(values, {"dataset": C, "--model": A, "--index": index})

    index = B
    first = recipe()
    assert recipe(model="net.py:build", index="other.txt") == first
    assert recipe(model="/a/net.py:other") != first
    index = C
    assert recipe() != first
    assert recipe_sha256({"index": None}, {"dataset": C}) == recipe_sha256({"index": None})


def test_the_lists_without_an_order_are_those_of_distinct_names() -> None:
    """Of the flags of all runs; in every other list the place of a value means something."""
    rooms = {"attack": attack.names(), "defense": defense.names(), "analysis": analysis.names()}
    distinct = set()
    for room, names in rooms.items():
        for config in filter(None, (config_class(room, name) for name in names)):
            hints = get_type_hints(config, include_extras=True)
            distinct |= {f.name for f in dataclasses.fields(config) if is_distinct(hints[f.name])}
    assert distinct == set(SETS)
