"""What users meet on the first day: own images, own names, numbers that are names."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
import torch
from PIL import Image

import utils.data.images
from attack import badnet
from attack.recipe import AttackConfig
from tests.conftest import make_small
from tests.scripts import attack_flags, defense_flags, one_error, run_script
from utils import plot
from utils.data import poison
from utils.data.datasets import load_dataset
from utils.data.labelled import Dataset, Labelled
from utils.errors import UserError
from utils.files import ROOT
from utils.records.attack import load_attack
from utils.records.index import read_index
from utils.values import allowed_values


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_small(monkeypatch)
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    return tmp_path


def make_images(root: Path, classes: list[str], count: int = 4, level: int = 255) -> Path:
    """Random images, `count` a class and split."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, level + 1, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def attack(place: Path, name: str, *more: object, **changes: object) -> int:
    flags = attack_flags(place, name, **{"dataset_path": place / "images", **changes})
    return run_script(ROOT / "attack/badnet.py", *flags, *more)


# --- classes that are called by numbers ---------------------------------------------------------


def test_folders_that_are_numbers_sort_as_numbers(place: Path) -> None:
    names = [str(number) for number in range(12)]
    data = load_dataset("folder", make_images(place / "images", names, 1), 16)
    assert data.classes == tuple(names)
    others = load_dataset("folder", make_images(place / "more", [*names, "x"], 1), 16)
    assert others.classes == tuple(sorted([*names, "x"]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["9", "10", "2"], ["2", "9", "10"]),
        (["010", "9"], ["9", "010"]),
        (["1", "01"], ["01", "1"]),
        (["-1", "2", "10"], ["-1", "10", "2"]),
        (["1.5", "1"], ["1", "1.5"]),
        (["²", "10", "9"], ["10", "9", "²"]),
        (["9" * 30, "10"], ["10", "9" * 30]),
    ],
)
def test_what_counts_as_a_number(place: Path, names: list[str], expected: list[str]) -> None:
    data = load_dataset("folder", make_images(place / "images", names, 1), 16)
    assert list(data.classes) == expected


def test_a_record_of_the_other_order_notices(place: Path, tiny_data: Dataset) -> None:
    """Before, "10" came before "2": such records name other images by their labels."""
    names = [str(number) for number in range(12)]
    data = load_dataset("folder", make_images(place / "images", names, 1), 16)
    order = torch.tensor([names.index(name) for name in sorted(names)])
    splits = [Labelled(s.images[order], torch.arange(12)) for s in (data.train, data.test)]
    before = Dataset("folder", *splits, tuple(sorted(names)), data.mean, data.std)
    assert before.fingerprint() != data.fingerprint()


def test_the_target_may_be_given_by_its_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(place / "images", ["cat", "dog", "emu"])
    assert attack(place, "x", attack_target="dog", batch_size=4) == 0
    said = capsys.readouterr().err
    assert "target: class 1 (dog)" in said
    folder = place / "record/x"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["attack_target"], summary["attack_target_name"]) == (1, "dog")
    assert "attack_target: 1\n" in (folder / "config.yaml").read_text()
    assert "target: class 1 (dog)" in (folder / "log.txt").read_text()
    assert load_attack(folder).attack_target == 1
    flags = defense_flags(place, "x", batch_size=4)
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    assert "ft against badnet on folder, target 1 (dog)" in capsys.readouterr().err
    assert attack(place, "x", attack_target="dog", batch_size=4, resume=True) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert attack(place, "x", attack_target="emu", batch_size=4, resume=True) == 2
    assert "was run with --attack_target 1; give the same" in capsys.readouterr().err


def test_pictures_name_the_target(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(place / "images", ["cat", "dog", "emu"])
    titles, texts = [], []
    from tests.conftest import Picture

    def grid(rows: object, captions: dict[str, list[str]], title: str) -> Picture:
        titles.append(title)
        texts.extend(text for row in captions.values() for text in row)
        return Picture()

    monkeypatch.setattr(plot, "image_grid", grid)
    assert attack(place, "x", attack_target="dog", batch_size=4) == 0
    assert titles[0].startswith("badnet on folder, target 1 (dog): ")
    assert {*texts} <= {"0 (cat)", "1 (dog)", "2 (emu)"}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("dgo", "dgo is no class of folder (did you mean dog?); give one of cat, dog, emu"),
        ("Dog", "Dog is no class of folder (did you mean dog?)"),
        ("3", "3 is no class of folder; give 0 to 2, or a name: cat, dog, emu"),
        ("-1", "-1 is not allowed; give int >= 0 or the name of a class"),
        ("1.5", "1.5 is no class of folder"),
        ("007", "007 is no class of folder"),
        ("+1", "+1 is no class of folder"),
        ("", "--attack_target: a value is missing; give int >= 0 or the name of a class"),
    ],
)
def test_a_target_that_is_none_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], target: str, told: str
) -> None:
    make_images(place / "images", ["cat", "dog", "emu"], 1)
    assert attack(place, "x", attack_target=target, batch_size=2) == 2
    assert told in one_error(capsys)


@pytest.mark.parametrize(
    ("names", "target", "label"),
    [
        (["0001", "0002", "0003"], "0001", 0),
        (["0001", "0002", "0003"], "0003", 2),
        (["0001", "0002", "0003"], "1", 1),
        (["1.0", "10.0", "2.0"], "1.0", 0),
        (["3", "5", "7"], "5", 1),
    ],
)
def test_a_name_may_look_like_a_number(
    place: Path, names: list[str], target: str, label: int
) -> None:
    """What is written like a label is one, where there is such a label."""
    make_images(place / "images", names)
    assert attack(place, "x", attack_target=target, batch_size=4) == 0
    summary = json.loads((place / "record/x/summary.json").read_text())
    assert (summary["attack_target"], summary["attack_target_name"]) == (label, names[label])
    assert not [text for text in summary["warnings"] if "--attack_target" in text]


def test_a_name_may_be_spelled_with_other_bytes(place: Path) -> None:
    """An accent is a character of its own, or part of its letter."""
    make_images(place / "images", ["a\u0301", "b"])
    for number, spelled in enumerate(("a\u0301", "\u00e1")):
        assert attack(place, f"x{number}", attack_target=spelled, batch_size=4) == 0


def test_a_number_that_names_another_class_is_warned_of(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(place / "images", ["1", "2", "3"])
    assert attack(place, "x", attack_target=2, batch_size=4) == 0
    warning = (
        "--attack_target 2 is the label of class 3; labels count from 0, and the class that is "
        "called 2 has label 1"
    )
    assert f"warning: {warning}" in capsys.readouterr().err
    assert warning in json.loads((place / "record/x/summary.json").read_text())["warnings"]


def test_a_number_that_is_its_class_s_name_is_not(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(place / "images", ["0", "1", "2"])
    assert attack(place, "x", attack_target=2, batch_size=4) == 0
    said = capsys.readouterr().err
    assert "called" not in said
    assert "target: class 2\n" in said


def test_flags_say_that_a_name_will_do() -> None:
    hint = badnet.Config.__dataclass_fields__["attack_target"].type
    assert "name of a class" in allowed_values(AttackConfig.__annotations__["attack_target"])
    assert hint is not None
    assert badnet.Config.load("digits", attack_target="3").attack_target == 3


# --- own images ---------------------------------------------------------------------------------


def test_the_command_that_is_told_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(place / "images", ["cat", "dog", "emu"], 13)
    assert attack(place, "x", batch_size=128) == 2
    told = one_error(capsys)
    assert "128 is more than the 39 training images; give --batch_size 39 or less" in told
    assert attack(place, "x", batch_size=39) == 0


@pytest.mark.parametrize("name", ["val", "valid", "validation", "testing", "Test"])
def test_another_name_of_the_test_set_is_told(place: Path, name: str) -> None:
    root = make_images(place / "images", ["cat", "dog"], 1)
    (root / "test").rename(root / name)
    with pytest.raises(UserError, match=f"has no folder test, but one called {name}; rename it"):
        load_dataset("folder", root, 16)


def test_classes_that_differ_are_named(place: Path) -> None:
    root = make_images(place / "images", [f"c{n}" for n in range(30)], 1)
    (root / "test/c7").rename(root / "test/d7")
    with pytest.raises(UserError, match=r"only .*train has c7; only .*test has d7; give both"):
        load_dataset("folder", root, 16)


def test_a_class_without_test_images_is_warned_of(place: Path) -> None:
    root = make_images(place / "images", ["cat", "dog"], 1)
    (root / "test/dog/0.png").unlink()
    data = load_dataset("folder", root, 16)
    assert [w for w in data.warnings if "has no image of dog; ACC tells nothing" in w]
    assert not load_dataset("folder", make_images(place / "more", ["cat", "dog"]), 16).warnings


def test_images_that_moved_are_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(place / "images", ["cat", "dog", "emu"])
    assert attack(place, "x", batch_size=4) == 0
    (place / "images").rename(place / "moved")
    capsys.readouterr()
    flags = defense_flags(place, "x", batch_size=4)
    assert run_script(ROOT / "defense/ft.py", *flags) == 2
    told = one_error(capsys)
    assert f"record/x: was made with the images in {place / 'images'}, which is no folder" in told
    assert "--dataset_path" in told
    flags += ["--dataset_path", place / "moved"]
    assert run_script(ROOT / "defense/ft.py", *flags) == 0


@pytest.mark.parametrize("name", ["CIFAR10", "Cifar10", "cifar-10", "cifar_10"])
def test_a_misspelt_dataset_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_script(ROOT / "attack/badnet.py", "--save_folder_name", "x", "--dataset", name) == 2
    assert f"--dataset: {name} is not allowed (did you mean cifar10?); give one of" in one_error(
        capsys
    )


def test_a_folder_for_data_may_be_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_images(place / "images", ["cat", "dog"], 1)
    monkeypatch.setenv("SAU_DATA", str(place / "elsewhere"))
    load_dataset("folder", root, 16)
    assert list((place / "elsewhere/cache").glob("*.bin"))
    assert not (place / "data").exists()


def test_the_folder_for_data_may_begin_with_the_home(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shell put the home in its place, as in a file of variables."""
    root = make_images(place / "images", ["cat", "dog"], 1)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(place / "home"))
    monkeypatch.setenv("SAU_DATA", "~/elsewhere")
    load_dataset("folder", root, 16)
    assert list((place / "home/elsewhere/cache").glob("*.bin"))


def test_a_place_where_nothing_can_be_kept_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images(place / "images", ["cat", "dog"], 1)
    (place / "file").touch()
    monkeypatch.setenv("SAU_DATA", str(place / "file"))
    with pytest.raises(UserError, match="name another folder for downloads and caches in SAU_DATA"):
        load_dataset("folder", root, 16)


@pytest.mark.parametrize(("highest", "is_told"), [(4095, True), (1023, True), (65535, False)])
def test_few_bits_in_files_of_sixteen_are_warned_of(
    place: Path, highest: int, is_told: bool
) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            levels = np.linspace(0, highest, 256).astype(np.uint16).reshape(16, 16)
            Image.fromarray(levels).save(folder / "0.png")
    found = load_dataset("folder", place / "images", 16).warnings
    assert any("scale them to all 16 first" in warning for warning in found) == is_told


@pytest.mark.parametrize("text", ["\ufeff3\n1\n", "3\r\n1\r\n", "\ufeff1 3"])
def test_an_index_of_another_editor(tmp_path: Path, text: str) -> None:
    path = tmp_path / "index.txt"
    path.write_text(text, encoding="utf-8")
    assert read_index(path, 10).tolist() == [1, 3]


def test_a_cut_checkpoint_says_what_to_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(place / "images", ["cat", "dog", "emu"])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.training.watch.Watch._after_round", stop)
        assert attack(place, "x", "--checkpoint_every", 0, batch_size=4) == 130
    path = place / "record/x/checkpoint.pt"
    os.truncate(path, path.stat().st_size // 2)
    capsys.readouterr()
    assert attack(place, "x", "--resume", batch_size=4) == 2
    told = one_error(capsys)
    assert "checkpoint.pt: is not a checkpoint of this program" in told
    assert told.endswith("; give --overwrite to start anew")


def test_fonts_of_other_scripts_are_used_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Font:
        name = "SimHei"

    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [*manager.ttflist, Font()])
    plot.fonts.cache_clear()
    try:
        assert plot.fonts()[0] == "DejaVu Sans"
        assert "SimHei" in plot.fonts()
    finally:
        plot.fonts.cache_clear()


def test_a_class_has_number_and_name(tiny_data: Dataset) -> None:
    assert [tiny_data.named(label) for label in range(3)] == ["0 (ant)", "1 (bee)", "2 (cat)"]
    assert tiny_data.listed() == "ant, bee, cat"


# --- shares of a batch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "size", "said"),
    [
        (0.1, 128, "12 of each batch of 128 images are poisoned, 9.38 %"),
        (0.01, 128, "1 of each batch of 128 images are poisoned, 0.78 %"),
        (0.01, 32, "one image is poisoned in one of 3.12 batches of 32, drawn at random, 1.00 %"),
        (0.005, 100, "one image is poisoned in one of 2 batches of 100, drawn at random, 0.50 %"),
    ],
)
def test_what_is_said_of_a_poisoning_ratio_is_what_happens(
    ratio: float, size: int, said: str
) -> None:
    assert poison.said_of_batches(ratio, size) == said
    rng = torch.Generator().manual_seed(0)
    counts: Callable[[], int] = lambda: poison.count_in_batch(ratio, size, rng)  # noqa: E731
    share = 100 * sum(counts() for _ in range(20_000)) / (20_000 * size)
    assert abs(share - float(said.split()[-2])) < 0.05
