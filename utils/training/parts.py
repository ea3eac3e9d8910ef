"""Work that treats each image by itself, done on as many images at once as suit the device.

How many these are changes the time that it takes, not what comes out.
"""

from collections.abc import Callable

import torch

from models.fast.convolution import constant_weights
from utils.process.device import images_at_once, rounded_up


def image_by_image(
    compute: Callable[..., torch.Tensor], images: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """compute(images, *others), a part of the rows at a time; the results are put together.

    No weight of a network may change meanwhile.

    Args:
        compute: of which row i of the result depends on row i of each argument alone, random
            numbers aside, which are drawn in the order of the rows.
        images: (N, C, H, W).
        others: (N, ...).
    """
    few = images_at_once(images.device, images.shape[-1])
    parts = (tensor.split(few) for tensor in (images, *others))
    with constant_weights():
        return torch.cat([compute(*part) for part in zip(*parts, strict=True)])


def rows_of(wanted: torch.Tensor) -> torch.Tensor:
    """The positions that are wanted, first.

    On a GPU others follow, up to a multiple of 128, so that few sizes occur there; for callers that
    more images do no harm.

    Args:
        wanted: bool (N,).

    Returns:
        int64 positions; none if none is wanted.
    """
    count = int(wanted.sum())
    order = (~wanted).int().argsort(stable=True)
    return order[: rounded_up(wanted.device, count)]
