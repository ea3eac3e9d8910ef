"""The two auxiliary networks of Input-Aware: an image goes in, its pattern or its mask comes out.

Nguyen, Tran. *Input-Aware Dynamic Backdoor Attack.* NeurIPS 2020. An encoder and a decoder of
convolution blocks without skip connections, in the sizes that were published for 32 and 28 pixels.
"""

import torch
from torch import nn

from utils.perturb import to_unit


class Painter(nn.Module):
    """The pattern and the mask of an image, in one pass.

    Shape:
        (N, C, H, W) normalized float -> (N, C, H, W) and (N, 1, H, W) float in [0, 1], as one
        (N, C + 1, H, W). The mask has gone through `threshold`.

    Args:
        pattern, mask: `PixelGenerator`, with C outputs and with one.
    """

    does_the_same = True

    def __init__(self, pattern: nn.Module, mask: nn.Module) -> None:
        super().__init__()
        self.pattern = pattern
        self.mask = mask

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.pattern(images), threshold(self.mask(images))], dim=1)


class PixelGenerator(nn.Sequential):
    """Encoder and decoder.

    Parameters at 32 and 64 pixels with 3 channels: 723,273 with 3 outputs, 722,691 with 1. At 28
    pixels with 1 channel and output: 42,339.

    Shape:
        (N, in_channels, H, W) normalized float -> (N, out_channels, H, W) float in [0, 1]; H and W
        divisible by 2 ** len(widths).

    Args:
        widths: channels of each step down, see `widths_for`.
        double_tanh: whether tanh is applied twice, so that the outputs are in [0.119, 0.881].
    """

    does_the_same = True

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], double_tanh: bool
    ) -> None:
        steps: list[nn.Module] = []
        for before, width in zip((in_channels, *widths), widths, strict=False):
            steps += [*_block(before, width), *_block(width, width), nn.MaxPool2d(2)]
        steps += _block(widths[-1], widths[-1])
        for width, after in zip(reversed(widths), (*widths[-2::-1], out_channels), strict=True):
            steps += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
            steps += [*_block(width, width), *_block(width, after)]
        super().__init__(*steps[:-1])  # no ReLU at the end
        self.double_tanh = double_tanh

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = super().forward(images)
        return to_unit(output.tanh() if self.double_tanh else output)


def widths_for(size: int) -> tuple[int, ...] | None:
    """The published widths for 32 pixels, for all multiples of 8 from 24 on; else those for 28.

    Three halvings of 16 pixels would give 2 x 2. None for a size that is no multiple of 4.
    """
    if size % 8 == 0 and size > 16:
        return 32, 64, 128
    return (16, 32) if size % 4 == 0 else None


def threshold(masks: torch.Tensor) -> torch.Tensor:
    """A soft step at 0.5, close to 0 below 0.4 and to 1 above 0.6: [0, 1] -> (0, 1)."""
    return to_unit(20 * masks - 10)


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.05),
        nn.ReLU(),
    ]
