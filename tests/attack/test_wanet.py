"""WaNet: the warp as a function, and what its batches hold."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attack.setting import Setting
from attack.wanet import Config, WaNet, add_noise, flow_field, warp, warping_grid
from utils.data.batches import as_float
from utils.data.labelled import Dataset

SIZES = [16, 28, 32, 64]
STILL = {"crop_probability": 0.0, "rotation_probability": 0.0, "flip": False}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(size: int, seed: int = 0, s: float = 0.5) -> torch.Tensor:
    return warping_grid(flow_field(4, size, rng(seed)), s)


class Recorder(nn.Module):
    """Keeps the images that it is given; its logits are fixed random numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return torch.randn(len(images), 3, generator=rng(9))


def control(data: Dataset, **changes: Any) -> WaNet:
    config = Config.load("cifar10", **(STILL | {"pratio": 0.25} | changes))
    return WaNet(config, Setting(data, torch.device("cpu"), "fp32"))


# --- the warp -----------------------------------------------------------------------------------


def test_the_field_of_seed_0() -> None:
    """Numbers of an independent computation with the same generator."""
    field = flow_field(4, 32, rng())
    assert field.shape == (1, 32, 32, 2)
    torch.testing.assert_close(
        field[0, [0, 16], [0, 16]],
        torch.tensor([[-0.0160, 0.8444], [0.1989, 1.4000]]),
        atol=1e-4,
        rtol=0,
    )
    assert field.abs().mean().item() == pytest.approx(0.7182, abs=1e-4)


def test_fields_have_magnitudes_below_one() -> None:
    """Between the coarse points opposite directions cancel: 0.78 +- 0.07 over seeds."""
    means = torch.stack([flow_field(4, 32, rng(seed)).abs().mean() for seed in range(30)])
    assert 0.72 < means.mean() < 0.84
    assert 0.04 < means.std() < 0.1


@pytest.mark.parametrize("size", SIZES)
def test_the_corners_of_the_coarse_grid_are_those_of_the_image(size: int) -> None:
    coarse = torch.rand(1, 2, 4, 4, generator=rng(3)) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    field = flow_field(4, size, rng(3))
    for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(field[0, i, j], coarse[0, :, i, j])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pixels_move_by_a_fraction_of_a_pixel(seed: int) -> None:
    """From -1 to 1 are 31 pixels, so a grid difference of 2 / 31 is one pixel."""
    pixels = (grid_of(32, seed) - grid_of(32, seed, s=0.0)).abs() * 31 / 2
    assert 0.155 < pixels.mean() < 0.175
    assert 0.45 < pixels.max() < 0.65


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_strength_0_gives_the_image_back(size: int, channels: int) -> None:
    """Up to float32's rounding of the coordinates: 32 pixels by 1.2e-7, where neighbours differ by
    up to 1."""
    images = torch.rand(2, channels, size, size, generator=rng())
    torch.testing.assert_close(warp(images, grid_of(size, s=0.0)), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_warp_changes_images_of_any_size(size: int, channels: int) -> None:
    images = torch.rand(2, channels, size, size, generator=rng())
    warped = warp(images, grid_of(size))
    assert warped.shape == images.shape
    assert warped.min() >= 0
    assert warped.max() <= 1 + 1e-6
    assert ((warped - images).abs() > 1 / 255).float().mean() > 0.5


@pytest.mark.parametrize("size", SIZES)
def test_a_field_of_ones_moves_by_s_half_a_pixel(size: int) -> None:
    """s (H - 1) / (2 H) pixels along the rows.

    In an image that grows by 1 / (H - 1) a column that adds s / (2 H); the last columns hold the
    edge's 1. In one that grows down the rows it adds nothing.
    """
    field = torch.tensor([1.0, 0.0]).expand(1, size, size, 2)
    growing = torch.linspace(0, 1, size).expand(1, 1, size, size)
    expected = (growing + 0.5 / (2 * size)).clamp(max=1)
    torch.testing.assert_close(warp(growing, warping_grid(field, 0.5)), expected)
    downward = growing.transpose(2, 3)
    torch.testing.assert_close(warp(downward, warping_grid(field, 0.5)), downward)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_even_images_stay_as_they_are(value: int) -> None:
    """Bilinear weights sum to 1, and the grid never leaves the image."""
    images = torch.full((1, 3, 32, 32), value / 255)
    torch.testing.assert_close(warp(images, grid_of(32)), images)
    noise = torch.rand(1, 32, 32, 2, generator=rng()) * 2 - 1
    torch.testing.assert_close(warp(images, add_noise(grid_of(32), noise)), images)


def test_warping_pixels_is_warping_normalized_images() -> None:
    images, grid = torch.rand(2, 3, 32, 32, generator=rng()), grid_of(32)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.243, 0.261])
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    published = warp((images - mean) / std, grid) * std + mean
    torch.testing.assert_close(warp(images, grid), published)


def test_rescaling_shrinks_the_grid() -> None:
    """At 0.5 the corner of the warped image is a quarter into the image: -1 becomes -0.5."""
    still = torch.zeros(1, 32, 32, 2)
    assert warping_grid(still, 0.5, rescale=0.5)[0, 0, 0].tolist() == [-0.5, -0.5]


def test_noise_moves_by_up_to_half_a_pixel() -> None:
    """1 / H in grid units are (H - 1) / (2 H) pixels; beyond the edge the grid is clamped."""
    still = warping_grid(torch.zeros(1, 32, 32, 2), 0.5)
    moved = add_noise(still, torch.ones(2, 32, 32, 2))
    assert moved.shape == (2, 32, 32, 2)
    torch.testing.assert_close(moved[0, 5, 5] - still[0, 5, 5], torch.full((2,), 1 / 32))
    assert moved.max() == 1


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pratio", "counts"), [(0.1, (12, 24)), (0.05, (6, 12)), (0.01, (1, 2)), (0.5, (64, 64))]
)
def test_published_counts_of_a_batch(
    tiny_data: Dataset, pratio: float, counts: tuple[int, int]
) -> None:
    """Twice as many cross images as poisoned ones, as long as the batch of 128 has room."""
    assert control(tiny_data, pratio=pratio).poisoned_per_batch(128) == counts


@pytest.mark.parametrize(("cross_ratio", "crossed"), [(0.3, 0), (0.9, 2), (1.5, 4), (5.0, 9)])
def test_a_part_of_a_cross_image_is_none(
    tiny_data: Dataset, cross_ratio: float, crossed: int
) -> None:
    """As published. Three of 12 are poisoned: 0.9, 2.7 and 4.5 are cut down; nine are left."""
    attack = control(tiny_data, cross_ratio=cross_ratio)
    assert attack.poisoned_per_batch(12) == (3, crossed)


def test_cross_images_that_no_batch_has_are_warned_of(tiny_data: Dataset) -> None:
    """Of 4 poisoned images of a batch 20 % is none, 25 % is one. Zero is the user's wish."""
    for cross_ratio, count in ((0.2, 1), (0.25, 0), (0.0, 0)):
        flags = STILL | {"pratio": 0.25, "batch_size": 16, "cross_ratio": cross_ratio}
        setting = Setting(tiny_data, torch.device("cpu"), "fp32")
        WaNet(Config.load("cifar10", **flags), setting)
        assert (
            setting.warnings
            == [
                "--cross_ratio: 0.2 of 4 poisoned images is none of a batch, so there is no cross "
                "sample; give at least 0.25"
            ][:count]
        )


def test_the_share_of_cross_images_is_exact(tiny_data: Dataset) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    flags = {"pratio": 0.5, "cross_ratio": 0.29}
    assert control(tiny_data, **flags).poisoned_per_batch(200) == (100, 29)


def test_a_batch_is_poisoned_cross_and_clean(tiny_data: Dataset) -> None:
    """A quarter of 12 images is 3; twice as many are cross; 3 are left.

    Labels are 0 1 2 0 1 2 ...: the first three become the target 1, cross images keep theirs.
    """
    attack, model = control(tiny_data, attack_target=1), Recorder()
    images, labels = as_float(tiny_data.train.images), tiny_data.train.labels
    loss = attack.loss(model, tiny_data.train.images, labels)
    torch.testing.assert_close(model.images[:3], warp(images[:3], attack.grid))
    cross = model.images[3:9]
    assert (cross - images[3:9]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert (cross - warp(images[3:9], attack.grid)).abs().amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(model.images[9:], images[9:])
    expected = torch.cat([torch.tensor([1, 1, 1]), labels[3:]])
    torch.testing.assert_close(loss, F.cross_entropy(model(images), expected))


def test_cross_images_get_new_noise_in_every_batch(tiny_data: Dataset) -> None:
    attack, model = control(tiny_data), Recorder()
    batches = []
    for _ in range(2):
        attack.loss(model, tiny_data.train.images, tiny_data.train.labels)
        batches.append(model.images)
    assert torch.equal(batches[0][:3], batches[1][:3])
    assert not torch.equal(batches[0][3:9], batches[1][3:9])


def test_a_batch_without_poison_is_clean(tiny_data: Dataset) -> None:
    attack, model = control(tiny_data, pratio=1e-9), Recorder()
    loss = attack.loss(model, tiny_data.train.images, tiny_data.train.labels)
    images = as_float(tiny_data.train.images)
    torch.testing.assert_close(model.images, images)
    torch.testing.assert_close(loss, F.cross_entropy(model(images), tiny_data.train.labels))


def test_the_warp_depends_on_the_seed_alone(tiny_data: Dataset) -> None:
    first = control(tiny_data)
    torch.manual_seed(123)
    assert torch.equal(first.grid, control(tiny_data, pratio=0.5).grid)
    assert not torch.equal(first.grid, control(tiny_data, random_seed=1).grid)


def test_test_images_get_the_warp_without_noise(tiny_data: Dataset) -> None:
    attack, images = control(tiny_data), as_float(tiny_data.test.images)
    assert torch.equal(attack.trigger(images, torch.arange(9)), warp(images, attack.grid))


def test_stored_cross_noise_depends_on_the_image_s_index_alone(tiny_data: Dataset) -> None:
    attack, images = control(tiny_data), as_float(tiny_data.test.images)
    everything = attack.cross(images, torch.arange(9))
    assert torch.equal(everything[4:6], attack.cross(images[4:6], torch.tensor([4, 5])))
    same_image = images[:1].expand(2, -1, -1, -1)
    two = attack.cross(same_image, torch.tensor([0, 1]))
    assert not torch.equal(two[0], two[1])
    assert not torch.equal(everything, attack.trigger(images, torch.arange(9)))
