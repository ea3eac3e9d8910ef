"""The picture that Blended and Adaptive-Blend mix into images: drawn here, or the user's own.

It has its own file because two attacks need it and methods never import each other, and because
`utils/data/poison.py` is about sets of images with any trigger.
"""

import functools
from pathlib import Path

import torch
from torch.nn import functional as F

from utils.data.images import read_image
from utils.errors import UserError

_CANVAS = 256  # side in pixels that the emblem is drawn at
_GROUND = (245, 245, 245)
_OUTLINE = 0.028  # half the width of the black outlines; the canvas reaches from -1 to 1

# Ellipses in the order of drawing: centre (right, down), radii, fill.
_ELLIPSES = (
    ((0.00, 0.25), (0.80, 0.55), _GROUND),
    ((-0.62, -0.62), (0.24, 0.24), _GROUND),
    ((0.62, -0.62), (0.24, 0.24), _GROUND),
    ((0.00, -0.62), (0.55, 0.34), (255, 160, 205)),
    ((0.00, -0.45), (0.20, 0.14), (230, 50, 140)),
    ((-0.36, 0.20), (0.04, 0.07), (0, 0, 0)),
    ((0.36, 0.20), (0.04, 0.07), (0, 0, 0)),
    ((0.45, 0.66), (0.26, 0.22), (230, 50, 140)),
    ((0.45, 0.66), (0.05, 0.05), (230, 180, 20)),
)


def picture(path: str | None, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """The picture of a file, or the emblem, at the images' size.

    Args:
        path: a picture file, squashed to the size (bilinear, antialiased); None for the emblem.
        image_shape: (C, H, W), square; one channel gets the mean of the three.

    Returns:
        float (C, H, W) in [0, 255].

    Raises:
        UserError: if the file is no picture, or the images have neither one nor three channels.
    """
    channels, height, width = image_shape
    if channels not in (1, 3) or height != width:
        raise UserError(
            f"a picture cannot be blended into images of {channels} x {height} x {width}; give "
            "square ones with one or three channels"
        )
    if path is None:
        pattern = emblem(width)
    else:
        try:
            pattern = torch.from_numpy(read_image(Path(path), width).copy()).float()
        except UserError as error:
            raise UserError(f"--trigger_image: {error}") from None
    return pattern if channels == 3 else pattern.mean(dim=0, keepdim=True)


def emblem(size: int) -> torch.Tensor:
    """An outlined head with two ears, a pink bow and a flower on a light ground.

    Its channel means, its contrast and the coarseness of its shapes are those of the picture that
    published results of Blended come from. Uniform noise would be a far easier trigger: a matched
    filter tells it from images about six times better.

    Args:
        size: side in pixels.

    Returns:
        float (3, size, size) in [0, 255].
    """
    small = F.interpolate(
        _drawing(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].clamp(0, 255).float()


@functools.cache
def _drawing() -> torch.Tensor:
    """The emblem, float64 (1, 3, 256, 256) in [0, 255]."""
    axis = (torch.arange(_CANVAS, dtype=torch.float64) + 0.5) * (2 / _CANVAS) - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    canvas = torch.tensor(_GROUND).double().view(3, 1, 1).repeat(1, _CANVAS, _CANVAS)
    for (centre_right, centre_down), (width, height), fill in _ELLIPSES:
        x, y = right - centre_right, down - centre_down
        radius = torch.hypot(x / width, y / height)
        slope = torch.hypot(x / width**2, y / height**2) + 1e-9
        distance = radius * (radius - 1) / slope  # to the outline, to first order; < 0 inside
        canvas[:, distance <= 0] = torch.tensor(fill).double().view(3, 1)
        canvas[:, distance.abs() <= _OUTLINE] = 0
    return canvas.unsqueeze(0)
