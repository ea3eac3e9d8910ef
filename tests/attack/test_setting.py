"""What attacks train before the classifier: an interrupted training goes on where it was."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import utils.data.images
from attack import inputaware, lc, prototype, ssba, trojannn
from attack.setting import Setting
from tests.scripts import run_script
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import ROOT
from utils.process import device
from utils.records.folders import RunFolder
from utils.records.partial import Partial

CPU = torch.device("cpu")
MODEL = {"model": "tiny", "batch_size": 6, "crop_padding": 1}


class Killed(BaseException):
    """Stands for the end of the process."""


def mask(setting: Setting) -> None:
    config = inputaware.Config.load("cifar10", pratio=0.25, mask_epochs=3, **MODEL)
    inputaware.InputAware(config, setting).before_training()


def encoder(setting: Setting) -> None:
    """Its first start is given up after ten steps, if `PATIENCE` is ten."""
    flags = {"message_bits": 8, "encoder_steps": 25, "encoder_batch_size": 4, "pratio": 0.1}
    config = ssba.Config.load("digits", min_bit_accuracy=0.0, **flags, **MODEL)
    ssba.prepare(config, setting)


def clean_model(setting: Setting) -> None:
    trojannn.prepare(trojannn.Config.load("digits", clean_epochs=3, iterations=2, **MODEL), setting)


def surrogate(setting: Setting) -> None:
    flags = {"surrogate": "adversarial", "surrogate_steps": 2, "adv_steps": 2}
    lc.prepare(lc.Config.load("digits", surrogate_epochs=3, **flags, **MODEL), setting)


def cached() -> dict[str, Any]:
    """The tensors in the cache, by the names of their files."""
    folder = utils.data.images.ROOT / "data/cache"
    return {path.name: torch.load(path, mmap=False) for path in sorted(folder.glob("*.pt"))}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture
def setting(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path / "whole")
    monkeypatch.setattr(ssba, "EPOCH", 7)
    return Setting(tiny_data, CPU, "fp32", checkpoint_every=0.0)


def interrupt(make: Callable[[Setting], None], setting: Setting, count: int) -> Path:
    """Makes it until the process ends after some checkpoints; gives the latest one."""
    written = []
    write = Partial.write_checkpoint

    def write_and_end(self: Partial, content: Mapping[str, Any]) -> None:
        write(self, content)
        written.append(content)
        if len(written) == count:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "write_checkpoint", write_and_end)
        with pytest.raises(Killed):
            make(setting)
    (partial,) = (utils.data.images.ROOT / "data/cache").glob("*.part")
    return partial


def steps_of(make: Callable[[Setting], None], setting: Setting) -> int:
    """Makes it; gives the number of checkpoints, so of batches."""
    taken = []
    write = Partial.write_checkpoint

    def counted(self: Partial, content: Mapping[str, Any]) -> None:
        taken.append(content["seconds"])
        write(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "write_checkpoint", counted)
        make(setting)
    return len(taken)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("make", [mask, encoder, clean_model, surrogate])
def test_it_goes_on_where_it_was_interrupted(
    make: Callable[[Setting], None],
    share: float,
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputaware, "MASK_MILESTONES", [1, 2])
    steps = steps_of(make, setting)
    whole = cached()
    count = max(1, round(share * steps))
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path / "interrupted")
    partial = interrupt(make, setting, count)
    assert steps_of(make, setting) == steps - count
    assert not partial.exists()
    assert equal(cached(), whole)


def test_a_start_that_was_given_up_is_not_made_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start ends after ten steps, which are nine checkpoints; then 25 steps follow."""
    monkeypatch.setattr(ssba, "PATIENCE", 10)
    monkeypatch.setattr(ssba, "bit_accuracy", lambda *_: 0.5 if len(starts) == 1 else 0.7)
    starts: list[str] = []
    train = ssba.train

    def counted(*arguments: Any) -> bool:
        starts.append(arguments[-1])
        return train(*arguments)

    monkeypatch.setattr(ssba, "train", counted)
    assert steps_of(encoder, setting) == 9 + 25
    assert starts == ["encoder", "encoder, start 2"]
    whole = cached()
    starts.clear()
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path / "interrupted")
    interrupt(encoder, setting, 14)
    starts.clear()
    assert steps_of(encoder, setting) == 9 + 25 - 14
    assert equal(cached(), whole)


def test_the_growing_weight_of_the_pixels_goes_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows from the step on in which the string could be read."""
    monkeypatch.setattr(ssba, "bit_accuracy", lambda *_: 0.95)
    encoder(setting)
    whole = cached()
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path / "interrupted")
    interrupt(encoder, setting, 12)
    encoder(setting)
    assert equal(cached(), whole)


def test_the_checkpoint_stays_until_the_result_is_on_the_disk(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all of the training is lost where the disk is full, or the process ends there."""
    write = RunFolder.write

    def full(self: RunFolder, name: str, writer: Callable[[Path], None]) -> Path:
        if name.endswith(".pt"):
            raise UserError(f"{name}: could not be written")
        return write(self, name, writer)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", full)
        with pytest.raises(UserError, match="could not be written"):
            mask(setting)
    (partial,) = (utils.data.images.ROOT / "data/cache").glob("*.part")
    assert steps_of(mask, setting) == 0
    assert not partial.exists()


def test_a_checkpoint_that_a_killed_process_has_left_goes_with_the_next_read(
    setting: Setting,
) -> None:
    partial = interrupt(mask, setting, 3)
    content = partial.read_bytes()
    mask(setting)
    partial.write_bytes(content)
    mask(setting)
    assert not partial.exists()


def test_elsewhere_it_starts_again(setting: Setting) -> None:
    """Another precision makes other digits."""
    interrupt(mask, setting, 3)
    assert steps_of(mask, replace(setting, precision="bf16")) == 6


@pytest.mark.parametrize(("version", "commit", "steps"), [("9.9", "abc", 6), (None, "def", 3)])
def test_with_other_versions_it_starts_again_but_not_with_another_commit(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    commit: str,
    steps: int,
) -> None:
    monkeypatch.setattr(device, "_git_commit", lambda: "abc")
    interrupt(mask, setting, 3)
    monkeypatch.setattr(device, "_git_commit", lambda: commit)
    if version is not None:
        monkeypatch.setattr(metadata, "version", lambda _: version)
    assert steps_of(mask, setting) == steps


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_damaged_checkpoint_is_left_aside(
    content: bytes, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    partial = interrupt(mask, setting, 3)
    partial.write_bytes(content)
    assert steps_of(mask, setting) == 6
    assert f"{partial}: cannot be read; that part starts again" in caplog.text
    assert [file.suffix for file in partial.parent.iterdir()] == [".pt"]


def test_a_checkpoint_of_another_training_is_named(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another version of the code, which forgot to say that it is one."""
    partial = interrupt(mask, setting, 3)
    content = torch.load(partial, weights_only=True)
    content["loop"]["round"] = 99
    torch.save(content, partial)
    with pytest.raises(UserError, match=r"\.part: is no checkpoint of this training .*; remove it"):
        mask(setting)


def test_a_script_makes_checkpoints_as_often_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trained(self: Setting, *_: object, **__: object) -> None:
        seen.append(self.checkpoint_every)
        raise Killed

    monkeypatch.setattr(Setting, "trained", trained)
    flags = ["--dataset", "random", "--model", "tiny", "--epochs", 1, "--checkpoint_every", 7]
    place = ["--record_path", tmp_path, "--save_folder_name", "x"]
    with pytest.raises(Killed):
        run_script(ROOT / "attack/ssba.py", *flags, *place)
    assert seen == [7.0]


def test_a_target_without_test_images_is_refused_before_anything_is_prepared(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an attack of any kind; all-to-all has test images to trigger in the same set."""
    one = replace(tiny_data, test=tiny_data.test.at(torch.tensor([0, 3])))
    monkeypatch.setattr(prototype, "load_dataset", lambda *_: one)
    flags = {"record_path": str(tmp_path), "save_folder_name": "one", "device": "cpu", **MODEL}

    def prepare(config: Any, setting: Setting) -> Any:
        raise Killed

    for module in (ssba, inputaware):
        with pytest.raises(UserError, match=r"^--attack_target: every test image has label 0; "):
            prototype.train(module.Config.load("digits", **flags), "one", prepare)
        config = module.Config.load("digits", attack_label_trans="all2all", **flags)
        with pytest.raises(Killed):
            prototype.train(config, "one", prepare)


TWICE = """
import sys, time
from pathlib import Path
import torch
import utils.data.images
from attack.setting import Setting
from utils.data.datasets import load_dataset
from utils.process.script import run_script

folder, number = Path(sys.argv[1]), sys.argv[2]
utils.data.images.ROOT = folder

def compute():
    (folder / f"made by {number}").touch()
    while not (folder / "enough").exists():
        time.sleep(0.05)
    return {"x": torch.tensor(int(number))}

def main():
    setting = Setting(load_dataset("digits", None, 16), torch.device("cpu"), "fp32")
    print(setting.cached("x", {}, compute)["x"].item())

run_script(main)
"""


def test_of_two_processes_one_waits_for_what_the_other_makes(tmp_path: Path) -> None:
    def begin(number: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", TWICE, tmp_path, str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = begin(1)
    end = time.monotonic() + 120
    while not (tmp_path / "made by 1").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    second = begin(2)
    assert second.stderr is not None
    assert "x: another process makes it; waiting for it" in second.stderr.readline()
    (tmp_path / "enough").touch()
    assert [process.communicate(timeout=120)[0] for process in (first, second)] == ["1\n", "1\n"]
    assert not (tmp_path / "made by 2").exists()
    assert [path.suffix for path in (tmp_path / "data/cache").glob("*x-*")] == [".pt"]
