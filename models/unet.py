"""A U-Net from images to images of the same size."""

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Convolutions at one size after the other, down to the smallest size and up again.

    Each size has half the side of the size before, and twice the channels. On the way up, the
    outputs from the way down are added as further channels. There is no normalization, so an
    image's output depends on that image only, in train and in eval mode. The output is not bounded.

    Shape:
        (N, C, H, W) float -> (N, C, H, W) float; any H and W.

    Args:
        channels: C.
        width: channels at the full size.
        blocks: how many sizes.
    """

    does_the_same = True

    def __init__(self, channels: int, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        widths = [width * 2**number for number in range(blocks)]
        befores = [channels, *widths[:-1]]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(befores, widths, strict=True))
        self.up = nn.ModuleList(
            _block(b + a, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, passed = images, []
        for number, block in enumerate(self.down):
            features = block(F.avg_pool2d(features, 2, ceil_mode=True) if number else features)
            passed.append(features)
        for block, finer in zip(self.up, passed[-2::-1], strict=True):
            enlarged = F.interpolate(features, finer.shape[2:])
            features = block(torch.cat([enlarged, finer], dim=1))
        return self.last(features)


def _block(before: int, after: int) -> nn.Sequential:
    first, second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
