"""Each dataset, read from miniature copies in its official layout; folders of images."""

import dataclasses
import hashlib
import os
import shutil
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import utils.data.datasets
from tests.miniatures import official, official_cifar, official_gtsrb, official_tiny
from utils.data.archives import Archive
from utils.data.datasets import load_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads and decoded images go here instead of into the checkout."""
    monkeypatch.setattr("utils.data.images.ROOT", tmp_path / "root")
    return tmp_path / "root"


def save_colour(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Path:
    """An image of one colour, which no resizing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`train/` and `test/` with one image in each of two classes, all of different colours."""
    folder = tmp_path / "images"
    for number, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        save_colour(folder / name / "1.png", (10 * number, 100, 200))
    return folder


def unreachable(*_: object, **__: object) -> NoReturn:
    """In the place of `urlopen`."""
    raise urllib.error.URLError("no route to host")


def cache_files(root: Path) -> list[Path]:
    return sorted((root / "data" / "cache").glob("*"))


# --- digits -------------------------------------------------------------------------------------


def test_digits_shapes() -> None:
    """1,797 images; a fifth is 359.4, which the split rounds up to 360 for testing."""
    data = load_dataset("digits", None, 16)
    assert data.name == "digits"
    assert data.train.images.shape == (1437, 3, 16, 16)
    assert data.test.images.shape == (360, 3, 16, 16)
    assert data.train.images.dtype == data.test.images.dtype == torch.uint8
    assert data.train.labels.dtype == data.test.labels.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert data.image_shape == (3, 16, 16)
    assert (len(data.train), len(data.test)) == (1437, 360)


def test_digits_keep_their_17_levels_at_their_own_size() -> None:
    """Level k of 16 is 15.9375 k: 16, 31.875, 47.8125, ..., 127.5 (rounded to even: 128), ..., 255.

    Every channel is the same grey.
    """
    data = load_dataset("digits", None, 8)
    levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert data.train.images.unique().tolist() == levels
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])


def test_digits_are_split_class_by_class() -> None:
    """Every class keeps its share: a fifth of its images, up to rounding, is in the test set."""
    data = load_dataset("digits", None, 8)
    train, test = (torch.bincount(split.labels) for split in (data.train, data.test))
    assert ((train + test) * 0.2 - test).abs().max() < 1


def test_digits_are_the_same_every_time() -> None:
    first, second = load_dataset("digits", None, 16), load_dataset("digits", None, 16)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)
    assert first.fingerprint() == second.fingerprint()


def test_digits_in_both_splits_are_the_originals() -> None:
    """The two splits together are the 1,797 originals: as many images of each sum of pixels."""
    from sklearn.datasets import load_digits

    data = load_dataset("digits", None, 8)
    together = torch.cat([data.train.images, data.test.images])[:, 0].double() / 15.9375
    found = Counter(together.round().sum(dim=(1, 2)).int().tolist())
    assert found == Counter(load_digits().data.sum(axis=1).astype(int).tolist())


def test_mean_and_deviation_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    """Half of the red pixels is 0, half 255: mean 1/2, deviation 1/2.

    Green is always 51: mean 51/255 = 0.2. A deviation of 0 would divide by zero, so it is at least
    sqrt(1e-4) = 0.01. The test image, all white, counts nothing.
    """
    save_colour(tmp_path / "images/train/a/1.png", (0, 51, 255))
    save_colour(tmp_path / "images/train/a/2.png", (255, 51, 255))
    save_colour(tmp_path / "images/test/a/1.png", (255, 255, 255))
    data = load_dataset("folder", tmp_path / "images", 8)
    assert data.mean == (0.5, 0.2, 1.0)
    assert data.std == (0.5, 0.01, 0.01)


def test_an_unknown_dataset_is_refused_with_the_valid_names() -> None:
    with pytest.raises(UserError) as caught:
        load_dataset("cifar11", None, 16)
    assert "--dataset: cifar11" in str(caught.value)
    assert "did you mean cifar10?" in str(caught.value)
    assert "digits, cifar10, cifar100, gtsrb, tiny, random, folder" in str(caught.value)


# --- random images ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 16])
def test_random_images_are_the_same_every_time_and_tell_their_class(size: int) -> None:
    """Ten classes of 20 and 10 images, over one pattern per class in both splits."""
    data, again = load_dataset("random", None, size), load_dataset("random", None, size)
    assert data.image_shape == (3, size, size)
    assert data.classes == tuple("0123456789")
    for split, other, count in ((data.train, again.train, 20), (data.test, again.test, 10)):
        assert split.images.dtype == torch.uint8
        assert torch.equal(split.images, other.images)
        assert torch.bincount(split.labels).tolist() == [count] * 10
    means = [
        torch.stack([split.images[split.labels == label].float().mean(0) for label in range(10)])
        for split in (data.train, data.test)
    ]
    distances = torch.cdist(means[0].flatten(1), means[1].flatten(1))
    assert size == 1 or distances.argmin(1).tolist() == list(range(10))


# --- a folder of images -------------------------------------------------------------------------


def test_folder_reads_every_kind_of_image(tmp_path: Path) -> None:
    """One colour a file, so the colour survives resizing; a flat grey survives JPEG exactly.

    Transparency is dropped, not blended. 16-bit grey is scaled by 1/257 and not clipped: 25,700 is
    100, and 300, which clipping would make 255, is 1 (1.17 without its fraction).
    """
    train = tmp_path / "images" / "train" / "a"
    save_colour(tmp_path / "images/test/a/1.png", (0, 0, 0))
    save_colour(train / "1_rgb.png", (10, 20, 30), size=(5, 9))
    Image.new("L", (30, 7), 77).save(train / "2_grey.PNG")
    Image.new("RGBA", (8, 8), (10, 20, 30, 128)).save(train / "3_alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(train / "4_palette.png")
    for number, level in ((5, 25700), (6, 300), (7, 65535)):
        grey = np.full((6, 6), level, dtype=np.uint16)
        Image.fromarray(grey).save(train / f"{number}_deep.png")
    Image.new("RGB", (16, 16), (128, 128, 128)).save(train / "8_flat.jpg")

    images = load_dataset("folder", tmp_path / "images", 8).train.images
    assert images.shape == (8, 3, 8, 8)
    assert images.dtype == torch.uint8
    colours = [(10, 20, 30), (77,) * 3, (10, 20, 30), (200, 100, 50)]
    colours += [(100,) * 3, (1,) * 3, (255,) * 3, (128,) * 3]
    expected = torch.tensor(colours, dtype=torch.uint8).view(8, 3, 1, 1)
    assert torch.equal(images, expected.expand_as(images))


def test_folder_reads_the_rarer_kinds_too(tmp_path: Path) -> None:
    """Grey with transparency, one bit, CMYK, a transparent palette, 16 bits in either byte order.

    CMYK 255 - (10, 20, 30) without black is (10, 20, 30). 16-bit RGB is not among what Pillow
    writes.
    """
    train = tmp_path / "images" / "train" / "a"
    save_colour(tmp_path / "images/test/a/1.png", (0, 0, 0))
    train.mkdir(parents=True)
    Image.new("LA", (8, 8), (50, 9)).save(train / "1.png")
    Image.new("1", (8, 8), 1).save(train / "2.png")
    Image.new("CMYK", (8, 8), (245, 235, 225, 0)).save(train / "3.tif")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(train / "4.png", transparency=bytes([255, 100]))
    palette.save(train / "5.gif")
    deep = np.full((8, 8), 25700)
    Image.fromarray(deep.astype(np.uint16)).save(train / "6.tif")
    Image.frombytes("I;16B", (8, 8), deep.astype(">u2").tobytes()).save(train / "7.tif")
    (train / "8.pgm").write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_dataset("folder", tmp_path / "images", 8).train.images
    colours = [(50,) * 3, (255,) * 3, (10, 20, 30), (200, 100, 50), (200, 100, 50)]
    expected = torch.tensor([*colours, *[(100,) * 3] * 3], dtype=torch.uint8)
    assert torch.equal(images, expected.view(8, 3, 1, 1).expand_as(images))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (Image.new("F", (8, 8), 0.5), "floats, have no known range"),
        (Image.new("I", (8, 8), 70000), "of 32 bits, have no known range"),
        (Image.new("I", (8, 8), 200), "of 32 bits, have no known range"),
        (Image.new("L", (9500, 9500)), "9500 x 9500 pixels are too many"),
        (Image.new("1", (15000, 15000)), "decompression bomb"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    tree: Path, root: Path, content: Image.Image, problem: str
) -> None:
    """90 million pixels are more than 89; of 225 million Pillow itself warns."""
    file = tree / "train" / "dog" / "2.tif"
    content.save(file, compression=None if content.mode in "FI" else "tiff_lzw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = folder_problem(tree)
    assert text.startswith(f"{file}: not a readable image")
    assert problem in text
    assert len(text.splitlines()) == 1
    assert cache_files(root) == []


def test_a_class_may_have_one_image_or_no_test_image_but_not_no_image(tree: Path) -> None:
    """Other programs' hidden notes beside an image are no images."""
    (tree / "test" / "cat" / "1.png").unlink()
    (tree / "train" / "cat" / "._1.png").write_bytes(b"a note")
    data = load_dataset("folder", tree, 8)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1])
    (tree / "train" / "cat" / "1.png").unlink()
    assert f"{tree / 'train' / 'cat'} has no image file" in folder_problem(tree)


def test_folder_keeps_the_orientation_of_an_image(tmp_path: Path) -> None:
    """Rows are rows and columns columns: the top is white, the left half below it red."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    pixels[1:, :4, 0] = 200
    for split in ("train", "test"):
        save_colour(tmp_path / "images" / split / "a" / "1.png", (0, 0, 0))
    Image.fromarray(pixels).save(tmp_path / "images" / "train" / "a" / "1.png")
    data = load_dataset("folder", tmp_path / "images", 8)
    assert torch.equal(data.train.images[0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_folder_labels_follow_the_sorted_class_names(tmp_path: Path) -> None:
    """Code points order names: b, then Ü, then 猫. Hidden folders and other files do not count."""
    names = ["猫", "big cat", "Über"]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            save_colour(tmp_path / "images" / split / name / "x y.png", (number, 0, 0))
        save_colour(tmp_path / "images" / split / ".hidden" / "1.png", (9, 9, 9))
        (tmp_path / "images" / split / "notes.txt").write_text("no class")
        (tmp_path / "images" / split / "big cat" / "notes.txt").write_text("no image")
    data = load_dataset("folder", tmp_path / "images", 8)
    assert data.classes == ("big cat", "Über", "猫")
    for split in (data.train, data.test):
        assert split.labels.tolist() == [0, 1, 2]
        assert split.images[:, 0, 0, 0].tolist() == [1, 2, 0]


def test_folder_tells_the_splits_apart(tree: Path) -> None:
    """The fixture's red levels: 0 and 10 in train, 20 and 30 in test."""
    data = load_dataset("folder", tree, 8)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10]
    assert data.test.images[:, 0, 0, 0].tolist() == [20, 30]


def test_folder_decodes_once(tree: Path, root: Path) -> None:
    """The cache holds 4 images of 3 x 8 x 8 bytes; a second load does not write it again."""
    first = load_dataset("folder", tree, 8)
    (cache,) = cache_files(root)
    before = cache.stat()
    assert before.st_size == 4 * 3 * 8 * 8
    second = load_dataset("folder", tree, 8)
    assert cache_files(root) == [cache]
    assert (cache.stat().st_ino, cache.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert torch.equal(first.train.images, second.train.images)


def test_folder_reads_the_cache_and_not_the_images(tree: Path, root: Path) -> None:
    """A byte changed in the cache shows up, so the second load took its pixels from there."""
    load_dataset("folder", tree, 8)
    (cache,) = cache_files(root)
    content = bytearray(cache.read_bytes())
    content[0] = 123
    cache.write_bytes(content)
    assert load_dataset("folder", tree, 8).train.images[0, 0, 0, 0] == 123


def test_folder_decodes_again_after_an_image_changed(tree: Path, root: Path) -> None:
    before = load_dataset("folder", tree, 8)
    save_colour(tree / "train" / "dog" / "1.png", (250, 100, 200))
    after = load_dataset("folder", tree, 8)
    assert len(cache_files(root)) == 2
    assert after.train.images[:, 0, 0, 0].tolist() == [0, 250]
    assert before.fingerprint() != after.fingerprint()


def test_folder_decodes_again_at_another_size(tree: Path, root: Path) -> None:
    load_dataset("folder", tree, 8)
    assert load_dataset("folder", tree, 10).train.images.shape == (2, 3, 10, 10)
    assert len(cache_files(root)) == 2


def test_folder_decodes_again_if_the_cache_was_cut_short(tree: Path, root: Path) -> None:
    expected = load_dataset("folder", tree, 8).train.images.clone()
    (cache,) = cache_files(root)
    cache.write_bytes(cache.read_bytes()[:-1])
    assert torch.equal(load_dataset("folder", tree, 8).train.images, expected)


def test_changing_the_images_in_memory_leaves_the_cache_alone(tree: Path) -> None:
    load_dataset("folder", tree, 8).train.images.fill_(7)
    assert load_dataset("folder", tree, 8).train.images[:, 0, 0, 0].tolist() == [0, 10]


def folder_problem(folder: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset("folder", folder, 8)
    return str(caught.value)


# Where EXIF says that the stored picture's first row and first column are: (rows, columns).
ORIENTATIONS = {
    None: ("top", "left"),
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
    9: ("top", "left"),  # means nothing
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photo_is_turned_upright(tmp_path: Path, orientation: int | None) -> None:
    """By the definition of each orientation, on a picture that is no two ways alike."""
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    for split in ("train", "test"):
        path = tmp_path / "images" / split / "a" / "1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path, exif=exif)
    found = load_dataset("folder", tmp_path / "images", 8).train.images[0, 0].numpy()
    row, column = ORIENTATIONS[orientation]
    side = {"top": found[0], "bottom": found[-1], "left": found[:, 0], "right": found[:, -1]}
    assert sorted(side[row]) == sorted(pixels[0])
    assert sorted(side[column]) == sorted(pixels[:, 0])


@pytest.mark.parametrize("note", [b"Exif\0\0MM\0*broken", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
@pytest.mark.filterwarnings("error")
def test_a_damaged_note_of_a_camera_leaves_the_photo_as_it_is(tmp_path: Path, note: bytes) -> None:
    """In silence."""
    for split in ("train", "test"):
        path = tmp_path / "images" / split / "a" / "1.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (200, 0, 0)).save(path, exif=note)
    assert load_dataset("folder", tmp_path / "images", 8).train.images[0, 0, 0, 0] >= 190


def test_what_is_no_picture_by_its_name_is_told(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "train/cat/notes.txt").write_text("no picture")
    (tree / "test/dog/more").mkdir()
    (tree / "train/stray.png").write_text("of no class")
    (tree / "train/.hidden").write_text("")
    data = load_dataset("folder", tree, 8)
    message = caplog.messages[-1]
    assert "3 files or folders are skipped, such as train/stray.png; " in message
    assert ".png" in message
    assert message == f"warning: {data.warnings[0]}"


def test_an_accent_is_one_letter_in_both_spellings(tree: Path) -> None:
    """As macOS and Linux write folder names."""
    (tree / "train/dog").rename(tree / "train/caf\u00e9")
    (tree / "test/dog").rename(tree / "test/cafe\u0301")
    data = load_dataset("folder", tree, 8)
    assert data.classes == ("caf\u00e9", "cat")
    assert data.train.images[:, 0, 0, 0].tolist() == [10, 0]
    assert data.test.images[:, 0, 0, 0].tolist() == [30, 20]


def test_two_spellings_of_one_class_are_refused(tree: Path) -> None:
    for name in ("caf\u00e9", "cafe\u0301"):
        save_colour(tree / "train" / name / "1.png", (1, 2, 3))
    assert "have the same name, spelled in two ways" in folder_problem(tree)


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "tiny", "folder"])
def test_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match=r"--dataset_path: .*file is no folder"):
        load_dataset(name, path, 32)


def test_folder_needs_a_path() -> None:
    assert folder_problem(None).startswith("--dataset_path: a value is needed")


def test_folder_refuses_classes_that_differ(tree: Path) -> None:
    (tree / "test" / "dog").rename(tree / "test" / "bird")
    problem = folder_problem(tree)
    assert f"only {tree / 'train'} has dog; only {tree / 'test'} has bird; give both" in problem


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_names_the_missing_folder(tree: Path, split: str) -> None:
    (tree / split).rename(tree / "elsewhere")
    assert f"{tree / split} is not a folder" in folder_problem(tree)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    assert f"{tmp_path / 'images' / 'train'} has no class folders" in folder_problem(
        tmp_path / "images"
    )


@pytest.mark.parametrize("emptied", [["train"], ["test"], ["train", "test"]])
def test_folder_without_images_is_refused(tree: Path, emptied: list[str]) -> None:
    for split in emptied:
        for name in ("cat", "dog"):
            (tree / split / name / "1.png").unlink()
    assert "no image" in folder_problem(tree)


def test_a_corrupt_image_is_named_and_nothing_is_cached(tree: Path, root: Path) -> None:
    broken = tree / "test" / "cat" / "2.png"
    whole = save_colour(broken, (1, 2, 3), size=(64, 64)).read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        assert folder_problem(tree).startswith(f"{broken}: not a readable image")
        assert cache_files(root) == []


def test_a_file_that_cannot_be_opened_is_named(tree: Path) -> None:
    """A dangling link, and a folder that is named like an image."""
    link = tree / "train" / "cat" / "2.png"
    link.symlink_to(tree / "nowhere.png")
    assert str(link) in folder_problem(tree)
    link.unlink()
    link.mkdir()
    assert str(link) in folder_problem(tree)


def test_a_file_name_that_is_no_unicode_is_fine(tree: Path) -> None:
    """Names from an archive of another system may hold any byte."""
    image = tree / "train" / "cat" / "1.png"
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/\xff.png"))
    assert load_dataset("folder", tree, 8).train.images[:, 0, 0, 0].tolist() == [0, 10]


# --- CIFAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("cifar10", 10), ("cifar100", 2)])
def test_cifar_is_read_from_the_official_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """CIFAR-10 has five training files, CIFAR-100 one; each of ours holds two images."""
    data = load_dataset(name, official_cifar(tmp_path / "downloads", name, monkeypatch), 32)
    assert data.name == name
    assert data.train.images.shape == (count, 3, 32, 32)
    assert data.test.images.shape == (2, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == list(range(count))
    planes = torch.tensor([[i, 100 + i, 200 + i] for i in range(count)], dtype=torch.uint8)
    assert torch.equal(data.train.images, planes.view(count, 3, 1, 1).expand(-1, -1, 32, 32))
    assert data.classes[1] == "class 1"
    assert len(data.classes) == {"cifar10": 10, "cifar100": 100}[name]


def test_cifar_is_looked_for_in_the_checkout_by_default(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official_cifar(root / "data", "cifar10", monkeypatch)
    assert len(load_dataset("cifar10", None, 32).train) == 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny"])
def test_official_sets_are_found_where_backdoorbench_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In data/<name>/, extracted or as archives."""
    source = official(name, tmp_path / "source", monkeypatch)
    expected = load_dataset(name, source, 32).fingerprint()
    if name == "gtsrb":
        shutil.copytree(source / "gtsrb", tmp_path / "data/gtsrb")
    else:
        shutil.copytree(source, tmp_path / "data" / name)
    assert load_dataset(name, tmp_path / "data", 32).fingerprint() == expected
    (tmp_path / "packed").mkdir()
    packed(name, source, tmp_path / "packed" / name, monkeypatch)
    assert load_dataset(name, tmp_path / "packed", 32).fingerprint() == expected
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [name]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_may_be_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of any name; what is missing there is told, and nothing is downloaded into it."""
    source = official_cifar(tmp_path / "source", name, monkeypatch)
    expected = load_dataset(name, source, 32).fingerprint()
    (inside,) = source.iterdir()
    assert load_dataset(name, inside, 32).fingerprint() == expected
    own = inside.rename(tmp_path / "mine")
    assert load_dataset(name, own, 32).fingerprint() == expected
    next(path for path in own.iterdir() if "test" in path.name).unlink()
    with pytest.raises(
        UserError, match=rf"^{own}: is damaged or incomplete .*; put its files back"
    ):
        load_dataset(name, own, 32)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(
    ("name", "entry"), [("cifar10", "batches.meta"), ("cifar100", "meta"), ("gtsrb", "Train")]
)
def test_other_things_in_the_folder_of_downloads_are_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, entry: str, is_file: bool
) -> None:
    """Whether the set is there already, or has to be downloaded."""
    source = official(name, tmp_path / "source", monkeypatch)
    expected = load_dataset(name, source, 32).fingerprint()
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    (tmp_path / "data").mkdir()
    for folder in (source, tmp_path / "data"):
        (folder / entry).write_text("") if is_file else (folder / entry / "a").mkdir(parents=True)
    assert load_dataset(name, source, 32).fingerprint() == expected
    with pytest.raises(UserError, match="not found and the download failed"):
        load_dataset(name, tmp_path / "data", 32)


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "tiny"])
def test_a_folder_without_a_folder_around_it_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A typing error; a new folder in one that is there is what a download may go to."""
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"^--dataset_path: .*no/where is no folder, and .*no is"):
        load_dataset(name, tmp_path / "no/where", 32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not found and the download failed"):
        load_dataset(name, tmp_path / "new", 32)


def test_cifar_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset("cifar10", official_cifar(tmp_path / "d", "cifar10", monkeypatch), 16)
    assert data.image_shape == (3, 16, 16)
    assert data.train.images[3, :, 5, 5].tolist() == [3, 103, 203]


def test_cifar_has_the_published_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten = load_dataset("cifar10", official_cifar(tmp_path / "a", "cifar10", monkeypatch), 32)
    hundred = load_dataset("cifar100", official_cifar(tmp_path / "b", "cifar100", monkeypatch), 32)
    assert (ten.mean, ten.std) == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
    assert hundred.mean == (0.5071, 0.4865, 0.4409)
    assert hundred.std == (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize(
    ("name", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")],
)
def test_a_failing_download_says_where_to_put_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path / "empty", 32)
    for part in (f"--dataset {name}", str(tmp_path / "empty"), "no route", archive):
        assert part in str(caught.value)


def test_a_damaged_cifar_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is missing: it is said which folder to remove, and no download is tried."""
    folder = official_cifar(tmp_path / "d", "cifar10", monkeypatch)
    (folder / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match="cifar-10-batches-py: is damaged or incomplete"):
        load_dataset("cifar10", folder, 32)


def packed(name: str, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The miniature in `source` as the archives of the real one, with their names, in `folder`."""

    def described(archive: Archive, inside: str, extension: str) -> Archive:
        base = folder / archive.name.removesuffix(f".{extension}")
        kind = {"zip": "zip", "tar.gz": "gztar"}[extension]
        file = Path(shutil.make_archive(str(base), kind, source / inside, archive.content))
        digest = hashlib.md5(file.read_bytes()).hexdigest()
        files.append(file)
        return dataclasses.replace(archive, md5=digest)

    files: list[Path] = []
    folder.mkdir()
    if name == "gtsrb":
        archives = [described(a, "gtsrb", "zip") for a in utils.data.datasets._GTSRB_ARCHIVES]
        monkeypatch.setattr(utils.data.datasets, "_GTSRB_ARCHIVES", archives)
    elif name == "tiny":
        archive = described(utils.data.datasets._TINY_ARCHIVE, "", "zip")
        monkeypatch.setattr(utils.data.datasets, "_TINY_ARCHIVE", archive)
    else:
        cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
        reader = cifar[name]
        archive = described(Archive(reader.url, "", reader.base_folder), "", "tar.gz")
        monkeypatch.setattr(reader, "tgz_md5", archive.md5)
    return files


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny"])
def test_archives_are_checked_and_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One cut short is said so, and leaves nothing; whole ones give what their content gives."""
    source = official(name, tmp_path / "source", monkeypatch)
    expected = load_dataset(name, source, 32).fingerprint()
    folder = tmp_path / "archives"
    last = packed(name, source, folder, monkeypatch)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-5])
    with pytest.raises(UserError) as caught:
        load_dataset(name, folder, 32)
    assert f"{last}: is damaged or incomplete (its md5 is not " in str(caught.value)
    last.write_bytes(whole)
    assert load_dataset(name, folder, 32).fingerprint() == expected
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "gtsrb",
            "GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip, GTSRB_Final_Test_GT.zip",
        ),
        ("tiny", "tiny-imagenet-200.zip"),
    ],
)
def test_without_a_network_the_wanted_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wanted: str
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path, 32)
    assert f"put {wanted} into {tmp_path}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- GTSRB --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "backdoorbench"])
@pytest.mark.parametrize("inside", [False, True])
def test_gtsrb_is_read_in_both_layouts(tmp_path: Path, layout: str, inside: bool) -> None:
    """From the folder of downloads and from gtsrb/ itself; labels follow the csv files."""
    folder = official_gtsrb(tmp_path / "downloads", layout, count=2)
    data = load_dataset("gtsrb", folder / "gtsrb" if inside else folder, 32)
    assert data.name == "gtsrb"
    assert data.train.images.shape == (86, 3, 32, 32)
    assert data.train.labels.tolist() == [label for label in range(43) for _ in range(2)]
    assert data.train.images[:, 0, 9, 9].tolist() == data.train.labels.tolist()
    assert data.train.images[:4, 1, 0, 0].tolist() == [0, 10, 0, 10]
    assert data.test.labels.tolist() == [3, 1, 4, 1]
    assert data.test.images[:, :, 31, 31].tolist() == [[i, 0, 200] for i in range(4)]
    assert len(data.classes) == 43
    assert (data.mean, data.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        ("gtsrb", "43 classes, 43 training and 4 test", "43, 39209 and 12630"),
        ("tiny", "200 classes, 200 training and 3 test", "200, 100000 and 10000"),
    ],
)
def test_a_part_of_an_official_set_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    found: str,
    wanted: str,
) -> None:
    load_dataset(name, official(name, tmp_path, monkeypatch), 32)
    assert f"has {found} images, where the official set has {wanted}" in caplog.messages[-1]


def test_sets_without_a_picture_are_refused(tmp_path: Path, root: Path) -> None:
    """Before anything is decoded; folders that somebody emptied, and lists of no picture."""
    signs = official_gtsrb(tmp_path / "signs")
    for file in signs.rglob("GT-*.csv"):
        header = file.read_text().splitlines()[0]
        if file.name != "GT-final_test.csv":
            file.write_text(f"{header}\n")
    with pytest.raises(UserError, match=r"^--dataset gtsrb: the training set has no image; give"):
        load_dataset("gtsrb", signs, 8)
    signs = official_gtsrb(tmp_path / "others")
    (signs / "gtsrb" / "GT-final_test.csv").write_text(f"{header}\n")
    with pytest.raises(UserError, match=r"^--dataset gtsrb: the test set has no image; give"):
        load_dataset("gtsrb", signs, 8)
    (signs / "gtsrb" / "GT-final_test.csv").write_text("Filename;Width\n")
    with pytest.raises(UserError, match=r"GT-final_test.csv: has no columns Filename and ClassId"):
        load_dataset("gtsrb", signs, 8)
    tiny = official_tiny(tmp_path / "tiny", classes=10)
    for file in tiny.rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(UserError, match=r"^--dataset tiny: the training set has no image; give"):
        load_dataset("tiny", tiny, 8)
    assert cache_files(root) == []


def test_gtsrb_is_decoded_once(tmp_path: Path, root: Path) -> None:
    folder = official_gtsrb(tmp_path)
    load_dataset("gtsrb", folder, 32)
    load_dataset("gtsrb", folder, 32)
    (cache,) = cache_files(root)
    assert cache.stat().st_size == 47 * 3 * 32 * 32


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("GT-final_test.csv", "Filename;Width\n1.ppm;3\n", "has no columns Filename and ClassId"),
        ("GT-final_test.csv", "Filename;ClassId\n1.ppm;x\n", "has no columns Filename and ClassId"),
        ("GT-final_test.csv", "Filename;ClassId\n00001.ppm;43\n", "names class 43; GTSRB has 0 to"),
        ("GT-final_test.csv", "Filename;ClassId\n99999.ppm;3\n", "99999.ppm: cannot be read"),
        ("GT-final_test.csv", "ClassId;Filename\n3\n", "has no columns Filename and ClassId"),
        (
            "GTSRB/Final_Training/Images/00007/GT-00007.csv",
            "Filename;ClassId\n00000_00000.ppm;8\n",
            "GT-00007.csv: names other classes than 7",
        ),
        ("GTSRB/Final_Training/Images/00007/GT-00007.csv", None, "GT-00007.csv: cannot be read"),
    ],
)
def test_a_damaged_gtsrb_names_the_file(
    tmp_path: Path, file: str, text: str | None, problem: str
) -> None:
    path = official_gtsrb(tmp_path) / "gtsrb" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_dataset("gtsrb", tmp_path, 32)
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- Tiny ImageNet ------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("layout", ["official", "sorted", "deeper"])
def test_tiny_is_read_in_its_layouts(tmp_path: Path, layout: str, inside: bool) -> None:
    """Classes in the order of their ids, not of the list; validation images are the test set, by
    class, then by name as text: 11 before 9."""
    folder = official_tiny(tmp_path / "downloads", layout=layout)
    data = load_dataset("tiny", folder / "tiny-imagenet-200" if inside else folder, 64)
    assert data.train.images.shape == (200, 3, 64, 64)
    assert data.train.labels.tolist() == list(range(200))
    assert data.train.images[:, 1, 5, 60].tolist() == list(range(200))
    assert data.test.labels.tolist() == [0, 7, 7]
    assert data.test.images[:, 2, 0, 0].tolist() == [110, 111, 109]
    assert (data.classes[0], data.classes[9]) == ("name 0", "n00000009")
    assert data.mean == (0.4802, 0.4481, 0.3975)
    assert data.std == (0.2302, 0.2265, 0.2262)


def test_an_incomplete_tiny_is_refused(tmp_path: Path) -> None:
    folder = official_tiny(tmp_path, count=2) / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    for text, problem in (
        (whole + "val_8.JPEG\tn99999999\t1\t1\t1\t1\n", "n99999999 1 1 1 1 names no class"),
        (whole + "val_8.JPEG\tn00000001\t1\t1\t1\t1\n", "val_8.JPEG: cannot be read"),
        (whole + "/etc/passwd\tn00000001\t1\t1\t1\t1\n", "images/passwd: cannot be read"),
    ):
        annotations.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_dataset("tiny", tmp_path, 64)
        assert problem in str(caught.value)
    (folder / "train/n00000005/images/n00000005_1.JPEG").unlink()
    for path, way in ((tmp_path, "remove that folder"), (folder, "put its files back")):
        message = rf"is incomplete \(class n00000005 has fewer .*; {way}"
        with pytest.raises(UserError, match=message):
            load_dataset("tiny", path, 64)
    (folder / "words.txt").unlink()
    with pytest.raises(UserError, match=r"words.txt: cannot be read \(No such file"):
        load_dataset("tiny", tmp_path, 64)
