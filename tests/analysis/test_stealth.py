"""PSNR by hand, and SSIM against a literal transcription."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from analysis import stealth


def test_psnr_and_changes() -> None:
    """One value of 12 changes by 0.5: the mean square is 1 / 48. One of four pixels changes."""
    clean = torch.zeros(2, 3, 2, 2)
    changed = clean.clone()
    changed[0, 1, 0, 0] = 0.5
    assert stealth.psnr(clean, changed).tolist() == [pytest.approx(10 * math.log10(48)), math.inf]
    values = {name: value.tolist() for name, value in stealth.changes(clean, changed).items()}
    assert values == {"l_inf": [0.5, 0], "l2": [0.5, 0], "l0": [0.25, 0]}


def literal_ssim(first: torch.Tensor, second: torch.Tensor, places: Sequence[int]) -> float:
    """SSIM of two square (H, H) images by its definition, a window around each of H' x H' places.

    Weights exp(-d^2 / (2 1.5^2)) in both directions, up to 5 pixels away. Beyond a border the image
    is mirrored at its last pixel.
    """
    size, reach = len(first), range(-5, 6)
    weights = [math.exp(-(d**2) / (2 * 1.5**2)) for d in reach]
    window = [one * other / sum(weights) ** 2 for one in weights for other in weights]

    def seen(image: list[list[float]], row: int, column: int) -> list[float]:
        def inside(place: int) -> int:
            return min(abs(place), 2 * (size - 1) - abs(place))

        return [image[inside(row + i)][inside(column + j)] for i in reach for j in reach]

    def mean(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(window, values, strict=True))

    found = []
    for row, column in itertools.product(places, places):
        x, y = (seen(image.tolist(), row, column) for image in (first, second))
        of_x, of_y = mean(x), mean(y)
        x, y = [value - of_x for value in x], [value - of_y for value in y]
        xx, yy, xy = (
            mean([a * b for a, b in zip(one, other, strict=True)])
            for one, other in ((x, x), (y, y), (x, y))
        )
        luminance = (2 * of_x * of_y + 0.01**2) / (of_x**2 + of_y**2 + 0.01**2)
        found.append(luminance * (2 * xy + 0.03**2) / (xx + yy + 0.03**2))
    return sum(found) / len(found)


def test_ssim_is_the_literal_one() -> None:
    """Of noise, a little and a lot: about 0.9 and 0.6, and below 0 of an inverted image."""
    torch.manual_seed(0)
    clean = torch.rand(3, 2, 8, 8)
    noise = torch.rand(2, 2, 8, 8) - 0.5
    changed = torch.cat([clean[:1] + 0.4 * noise[:1], clean[1:2] + noise[1:], 1 - clean[2:]])
    expected = [
        sum(literal_ssim(x, y, range(8)) for x, y in zip(*pair, strict=True)) / 2
        for pair in zip(clean, changed, strict=True)
    ]
    assert stealth.ssim(clean, changed).tolist() == pytest.approx(expected, abs=1e-9)
    assert expected[2] < 0 < expected[1] < expected[0] < 1


def test_ssim_of_equal_and_of_constant_images() -> None:
    """Constant images have no variance: (2 a b + c1) / (a^2 + b^2 + c1)."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    assert stealth.ssim(images, images).tolist() == pytest.approx([1, 1])
    dark, bright = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert stealth.ssim(dark, bright).item() == pytest.approx(expected, rel=1e-5)
    assert stealth.ssim(images[..., :8, :8], images[..., :8, :8]).tolist() == pytest.approx([1, 1])


def test_a_trigger_in_the_corner_of_a_small_image_lowers_ssim() -> None:
    """To 0.8663. Windows inside of the image, around places 5 to 10, would have 0.9973."""
    clean = torch.zeros(1, 3, 16, 16)
    changed = clean.clone()
    changed[:, :, -2:, -2:] = 1
    of_all, of_inside = (
        literal_ssim(clean[0, 0], changed[0, 0], places) for places in (range(16), range(5, 11))
    )
    assert (of_all, of_inside) == (pytest.approx(0.8663, abs=5e-5), pytest.approx(0.9973, abs=5e-5))
    assert stealth.ssim(clean, changed).item() == pytest.approx(of_all)
