"""Pickles that would make a folder when run, in every place from which a run reads tensors."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.tiny import TinyNet
from tests.conftest import make_small
from tests.scripts import attack_flags, defense_flags, one_error, run_script, trained
from utils.errors import UserError
from utils.files import ROOT
from utils.records.folders import RunFolder
from utils.records.hashes import file_hashes
from utils.tensors import load_tensors

pytestmark = pytest.mark.usefixtures("small", "cache")


class Trap:
    """Reading it as a pickle makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plain(path: Path, trap: Trap) -> None:
    """A pickle and nothing else."""
    path.write_bytes(pickle.dumps(trap))


def whole(path: Path, trap: Trap) -> None:
    """In an archive of torch.save."""
    torch.save(trap, path)


def nested(path: Path, trap: Trap) -> None:
    """Deep inside of what is there: in the place of the last value of the last dictionary."""
    content = load_tensors(path)
    inner: dict[str, Any] = content
    while dictionaries := [value for value in inner.values() if isinstance(value, dict) and value]:
        inner = dictionaries[0]
    inner[list(inner)[-1]] = trap
    torch.save(content, path)


WAYS = [plain, whole, nested]


@pytest.fixture(scope="module")
def badnet(workplace: Path) -> Path:
    """A good record."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return trained(workplace, "good", patch)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path / "executed")


def assert_refused(
    capsys: pytest.CaptureFixture[str], trap: Trap, path: Path, script: str, *flags: object
) -> None:
    """The script says in one line that it does not read the file, which is a working trap."""
    capsys.readouterr()
    assert run_script(ROOT / script, *flags) == 2
    error = one_error(capsys)
    assert str(path) in error
    assert "no plain data and is not read" in error or "no archive of torch" in error
    assert not trap.mark.exists()
    with contextlib.suppress(RuntimeError):  # a plain pickle is sprung before torch complains
        torch.load(path, weights_only=False)
    assert trap.mark.exists()


def vouch(folder: Path) -> None:
    """Makes the summary say that the files are as they are, as a careful attacker would."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["files"] = file_hashes(RunFolder(folder), "attack_result.pt", "poison.pt")
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
def test_a_record(
    workplace: Path,
    badnet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trap: Trap,
    name: str,
    way: Callable[[Path, Trap], None],
) -> None:
    folder = shutil.copytree(badnet, tmp_path / "record")
    way(folder / name, trap)
    vouch(folder)
    flags = defense_flags(workplace, str(folder))
    assert_refused(capsys, trap, folder / name, "defense/sau.py", *flags)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_checkpoint_of_the_user_s(
    workplace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trap: Trap,
    suffix: str,
    way: Callable[[Path, Trap], None],
) -> None:
    path = tmp_path / f"theirs{suffix}"
    torch.save({"state_dict": TinyNet(3).state_dict(), "epoch": 3}, path)
    way(path, trap)
    flags = ["--save_folder_name", "theirs", "--record_path", workplace / "record"]
    flags += ["--dataset", "folder", "--dataset_path", workplace / "images", "--image_size", 16]
    assert_refused(capsys, trap, path, "interop/state_dict.py", *flags, "--state_dict", path)
    assert not (workplace / "record/theirs").exists()


def test_a_pickle_that_calls_itself_safetensors(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trap: Trap
) -> None:
    path = tmp_path / "theirs.safetensors"
    plain(path, trap)
    flags = ["--save_folder_name", "theirs", "--record_path", workplace / "record"]
    flags += ["--dataset", "folder", "--dataset_path", workplace / "images", "--image_size", 16]
    assert run_script(ROOT / "interop/state_dict.py", *flags, "--state_dict", path) == 2
    assert f"--state_dict: {path} cannot be read as plain tensors" in capsys.readouterr().err
    assert not trap.mark.exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", ["attack/badnet.py", "defense/sau.py"])
def test_the_checkpoint_of_an_interrupted_run(
    workplace: Path,
    badnet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trap: Trap,
    script: str,
    way: Callable[[Path, Trap], None],
) -> None:
    """And it stays, as all of the run, for whoever wants to look."""
    name = f"stopped_{way.__name__}"
    if script == "defense/sau.py":
        flags = attack_flags(workplace, name, overwrite="true", epochs=1)
        assert run_script(ROOT / "attack/badnet.py", *flags) == 0
        flags, folder = defense_flags(workplace, name), workplace / "record" / name / "defense/sau"
    else:
        flags, folder = attack_flags(workplace, name), workplace / "record" / name

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("utils.training.watch.Watch._after_round", stop)
        assert run_script(ROOT / script, *flags, "--checkpoint_every", 0) == 130
    way(folder / "checkpoint.pt", trap)
    before = sorted(path.name for path in folder.iterdir())
    assert_refused(capsys, trap, folder / "checkpoint.pt", script, *flags, "--resume")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_file_of_the_cache(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    trap: Trap,
    way: Callable[[Path, Trap], None],
) -> None:
    """data/cache may be shared with others."""
    flags = attack_flags(workplace, "cached", surrogate_epochs=1, adv_steps=1, epochs=1)
    folder = workplace / "data/cache"
    for path in folder.glob("*.pt"):
        path.unlink()
    assert run_script(ROOT / "attack/lc.py", *flags, "--overwrite") == 0
    (path,) = folder.glob("lc-hard-images-*.pt")
    way(path, trap)
    assert_refused(capsys, trap, path, "attack/lc.py", *flags, "--overwrite")
    assert (workplace / "record/cached/summary.json").exists()


@pytest.mark.parametrize("way", WAYS)
def test_pretrained_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trap: Trap,
    way: Callable[[Path, Trap], None],
) -> None:
    """A file of torchvision's name that somebody has put where torchvision keeps its files."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints/resnet18-f37072fd.pth"
    path.parent.mkdir()
    network = models.build_model("resnet18", 3).network
    torch.save(network.state_dict(), path)
    way(path, trap)
    with pytest.raises(UserError, match=r"--pretrained: the weights of resnet18 cannot be .* read"):
        models.load_pretrained(network, "resnet18")
    assert not trap.mark.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert trap.mark.exists()


@pytest.mark.parametrize("place", ["yaml_path", "config.yaml", "summary.json"])
def test_files_of_text_are_no_way_in(
    workplace: Path,
    badnet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trap: Trap,
    place: str,
) -> None:
    """YAML's tags for Python objects are not read, neither by a flag nor in a record."""
    folder = shutil.copytree(badnet, tmp_path / "record")
    path = folder / place
    path.write_text(f"dataset: !!python/object/apply:os.mkdir ['{trap.mark}']\n")
    flags = defense_flags(workplace, str(folder))
    extra = ("--yaml_path", path) if place == "yaml_path" else ()
    assert run_script(ROOT / "defense/sau.py", *flags, *extra) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line[:7] == "error: "]
    assert str(folder) in error
    assert not trap.mark.exists()
