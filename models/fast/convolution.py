"""A 3x3 convolution that needs a quarter of the multiplications on a CPU without bf16 instructions.

Lavin, Gray. *Fast Algorithms for Convolutional Neural Networks.* CVPR 2016, arXiv 1509.09308:
F(4x4, 3x3), after Winograd. The map is cut into tiles of 4 x 4 outputs, which 6 x 6 inputs make.
Three linear maps turn the product of polynomials that a convolution is into 36 products of
matrices,

    output = A (B input * G weight)        * multiplies channels, for each of the 36 places

and the gradients are the same with the maps transposed. In float32 its error is nearly that of
the library's convolution (relative, 1.1e-6 beside 0.9e-6), because of the points chosen below; the
usual 0, 1, -1, 2, -2 have three times as much. Parameters and state dict are those of
`torch.nn.Conv2d`.

Where the maps are smaller than a tile, the weight gradient alone is a single product of matrices.

Where only the image has a gradient, the convolution is the library's, and so is that gradient to
the last bit: an adversarial perturbation goes by its sign, and where it is near 0 a rounding error
would become a whole step.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

POINTS = (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)  # where the polynomials are evaluated, beside infinity
TILE, PLACES = 4, 6  # outputs and inputs of a tile, along a side

# Measured on two cores (AVX2), where the library reaches the machine's matrix rate:
FEWEST_CHANNELS = 128  # with fewer, moving the 36 values costs more than is saved
FEWEST_CHANNELS_LEARNING = 64  # likewise where the weight gradient is needed, which gains most
FEWEST_TILES = 64  # of a batch, or transforming the weight costs more than is saved
FEWEST_TILES_KEPT = 16  # likewise where the transformed weight is kept
PRODUCT = 2_400_000  # transformed weights at a time; more leave the caches
BLOCK = 700_000  # transformed values at a time, likewise, or as many as there are weights
FEW_PIXELS = 16  # of an output map up to which patches are worth a copy


class _Kept:
    """What the weights become while they stay the same; None where they may change."""

    weights: dict[torch.Tensor, torch.Tensor] | None = None


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Inside, no weight may change: what is made of weights alone is made once."""
    before = _Kept.weights
    _Kept.weights = {} if before is None else before
    try:
        yield
    finally:
        _Kept.weights = before


class Conv3x3(nn.Conv2d):
    """3x3 convolution with padding 1 and no bias.

    Shape:
        (N, in_channels, H, W) float -> (N, out_channels, ceil(H / stride), ceil(W / stride)) float.
    """

    does_the_same = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if (
            self.bias is not None
            or images.device.type != "cpu"
            or images.dtype not in (torch.float32, torch.float64)
            or images.dtype != self.weight.dtype
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(images)
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if torch.is_grad_enabled() and images.requires_grad and not learns:
            return super().forward(images)
        count, _, height, width = images.shape
        channels = FEWEST_CHANNELS_LEARNING if learns else FEWEST_CHANNELS
        tiles = FEWEST_TILES if learns or _Kept.weights is None else FEWEST_TILES_KEPT
        if (
            self.stride[0] == 1
            and height % TILE == width % TILE == 0
            and count * height * width >= tiles * TILE**2
            and min(self.in_channels, self.out_channels) >= channels
        ):
            return _ByTiles.apply(images, self.weight, kept_transform(self.weight))
        outputs = -(-height // self.stride[0]) * -(-width // self.stride[1])
        if learns and self.in_channels >= FEWEST_CHANNELS and outputs <= FEW_PIXELS:
            return _ByPatches.apply(images, self.weight, self.stride[0])
        return super().forward(images)


class _ByTiles(torch.autograd.Function):
    """By tiles, forwards and backwards.

    The transformed weight is an argument where it is kept. Where it is large it is made for a part
    of the outputs at a time, and the images are spread anew for each, which costs less than moving
    it. Second derivatives are the library's.
    """

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)  # not what it becomes, which is four times as large
        outputs = map_like(images, weight.shape[0])
        for part in at_once(weight):
            product = transform(weight[part]) if kept is None else kept[:, :, part]
            for x, y in blocks(weight, images, outputs[:, part]):
                from_tiles(torch.bmm(spread(x), product), out=y)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        images, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            of_images = conv2d_input(images.shape, weight, gradient, padding=1)
            return of_images, conv2d_weight(images, weight.shape, gradient, padding=1), None
        of_images = map_like(images, weight.shape[1])
        of_weight = torch.empty_like(weight)
        for part in at_once(weight):
            product = transform(weight[part])
            of_product = weight.new_empty(product.shape)  # contiguous, for torch's fast way
            maps = blocks(weight, images, gradient[:, part], of_images)
            for number, (x, g, of_x) in enumerate(maps):
                values, known = to_tiles(g), spread(x).mT
                torch.baddbmm(of_product, known, values, beta=min(number, 1), out=of_product)
                if ctx.needs_input_grad[0]:
                    unspread(torch.bmm(values, product.mT), out=of_x, adds=part.start > 0)
            of_weight[part] = untransform(of_product)
        return of_images if ctx.needs_input_grad[0] else None, of_weight, None


class _ByPatches(torch.autograd.Function):
    """The library's convolution; its weight gradient by patches."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        return F.conv2d(images, weight, stride=stride, padding=1)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        images, weight = ctx.saved_tensors
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images = conv2d_input(images.shape, weight, gradient, ctx.stride, padding=1)
        return of_images, patch_gradient(images, gradient, ctx.stride), None


def patch_gradient(images: torch.Tensor, gradient: torch.Tensor, stride: int) -> torch.Tensor:
    """The gradient of a 3x3 convolution's weight, padding 1, as one product of patches.

    Args:
        images: (N, C, H, W) float, the convolution's input.
        gradient: (N, O, H', W') float, of its output.

    Returns:
        (O, C, 3, 3) float, channels-last in memory.
    """
    channels, outputs = images.shape[1], gradient.shape[1]
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # (N, H', W', C, 3, 3)
    patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)
    product = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ patches
    return product.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)


def map_like(images: torch.Tensor, channels: int) -> torch.Tensor:
    """An empty map of the same places, (N, channels, H, W), channels-last in memory."""
    shape = images.shape[0], channels, *images.shape[2:]
    return torch.empty(
        shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last
    )


def at_once(weight: torch.Tensor) -> Iterator[slice]:
    """Parts of the outputs, equal but for the last; what becomes of each stays in the caches."""
    count, channels = weight.shape[:2]
    parts = -(-count * channels * PLACES**2 // PRODUCT)
    size = -(-count // parts)
    return (slice(start, start + size) for start in range(0, count, size))


def blocks(weight: torch.Tensor, *maps: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Maps in parts, equal but for the last, whose tiles stay in the caches beside the weight."""
    count, _, height, width = maps[0].shape
    values = max(weight.shape[:2]) * height * width * PLACES**2 // TILE**2
    most = max(BLOCK, min(PRODUCT, PLACES**2 * weight.shape[0] * weight.shape[1]))
    parts = -(-count * values // most)
    return zip(*(part.split(-(-count // parts)) for part in maps), strict=True)


@cache
@torch.inference_mode(False)
def matrices(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A, B and G along a side, (4, 6), (6, 6) and (6, 3), and their squares AA and GG for both.

    Cook and Toom: evaluate both polynomials at the points (A transposed, G), multiply, and
    interpolate (B transposed), here transposed as a whole, as a convolution's sliding window is.
    """
    points = np.array(POINTS)
    others = [np.delete(points, i) for i in range(len(points))]
    a = np.zeros((TILE, PLACES))
    b = np.zeros((PLACES, PLACES))
    g = np.zeros((PLACES, 3))
    a[:, :-1] = points ** np.arange(TILE)[:, None]
    g[:-1] = points[:, None] ** np.arange(3)
    g[:-1] /= np.array([np.prod(p - q) for p, q in zip(points, others, strict=True)])[:, None]
    b[:-1, :-1] = [np.poly(q)[::-1] for q in others]
    b[-1] = np.poly(points)[::-1]
    a[-1, -1] = g[-1, -1] = 1
    made = {"A": a, "B": b, "G": g, "AA": np.kron(a, a), "GG": np.kron(g, g)}
    return {name: torch.from_numpy(matrix).to(dtype) for name, matrix in made.items()}


@cache
@torch.inference_mode(False)
def side(length: int, dtype: torch.dtype) -> torch.Tensor:
    """B for a whole side with its padding: (6 * length / 4, length), tile after tile."""
    tiles = length // TILE
    whole = torch.zeros(tiles, PLACES, length + 2, dtype=dtype)
    for tile in range(tiles):
        whole[tile, :, TILE * tile : TILE * tile + PLACES] = matrices(dtype)["B"]
    return whole[:, :, 1:-1].reshape(PLACES * tiles, length).contiguous()


def kept_transform(weight: torch.Tensor) -> torch.Tensor | None:
    """`transform`, without gradients, inside `constant_weights`; else None."""
    if _Kept.weights is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        if weight not in _Kept.weights:
            _Kept.weights[weight] = transform(weight)
        return _Kept.weights[weight]


def transform(weight: torch.Tensor) -> torch.Tensor:
    """G: (O, C, 3, 3) -> (36, C, O)."""
    outputs, channels = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (matrices(weight.dtype)["GG"] @ taps).view(PLACES**2, outputs, channels).mT


def untransform(products: torch.Tensor) -> torch.Tensor:
    """G transposed: (36, C, O) -> (O, C, 3, 3)."""
    taps = matrices(products.dtype)["GG"].t() @ products.reshape(PLACES**2, -1)
    return taps.view(3, 3, *products.shape[1:]).permute(3, 2, 0, 1)


def spread(images: torch.Tensor) -> torch.Tensor:
    """B: (N, C, H, W) -> (36, N * H / 4 * W / 4, C)."""
    count, channels, height, width = images.shape
    rows, columns = (side(length, images.dtype) for length in (height, width))
    flat = images.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    values = (columns @ (rows @ flat).view(-1, width, channels)).view(
        count, height // TILE, PLACES, width // TILE, PLACES, channels
    )
    return values.permute(2, 4, 0, 1, 3, 5).reshape(PLACES**2, -1, channels)


def unspread(values: torch.Tensor, out: torch.Tensor, adds: bool) -> None:
    """B transposed, of (36, N * H / 4 * W / 4, C).

    Args:
        out: (N, C, H, W), channels-last in memory.
        adds: whether the result is added to what is in `out`; else it replaces that.
    """
    count, channels, height, width = out.shape
    rows, columns = (side(length, values.dtype).t() for length in (height, width))
    tiles = values.view(PLACES, PLACES, count, height // TILE, width // TILE, channels)
    flat = tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, columns.shape[1], channels)
    summed = (columns @ flat).view(count, rows.shape[1], width * channels)
    flat_out = out.permute(0, 2, 3, 1).view(count, height, width * channels)
    rows = rows.expand(count, -1, -1)
    torch.baddbmm(flat_out, rows, summed, beta=int(adds), out=flat_out)


def from_tiles(values: torch.Tensor, out: torch.Tensor) -> None:
    """A, of (36, N * H / 4 * W / 4, O).

    Args:
        out: (N, O, H, W), channels-last in memory, or some of its channels; is replaced.
    """
    count, outputs, height, width = out.shape
    rows, columns = height // TILE, width // TILE
    by_image = values.view(PLACES**2, count, -1).transpose(0, 1)
    tiles = matrices(values.dtype)["AA"] @ by_image
    tiles = tiles.view(count, TILE, TILE, rows, columns, outputs)
    places = out.permute(0, 2, 3, 1).view(count, rows, TILE, columns, TILE, outputs)
    places.copy_(tiles.permute(0, 3, 1, 4, 2, 5))


def to_tiles(images: torch.Tensor) -> torch.Tensor:
    """A transposed: (N, O, H, W) -> (36, N * H / 4 * W / 4, O)."""
    count, outputs, height, width = images.shape
    tiles = images.permute(0, 2, 3, 1).reshape(
        count, height // TILE, TILE, width // TILE, TILE, outputs
    )
    flat = tiles.permute(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)
    return (matrices(images.dtype)["AA"].t() @ flat).view(PLACES**2, -1, outputs)
