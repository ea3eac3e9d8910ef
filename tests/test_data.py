"""Datasets as uint8 tensors, augmentation, and the fingerprint that a record keeps."""

import dataclasses
import os
import pickle
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from utils.data import Dataset, Labelled, as_float, augment, load_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads and decoded images go here instead of into the checkout."""
    monkeypatch.setattr("utils.data.ROOT", tmp_path / "root")
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
    assert "digits, cifar10, cifar100, folder" in str(caught.value)


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


def test_folder_needs_a_path() -> None:
    assert folder_problem(None).startswith("--dataset_path: a value is needed")


def test_folder_refuses_classes_that_differ(tree: Path) -> None:
    (tree / "test" / "dog").rename(tree / "test" / "bird")
    problem = folder_problem(tree)
    assert f"{tree / 'train'} has cat, dog" in problem
    assert f"{tree / 'test'} has bird, cat" in problem


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


def official_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Miniature pickles in the official layout, two images a file, accepted in place of the real.

    Image number i of a split has the red plane i, green 100 + i, blue 200 + i, and the label i.
    """
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        name
    ]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder = folder / source.base_folder
    folder.mkdir(parents=True)
    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, [[file, None] for file in files])
        for number, file in enumerate(files):
            rows = [
                np.repeat(np.array([i, 100 + i, 200 + i], dtype=np.uint8), 1024)
                for i in (2 * number, 2 * number + 1)
            ]
            content: dict[str, Any] = {"data": np.stack(rows), key: [2 * number, 2 * number + 1]}
            (folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    names = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: names}))
    return folder.parent


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
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path / "empty", 32)
    for part in (f"--dataset {name}", str(tmp_path / "empty"), "no route", archive):
        assert part in str(caught.value)


# --- batches ------------------------------------------------------------------------------------


def numbered(count: int, size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Images whose pixels are 1, 2, 3, ... in reading order, so that any crop tells its place."""
    pixels = torch.arange(1, size * size + 1, dtype=dtype).view(1, 1, size, size)
    return pixels.expand(count, 3, size, size).clone()


def test_crops_lie_in_the_padded_image_each_at_its_own_place() -> None:
    """Padding 1 leaves 3 x 3 places; 300 crops meet all nine, and each is one of them exactly."""
    images = numbered(300, 4)
    padded = torch.zeros(3, 6, 6, dtype=torch.uint8)
    padded[:, 1:5, 1:5] = images[0]
    places = {
        tuple(padded[:, top : top + 4, left : left + 4].flatten().tolist()): (top, left)
        for top in range(3)
        for left in range(3)
    }
    crops = augment(images, 1, False, torch.Generator().manual_seed(0))
    assert crops.shape == images.shape
    met = Counter(places[tuple(crop.flatten().tolist())] for crop in crops)
    assert len(met) == 9


def test_crops_may_be_mirrored_too() -> None:
    """Every result is one of the nine crops or the mirror of one, and both kinds occur."""
    images = numbered(200, 4)
    padded = torch.zeros(3, 6, 6, dtype=torch.uint8)
    padded[:, 1:5, 1:5] = images[0]
    crops = [padded[:, r : r + 4, c : c + 4] for r in range(3) for c in range(3)]
    straight = {tuple(crop.flatten().tolist()) for crop in crops}
    mirrored = {tuple(crop.flip(2).flatten().tolist()) for crop in crops}
    found = {
        tuple(image.flatten().tolist())
        for image in augment(images, 1, True, torch.Generator().manual_seed(0))
    }
    assert found <= straight | mirrored
    assert found & straight
    assert found & mirrored


def test_no_padding_and_no_flip_change_nothing() -> None:
    images = numbered(5, 4)
    assert torch.equal(augment(images, 0, False), images)


def test_a_flip_mirrors_columns_of_half_of_the_images() -> None:
    """Of 2,000 images 1,000 are expected, with a standard deviation of sqrt(500) = 22.4.

    Within 4.5 deviations is 0.45 to 0.55.
    """
    images = numbered(2000, 4)
    flipped = augment(images, 0, True, torch.Generator().manual_seed(0))
    is_mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    is_same = (flipped == images).flatten(1).all(1)
    assert (is_mirrored ^ is_same).all()
    assert 0.45 < is_mirrored.double().mean() < 0.55


def test_augmentation_depends_on_its_generator_alone() -> None:
    images = numbered(20, 6)
    results = [augment(images, 2, True, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_augmentation_keeps_the_type_and_leaves_its_input_alone(dtype: torch.dtype) -> None:
    images = numbered(20, 4, dtype)
    result = augment(images, 1, True, torch.Generator().manual_seed(0))
    assert result.dtype == dtype
    assert torch.equal(images, numbered(20, 4, dtype))


def test_rectangular_images_keep_their_shape() -> None:
    images = torch.zeros(2, 3, 4, 7, dtype=torch.uint8)
    assert augment(images, 2, True).shape == (2, 3, 4, 7)


def test_as_float_divides_by_255_and_leaves_its_input_alone() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = as_float(images)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert images.flatten().tolist() == [0, 51, 255]


def test_as_float_takes_pixels_that_are_float_already() -> None:
    images = torch.tensor([0.0, 0.25, 1.0]).view(1, 3, 1, 1)
    assert torch.equal(as_float(images, torch.device("cpu")), images)


def test_as_float_gives_channels_last_memory() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert as_float(images).is_contiguous(memory_format=torch.channels_last)


# --- fingerprint --------------------------------------------------------------------------------


def with_test(data: Dataset, images: torch.Tensor, labels: torch.Tensor) -> Dataset:
    return dataclasses.replace(data, test=Labelled(images, labels))


def test_the_fingerprint_tells_pixels_labels_and_classes_apart(tiny_data: Dataset) -> None:
    """One pixel, one label, one class name: each alone gives another fingerprint."""
    pixels = tiny_data.test.images.clone()
    pixels[4, 1, 2, 3] += 1
    labels = tiny_data.test.labels.clone()
    labels[4] = 0
    variants = [
        tiny_data,
        with_test(tiny_data, pixels, tiny_data.test.labels),
        with_test(tiny_data, tiny_data.test.images, labels),
        dataclasses.replace(tiny_data, classes=("ant", "bee", "cow")),
        dataclasses.replace(tiny_data, train=tiny_data.test, test=tiny_data.train),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)


def test_the_fingerprint_is_that_of_the_content(tiny_data: Dataset) -> None:
    """A copy, whatever its order in memory, has the same fingerprint."""
    copied = tiny_data.test.images.clone(memory_format=torch.channels_last)
    copy = with_test(tiny_data, copied, tiny_data.test.labels.clone())
    assert copy.fingerprint() == tiny_data.fingerprint()


def test_rows_of_a_split_are_picked_by_index(tiny_data: Dataset) -> None:
    picked = tiny_data.train.at(torch.tensor([4, 2]))
    assert picked.labels.tolist() == [1, 2]
    assert torch.equal(picked.images[0], tiny_data.train.images[4])
