"""What each trigger changes on photographs.

The published statistics were taken on 2,000 CIFAR-10 test images, which are not at hand here. The
two photographs that come with scikit-learn are more contrasted and have less texture: the values on
their tiles, which the tests hold, lie within a fifth of the published ones, but for WaNet's.
"""

from functools import cache

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from attack import adaptive_blend, badnet, blended, lc, lf, sig, wanet
from attack.bpp import quantize
from utils.poison import Trigger
from utils.runtime import generator

SHAPE = (3, 32, 32)


@cache
def tiles() -> torch.Tensor:
    """uint8 (456, 3, 32, 32): overlapping tiles of both photographs at half their size."""
    found = []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).permute(2, 0, 1).unsqueeze(0).float()
        image = F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
        height, width = (size // 16 * 16 for size in image.shape[2:])
        parts = image[:, :, :height, :width].unfold(2, 32, 16).unfold(3, 32, 16)
        found.append(parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, *SHAPE))
    return torch.cat(found).round().clamp(0, 255).to(torch.uint8)


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.mul(255).round().to(torch.uint8)


def warped(noise: bool, seed: int = 0) -> torch.Tensor:
    grid = wanet.warping_grid(wanet.flow_field(4, 32, generator(seed, "warp")), 0.5)
    if noise:
        drawn = torch.rand(len(tiles()), 32, 32, 2, generator=generator(seed, "test noise"))
        grid = wanet.add_noise(grid, drawn * 2 - 1)
    return pixels(wanet.warp(tiles() / 255, grid))


def corners(images: torch.Tensor) -> torch.Tensor:
    return lc.add_pattern(images, lc.corner_pattern(32, 32), 1.0)


def placed(trigger: Trigger) -> torch.Tensor:
    return trigger(tiles(), torch.arange(len(tiles())))


def triggered(name: str) -> torch.Tensor:
    faint = adaptive_blend.make_trigger(adaptive_blend.Config.load("cifar10"), SHAPE)
    return {
        "badnet": lambda: placed(badnet.make_trigger(badnet.Config.load("cifar10"), SHAPE)),
        "blended": lambda: placed(blended.make_trigger(blended.Config.load("cifar10"), SHAPE)),
        "sig": lambda: placed(sig.make_trigger(sig.Config.load("cifar10"), SHAPE)),
        "lf": lambda: placed(lf.make_trigger(lf.Config.load("cifar10"), SHAPE)),
        "bpp": lambda: pixels(quantize(tiles() / 255, 8)),
        "bpp of 32 levels": lambda: pixels(quantize(tiles() / 255, 32)),
        "lc": lambda: corners(tiles()),
        "adaptive_blend in training": lambda: placed(faint.train),
        "adaptive_blend at test": lambda: placed(faint.test),
        "wanet": lambda: warped(noise=False),
        "wanet, cross": lambda: warped(noise=True),
    }[name]()


@pytest.mark.parametrize(
    ("name", "largest", "expected"),
    [
        ("badnet", 255, 3.248),  # 2.80
        ("blended", 51, 5.868),  # 5.07
        ("sig", 40, 5.649),  # 5.97
        ("lf", 51, 3.616),  # 3.90
        ("bpp", 18, 2.208),  # 2.27
        ("bpp of 32 levels", 4, 0.503),  # 0.52
        ("lc", 255, 6.186),  # 5.87
        ("adaptive_blend in training", 38, 3.132),  # 2.68
        ("adaptive_blend at test", 51, 5.918),  # 5.04
        ("wanet", None, 0.661),  # 1.50
        ("wanet, cross", None, 1.10),  # 2.48
    ],
)
def test_the_change_is_as_large_as_ever(name: str, largest: int | None, expected: float) -> None:
    """Mean L2 norm of the difference, on the scale of 0 to 1 (beside it the published one), and its
    largest value."""
    difference = triggered(name).int() - tiles().int()
    if largest is not None:
        assert int(difference.abs().max()) == largest
    norm = float((difference.float() / 255).flatten(1).norm(dim=1).mean())
    assert norm == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cross_images_of_wanet_change_more_than_triggered_ones(seed: int) -> None:
    """On CIFAR-10 1.50 and 2.48: noise of half a pixel beside a warp of a sixth."""
    triggered_by, cross_by = (
        (warped(noise, seed).float() - tiles().float()).flatten(1).norm(dim=1).mean()
        for noise in (False, True)
    )
    assert float(cross_by / triggered_by) == pytest.approx(2.48 / 1.50, rel=0.1)
