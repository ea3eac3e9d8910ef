"""Export is what BackdoorBench's format says, import gives it back, to the last bit."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from interop.backdoorbench import _refuse_unknown, export_record, import_record
from models import Classifier, build_model, preactresnet18
from models.changes import insert
from perf import fuzz
from tests import backdoorbench_writer as writer
from tests.scripts import run_script
from tests.summary_keys import check_keys
from tests.utils.records.test_backdoorbench import (
    MEAN,
    STD,
    TARGET,
    TEST,
    TRAIN,
    badnet,
    data,
    wanet,
)
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import (
    KINDS,
    Choice,
    dirty_label,
    replace_images,
    triggered_test_set,
    unpoisoned,
)
from utils.errors import UserError
from utils.files import ROOT, file_sha256, read_object
from utils.records import folders, places
from utils.records.attack import load_attack, save_attack
from utils.records.defense import save_defense
from utils.records.hashes import file_hashes
from utils.records.named import recorded_dataset
from utils.records.network import model_state

__all__ = ["data"]  # a fixture
SCRIPT = ROOT / "interop/backdoorbench.py"
FACTS = {
    "attack": "badnet",
    "model_name": "preactresnet18",
    "dataset_path": None,
    "attack_target": TARGET,
    "attack_label_trans": "all2one",
}


def square(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[:, :, :3, :3] = 255
    return images


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return build_model("preactresnet18", 10, MEAN, STD)


def save_ours(
    folder: Path,
    data: Dataset,
    model: Classifier,
    *,
    kinds: tuple[str, ...] = ("poison",),
    **changes: Any,
) -> folders.RunFolder:
    """A finished record with every file that export takes, and a defense's result."""
    choice = dirty_label(data.train.labels, 0.2, "all2one", TARGET, 10, torch.Generator())
    drawn = torch.arange(len(choice.index)) % len(kinds)
    names = [KINDS.index(kinds[i]) for i in drawn.tolist()]
    labels = torch.where(drawn == 0, choice.labels, data.train.labels[choice.index])
    choice = Choice(choice.index, labels, torch.tensor(names, dtype=torch.uint8))
    cross = None
    if "cross" in kinds:
        cross = Labelled(square(data.test.images, torch.arange(TEST)), data.test.labels)
    run = folders.RunFolder(folder)
    run.start("dataset: cifar10\nlr: 0.01\nflip: true\ndataset_path: null\n")
    save_attack(
        run,
        model,
        data,
        replace_images(data.train, choice, square),
        triggered_test_set(data, square, "all2one", TARGET),
        cross,
        {**FACTS, **changes},
    )
    run.write_metrics([{"epoch": 1, "loss": 0.5, "acc": 0.75, "asr": 1.0, "ra": 0.0, "seconds": 3}])
    run.write_summary({"files": file_hashes(run, "attack_result.pt", "poison.pt")})
    purified = build_model("preactresnet18", 10, data.mean, data.std)
    purified.network.load_state_dict({k: value + 1 for k, value in model_state(model).items()})
    save_result(folder, purified, "sau")
    (folder / "defense/unfinished").mkdir()
    return run


def save_result(record: Path, purified: Classifier, name: str) -> None:
    """A finished result of a defense."""
    folder, attack = places.defense_folder(record, name), load_attack(record)
    folder.start("lr: 0.01\n")
    save_defense(folder, purified, attack, name)
    files = file_hashes(folder, "defense_result.pt")
    folder.write_summary({"attack_sha256": attack.sha256, "files": files})


def rebuilt(state: dict[str, Any], clean: Labelled) -> list[tuple[np.ndarray, int, int, int, int]]:
    """All items of a poisoned set as the format's description makes them, paths as stored."""
    items = []
    for j in state["original_index_array"]:
        if state["poison_indicator"][j] == 0:
            label = int(clean.labels[j])
            items.append((clean.images[j].permute(1, 2, 0).numpy(), label, int(j), 0, label))
            continue
        value = state["bd_data_container"]["data_dict"][j]
        with Image.open(value["path"]) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            pixels = np.asarray(picture)
        label, original = value["other_info"]
        items.append((pixels, label, int(j), 1, original))
    return items


@pytest.mark.parametrize("kinds", [("poison",), ("poison", "cross"), ("poison", "cover")])
def test_export_is_what_their_loader_reads(
    tmp_path: Path,
    data: Dataset,
    model: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[str, ...],
) -> None:
    """Read by hand, by the format's description, from the root that BackdoorBench runs in."""
    ours = save_ours(tmp_path / "ours", data, model, kinds=kinds)
    to = tmp_path / "bdb/record/name"
    export_record(ours.path, to)
    # 2. The data is found beside the first "record" of the path.
    content = torch.load(to / "attack_result.pt", weights_only=False)
    keys = "model_name num_classes model data_path img_size clean_data bd_train bd_test"
    assert set(content) == set(keys.split())
    path = str((to / "attack_result.pt").resolve())
    root, relative = path[: path.index("record")], content["data_path"]
    assert root + relative[relative.index("data") :] == str(tmp_path / "bdb/data/cifar10")
    assert (content["model_name"], content["num_classes"]) == ("preactresnet18", 10)
    assert (content["img_size"], content["clean_data"]) == ((32, 32, 3), "cifar10")
    # 6. Weights by position.
    weights, expected = content["model"], preactresnet18(10).state_dict()
    assert type(weights) is OrderedDict
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[k], v) for k, v in model.network.state_dict().items())
    # 5. Both poisoned sets.
    monkeypatch.chdir(tmp_path / "bdb")
    poison = torch.load(ours.path / "poison.pt", weights_only=True)
    for name, clean, length in (("bd_train", data.train, TRAIN), ("bd_test", data.test, 36)):
        state = content[name]
        assert (state["getitem_all"], state["getitem_all_switch"]) == (True, False)
        assert state["poison_indicator"].dtype == np.float64
        assert len(state["poison_indicator"]) == len(clean)
        assert state["original_index_array"].dtype == np.int64
        container = state["bd_data_container"]
        assert container["save_file_format"] == ".png"
        assert container["save_folder_path"] == state["save_folder_path"]
        assert state["save_folder_path"] == f"./record/name/{name}_dataset"
        for index, value in container["data_dict"].items():
            assert type(index) is int
            assert [type(label) for label in value["other_info"]] == [int, int]
            label = value["other_info"][1]
            assert value["path"] == f"./record/name/{name}_dataset/{label}/{index}.png"
        items = rebuilt(state, clean)
        assert len(items) == length
        assert [item[4] for item in items] == clean.labels[state["original_index_array"]].tolist()
        split = name.removeprefix("bd_")
        replaced = [item for item in items if item[3]]
        assert [item[2] for item in replaced] == poison[f"{split}_index"].tolist()
        images = poison[f"{split}_images"].permute(0, 2, 3, 1).numpy()
        assert all((item[0] == image).all() for item, image in zip(replaced, images, strict=True))
        labels = poison["train_labels" if split == "train" else "test_targets"].tolist()
        assert [item[1] for item in replaced] == labels

    files = "attack_result.pt attack_df.csv info.pickle bd_train_dataset bd_test_dataset defense"
    is_cross = "cross" in kinds
    files += " cross_test_dataset" if is_cross else " train_poison_index_list.pickle"
    assert sorted(path.name for path in to.iterdir()) == sorted(files.split())
    if is_cross:
        assert len(list((to / "cross_test_dataset").glob("*/*.png"))) == TEST
    else:
        listed = torch.load(to / "train_poison_index_list.pickle", weights_only=False)
        assert listed.dtype == np.float64
        is_poison = poison["train_kinds"] == KINDS.index("poison")
        assert np.flatnonzero(listed).tolist() == poison["train_index"][is_poison].tolist()
    arguments = torch.load(to / "info.pickle", weights_only=True)
    assert (arguments["attack"], arguments["lr"], arguments["flip"]) == ("badnet", 0.01, True)
    table = pd.read_csv(to / "attack_df.csv")
    assert list(table.columns[:3]) == ["epoch", "batch", "train_epoch_loss_avg_over_batch"]
    assert table[["epoch", "test_acc", "test_asr", "test_ra"]].values.tolist() == [[1, 0.75, 1, 0]]
    # 7. Defenses: finished ones, three keys.
    assert [path.name for path in (to / "defense").iterdir()] == ["sau"]
    result = torch.load(to / "defense/sau/defense_result.pt", weights_only=True)
    assert set(result) == {"model_name", "num_classes", "model"}
    assert torch.equal(result["model"]["linear.bias"], weights["linear.bias"] + 1)


@pytest.mark.parametrize("kinds", [("poison",), ("poison", "cross"), ("poison", "cover")])
def test_import_gives_an_export_back(
    tmp_path: Path, data: Dataset, model: Classifier, kinds: tuple[str, ...]
) -> None:
    """Bit for bit: weights, indices, labels, pixels, kinds; and the facts."""
    ours = save_ours(tmp_path / "ours", data, model, kinds=kinds)
    export_record(ours.path, tmp_path / "record/name")
    back = import_record(tmp_path / "record/name", "back", record_path=tmp_path)
    assert back.path == tmp_path / "back"
    for name in ("attack_result.pt", "poison.pt"):
        first, second = (
            torch.load(folder / name, weights_only=True) for folder in (ours.path, back.path)
        )
        assert list(first) == list(second)
        for key, value in first.items():
            if key == "train_kinds":  # poison of the target class looks like a cross sample
                same = value == second[key]
                is_target = data.train.labels[first["train_index"]] == TARGET
                assert (same | is_target).all()
            elif key == "model":
                assert list(value) == list(second[key])
                assert all(torch.equal(value[k], second[key][k]) for k in value)
            elif isinstance(value, torch.Tensor):
                assert value.dtype == second[key].dtype
                assert torch.equal(value, second[key])
            else:
                assert value == second[key]
    summary = json.loads((back.path / "summary.json").read_text())
    assert summary["imported_from"] == "BackdoorBench"
    check_keys(summary, "import")
    loaded = load_attack(back.path)
    loaded.load_dataset()
    assert recorded_dataset(back.path) == "cifar10"


@pytest.mark.parametrize("make", [badnet, wanet, lambda data: badnet(data, train=None)])
def test_a_record_of_theirs_is_imported(tmp_path: Path, data: Dataset, make: Any) -> None:
    """What a defense sees of it is the same, before and after; exported it is theirs again."""
    folder = writer.write(tmp_path / "theirs", make(data))
    import_record(folder, "ours", record_path=tmp_path)
    first, second = (load_attack(tmp_path / name) for name in ("theirs", "ours"))
    for name in ("attack", "model_name", "dataset", "attack_target", "attack_label_trans"):
        assert getattr(first, name) == getattr(second, name)
    assert first.triggered is not None
    assert second.triggered is not None
    for name in ("images", "targets", "labels", "index"):
        assert torch.equal(getattr(first.triggered, name), getattr(second.triggered, name))
    sets = [attack.poisoned_set(data) for attack in (first, second)]
    for name in ("index", "images", "labels", "kinds"):
        assert torch.equal(getattr(sets[0], name), getattr(sets[1], name))
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)


def test_a_record_without_poisoned_training_images_is_exported_without(
    tmp_path: Path, data: Dataset, model: Classifier
) -> None:
    source = badnet(data, train=None, model=model.network.state_dict())
    source.model_name = "preactresnet18"
    folder = writer.write(tmp_path / "theirs", source)
    export_record(folder, tmp_path / "record/again")
    content = torch.load(tmp_path / "record/again/attack_result.pt", weights_only=False)
    assert content["bd_train"] is None
    assert not (tmp_path / "record/again/train_poison_index_list.pickle").exists()
    assert load_attack(tmp_path / "record/again").poison_index is None


def test_a_transformer_that_does_not_resize_is_not_exported(tmp_path: Path, data: Dataset) -> None:
    attack = load_attack(writer.write(tmp_path / "r", badnet(data)))
    vit = dataclasses.replace(attack, model_name="vit_b_16", network_size=224)
    _refuse_unknown(vit)
    with pytest.raises(UserError, match="resizes them to 224; train it with --pretrained"):
        _refuse_unknown(dataclasses.replace(vit, network_size=None))
    with pytest.raises(UserError, match="takes them as they are; train it without --pretrained"):
        _refuse_unknown(dataclasses.replace(vit, model_name="resnet18"))


def test_what_backdoorbench_cannot_read_is_not_exported(
    tmp_path: Path, data: Dataset, model: Classifier
) -> None:
    to = tmp_path / "record/out"
    digits = dataclasses.replace(data, name="digits")
    other = dataclasses.replace(data, mean=(0.1, 0.2, 0.3))
    for name, source, changes, reason in (
        (
            "a",
            digits,
            {},
            "BackdoorBench has no dataset digits, so it could not read this; give a "
            "record with one of cifar10, cifar100, gtsrb, tiny",
        ),
        ("b", data, {"model_name": "my_net.py:build"}, "has no network my_net.py:build"),
        ("c", other, {}, "its network normalizes with (0.1, 0.2, 0.3)"),
    ):
        ours = save_ours(tmp_path / name, source, model, **changes)
        with pytest.raises(UserError) as caught:
            export_record(ours.path, to)
        assert reason in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert not to.exists()
    clean = folders.RunFolder(tmp_path / "clean")
    clean.start("dataset: cifar10\n")
    save_attack(clean, model, data, unpoisoned(data.train), None, None, FACTS)
    clean.write_summary({"files": file_hashes(clean, "attack_result.pt")})
    with pytest.raises(UserError, match="has no triggered images"):
        export_record(clean.path, to)


@pytest.mark.parametrize(
    ("change", "is_hashed", "reason"),
    [
        ({"model": {}}, False, "is not the file that summary.json describes"),
        ({"model": {}}, True, "its weights do not fit preactresnet18"),
        ({"model": {"a": torch.tensor(torch.nan)}}, True, "the weights a are not finite"),
        ({"model": 3}, True, "is not a defense's result of this program"),
        ({}, True, "is of another attack than the record that is there; run the defense again"),
    ],
)
def test_a_defense_s_result_that_does_not_fit_is_not_exported(
    tmp_path: Path,
    data: Dataset,
    model: Classifier,
    change: dict[str, Any],
    is_hashed: bool,
    reason: str,
) -> None:
    ours = save_ours(tmp_path / "ours", data, model)
    folder = ours.path / "defense/sau"
    path = folder / "defense_result.pt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    summary = read_object(folder / "summary.json")
    if is_hashed:
        summary["files"][path.name] = file_sha256(path)
    if not change:
        summary["attack_sha256"] = "0" * 64
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError) as caught:
        export_record(ours.path, tmp_path / "record/name")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f", or move {folder} away")
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "record").iterdir()) == []


def test_a_defense_that_has_changed_the_network_is_not_exported(
    tmp_path: Path, data: Dataset, model: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    ours = save_ours(tmp_path / "ours", data, model)
    purified = build_model("preactresnet18", 10, data.mean, data.std)
    insert(purified.network, "polarizer", "layer4", 256)
    save_result(ours.path, purified, "npd")
    export_record(ours.path, tmp_path / "record/name")
    assert [path.name for path in (tmp_path / "record/name/defense").iterdir()] == ["sau"]
    assert "npd: the defense has changed the network" in caplog.text


def run(*flags: object) -> int:
    return run_script(SCRIPT, *flags)


@pytest.mark.slow
def test_the_command_line_converts_both_ways(
    tmp_path: Path, data: Dataset, model: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ours(tmp_path / "ours", data, model)
    where = ["--record_path", tmp_path]
    to = tmp_path / "record" / "theirs"
    assert run("export", "--result_file", "ours", *where, "--to", to) == 0
    assert f"record: {to}" in capsys.readouterr().err
    assert run("import", to, *where, "--save_folder_name", "back") == 0
    assert (tmp_path / "back/summary.json").exists()
    assert run("import", to, *where, "--save_folder_name", "back") == 2
    assert "--overwrite" in capsys.readouterr().err
    again = ["import", to, *where, "--save_folder_name", "back", "--overwrite"]
    assert run(*again) == 0
    assert run("export", "--result_file", "ours", *where, "--to", tmp_path / "elsewhere") == 0
    assert "warning: BackdoorBench finds its data beside" in capsys.readouterr().err


def test_an_import_names_the_results_that_it_leaves_out(
    tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = writer.write(tmp_path / "theirs", badnet(data))
    flags = ["import", theirs, "--record_path", tmp_path, "--save_folder_name"]
    assert run(*flags, "without") == 0
    assert "left out" not in capsys.readouterr().err
    for name in ("nad", "ft"):
        (theirs / "defense" / name).mkdir(parents=True)
        (theirs / "defense" / name / "defense_result.pt").touch()
    assert run(*flags, "with") == 0
    assert (
        capsys.readouterr().err.count(
            f"warning: {theirs}: results of defenses are left out (ft, nad); run our defenses with "
            "--result_file with\n"
        )
        == 1
    )
    assert not (tmp_path / "with/defense").exists()


def test_an_import_that_was_killed_after_its_last_file_is_finished(
    tmp_path: Path,
    data: Dataset,
    model: Classifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lock that it left tells it from one that has ended, which needs --overwrite."""
    theirs = writer.write(tmp_path / "theirs", badnet(data))
    flags = ["import", theirs, "--record_path", tmp_path, "--save_folder_name", "x"]
    assert run(*flags) == 0
    places.attack_folder("x", tmp_path).release()  # as at the end of the process
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))
    assert run(*flags[:-1], "y", f"--dataset_path=~/{tmp_path.name}") == 0
    import_record(theirs, "z", f"~/{tmp_path.name}", tmp_path)
    for name in ("y", "z"):
        assert read_object(tmp_path / name / "summary.json")["dataset_path"] == str(tmp_path)
    for other, code in (([], 0), (["--dataset_path", tmp_path], 2)):
        (tmp_path / ".x.lock").touch()
        capsys.readouterr()
        assert run(*flags, *other) == code
        said = ("is finished; nothing is left to do", "x exists; give --overwrite")[code // 2]
        assert said in capsys.readouterr().err
        assert not (tmp_path / ".x.lock").exists()
    assert run(*flags) == 2


EXPORT = """
import sys
from interop import backdoorbench
from utils.process.script import run_script
print("ready", flush=True)
sys.stdin.readline()
run_script(backdoorbench.main)
"""


@pytest.mark.slow
def test_of_three_exports_at_once_one_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are told in one line each; and what a killed one was writing is removed."""
    monkeypatch.setenv("SAU_DATA", str(tmp_path / "data"))
    fuzz.write_traffic_signs(tmp_path / "data")
    fuzz.write_record(tmp_path / "ours", fuzz.KNOWN_DATASET, fuzz.KNOWN_MODEL)
    killed = tmp_path / "record/.y[1].0123abcd.tmp"
    (killed / "bd_test_dataset").mkdir(parents=True)
    (tmp_path / "record/y").mkdir()
    (tmp_path / "record/y/chapter1.tex").write_text("years of work")
    flags = ["export", "--result_file", tmp_path / "ours", "--to", tmp_path / "record/y[1]"]
    call = [sys.executable, "-c", EXPORT, *flags]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(call, cwd=ROOT, env=env, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    messages = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2]
    for process, text in zip(processes, messages, strict=True):
        if process.returncode:
            of_data = f"warning: --dataset {fuzz.KNOWN_DATASET}: "  # which is a small part of it
            lines = [line for line in text.splitlines() if not line.startswith(of_data)]
            assert lines == [f"error: --to: {tmp_path / 'record/y[1]'} exists; give a new folder"]
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"y", "y[1]"}
    assert len(load_attack(tmp_path / "record/y[1]").state) > 5


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, data: Dataset, model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder stays empty; one into which somebody writes meanwhile stays as it is."""
    ours = save_ours(tmp_path / "ours", data, model).path
    to = tmp_path / "record/y"
    to.mkdir(parents=True)

    def write(*_: object) -> None:
        (to / "chapter1.tex").write_text("years of work")

    def fail(*_: object) -> None:
        raise UserError("a reason")

    for function, message, left in ((fail, "a reason", []), (write, "exists", [to])):
        monkeypatch.setattr("interop.backdoorbench._write_notes", function)
        with pytest.raises(UserError, match=message):
            export_record(ours, to)
        assert list(to.parent.iterdir()) == [to]
        assert [path.parent for path in to.iterdir()] == left
    assert (to / "chapter1.tex").read_text() == "years of work"


def test_a_wrong_command_line_gets_one_line(
    tmp_path: Path, data: Dataset, model: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = save_ours(tmp_path / "ours", data, model).path
    theirs = writer.write(tmp_path / "theirs", badnet(data))
    (tmp_path / "file").write_text("")
    import_ = ["import", "--record_path", tmp_path]
    export = ["export", "--record_path", tmp_path]
    for flags, message in (
        ([], "the following arguments are required: command; --help lists"),
        (["send"], "invalid choice: 'send'"),
        (["export"], "are required: --result_file, --to"),
        ([*export, "--result_file", "nothing", "--to", "x"], "nothing is no record in"),
        ([*export, "--result_file", ours, "--to", theirs], "theirs exists; give a new folder"),
        ([*export, "--result_file", ours, "--to", tmp_path / "file"], "file exists; give a new"),
        ([*export, "--result_file", ours, "--to", tmp_path / "file/x"], "cannot be made"),
        ([*import_, ours, "--save_folder_name", "x"], "is no record of Backdoor"),
        ([*import_, "nowhere", "--save_folder_name", "x"], "DIR: nowhere is no folder"),
        ([*import_, theirs, "--save_folder_name", "../x"], "is not a name"),
        ([*import_, theirs], "are required: --save_folder_name"),
        ([*import_, theirs, "--save_folder", "x"], "--save_folder_name"),
    ):
        assert run(*flags) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        assert message in error


def test_help_tells_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "import" in text
    assert "export" in text


def test_the_commands_of_the_readme_run(tmp_path: Path, data: Dataset, model: Classifier) -> None:
    """In their order, with both checkouts in a temporary folder."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page[page.index("## BackdoorBench records") :], flags=re.M)[1]
    commands = re.findall(r"^python (.*)$", section, flags=re.M)
    assert len(commands) == 3
    writer.write(tmp_path / "BackdoorBench/record/badnet_0_1", badnet(data))
    save_ours(tmp_path / "ours/cifar10_badnet", data, model)
    for command in commands:
        script, *flags = shlex.split(command.replace("../", f"{tmp_path}/"), comments=True)
        flags += ["--record_path", str(tmp_path / "ours")]
        if script.startswith("defense"):
            flags += ["--n_rounds", "1", "--ratio", "0.5", "--precision", "fp32"]
        assert run_script(ROOT / script, *flags) == 0, command
    assert (tmp_path / "BackdoorBench/record/badnet_0_1/defense/sau/summary.json").exists()
    assert (tmp_path / "ours/badnet_0_1/summary.json").exists()
    assert (tmp_path / "BackdoorBench/record/cifar10_badnet/attack_result.pt").exists()
