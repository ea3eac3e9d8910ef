"""The built-in picture against the numbers that it was designed to have."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.data.emblem import emblem, picture
from utils.errors import UserError


@pytest.mark.parametrize(
    ("size", "std"),
    [
        (16, (43.4, 60.6, 49.8)),
        (28, (58.7, 71.4, 62.5)),
        (32, (62.6, 74.2, 65.8)),
        (64, (76.8, 84.2, 77.8)),
    ],
)
def test_contrast_is_that_of_the_published_picture(size: int, std: tuple[float, ...]) -> None:
    """The published picture has 44.6 59.9 51.1, 59.8 71.7 64.6, 63.3 74.3 67.6, 79.6 86.6 81.7.

    Its channel means are 206.9 190.4 197.8 at 32 pixels.
    """
    found = emblem(size)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.float32
    assert found.std(dim=(1, 2), correction=0).tolist() == pytest.approx(std, abs=0.051)
    assert found.mean(dim=(1, 2)).tolist() == pytest.approx((204.8, 187.2, 195.7), abs=0.4)


def test_pixels_at_32() -> None:
    """The ground, an outline at the knot, the bow's pink, an outline at the flower."""
    found = emblem(32)
    for row, column, expected in (
        (0, 0, [245, 245, 245]),
        (6, 16, [78, 39, 58]),
        (2, 16, [255, 160, 205]),
        (26, 23, [52, 39, 6]),
    ):
        assert found[:, row, column].round().tolist() == expected
    assert found.min() == pytest.approx(5.9, abs=0.05)
    assert found.max() == 255
    assert (found - found.flip(2)).abs().mean() == pytest.approx(16.0, abs=0.05)


def test_coarseness_at_32() -> None:
    """Energy of the grey picture by cycles per image: the published one has .24 .17 .34 .24 .01."""
    grey = emblem(32).double().mean(dim=0)
    energy = torch.fft.fft2(grey - grey.mean()).abs() ** 2
    along = torch.fft.fftfreq(32) * 32
    cycles = torch.hypot(along.view(-1, 1), along)
    edges = (0, 2, 4, 8, 16, 99)
    shares = [
        float(energy[(cycles > low) & (cycles <= high)].sum() / energy.sum())
        for low, high in itertools.pairwise(edges)
    ]
    assert shares == pytest.approx([0.24, 0.16, 0.32, 0.27, 0.01], abs=0.006)


def test_a_grey_picture_is_the_mean_of_the_channels() -> None:
    assert torch.equal(picture(None, (3, 28, 28)), emblem(28))
    grey = picture(None, (1, 28, 28))
    assert torch.equal(grey, emblem(28).mean(dim=0, keepdim=True))
    assert grey.shape == (1, 28, 28)


def test_a_file_is_squashed_to_the_images_size(tmp_path: Path) -> None:
    """40 x 20 pixels, left half red and right half blue, become 16 x 16 of the same halves."""
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    image.paste((0, 0, 100), (20, 0, 40, 20))
    image.save(tmp_path / "mine.png")
    found = picture(str(tmp_path / "mine.png"), (3, 16, 16))
    assert found.dtype == torch.float32
    assert found[:, :, :7].unique(dim=2).unique(dim=1).flatten().tolist() == [200, 0, 0]
    assert found[:, :, 9:].unique(dim=2).unique(dim=1).flatten().tolist() == [0, 0, 100]
    grey = picture(str(tmp_path / "mine.png"), (1, 16, 16))
    assert grey[0, 0, [0, 15]].tolist() == pytest.approx([200 / 3, 100 / 3])


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("text.png", "absent.png"):
        with pytest.raises(UserError, match=rf"^--trigger_image: .*{name}: not a readable image"):
            picture(str(tmp_path / name), (3, 32, 32))


@pytest.mark.parametrize("shape", [(2, 32, 32), (4, 32, 32), (3, 32, 16)])
def test_other_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="one or three channels"):
        picture(None, shape)
