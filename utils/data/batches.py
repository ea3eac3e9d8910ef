"""Batches of images: in memory, as floats, augmented."""

import mmap
import weakref
from pathlib import Path

import torch
from torch.nn import functional as F

from utils.process import distributed

RESIDENT = 1 << 29  # bytes of a mapped file that may stay in memory


# By the address of a tensor's storage, which keeps the map alive.
_MAPS: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()


def spread(count: int, most: int) -> torch.Tensor:
    """Up to `most` evenly spaced positions of `count` ones: int64, ascending, each once."""
    return torch.linspace(0, count - 1, min(most, count)).long().unique()


def whole_share(ratio: float, count: int) -> int:
    """int(ratio * count) of the exact product: 29 for 0.29 and 100.

    Published code has 28 there.

    Args:
        ratio: >= 0.
        count: of the images that it is a share of.
    """
    return int(ratio * count + 1e-9)  # 0.29 * 100 is 28.999999999999996


def none_of(flag: str, share: float, count: int, things: str) -> str:
    """The start of a line about a share that is rounded down to none.

    Args:
        flag: that gives the share.
        share: over 0.
        count: of what it is a share.
        things: what these are.

    Returns:
        Flag, value and number, without what follows from it.
    """
    return f"{flag}: {share:g} of {count} {things} is none"


def least_share(count: int) -> str:
    """A share of `count` that is at least one, in a few digits: 1 / 3 is 0.334, not 0.333."""
    digits = 10 ** (len(str(count)) + 2)
    return f"{-(-digits // count) / digits:g}"


def mapped(file: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """A file of uint8 values as a tensor, read as it is used; it must not be written to.

    Pages that were read count as this process's memory until `release`.
    """
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    images = torch.frombuffer(pages, dtype=torch.uint8).view(shape)
    _MAPS[images.untyped_storage().data_ptr()] = pages
    return images


def release(images: torch.Tensor) -> None:
    """Gives back the memory of the pages that were read of a large mapped file.

    They can be read again, so a model can be trained on a set larger than memory. Does nothing to
    other tensors, or if the file is small.
    """
    if images.device.type == "cpu" and images.untyped_storage().nbytes() > RESIDENT:
        pages = _MAPS.get(images.untyped_storage().data_ptr())
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            pages.madvise(mmap.MADV_DONTNEED)


def as_float(images: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Images as the network takes them: float in [0, 1]; from uint8, channels-last in memory.

    Shape:
        (N, C, H, W) uint8, or float already in [0, 1] -> (N, C, H, W) float, on the device.
    """
    if device is not None:
        images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.contiguous(memory_format=torch.channels_last).float().div_(255)
    return images


def wide(values: torch.Tensor) -> torch.Tensor:
    """Floats of half precision in float32, where 1e-8 and 1 - 0.999 are numbers; others as is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def truncated(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1] as uint8, fractions of a level cut off, as published triggers are.

    A small number is added first, because k / 255 * 255 may be below k in float32.
    """
    return (images * 255 + 1e-3).to(torch.uint8)


def augment(
    images: torch.Tensor,
    padding: int,
    flip: bool,
    generator: torch.Generator | None = None,
    is_part: bool = False,
) -> torch.Tensor:
    """Random crop after zero padding, and a horizontal flip with probability 1/2; per image.

    Args:
        images: (N, C, H, W), any dtype.
        padding: pixels on every side, >= 0.
        flip: whether to flip.
        generator: on the device of the images.
        is_part: whether the images are this process's `distributed.part` of a batch, whose images
            then move as they would in a single process.

    Returns:
        (N, C, H, W), channels-last in memory.
    """
    count, _, height, width = images.shape
    device = images.device

    # Parts may differ by one image, and every process draws for all of them.
    whole = int(distributed.total(torch.tensor(count))) if is_part else count
    part = distributed.part(whole) if is_part else slice(whole)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (whole, 1), device=device, generator=generator)[part]

    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=device)
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=device).view(-1, 1, 1)
    return padded[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def augment_affine(
    images: torch.Tensor,
    *,
    padding: int,
    crop_probability: float,
    degrees: float,
    rotation_probability: float,
    flip: bool,
    fill: torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random shift, rotation (nearest neighbour) and horizontal flip; all drawn per image.

    Args:
        images: (N, C, H, W) float.
        padding: largest shift, pixels.
        crop_probability, rotation_probability: of an image to be shifted, rotated, in [0, 1].
        degrees: largest rotation to either side.
        flip: whether to mirror with probability 1/2.
        fill: (C,) float, the value of pixels from outside of the image.
        generator: on the device of the images.

    Returns:
        (N, C, H, W) float.
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        draws = torch.rand(count, device=images.device, generator=generator)
        return low + (high - low) * draws

    cropped = uniform(0, 1) < crop_probability
    shift = [
        (uniform(0, 2 * padding + 1).floor() - padding) * cropped * (2 / size)
        for size in (width, height)
    ]
    angle = uniform(-degrees, degrees).deg2rad() * (uniform(0, 1) < rotation_probability)
    mirror = 1 - 2 * ((uniform(0, 1) < 0.5) & flip).to(images.dtype)
    # Output to input coordinates: mirror, then rotate, then shift. Both axes reach from -1 to 1.
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    rows = [
        torch.stack([mirror * cos, -sin * aspect, shift[0]], dim=1),
        torch.stack([mirror * sin / aspect, cos, shift[1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    background = fill.view(1, -1, 1, 1)
    moved = F.grid_sample(
        images - background, grid.to(images.dtype), mode="nearest", align_corners=False
    )
    return moved + background


def fits(device: torch.device, count: int) -> bool:
    """Whether so many bytes take at most half of a GPU's free memory; False on a CPU."""
    return device.type == "cuda" and count <= torch.cuda.mem_get_info(device)[0] // 2


def keep_on(device: torch.device, images: torch.Tensor) -> torch.Tensor:
    """The images on the GPU if they fit; else where they are."""
    return images.to(device) if fits(device, images.nbytes) else images
