"""SIG: vertical stripes on images of the target class, labels untouched.

Barni, Kallas, Tondi. *A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning.* ICIP 2019, arXiv 1902.11237. The attacker adds a horizontal sine to images of one class;
a model trained on the set takes the stripes for a sign of that class.

Threat model: data poisoning, clean label. The attacker changes training images of the target class,
no label, and not the training. The trigger is the same at test time, on images of any class.

    python attack/sig.py --save_folder_name sig_demo

`--pratio` is a share of the whole training set. On CIFAR-10, 0.1 means all images of the class, so
the model sees no image of the class without stripes. In the paper, the ratio is a share of the
class.

Limits: the stripes need more than two pixels per cycle. If a class has too few images, all of them
are used.

Expected on the embedded digits, where all zeros are poisoned and stripes are stronger: ACC 90 %,
ASR >= 92 %. CIFAR-10, PreAct-ResNet18, as published by BackdoorBench: 10 % poisoned ACC 84.48 %,
ASR 98.27 %; 5 % poisoned 93.64 %, 97.09 %; 1 % poisoned 93.82 %, 83.40 %.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import clean_label, run
from attack.recipe import AttackConfig
from utils.data.poison import Trigger
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    delta: Annotated[float, Field(gt=0, le=255, description="height of the sine, grey levels")]
    frequency: Annotated[
        int | None, Field(ge=1, description="cycles per image; null for 6, or 3 under 24 pixels")
    ]


def make_trigger(config: Config, image_shape: tuple[int, int, int]) -> Trigger:
    """The trigger x[..., j] -> x[..., j] + delta sin(2 pi frequency j / W), truncated.

    The sum is in float32, which absorbs the error of a sine that should be zero. Published code
    adds in float64, where a tiny negative number in some columns costs a whole grey level.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if the frequency is too high for the images.

    Example:
        >>> trigger = make_trigger(Config.load(), (3, 32, 32))
        >>> triggered = trigger(images, indices)
    """
    width = image_shape[2]
    cycles = config.frequency or (6 if width >= 24 else 3)
    if 2 * cycles >= width:
        raise UserError(
            f"--frequency: {cycles} cycles do not fit into {width} pixels; give at most "
            f"{(width - 1) // 2}"
        )
    columns = torch.arange(width, dtype=torch.float64)
    stripes = (config.delta * torch.sin(2 * math.pi * cycles * columns / width)).float()

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return (images.float() + stripes).clamp(0, 255).to(torch.uint8)

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger, choose=clean_label)
