"""Runs are repeats only if they differ in nothing but seed, time and place."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from attack import blended
from benchmark.cells import Cell
from benchmark.checks import cells_of
from benchmark.grid import read_grid
from benchmark.reporting import tables
from benchmark.reporting.means import summarize
from benchmark.reporting.stored import UNDEFENDED
from benchmark.reporting.summaries import read_runs
from defense import fst, ft
from tests.benchmark.test_report import attack, defense, write
from tests.interop.test_state_dict import OWN, flags, network, own, state, triggered_images, wrapped
from tests.scripts import attack_flags, defense_flags, run_script
from utils.errors import UserError
from utils.files import ROOT
from utils.records.places import CLEAN
from utils.training import ending

__all__ = ["own", "state"]  # fixtures

pytestmark = pytest.mark.usefixtures("cache")

A, B, C = "1" * 64, "2" * 64, "3" * 64


def rows(under: Path) -> dict[str, int]:
    """Seeds by "table: row" without a defense."""
    runs, problems = read_runs(under)
    assert problems == []
    return {
        f"{table.title}: {row.name}": row.numbers[UNDEFENDED, "acc"].seeds
        for table in summarize(runs)
        for row in (*table.main.body, *table.main.foot)
        if row.seeds is not None
    }


def names(under: Path) -> dict[str, int]:
    """Seeds by row, where there is one table."""
    return {name.rpartition(": ")[2]: seeds for name, seeds in rows(under).items()}


def external(root: Path, name: str, **more: Any) -> Path:
    """The summary of an imported model, which has no seed."""
    folder = attack(root, f"{name}-0", 0.9, 1.0)
    facts = json.loads((folder / "summary.json").read_text()) | {"attack": "external", "seed": None}
    shutil.rmtree(folder)
    return write(root / name, facts | more)


# --- what the summaries say -----------------------------------------------------------------------


def test_imported_models_are_rows_of_their_own_called_after_their_records(tmp_path: Path) -> None:
    """ACC 92 % and 40 %, which are no two seeds of anything."""
    for name, acc, digest in (("mine", 0.92, A), ("theirs", 0.40, B)):
        external(tmp_path, name, acc=acc, config_sha256=digest, inputs={"dataset": C})
    assert names(tmp_path) == {"external (mine)": 1, "external (theirs)": 1}
    defense(tmp_path / "theirs", "ft", 0.4, 0.1, 0.3)
    runs, _ = read_runs(tmp_path)
    assert set(runs.loc[runs["record"] == "theirs", "attack"]) == {"external (theirs)"}
    shutil.rmtree(tmp_path / "mine")
    assert names(tmp_path) == {"external": 1}


def test_imports_of_earlier_versions_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    """Their flags may be the same; of BackdoorBench they have no flags, or no summary at all."""
    external(tmp_path / "a", "mine")
    external(tmp_path / "a", "theirs", files={"attack_result.pt": A})
    assert names(tmp_path / "a") == {"external (mine)": 1, "external (theirs)": 1}
    for name, digest in (("mine", A), ("theirs", B)):
        external(tmp_path / "b", name, config_sha256=None, imported_sha256=digest)
        bare = defense(external(tmp_path / "c", name), "ft", 0.9, 0.1, 0.9, attack_sha256=digest)
        (bare.parents[1] / "summary.json").unlink()
    assert names(tmp_path / "b") == {"external (mine)": 1, "external (theirs)": 1}
    assert names(tmp_path / "c") == {"external (mine)": 1, "external (theirs)": 1}


def test_the_same_import_twice_is_no_second_seed(tmp_path: Path) -> None:
    for name in ("again", "mine"):
        external(tmp_path, name, config_sha256=A, inputs={"dataset": C})
    runs, problems = read_runs(tmp_path)
    assert problems == ["mine: is of the same model as again; skipped"]
    assert set(runs["attack"]) == {"external"}


def test_an_import_is_no_seed_of_runs_that_have_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        attack(tmp_path, f"sig-{seed}", 0.9, 1.0)
    external(tmp_path, "a_stranger_s", attack="sig")
    assert names(tmp_path) == {"sig": 2, "sig (a_stranger_s)": 1}


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_folders_of_pictures_are_tables_of_their_own(
    tmp_path: Path, seeds: tuple[int, int]
) -> None:
    """With one seed, one of them was dropped; with two, they were averaged."""
    for name, seed, digest in (("cats", seeds[0], A), ("dogs", seeds[1], B)):
        more = {"inputs": {"dataset": digest}, "dataset_path": f"/somewhere/{name}", "seed": seed}
        attack(tmp_path, f"badnet-{name}-{seed}", 0.9, 1.0, attack="badnet", **more)
    model = "preactresnet18, pratio 10 %: badnet"
    assert rows(tmp_path) == {f"digits (cats), {model}": 1, f"digits (dogs), {model}": 1}
    shutil.rmtree(tmp_path / f"badnet-dogs-{seeds[1]}")
    assert rows(tmp_path) == {f"digits, {model}": 1}


def test_folders_of_one_name_are_told_apart_by_their_content(tmp_path: Path) -> None:
    """The same content elsewhere is a repeat; another at the same place is none."""
    for seed, digest, path in ((0, A, "/a/cats"), (1, A, "/b/pets"), (2, B, f"/{'x' * 400}/cats")):
        attack(tmp_path, f"sig-{seed}", 0.9, 1.0, inputs={"dataset": digest}, dataset_path=path)
    assert sorted(rows(tmp_path).values()) == [1, 2]
    runs, _ = read_runs(tmp_path)
    assert set(runs["dataset"]) == {"digits (cats 111111)", "digits (cats 222222)"}


def test_a_network_file_that_changed_between_seeds_is_another_network(tmp_path: Path) -> None:
    for seed, digest in ((0, A), (1, A), (2, B)):
        more = {"model": "my_net.py:build", "inputs": {"dataset": C, "--model": digest}}
        defense(attack(tmp_path, f"sig-{seed}", 0.9, 1.0, **more), "ft", 0.9, 0.1, 0.8, **more)
    runs, _ = read_runs(tmp_path)
    assert dict(runs["model"].value_counts()) == {
        "my_net.py:build (111111)": 4,
        "my_net.py:build (222222)": 2,
    }
    assert sorted(rows(tmp_path).values()) == [1, 2]


def test_another_recipe_of_another_seed_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Two records of one recipe are one row, whatever they are called."""
    for seed, digest in ((0, A), (1, A), (2, B), (3, B)):
        attack(tmp_path, f"sig-{seed}", 0.9, 1.0, config_sha256=digest)
        attack(tmp_path, f"prototype-{seed}", 0.9, None, pratio=None, config_sha256=digest)
    assert names(tmp_path) == {
        "sig": 2,
        "sig (sig-2)": 2,
        CLEAN: 2,
        f"{CLEAN} (prototype-2)": 2,
    }
    (table,) = summarize(read_runs(tmp_path)[0])
    assert [row.name for row in table.main.body] == ["sig", "sig (sig-2)"]  # those of the mean
    order = tables.made_by(table)[0]["attack"].drop_duplicates()
    assert list(order)[-2:] == [CLEAN, f"{CLEAN} (prototype-2)"]


def test_recipes_of_records_with_one_name_are_told_apart_by_their_hash(tmp_path: Path) -> None:
    """As a grid gives them when what a flag's file holds has changed."""
    for seed, digest in ((0, A), (1, B), (2, "2" * 6 + "4" * 58)):
        facts = {"attack": "sig", "seed": seed, "config_sha256": digest}
        attack(tmp_path, f"digits-sig-s{seed}-0", 0.9, 1.0)
        folder = tmp_path / f"digits-sig-s{seed}-0"
        summary = json.loads((folder / "summary.json").read_text()) | facts
        write(tmp_path / f"digits-sig-s{seed}", summary)
        shutil.rmtree(folder)
    assert names(tmp_path) == {
        "sig": 1,
        "sig (digits-sig 22222222)": 1,
        "sig (digits-sig 22222244)": 1,
    }


def test_a_result_of_another_recipe_is_a_column_of_its_own(tmp_path: Path) -> None:
    """What a defense sees is in its recipe. Most runs of a column keep its name."""
    for kind, seed, digest in (("sig", 0, B), ("sig", 1, A), ("lf", 0, A), ("bpp", 0, B)):
        record = attack(tmp_path, f"{kind}-{seed}", 0.9, 1.0)
        defense(record, "ft", 0.9, 0.1, 0.8, config_sha256=digest)
    defense(tmp_path / "sig-0", "sau-x", 0.9, 0.1, 0.8, config_sha256=A)
    defense(tmp_path / "sig-1", "sau-x", 0.9, 0.1, 0.8, config_sha256=B)
    defense(attack(tmp_path, "lf-1", 0.9, 1.0), "ft", 0.9, 0.1, 0.8, config_sha256=A)
    (table,) = summarize(read_runs(tmp_path)[0])
    labels = table.runs.groupby("row")["label"].unique().map(sorted).to_dict()
    variants = ["sau-x", "sau-x (222222)"]
    assert labels == {
        "bpp": ["ft (222222)", UNDEFENDED],  # a mean over attacks is of one recipe
        "lf": ["ft", UNDEFENDED],
        "sig": ["ft", "ft (222222)", UNDEFENDED, *variants],
    }
    assert [row.name for row in table.ablations["sau"].body] == variants


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "ft"),
        ({"precision": "fp32", "random_seed": 3, "dataset_path": "elsewhere"}, "ft"),
        ({"came_later": 1}, "ft"),
        ({"lr": 0.1}, "ft (222222)"),
        (None, "ft (222222)"),
    ],
)
def test_a_column_has_one_recipe_by_what_its_configurations_say(
    tmp_path: Path, changes: dict[str, Any] | None, label: str
) -> None:
    """Of another hash, on another attack. Of two on one attack that are alike, one has the name."""
    plain = {"lr": 0.01, "precision": "auto", "random_seed": 0, "dataset_path": None}
    for kind, digest, values in (*[("sig", A, plain)] * 3, ("lf", B, changes)):
        seed = len(list(tmp_path.iterdir()))
        folder = defense(
            attack(tmp_path, f"{kind}-{seed}", 0.9, 1.0), "ft", 0.9, 0.1, 0.8, config_sha256=digest
        )
        if values is not None:
            (folder / "config.yaml").write_text(yaml.dump(plain | values))
    runs, problems = read_runs(tmp_path)
    assert problems == []
    assert set(runs[runs["attack"] == "lf"]["label"]) == {UNDEFENDED, label}
    assert set(runs[runs["attack"] == "sig"]["label"]) == {UNDEFENDED, "ft"}
    if label == "ft":  # and a third recipe, on both attacks; the last record is read first
        for name, kind in (("lf-5", "lf"), ("a/sig-5", "sig")):
            shutil.copytree(folder.parents[1], tmp_path / name)
            for path in (tmp_path / name).rglob("summary.json"):
                summary = json.loads(path.read_text()) | {"seed": 5, "attack": kind}
                of_result = {"config_sha256": C} if "defense" in summary else {}
                path.write_text(json.dumps(summary | of_result))
        runs, _ = read_runs(tmp_path)
        for kind in ("lf", "sig"):
            labels = runs[runs["attack"] == kind]["label"]
            assert set(labels) == {UNDEFENDED, "ft", "ft (333333)"}
            assert (labels == "ft").sum() == {"lf": 1, "sig": 3}[kind]


def test_one_name_of_two_methods_on_two_attacks_is_no_column(tmp_path: Path) -> None:
    defense(attack(tmp_path, "sig-0", 0.9, 1.0), "mine", 0.9, 0.1, 0.8, defense="ft")
    record = attack(tmp_path, "lf-0", 0.9, 1.0)
    defense(record, "mine", 0.9, 0.9, 0.8, defense="nad", config_sha256=None)
    runs, _ = read_runs(tmp_path)
    assert set(runs["label"]) == {UNDEFENDED, "mine", "mine (ft)"}
    (table,) = summarize(runs)
    assert set(table.labels()) == {"mine", "mine (ft)"}


def test_results_of_clean_models_are_told_apart_as_well(tmp_path: Path) -> None:
    """These have no poisoning ratio."""
    for seed, digest in ((0, A), (1, B)):
        record = attack(tmp_path, f"prototype-{seed}", 0.9, 0.0, pratio=None)
        defense(record, "ft", 0.9, 0.0, 0.8, config_sha256=digest)
    runs, _ = read_runs(tmp_path)
    assert set(runs["label"]) == {UNDEFENDED, "ft", "ft (222222)"}


def test_results_of_two_methods_with_one_name_are_no_repeats(tmp_path: Path) -> None:
    for seed, method in ((0, "ft"), (1, "sau")):
        record = attack(tmp_path, f"sig-{seed}", 0.9, 1.0)
        more = {"defense": method, "config_sha256": None}
        defense(record, "final", 0.9, 0.1, 0.8, **more)
    runs, _ = read_runs(tmp_path)
    assert set(runs["label"]) == {UNDEFENDED, "final", "final (sau)"}


def test_what_a_summary_does_not_say_tells_nothing_apart(tmp_path: Path) -> None:
    """Two of an earlier version, one of this; a second content is told apart from all of them."""
    attack(tmp_path, "sig-0", 0.9, 1.0, config_sha256=None)
    attack(tmp_path, "sig-1", 0.9, 1.0)
    attack(tmp_path, "sig-2", 0.9, 1.0, inputs={"dataset": A, "--model": A})
    assert names(tmp_path) == {"sig": 3}
    attack(tmp_path, "sig-3", 0.9, 1.0, inputs={"dataset": B, "--model": A})
    assert sorted(rows(tmp_path).values()) == [1, 1, 2]


# --- what runs write ------------------------------------------------------------------------------


def test_only_flags_that_name_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called as a dataset, or as a precision, is none of the run's."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "auto", "record", "linear", "index.txt"):
        Path(name).write_text("0\n")
    config = ft.Config.load(dataset="digits", save_folder_name="record", index="index.txt")
    assert ending.paths_of(ft.Config) == {"index"}
    assert ending.paths_of(blended.Config) == {"trigger_image"}
    of_layer = fst.Config.load(dataset="digits", select_layer_name="linear")

    class Data:
        def fingerprint(self) -> str:
            return A

    assert list(ending.inputs_of(of_layer, Data())) == ["dataset"]  # type: ignore[arg-type]
    found = ending.inputs_of(config, Data(), B, bd_test_dir=C)  # type: ignore[arg-type]
    assert list(found) == ["dataset", "--model", "--index", "--bd_test_dir"]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.usefixtures("small")
def test_scripts_write_what_tells_their_runs_apart(
    workplace: Path, own: Path, state: Path, tmp_path: Path
) -> None:
    """Two checkpoints, two folders of pictures, two lists of indices, the same in two places."""
    script = ROOT / "interop/state_dict.py"
    other = wrapped(
        tmp_path / "other.pt", {k: v + 0.1 for k, v in network().state_dict().items()}, "net"
    )
    copied = Path(shutil.copy(state, tmp_path / "copied.pt"))
    seen = triggered_images(workplace, tmp_path / "bd")
    more = {"b": {"state_dict": other}, "c": {"state_dict": copied}, "a": {}}
    more["d"] = {"bd_test_dir": seen, "attack_target": 0}
    for name, changes in more.items():
        assert run_script(script, *flags(workplace, own, state, f"r_{name}", **changes)) == 0
    found = {name: summary(workplace / f"record/r_{name}") for name in more}
    assert len({found[name]["config_sha256"] for name in "abd"}) == 3
    assert found["a"]["config_sha256"] == found["c"]["config_sha256"]
    runs, problems = read_runs(workplace / "record")
    assert problems == ["r_c: is of the same model as r_a; skipped"]
    assert set(runs["attack"]) == {f"external (r_{name})" for name in "abd"}

    index = tmp_path / "index.txt"
    for name, content in (("x", "0\n13\n25\n"), ("y", "1\n13\n25\n")):
        index.write_text(content)
        given = {"index": index, "save_folder_name": name, "model": f"{own}:build"}
        assert run_script(ROOT / "defense/ft.py", *defense_flags(workplace, "r_a", **given)) == 0
    moved = {"index": Path(shutil.copy(index, tmp_path / "moved.txt")), "model": f"{own}:build"}
    moved |= {"save_folder_name": "z", "dataset": "folder"}
    assert run_script(ROOT / "defense/ft.py", *defense_flags(workplace, "r_a", **moved)) == 0
    x, y, z = (summary(workplace / "record/r_a/defense" / name) for name in "xyz")
    assert x["config_sha256"] != y["config_sha256"] == z["config_sha256"]
    assert x["inputs"]["dataset"] == found["a"]["inputs"]["dataset"]
    assert x["inputs"]["--model"] == found["a"]["inputs"]["--model"]


@pytest.mark.usefixtures("small")
def test_pictures_that_changed_are_another_dataset(workplace: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(workplace / "images", tmp_path / "changed"))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(images / "train/bright/0.png")
    root = tmp_path / "record"
    for seed, path in ((0, workplace / "images"), (1, images)):
        given = {"record_path": root, "dataset_path": path, "random_seed": seed, "epochs": 1}
        flags = attack_flags(workplace, f"r{seed}", **given)
        assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    runs, problems = read_runs(root)
    assert problems == []
    assert set(runs["dataset"]) == {"folder (images)", "folder (changed)"}


# --- the grid -------------------------------------------------------------------------------------


def test_a_cell_is_not_done_when_a_file_that_it_names_has_changed(tmp_path: Path) -> None:
    """The network's file, and a defense's indices; the same content at another time is the same."""
    net, index = tmp_path / "net.py", tmp_path / "index.txt"
    net.write_text(OWN)
    index.write_text("0\n1\n")
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"datasets: [digits]\nmodels: ['{net}:build']\nattacks: [badnet]\nseeds: [0]\n"
        f"defenses: {{ft: {{index: {index}}}}}\n"
    )

    def cells() -> list[Cell]:
        return cells_of(read_grid(path), tmp_path / "records")

    inputs = {"--model": ending.files_of({"model": str(net)})["--model"]}
    indices = {"--index": ending.files_of({"index": str(index)})["--index"]}
    for cell, read in zip(cells(), (inputs, inputs | indices), strict=True):
        write(cell.folder, {"inputs": {"dataset": A, **read}, "attack_sha256": B})
        (cell.folder / "config.yaml").write_text(f"model: {net}:build\nindex: {index}\n")
    net.write_text(OWN)
    assert all(cell.is_done for cell in cells())
    index.write_text("0\n2\n")
    with pytest.raises(UserError) as refused:
        cells()
    (problem,) = refused.value.problems
    assert f"defense/ft: was made with another content of --index {index}; delete it" in problem
    net.write_text(OWN + "\n")
    with pytest.raises(UserError, match=r"another content of --model .*net\.py:build") as refused:
        cells()
    assert len(refused.value.problems) == 2
    for cell in ("", "defense/ft"):  # of an earlier version, which does not say what it read
        folder = next((tmp_path / "records").iterdir()) / cell
        write(folder, {"attack_sha256": B})
    assert all(cell.is_done for cell in cells())
