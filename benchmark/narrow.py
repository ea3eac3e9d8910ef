"""PreAct-ResNet18 at a quarter of its widths, so that two cores can train it on photographs.

python attack/wanet.py --dataset folder --dataset_path DIR --model benchmark/narrow.py:build ...
"""

from torch import nn

from models.convolution import Conv3x3
from models.preactresnet import PreActBlock, PreActResNet

WIDTHS = (16, 32, 64, 128)


def build(num_classes: int, image_size: int) -> nn.Module:
    """Two blocks of each width; 0.7 million parameters. Any image size of 8 or more."""
    network = PreActResNet((2, 2, 2, 2), num_classes)
    network.conv1 = Conv3x3(3, WIDTHS[0])
    channels = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        blocks = (PreActBlock(channels, width, min(stage, 1) + 1), PreActBlock(width, width, 1))
        setattr(network, f"layer{stage + 1}", nn.Sequential(*blocks))
        channels = width
    network.linear = nn.Linear(channels, num_classes)
    return network
