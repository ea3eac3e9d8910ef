"""PreAct-ResNet18 with a quarter of its channels, so that two cores can train it on photographs.

    python attack/wanet.py --dataset folder --dataset_path photos --model benchmark/narrow.py:build

Defenses of such a record take the same `--model`.
"""

from torch import nn

from models.preactresnet import PreActResNet


def build(num_classes: int, image_size: int) -> nn.Module:
    """0.7 million parameters; for any image size of 8 or more."""
    return PreActResNet((2, 2, 2, 2), num_classes, widths=(16, 32, 64, 128))
