"""The pictures of triggers show what the records hold."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import put_no_file
from tests.scripts import attack_flags, run_script
from utils import plot
from utils.data.datasets import load_dataset
from utils.files import ROOT

pytestmark = pytest.mark.usefixtures("cache")


def gallery(workplace: Path, *records: str, to: str = "pictures") -> int:
    flags = ["--record_path", workplace / "record", "--to", workplace / to]
    return run_script(ROOT / "benchmark/gallery.py", *records, *flags)


@pytest.mark.usefixtures("small")
def test_rows_are_the_same_test_images_with_each_trigger(workplace: Path, badnet: Path) -> None:
    """All-to-all triggers every test image, all-to-one 12 of 18; both rows show the latter's."""
    from benchmark.gallery import gallery_rows, load_rows

    flags = attack_flags(workplace, "all2all", attack_label_trans="all2all", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    dataset, clean, rows = load_rows([badnet, workplace / "record/all2all"], count=4)
    assert dataset == "folder"
    assert list(rows) == ["badnet", "badnet_all2all"]
    assert torch.equal(rows["badnet"], rows["badnet_all2all"])
    test = load_dataset("folder", workplace / "images", 16).test.images.float() / 255
    for image in clean:
        assert (test[6:] == image).flatten(1).all(1).any()  # the first six are of the target
    expected = clean.clone()
    expected[:, :, -2:, -2:] = 1
    assert torch.equal(rows["badnet"], expected)

    _, all_of_them, _ = load_rows([badnet], count=100)  # each once, if fewer are in common
    assert torch.equal(all_of_them, test[6:])
    _, five, _ = load_rows([badnet], count=5)
    assert torch.equal(five[[0, -1]], test[[6, -1]])

    drawn = gallery_rows(clean, {"badnet": rows["badnet"]})
    name, images = list(drawn.items())[1]
    assert name.startswith("badnet\nx 1")
    assert torch.equal(images[:4], expected)
    assert (images[4:, :, :-2] == 0.5).all()  # nothing changes outside the square
    assert (drawn["clean"][4:] == 0.5).all()


def test_it_writes_a_gallery_and_a_strip_for_each_attack(workplace: Path, badnet: Path) -> None:
    assert gallery(workplace, badnet.name) == 0
    assert Image.open(workplace / "pictures/attacks.png").width > 500
    assert Image.open(workplace / "pictures/attacks/badnet.png").size == (3 * 96 + 2 * 6, 96)


@pytest.mark.usefixtures("small")
def test_strips_of_an_earlier_gallery_are_removed_and_nothing_else(
    workplace: Path, badnet: Path
) -> None:
    """A strip that somebody gave another name is theirs, and so is every other picture."""
    flags = attack_flags(workplace, "turned", attack_label_trans="all2all", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    assert gallery(workplace, "turned", to="again") == 0
    strips = workplace / "again/attacks"
    shutil.copyfile(strips / "badnet_all2all.png", strips / "kept.png")
    for kind in ("pipe", "nowhere", "folder"):
        put_no_file(strips / f"{kind}.png", kind)
    (strips / "link.png").symlink_to(strips / "badnet_all2all.png")
    (strips / "text.png").write_text("no picture")
    Image.new("RGB", (2, 2)).save(strips / "mine.png")
    before = {path.name for path in strips.iterdir()}
    assert gallery(workplace, badnet.name, to="again") == 0
    after = {path.name for path in strips.iterdir()}
    assert after == before - {"badnet_all2all.png"} | {"badnet.png"}


def test_images_that_were_moved_are_named(
    workplace: Path, badnet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = (workplace / "images").rename(workplace / "moved")
    try:
        assert gallery(workplace, badnet.name, to="of_moved") == 2
        assert "give the one that has them with --dataset_path" in caplog.text
        assert gallery(workplace, badnet.name, "--dataset_path", str(moved), to="of_moved") == 0
    finally:
        moved.rename(workplace / "images")
    assert (workplace / "of_moved/attacks/badnet.png").exists()


def test_strip_by_hand() -> None:
    """Two 2x2 images at twice their size, with a white gap of two pixels."""
    images = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    picture = plot.strip(images, height=4)
    assert picture.size == (10, 4)
    assert [picture.getpixel((x, 0)) for x in (0, 3, 4, 9)] == [(0,) * 3, (0,) * 3] + [
        (255,) * 3
    ] * 2


@pytest.mark.usefixtures("small")
def test_what_has_no_trigger_or_comes_twice_is_refused(
    workplace: Path, badnet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert gallery(workplace, badnet.name, badnet.name) == 2
    assert "is a second record of badnet" in caplog.text
    flags = attack_flags(workplace, "clean")
    at = flags.index("--pratio")
    assert run_script(ROOT / "attack/prototype.py", *flags[:at], *flags[at + 2 :]) == 0
    assert gallery(workplace, "clean") == 2
    assert "is a clean model" in caplog.text
    flags = attack_flags(workplace, "other", attack_label_trans="all2all", image_size=8, epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    assert gallery(workplace, badnet.name, "other") == 2
    said = "was trained on other images or classes than"
    assert f"records: {workplace}/record/other {said} {badnet}; give one of the sa" in caplog.text
    assert gallery(workplace, "nothing") == 2
    assert "records: nothing is no record" in caplog.text


def test_a_file_is_no_folder_for_the_pictures(
    workplace: Path, badnet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (workplace / "a_file").touch()
    assert gallery(workplace, badnet.name, to="a_file") == 2
    assert f"--to: {workplace / 'a_file'} cannot be made (File exists); " in caplog.text
