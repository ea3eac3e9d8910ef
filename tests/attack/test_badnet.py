"""BadNets: the square, at every size, and the published one with its rim."""

import pytest
import torch

from attack.badnet import Config, make_trigger, resized_square
from utils.errors import UserError

SHAPES = [(channels, size, size) for channels in (1, 3) for size in (16, 28, 32, 64)]
SIDES = {16: 2, 28: 3, 32: 3, 64: 6}  # max(2, round(3 H / 32)); 3 * 28 / 32 is 2.6


def triggered(images: torch.Tensor, **overrides: object) -> torch.Tensor:
    config = Config.load("cifar10", **overrides)
    return make_trigger(config, tuple(images.shape[1:]))(images, torch.arange(len(images)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_black_image_gets_a_white_square_flush_with_the_corner(
    shape: tuple[int, int, int],
) -> None:
    """At 3 x 32 x 32 these are 27 values of 255 in rows and columns 29 to 31."""
    channels, size, _ = shape
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    found = triggered(images)
    side = SIDES[size]
    assert found.unique().tolist() == [0, 255]
    assert (found == 255).flatten(1).sum(1).tolist() == [channels * side * side] * 2
    assert (found[:, :, -side:, -side:] == 255).all()
    assert images.max() == 0  # a copy


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_else_changes(shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 255, (4, *shape), dtype=torch.uint8)
    found = triggered(images)
    side = SIDES[shape[1]]
    assert float(found[:, :, -side:, -side:].float().mean()) == 255
    found[:, :, -side:, -side:] = images[:, :, -side:, -side:]
    assert torch.equal(found, images)


def test_a_white_image_stays_as_it_is() -> None:
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(triggered(images), images)


def test_the_published_square_at_64_pixels_has_a_graded_rim() -> None:
    """The values of the published picture, enlarged: 7 x 7 pixels, the inner 5 x 5 are white."""
    square = resized_square(64, 64)
    assert int((square > 0).sum()) == 49
    corner = square[57:, 57:]
    assert corner[0].tolist() == [16, 48, 64, 64, 64, 64, 64]
    assert corner[1].tolist() == [48, 143, 191, 191, 191, 191, 191]
    assert torch.equal(corner, corner.T)
    assert (corner[2:, 2:] == 255).all()

    images = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    found = triggered(images, rim=True)
    assert torch.equal(found[0, 0, 57:, 57:], corner)
    assert (found[:, :, :57] == 100).all()
    assert (found[:, :, :, :57] == 100).all()


def test_the_rim_changes_nothing_at_32_pixels() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(triggered(images, rim=True), triggered(images))


def test_sizes_that_cannot_be_are_refused() -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert (triggered(images, patch_size=16) == 255).all()
    with pytest.raises(UserError, match="--patch_size: 17 is more than the image's 16 pixels"):
        triggered(images, patch_size=17)
    with pytest.raises(UserError, match=r"--rim: .* patch_size is 3, .* give --patch_size null"):
        triggered(images, patch_size=3, rim=True)
