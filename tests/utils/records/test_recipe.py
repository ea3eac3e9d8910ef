"""The sum of a recipe: what is part of it, and what is not."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import get_type_hints

import pytest

import analysis
import attack
import defense
from benchmark.cells import config_class
from utils.records.checkpoint import files_of
from utils.records.places import CLEAN
from utils.records.recipe import (
    SETS,
    changed_files,
    differing_flags,
    is_same,
    recipe_sha256,
    same_contents,
)
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
    for values, inputs in (
        ({"dataset": "folder"}, {"dataset": C}),
        ({"model": None}, {"--model": A}),  # the record's
    ):
        assert recipe_sha256(values, inputs) == recipe_sha256(values)


def test_the_lists_without_an_order_are_those_of_distinct_names() -> None:
    """Of the flags of all runs; in every other list the place of a value means something."""
    rooms = {"attack": attack.names(), "defense": defense.names(), "analysis": analysis.names()}
    distinct = set()
    for room, names in rooms.items():
        for config in filter(None, (config_class(room, name) for name in names)):
            hints = get_type_hints(config, include_extras=True)
            distinct |= {f.name for f in dataclasses.fields(config) if is_distinct(hints[f.name])}
    assert distinct == set(SETS)


def test_the_name_of_a_target_is_that_of_its_label(tmp_path: Path) -> None:
    """Of this one flag; a run that does not say a name has its label."""

    def is_target(given: object, name: str = "attack_target") -> bool:
        return is_same(tmp_path, name, given, 3)

    assert not is_target("cat")  # no summary
    (tmp_path / "summary.json").write_text('{"attack_target_name": "cat"}')
    assert is_target("cat")
    assert is_target(3)
    assert not is_target("dog")
    assert not is_target(4)
    assert not is_target("cat", "model")
    (tmp_path / "summary.json").write_text("{}")
    assert is_target("3")
    assert not is_target("cat")


def test_what_a_finished_run_read_is_known_by_its_content(tmp_path: Path) -> None:
    """A file that it does not say it read has not changed."""
    index, image = tmp_path / "index.txt", tmp_path / "image.png"
    index.write_text("0\n")
    image.write_text("any")
    flags = {"index": str(index), "trigger_image": str(image), "lr": 0.1}
    summary = {"inputs": files_of({"index": str(index)}), "models": {CLEAN: A}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert changed_files(tmp_path, flags) == []
    assert same_contents(tmp_path, flags) == {"the record", f"the {CLEAN}", "--index"}
    index.write_text("1\n")
    assert changed_files(tmp_path, flags) == [f"--index {index}"]
    assert same_contents(tmp_path, flags) == {"the record", f"the {CLEAN}"}


@pytest.mark.parametrize(
    ("name", "now", "before", "same", "is_other"),
    [
        ("lr", 0.1, 0.2, {"the record"}, True),
        ("lr", 0.1, 0.1, {"the record"}, False),
        ("lr", None, 0.1, {"the record"}, True),
        ("model", None, "tiny", set(), False),  # found in the record
        ("random_seed", 1, 2, set(), True),
        ("resume", True, False, set(), False),
        ("result_file", "/b", "/a", {"the record"}, False),
        ("dataset_path", "/b", "/a", set(), True),
        ("index", "/b/i.txt", "/a/i.txt", {"--index"}, False),
        ("index", "/b/i.txt", "/a/i.txt", {"the record"}, True),
        ("index", None, "/a/i.txt", {"--index"}, True),
        ("model", "/b/net.py:f", "/a/net.py:f", {"--model"}, False),
        ("model", "/b/net.py:f", "/a/net.py:f", {"the record"}, True),
        ("model", "/b/net.py:g", "/a/net.py:f", {"--model"}, True),
        ("clean_record", "/b", "/a", {f"the {CLEAN}"}, False),
        ("clean_record", "/b", "/a", {"the record"}, True),
        ("clean_records", ["/b/y", "x"], ["x", "y"], set(), False),
        ("clean_records", ["/b/y", "x"], ["x", "z"], {"the record"}, True),
        ("defenses", ["ft", "sau"], ["sau", "ft"], set(), False),
        ("defenses", None, ["ft"], set(), True),
        ("seeds", [1, 0], [0, 1], set(), True),
    ],
)
def test_another_value_is_another_run_unless_it_stands_for_the_same(
    name: str, now: object, before: object, same: set[str], is_other: bool
) -> None:
    assert differing_flags({name: now}, {name: before}, same) == [name] * is_other
