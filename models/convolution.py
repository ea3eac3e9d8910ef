"""A convolution whose weight gradient is fast where maps are small.

On a CPU without bf16 instructions, the library's weight gradient of a 3x3 convolution with many
channels on few pixels reaches a fifth to two thirds of the machine's matrix rate. As one product of
two matrices (patches and output gradients) it reaches nearly all of it. Forward pass, input
gradient, parameters and state dict are those of `torch.nn.Conv2d`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

# Measured on two cores (AVX2): the product wins from here on; larger maps cost too many copies.
MOST_PIXELS = 16
FEWEST_CHANNELS = 128


class Conv3x3(nn.Conv2d):
    """3x3 convolution with padding 1 and no bias.

    Shape:
        (N, in_channels, H, W) float -> (N, out_channels, ceil(H / stride), ceil(W / stride)) float.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        is_small = (
            images.device.type == "cpu"
            and images.dtype == self.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and self.in_channels >= FEWEST_CHANNELS
            and -(-images.shape[2] // self.stride[0]) * -(-images.shape[3] // self.stride[1])
            <= MOST_PIXELS
        )
        if not (is_small and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(images)
        return _ByMatrices.apply(images, self.weight, self.stride[0])


class _ByMatrices(torch.autograd.Function):
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
        return of_images, weight_gradient(images, gradient, ctx.stride), None


def weight_gradient(images: torch.Tensor, gradient: torch.Tensor, stride: int) -> torch.Tensor:
    """The gradient of a 3x3 convolution's weight, padding 1, as one matrix product.

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
