"""PreAct-ResNet18 with half of its channels, for whole tables on two cores.

    python attack/badnet.py --model benchmark/half.py:build --save_folder_name badnet_half

Defenses of such a record take the same `--model`.
"""

from torch import nn

from models.preactresnet import PreActResNet


def build(num_classes: int, image_size: int) -> nn.Module:
    """2.8 million parameters; for any image size of 8 or more."""
    return PreActResNet((2, 2, 2, 2), num_classes, widths=(32, 64, 128, 256))
