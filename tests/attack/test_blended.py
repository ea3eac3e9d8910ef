"""Blended: the mixture in grey levels, at every size."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from attack.blended import Config, make_trigger
from attack.poisoning import dirty_label
from utils.data.emblem import picture

SHAPES = [(channels, size, size) for channels in (1, 3) for size in (16, 28, 32, 64)]


def triggered(images: torch.Tensor, **overrides: object) -> torch.Tensor:
    config = Config.load("cifar10", **overrides)
    return make_trigger(config, tuple(images.shape[1:]))(images, torch.arange(len(images)))


def constant(value: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.full((2, *shape), value, dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image(shape: tuple[int, int, int], value: int) -> None:
    """The mean moves by 0.2 (mean T - c), less up to one grey level of truncation.

    The first pixel of T is 245: 0 -> 49, 128 -> floor(102.4 + 49) = 151, 255 -> 204 + 49 = 253.
    """
    images = constant(value, shape)
    found = triggered(images)
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert images.unique().tolist() == [value]
    moved = float((found.double() - value).mean())
    expected = 0.2 * (float(picture(None, shape).double().mean()) - value)
    assert expected - 1 <= moved <= expected
    assert found[:, :, 0, 0].unique().tolist() == [{0: 49, 128: 151, 255: 253}[value]]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_random_images_move_by_at_most_a_fifth_and_in_every_channel(
    shape: tuple[int, int, int],
) -> None:
    """0.2 * 255 = 51; the exact mixture lies less than one grey level over the stored one."""
    images = torch.randint(
        0, 256, (20, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = triggered(images)
    assert (found.int() - images.int()).abs().max() <= 51
    lost = 0.8 * images.double() + 0.2 * picture(None, shape).double() - found.double()
    assert lost.min() > -1e-4
    assert lost.max() < 1
    assert lost.mean() == pytest.approx(0.5, abs=0.1)
    assert (found != images).any(dim=(0, 2, 3)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_itself_stays(shape: tuple[int, int, int]) -> None:
    """T truncated is at most one under T; the mixture loses at most one more."""
    images = picture(None, shape).to(torch.uint8).unsqueeze(0)
    assert (triggered(images).int() - images.int()).abs().max() <= 1


def test_alpha_is_the_share_of_the_picture() -> None:
    """At 1 the picture is all that is left; at 0.5 a black pixel over 245 becomes 122."""
    images = constant(0, (3, 32, 32))
    assert torch.equal(triggered(images, alpha=1.0)[0], picture(None, (3, 32, 32)).to(torch.uint8))
    assert triggered(images, alpha=0.5)[0, :, 0, 0].tolist() == [122] * 3


def test_the_user_s_own_picture(tmp_path: Path) -> None:
    """0.2 * (50, 100, 150) over black."""
    Image.new("RGB", (5, 9), (50, 100, 150)).save(tmp_path / "mine.png")
    found = triggered(constant(0, (3, 32, 32)), trigger_image=str(tmp_path / "mine.png"))
    assert found.flatten(2).unique(dim=2).flatten(1)[0].tolist() == [10, 20, 30]


def test_a_tenth_of_all_images_is_poisoned_whatever_their_class() -> None:
    """Of 50,000 images 5,000, some 500 of them of the target's class; all get label 0."""
    labels = torch.arange(50000) % 10
    choices = [
        dirty_label(Config.load("cifar10"), labels, 10, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert len(choices[0].index) == 5000
    assert choices[0].labels.unique().tolist() == [0]
    assert 400 < int((labels[choices[0].index] == 0).sum()) < 600
    assert torch.equal(choices[0].index, choices[1].index)
    assert not torch.equal(choices[0].index, choices[2].index)
