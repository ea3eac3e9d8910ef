"""Pre-activation residual networks for small images.

He, Zhang, Ren, Sun. *Identity Mappings in Deep Residual Networks.* ECCV 2016. The layout and the
order of the state dict are the usual ones for weights in the backdoor literature: a 3x3 stem, four
stages of widths 64 to 512, global average pooling and one linear layer. There is no BatchNorm or
ReLU after the last block, so features may be negative.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.fast.batchnorm import BatchNorm2d


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and no bias."""
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


class PreActBlock(nn.Module):
    """BatchNorm-ReLU-convolution twice, plus a shortcut.

    Shape:
        (N, in_channels, H, W) float -> (N, channels, ceil(H / stride), ceil(W / stride)) float.
    """

    does_the_same = True

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn1(features))
        # The projection reads the activated features, the identity the raw ones.
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet of basic blocks.

    Shape:
        (N, 3, H, W) normalized float with H, W >= 8 -> (N, num_classes) float logits.

    Args:
        blocks: number of blocks of each of the four stages.
        num_classes: number of outputs, >= 1.
        widths: channels of each of the four stages.
    """

    does_the_same = True

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        first, second, third, last = widths
        self.conv1 = conv3x3(3, first)
        self.layer1 = _stage(first, first, blocks[0], stride=1)
        self.layer2 = _stage(first, second, blocks[1], stride=2)
        self.layer3 = _stage(second, third, blocks[2], stride=2)
        self.layer4 = _stage(third, last, blocks[3], stride=2)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer1(self.conv1(images))
        features = self.layer4(self.layer3(self.layer2(features)))
        return self.linear(features.mean(dim=(2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(blocks - 1)))


def preactresnet18(num_classes: int) -> PreActResNet:
    """PreAct-ResNet18: 102 state-dict entries, 11,171,146 parameters for 10 classes."""
    return PreActResNet((2, 2, 2, 2), num_classes)


def preactresnet18_half(num_classes: int) -> PreActResNet:
    """PreAct-ResNet18 with half of its channels: 2,796,202 parameters for 10 classes."""
    return PreActResNet((2, 2, 2, 2), num_classes, widths=(32, 64, 128, 256))
