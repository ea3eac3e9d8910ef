"""Records of models trained elsewhere, and of networks from a user's own file."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.scripts import attack_flags, defense_flags, one_error, run_script
from tests.summary_keys import check_keys
from utils.data.datasets import load_dataset
from utils.data.labelled import Triggered
from utils.files import ROOT
from utils.records.attack import load_attack

pytestmark = pytest.mark.usefixtures("cache")

OWN = """
from torch import nn


def build(num_classes, image_size):
    open({touched!r}, "a").write("run ")
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4 * (image_size - 2) ** 2, num_classes),
    )
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with `build`, which leaves a word in touched.txt whenever it is called."""
    path = tmp_path / "my_net.py"
    path.write_text(OWN.format(touched=str(tmp_path / "touched.txt")), encoding="utf-8")
    return path


def network() -> nn.Module:
    """What `build` makes, with numbers of its own."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14**2, 3)
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(network().state_dict(), path)
    return path


def flags(workplace: Path, own: Path, state: Path, name: str, **changes: object) -> list[object]:
    values: dict[str, object] = {
        "save_folder_name": name,
        "record_path": workplace / "record",
        "dataset": "folder",
        "dataset_path": workplace / "images",
        "image_size": 16,
        "model": f"{own}:build",
        "state_dict": state,
        "precision": "fp32",
    }
    values |= changes
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def run(*args: object) -> int:
    return run_script(ROOT / "interop/state_dict.py", *args)


def triggered_images(workplace: Path, folder: Path) -> Path:
    """Every test image with a white corner, under its class and position."""
    data = load_dataset("folder", workplace / "images", 16)
    for position, (image, label) in enumerate(
        zip(data.test.images, data.test.labels.tolist(), strict=True)
    ):
        pixels = image.permute(1, 2, 0).numpy().copy()
        pixels[-2:, -2:] = 255
        path = folder / data.classes[label] / f"{position:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def wrapped(path: Path, state: dict[str, torch.Tensor], way: str) -> Path:
    """The state as other programs save it."""
    if way == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif way == "module":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif way == "half":
        torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    else:
        torch.save({way: state, "epoch": 3, "best": np.float64(0.5)}, path)
    return path


@pytest.mark.parametrize("way", ["state_dict", "model", "net", "module", "safetensors", "half"])
def test_checkpoints_are_read_as_they_come(
    workplace: Path, own: Path, tmp_path: Path, way: str
) -> None:
    expected = network().state_dict()
    path = wrapped(tmp_path / "other.pth", expected, way)
    assert run(*flags(workplace, own, path, f"way_{way}")) == 0
    record = load_attack(workplace / "record" / f"way_{way}")
    assert list(record.state) == list(expected)
    tolerance = 1e-3 if way == "half" else 0
    for key, value in expected.items():
        torch.testing.assert_close(record.state[key], value, rtol=tolerance, atol=tolerance)


def test_without_triggered_images_there_is_no_asr_and_defenses_say_so(
    workplace: Path, own: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags(workplace, own, state, "bare", mean="0.5,0.4,0.3", std="0.2,0.2,0.1")) == 0
    assert "no triggered images, so no ASR" in capsys.readouterr().err
    folder = workplace / "record/bare"
    record = load_attack(folder)
    assert (record.attack, record.attack_target, record.triggered) == ("external", None, None)
    assert (record.mean, record.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert record.model_name == "my_net.py:build"
    summary = json.loads((folder / "summary.json").read_text())
    check_keys(summary, "state_dict")
    data = load_dataset("folder", workplace / "images", 16)
    model = record.build(f"{own}:build")
    expected = (model(data.test.images.float() / 255).argmax(1) == data.test.labels).sum()
    assert (summary["acc_hits"], summary["acc_total"]) == (int(expected), 18)
    assert "asr" not in summary

    purify = [*defense_flags(workplace, "bare"), "--model", f"{own}:build"]
    assert run_script(ROOT / "defense/sau.py", *purify) == 0
    assert "ACC alone is reported" in capsys.readouterr().err
    after = json.loads((folder / "defense/sau/summary.json").read_text())
    assert after["der"] is None
    assert "asr" not in after["before"]


def test_triggered_images_give_asr(workplace: Path, own: Path, state: Path, tmp_path: Path) -> None:
    """The target's six test images are skipped; pixels and labels are those of the folder."""
    folder = triggered_images(workplace, tmp_path / "bd")
    changes: dict[str, object] = {"bd_test_dir": folder, "attack_target": 1}
    assert run(*flags(workplace, own, state, "triggered", **changes)) == 0
    record = load_attack(workplace / "record/triggered")
    data = load_dataset("folder", workplace / "images", 16)
    assert record.triggered is not None
    assert len(record.triggered.index) == 12
    assert 1 not in record.triggered.labels
    assert record.triggered.targets.tolist() == [1] * 12
    expected = data.test.images[record.triggered.index].clone()
    expected[:, :, -2:, -2:] = 255
    assert torch.equal(record.triggered.images, expected)
    purify = [*defense_flags(workplace, "triggered"), "--model", f"{own}:build"]
    assert run_script(ROOT / "defense/ft.py", *purify) == 0
    after = json.loads((workplace / "record/triggered/defense/ft/summary.json").read_text())
    assert after["before"]["asr_total"] == 12
    assert 0 <= after["der"] <= 1
    assert (workplace / "record/triggered/trigger.png").exists()


def test_a_checkpoint_of_the_record_that_is_replaced_has_its_hash(
    workplace: Path, own: Path, state: Path
) -> None:
    """As when a record is made anew from its own weights, with another --mean."""
    assert run(*flags(workplace, own, state, "again")) == 0
    folder = workplace / "record/again"
    weights = folder / "attack_result.pt"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    mean = {"mean": "0.5,0.4,0.3", "std": "0.2,0.2,0.1"}
    assert run(*flags(workplace, own, weights, "again", **mean), "--overwrite") == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["inputs"]["--state_dict"] == sha256
    assert hashlib.sha256(weights.read_bytes()).hexdigest() != sha256


def test_what_is_skipped_beside_triggered_images_is_told(
    workplace: Path, own: Path, state: Path, tmp_path: Path
) -> None:
    """Other endings, files of no class, deeper folders, the target class; no word of hidden."""
    folder = triggered_images(workplace, tmp_path / "bd")
    expected = load_triggered(workplace, own, state, folder, "plain")
    shutil.copytree(folder / "dark", folder / ".ipynb_checkpoints")
    shutil.copytree(folder / "dark", folder / "dark/deeper")
    shutil.copytree(folder / "dark", folder / "dark/.hidden")
    shutil.copytree(folder / "dark", folder / "bright/.hidden")
    (folder / ".5.png").write_bytes(b"a note")
    (folder / "dark/.5.png").write_bytes(b"a note")
    (folder / "5.png").write_bytes(b"a picture of no class")
    (folder / "notes.txt").write_text("no class")
    (folder / "dark/notes.txt").write_text("no picture")
    found = load_triggered(workplace, own, state, folder, "crowded")
    assert torch.equal(found.index, expected.index)
    warnings = json.loads((workplace / "record/crowded/summary.json").read_text())["warnings"]
    assert [w for w in warnings if w.startswith("--bd_test_dir: 4 files or folders are skipped")]
    assert (
        "--bd_test_dir: 6 images of the target class are skipped; ASR counts images of other "
        "classes"
    ) in warnings
    plain = json.loads((workplace / "record/plain/summary.json").read_text())["warnings"]
    assert not [w for w in plain if "files or folders" in w]


def load_triggered(workplace: Path, own: Path, state: Path, folder: Path, name: str) -> Triggered:
    """The triggered images of an import."""
    changes: dict[str, object] = {"bd_test_dir": folder, "attack_target": 1}
    assert run(*flags(workplace, own, state, name, **changes)) == 0
    triggered = load_attack(workplace / "record" / name).triggered
    assert triggered is not None
    return triggered


def test_all_to_all_keeps_every_image(
    workplace: Path, own: Path, state: Path, tmp_path: Path
) -> None:
    folder = triggered_images(workplace, tmp_path / "bd")
    changes: dict[str, object] = {"bd_test_dir": folder, "attack_label_trans": "all2all"}
    assert run(*flags(workplace, own, state, "all", **changes)) == 0
    triggered = load_attack(workplace / "record/all").triggered
    assert triggered is not None
    assert torch.equal(triggered.targets, (triggered.labels + 1) % 3)
    assert len(triggered.labels) == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": "nowhere.pt"}, "--state_dict: nowhere.pt cannot be read"),
        (
            {"model": "resnet18"},
            "--model resnet18: conv1.weight is missing; .*0.weight is not in",
        ),
        ({"image_size": 12}, r"3.weight is \(3, 784\) instead of \(3, 400\)"),
        ({"mean": "0.5"}, "--mean: has 1 numbers; give three"),
        ({"std": "0,1,1"}, r"--std: 0,1,1 .* give a list of float in \[0.001, 10\], separated"),
        ({"std": "1e-30,1,1"}, "--std: 1e-30,1,1 is not allowed"),
        ({"std": "58,57,57"}, "--std: 58,57,57 is not allowed"),  # of pixels from 0 to 255
        ({"mean": "124,116,104"}, r"--mean: 124,116,104 .* give a list of float in \[0, 1\], sep"),
        ({"mean": "1e400,0,0"}, r"--mean: 1e400,0,0 is not allowed; give finite numbers: a list"),
        ({"mean": "-0.1,0,0"}, r"--mean: -0.1,0,0 is not allowed; give a list of float in \[0, 1"),
        ({"attack_target": 3}, "--attack_target: 3 is no class of folder; give 0 to 2"),
        ({"bd_test_dir": "nowhere"}, "--attack_target: a value is needed with --bd_test_dir"),
        ({"bd_test_dir": "nowhere", "attack_target": 0}, "--bd_test_dir: nowhere is not a folder"),
        ({"save_folder_name": "../x"}, "--save_folder_name"),
    ],
)
def test_what_does_not_fit_gets_one_line(
    workplace: Path,
    own: Path,
    state: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
) -> None:
    assert run(*flags(workplace, own, state, "wrong", **changes)) == 2
    assert re.search(message, one_error(capsys))
    assert not (workplace / "record/wrong").exists()


def test_a_pickled_model_is_not_loaded(
    workplace: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network(), tmp_path / "whole.pt")
    assert run(*flags(workplace, own, tmp_path / "whole.pt", "whole")) == 2
    error = one_error(capsys)
    assert "which is no plain data and is not read" in error
    assert "torch.save(model.state_dict(), path)" in error


def test_values_that_are_too_large_for_the_network_are_told(
    workplace: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of float64 may hold what no float32 can; nothing is written."""
    state = {name: value.double() for name, value in network().state_dict().items()}
    largest = max(state, key=lambda name: state[name].numel())
    state[largest] += 1e300
    path = wrapped(tmp_path / "other.pth", state, "state_dict")
    assert run(*flags(workplace, own, path, "too_large")) == 2
    assert f"too large for the network: {largest}; give another file" in one_error(capsys)
    assert not (workplace / "record/too_large/summary.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"holds no state dict \(epoch, lr is no tensor\)"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "not finite: weight"),
        ({"w": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "not finite: w"),
        ({"w": torch.empty(1, dtype=torch.bits8)}, "w is of torch.bits8, which is not read"),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, "both with and without 'module.'"),
        ({}, r"holds no state dict \(it is empty\)"),
        ([1, 2], "holds no dictionary"),
    ],
)
def test_a_file_of_something_else_is_told(
    workplace: Path,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: object,
    message: str,
) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert run(*flags(workplace, own, tmp_path / "other.pt", "other")) == 2
    assert re.search(message, one_error(capsys))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bright/99.png", "is not named after a test image; name it 0 to 17"),
        ("bright/cat.png", "is not named after a test image"),
        ("dark/0.png", "stands in class dark, but test image 0 is of class bright"),
        ("bright/0.jpg", "are the same test image"),
    ],
)
def test_a_triggered_image_in_the_wrong_place_is_named(
    workplace: Path,
    own: Path,
    state: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    message: str,
) -> None:
    folder = triggered_images(workplace, tmp_path / "bd")
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(folder / path)
    changes: dict[str, object] = {"bd_test_dir": folder, "attack_target": 1}
    assert run(*flags(workplace, own, state, "place", **changes)) == 2
    assert message in one_error(capsys)


# --- a network from the user's own file ----------------------------------------------------------


@pytest.mark.slow
def test_a_record_never_runs_the_file_that_it_names(
    workplace: Path,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where the file lies in the working directory; its user names it, and it is the same."""
    attack = attack_flags(workplace, "own", model=f"{own}:build", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *attack) == 0
    result = torch.load(workplace / "record/own/attack_result.pt", weights_only=True)
    assert result["model_name"] == "my_net.py:build"
    assert len(result["model_sha256"]) == 64
    touched = tmp_path / "touched.txt"
    touched.unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    for given, message in (
        (None, "which is run only if you name it; give --model and its path"),
        ("resnet18", "--model: resnet18, but the record says my_net.py:build; give that file"),
        (f"{own}:other", "but the record says my_net.py:build"),
    ):
        extra = [] if given is None else ["--model", given]
        assert run_script(ROOT / "defense/sau.py", *defense_flags(workplace, "own"), *extra) == 2
        assert message in one_error(capsys)
    assert not touched.exists()

    extra = ["--model", f"{own}:build"]
    assert run_script(ROOT / "defense/sau.py", *defense_flags(workplace, "own"), *extra) == 0
    touched.unlink()
    own.write_text(own.read_text() + "\n# changed\n")
    capsys.readouterr()
    again = [*defense_flags(workplace, "own"), *extra, "--overwrite"]
    assert run_script(ROOT / "defense/sau.py", *again) == 2
    assert "is not the file that the record was made with" in one_error(capsys)
    assert not touched.exists()


@pytest.mark.slow
def test_a_pretrained_network_that_resizes_is_rebuilt_from_its_record(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pixels stand for 224, and no weights for torchvision's."""
    monkeypatch.setattr("attack.recipe.pretrained_size", lambda name, image_size: 24)
    monkeypatch.setattr("attack.recipe.load_pretrained", lambda network, name: "none")
    flags = [*attack_flags(workplace, "resized", model="resnet18", epochs=1), "--pretrained"]
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    record = load_attack(workplace / "record/resized")
    assert record.network_size == 24
    assert all(key.startswith("1.") for key in record.state)
    assert run_script(ROOT / "defense/ft.py", *defense_flags(workplace, "resized")) == 0
    result = workplace / "record/resized/defense/ft/defense_result.pt"
    assert torch.load(result, weights_only=True)["network_size"] == 24


def test_pretrained_needs_weights(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*attack_flags(workplace, "pre"), "--pretrained"]
    assert run_script(ROOT / "attack/badnet.py", *flags) == 2
    assert "torchvision has no trained weights of preactresnet18" in one_error(capsys)
