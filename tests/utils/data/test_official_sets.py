"""The scripts on every public dataset, by way of its own loader, and to BackdoorBench and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attack.recipe import TrainingConfig
from defense.sau import Config
from models.tiny import TinyNet
from tests import backdoorbench_writer as writer
from tests.conftest import make_small
from tests.miniatures import official, official_tiny
from tests.scripts import run_script
from utils.data.datasets import load_dataset
from utils.files import ROOT
from utils.plain import read_yaml
from utils.records.attack import load_attack

# Of the full recipe: epochs, rounds of SAU, side, flip.
RECIPES = {
    "cifar10": (100, 100, 32, True),
    "cifar100": (100, 100, 32, False),
    "gtsrb": (50, 100, 32, False),
    "tiny": (200, 20, 64, False),
}


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr("utils.data.images.ROOT", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_script_on_every_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An attack, SAU, the export, SAU on that, and the import, which is the record again."""
    folder = official(name, tmp_path / "downloads", monkeypatch)
    common = ["--record_path", tmp_path / "record", "--dataset_path", folder]
    train = ["--dataset", name, "--save_folder_name", "ours", "--batch_size", 2]
    train += ["--pratio", 0.5, "--precision", "fp32"]
    assert run_script(ROOT / "attack/badnet.py", *common, *train, "--epochs", 1) == 0
    defend = ["--ratio", 0.5, "--precision", "fp32", "--n_rounds", 1]
    sau = ROOT / "defense/sau.py"
    assert run_script(sau, *common, *defend, "--result_file", "ours") == 0

    config = read_yaml(tmp_path / "record/ours/config.yaml")
    assert (config["image_size"], config["flip"]) == RECIPES[name][2:]

    convert = ROOT / "interop/backdoorbench.py"
    theirs = tmp_path / "bdb/record/theirs"
    assert run_script(convert, "export", "--result_file", "ours", *common, "--to", theirs) == 0
    again = ["--result_file", theirs, "--save_folder_name", "again", "--dataset_path", folder]
    assert run_script(sau, *defend, *again) == 0
    back = ["--save_folder_name", "back", *common]
    assert run_script(convert, "import", theirs, *back) == 0
    first, second = (
        torch.load(tmp_path / "record" / run / "poison.pt", weights_only=True)
        for run in ("ours", "back")
    )
    for key, value in first.items():
        assert value == second[key] if isinstance(value, list) else value.equal(second[key]), key
    summaries = [
        json.loads((path / "summary.json").read_text())
        for path in (tmp_path / "record/ours/defense/sau", theirs / "defense/again")
    ]
    assert summaries[0]["after"] == summaries[1]["after"]
    is_part = name in ("gtsrb", "tiny")  # the checksums of the others are those of whole sets
    for summary in summaries:
        assert any("the official set has" in text for text in summary["warnings"]) == is_part


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_those_of_the_literature(name: str) -> None:
    training, sau = TrainingConfig.load(name), Config.load(name)
    found = (training.epochs, sau.n_rounds, training.image_size, training.flip)
    assert found == RECIPES[name]


@pytest.mark.parametrize("layout", ["official", "sorted"])
def test_a_record_of_tiny_has_backdoorbenchs_order(tmp_path: Path, layout: str) -> None:
    """BackdoorBench sorts the validation images into a folder per class, and numbers them by class,
    then by name as text; written here from those files, without a loader of ours."""
    home = official_tiny(tmp_path, layout="sorted") / "tiny-imagenet-200"
    splits = []
    for files in (sorted(home.glob("train/*/images/*")), sorted(home.glob("val/*/*.JPEG"))):
        labels = [int(file.relative_to(home).parts[1][1:]) for file in files]
        pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        splits.append({i: (p, 5, y) for i, (p, y) in enumerate(zip(pixels, labels, strict=True))})
    assert [label for _, _, label in splits[1].values()] == [0, 7, 7]
    written = writer.Record(
        model=TinyNet(200).state_dict(),
        train=writer.Rows(200, splits[0], True, "bd_train_dataset"),
        test=writer.Rows(3, splits[1], False, "bd_test_dataset"),
        model_name="preactresnet18",
        num_classes=200,
        dataset="tiny",
        size=64,
    )
    attack = load_attack(writer.write(tmp_path / "theirs", written))
    folder = official_tiny(tmp_path / "again", layout=layout)
    data = attack.load_dataset(str(folder))
    assert attack.triggered is not None
    clean = data.test.at(attack.triggered.index)
    assert torch.equal(attack.triggered.images, clean.images)
    assert torch.equal(attack.triggered.labels, clean.labels)
    assert data.fingerprint() == load_dataset("tiny", tmp_path, 64).fingerprint()
