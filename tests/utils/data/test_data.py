"""Batches, augmentation, and the fingerprint that a record keeps."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.data.batches import as_float, augment, least_share, mapped, release, whole_share
from utils.data.datasets import load_dataset
from utils.data.labelled import Dataset, Labelled
from utils.errors import UserError
from utils.process import distributed

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


@pytest.mark.parametrize(("count", "processes"), [(5, 2), (7, 3), (6, 2), (4, 1)])
def test_a_part_of_a_batch_moves_as_in_the_whole(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 2 and 3, of 2, 2 and 3, of 3 each; the generators draw on in step, too."""
    images = numbered(count, 4)
    rng = torch.Generator().manual_seed(3)
    expected = [augment(images, 2, True, rng) for _ in range(2)]
    after = torch.rand(1, generator=rng)
    monkeypatch.setattr(distributed, "processes", lambda: processes)
    monkeypatch.setattr(distributed, "total", lambda values: torch.tensor(count))
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own, rng = images[distributed.part(count)], torch.Generator().manual_seed(3)
        parts.append([augment(own, 2, True, rng, is_part=True) for _ in range(2)])
        assert torch.equal(torch.rand(1, generator=rng), after)
    for number, whole in enumerate(expected):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole)


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


# --- mapped files -------------------------------------------------------------------------------


def resident_mib() -> float:
    """Memory of this process that maps files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = [int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:"))]
    return sum(kib) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_released_pages_leave_memory_and_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB of a mapped file are read, given back, and read again."""
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 256, 256), dtype=np.uint8)
    pixels.tofile(tmp_path / "pixels.bin")
    images = mapped(tmp_path / "pixels.bin", (1024, 1, 256, 256))
    before = resident_mib()
    assert images.sum() == pixels.sum()
    assert resident_mib() > before + 50
    release(images)  # a small file may stay
    assert resident_mib() > before + 50
    monkeypatch.setattr("utils.data.batches.RESIDENT", 1 << 20)
    release(images[100:200])  # any part of it gives back the whole
    assert resident_mib() < before + 15
    assert torch.equal(images[7, 0], torch.from_numpy(pixels[7]))


def test_release_leaves_ordinary_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.data.batches.RESIDENT", 0)
    images = torch.arange(100, dtype=torch.uint8)
    release(images)
    assert images.tolist() == list(range(100))


@pytest.mark.parametrize("name", ["digits", "random"])
def test_a_folder_for_a_dataset_that_reads_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} is part of the program and reads no folder"):
        load_dataset(name, tmp_path, 16)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 16, 142, 1437, 50_000, 99_999])
def test_the_least_share_is_one_and_hardly_more(count: int) -> None:
    """1 / 3 in three digits is 0.333, of which three are none; 0.334 it is."""
    share = float(least_share(count))
    assert whole_share(share, count) == 1
    assert share * count < 1.011
    assert least_share(3) == "0.334"
