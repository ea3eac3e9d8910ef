"""BPP: quantization, dithering, and what its batches hold."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attack.bpp import Bpp, Config, dither, quantize
from attack.controlled import stored
from attack.setting import Setting
from utils.data.batches import as_float
from utils.data.labelled import Dataset, Labelled

STILL = {"crop_probability": 0.0, "rotation_probability": 0.0, "flip": False}
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_levels() -> torch.Tensor:
    """Every grey level once, in three channels: uint8 (1, 3, 16, 16)."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)


class Recorder(nn.Module):
    """Keeps the images that it is given; its logits are fixed random numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return torch.randn(len(images), 3, generator=rng(9))


def control(data: Dataset, **changes: Any) -> Bpp:
    config = Config.load("cifar10", **(STILL | {"pratio": 0.25, "neg_ratio": 0.25} | changes))
    return Bpp(config, Setting(data, torch.device("cpu"), "fp32"))


# --- the trigger --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truncate", "levels", "largest"),
    [
        (False, [0, 36, 73, 109, 146, 182, 219, 255], 18),
        (True, [0, 36, 72, 109, 145, 182, 218, 255], 19),
    ],
)
def test_eight_levels_as_they_are_stored(truncate: bool, levels: list[int], largest: int) -> None:
    """255 i / 7 is 36.43, 72.86, 109.29, 145.71, 182.14, 218.57.

    Nearest levels are 255 / 14 = 18.2 away at most; cutting off .86 makes it a whole 19.
    """
    images = all_levels()
    split = Labelled(images, torch.zeros(1, dtype=torch.int64))
    data = Dataset("levels", split, split, ("a",), CIFAR_MEAN, CIFAR_STD)
    found = stored(quantize(images / 255, 8), data, truncate)
    assert found.unique().tolist() == levels
    assert (found.int() - images.int()).abs().max() == largest


@pytest.mark.parametrize("levels", [2, 3, 8, 32, 256])
def test_quantization_is_to_the_nearest_level(levels: int) -> None:
    """Not farther than half of 1 / (q - 1), and all q levels are met by 256 grey levels."""
    images = all_levels() / 255
    found = quantize(images, levels)
    assert len(found.unique()) == levels
    assert (found - images).abs().max() <= 0.5 / (levels - 1) + 1e-6
    assert torch.equal(quantize(found, levels), found)


def test_thirty_two_levels_change_up_to_four() -> None:
    """255 / 62 = 4.1."""
    changed = (quantize(all_levels() / 255, 32) * 255).round() - all_levels()
    assert changed.abs().max() == 4


def test_stored_quantized_images_are_quantized_to_themselves() -> None:
    """Rounding moves a level by less than half a grey level, never to another one's side."""
    once = (quantize(all_levels() / 255, 8) * 255).round()
    assert torch.equal((quantize(once / 255, 8) * 255).round(), once)


def test_halves_go_to_the_even_level() -> None:
    """Of three levels 0.25 lies between 0 and 1, 0.75 between 1 and 2; grey levels never do."""
    assert quantize(torch.tensor([[[[0.25, 0.75]]]]), 3).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("apply", [quantize, dither])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_saturated_images_stay_as_they_are(apply: Any, value: float) -> None:
    images = torch.full((2, 3, 16, 16), value)
    assert torch.equal(apply(images, 8), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("apply", [quantize, dither])
def test_images_of_any_size_get_at_most_eight_values(apply: Any, size: int, channels: int) -> None:
    images = torch.rand(2, channels, size, size, generator=rng())
    found = apply(images, 8)
    assert found.shape == images.shape
    assert len(found.unique()) == 8
    assert 0.02 < (found - images).abs().mean() < 0.06  # 255 / 28 of 255 is 0.036


def test_an_even_grey_image() -> None:
    """128 / 255 * 7 = 3.51 is nearest to 4: 146 / 255 after rounding."""
    found = quantize(torch.full((1, 1, 28, 28), 128 / 255), 8) * 255
    assert found.round().unique().tolist() == [146]


# --- dithering ----------------------------------------------------------------------------------


def test_two_by_two_pixels_by_hand() -> None:
    """Two levels, 0.4 everywhere, in sixteenths of handed-on errors.

    (0, 0): 0.4 -> 0, error 0.4. (0, 1): 0.4 + 7/16 * 0.4 = 0.575 -> 1, error -0.425.
    (1, 0): 0.4 + 5/16 * 0.4 - 3/16 * 0.425 = 0.4453 -> 0, error 0.4453.
    (1, 1): 0.4 + 1/16 * 0.4 - 5/16 * 0.425 + 7/16 * 0.4453 = 0.487 -> 0.
    """
    assert dither(torch.full((1, 1, 2, 2), 0.4), 2).tolist() == [[[[0, 1], [0, 0]]]]


def literal_dither(image: torch.Tensor, levels: int) -> torch.Tensor:
    """Pixel by pixel in raster order, errors pushed on to the neighbours; (H, W) float64."""
    work, result = image.clone(), torch.zeros_like(image)
    height, width = image.shape
    for i in range(height):
        for j in range(width):
            result[i, j] = round(float(work[i, j]) * (levels - 1)) / (levels - 1)
            error = work[i, j] - result[i, j]
            for di, dj, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + di < height and 0 <= j + dj < width:
                    work[i + di, j + dj] += error * share / 16
    return (result * 255).round() / 255


@pytest.mark.parametrize(("height", "width"), [(1, 5), (5, 1), (7, 7), (3, 10), (10, 3)])
@pytest.mark.parametrize("levels", [2, 8])
def test_fronts_give_what_raster_order_gives(height: int, width: int, levels: int) -> None:
    images = torch.rand(2, 3, height, width, generator=rng(), dtype=torch.float64)
    found = dither(images, levels)
    for image, result in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
        torch.testing.assert_close(result, literal_dither(image, levels), atol=1e-9, rtol=0)


def test_dithering_keeps_the_mean() -> None:
    """What is not handed on over the border is lost: a few percent of a level."""
    images = torch.full((1, 1, 32, 32), 0.3)
    assert dither(images, 2).mean().item() == pytest.approx(0.3, abs=0.02)
    assert quantize(images, 2).mean() == 0


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pratio", "neg_ratio", "counts"),
    [(0.1, 0.1, (12, 12)), (0.05, 0.1, (6, 12)), (0.8, 0.5, (102, 26)), (0.1, 0.0, (12, 0))],
)
def test_published_counts_of_a_batch(
    tiny_data: Dataset, pratio: float, neg_ratio: float, counts: tuple[int, int]
) -> None:
    """Of 128; 102 poisoned leave room for 26 of 64."""
    attack = control(tiny_data, pratio=pratio, neg_ratio=neg_ratio)
    assert attack.poisoned_per_batch(128) == counts


def test_a_batch_is_poisoned_negative_and_clean(tiny_data: Dataset) -> None:
    """A quarter of 12 images each is 3, and 6 are left.

    Labels are 0 1 2 0 1 2 ...: the first three become the target 1, negatives keep theirs. What a
    negative has more than its image, unless that was clamped, is what storing some other training
    image's trigger changes: whole grey levels, 18 at most.
    """
    attack, model = control(tiny_data, attack_target=1), Recorder()
    images, labels = as_float(tiny_data.train.images), tiny_data.train.labels
    loss = attack.loss(model, tiny_data.train.images, labels)
    torch.testing.assert_close(model.images[:3], quantize(images[:3], 8))
    torch.testing.assert_close(model.images[6:], images[6:])
    residual = (model.images[3:6] - images[3:6]) * 255
    residuals = (quantize(images, 8) * 255).round() - images * 255
    for found, image in zip(residual, images[3:6], strict=True):
        expected = ((image * 255 + residuals).clamp(0, 255) - image * 255).round()
        assert (expected == found.round()).flatten(1).all(dim=1).any()
    expected_labels = torch.cat([torch.tensor([1, 1, 1]), labels[3:]])
    torch.testing.assert_close(loss, F.cross_entropy(model(images), expected_labels))


def test_every_negative_gets_a_partner_of_its_own(tiny_data: Dataset) -> None:
    """Equal images with drawn residuals: sixty batches of three see many of the twelve."""
    attack, model = control(tiny_data), Recorder()
    same = torch.full_like(tiny_data.train.images, 100)
    seen = set()
    for _ in range(60):
        attack.loss(model, same, tiny_data.train.labels)
        seen |= {tuple(image.flatten().tolist()) for image in model.images[3:6]}
    assert len(seen) == 12


def test_a_batch_without_poison_has_no_negatives(tiny_data: Dataset) -> None:
    attack, model = control(tiny_data, pratio=1e-9), Recorder()
    assert attack.poisoned_per_batch(12) == (0, 0)
    loss = attack.loss(model, tiny_data.train.images, tiny_data.train.labels)
    images = as_float(tiny_data.train.images)
    torch.testing.assert_close(model.images, images)
    torch.testing.assert_close(loss, F.cross_entropy(model(images), tiny_data.train.labels))


def test_the_flag_dithers(tiny_data: Dataset) -> None:
    images = as_float(tiny_data.test.images)
    plain, dithered = (control(tiny_data, dithering=flag) for flag in (False, True))
    index = torch.arange(9)
    torch.testing.assert_close(plain.trigger(images, index), quantize(images, 8))
    torch.testing.assert_close(dithered.trigger(images, index), dither(images, 8))


def test_cross_images_get_the_residual_with_its_sign(tiny_data: Dataset) -> None:
    """Every training image is c = 100 / 255: 100 / 255 * 7 = 2.7 -> 3, stored as 109: +9.

    A test image of 50 becomes 59, one of 250 is clamped to 255.
    """
    grey = torch.full((12, 3, 8, 8), 100, dtype=torch.uint8)
    data = Dataset(
        "grey",
        Labelled(grey, tiny_data.train.labels),
        tiny_data.test,
        tiny_data.classes,
        tiny_data.mean,
        tiny_data.std,
    )
    for value, expected in ((50, 59), (250, 255)):
        images = torch.full((2, 3, 8, 8), value / 255)
        found = control(data).cross(images, torch.tensor([0, 20])) * 255
        torch.testing.assert_close(found, torch.full_like(found, expected))


def test_stored_cross_images_depend_on_their_index_alone(tiny_data: Dataset) -> None:
    attack, images = control(tiny_data), as_float(tiny_data.test.images)
    everything = attack.cross(images, torch.arange(9))
    assert torch.equal(everything[4:6], attack.cross(images[4:6], torch.tensor([4, 5])))
    assert torch.equal(everything, control(tiny_data).cross(images, torch.arange(9)))
    assert not torch.equal(
        everything, control(tiny_data, random_seed=1).cross(images, torch.arange(9))
    )
