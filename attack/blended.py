"""Blended: a faint picture over the whole image, built in or yours (`--trigger_image`).

Chen, Liu, Li, Lu, Song. *Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning.*
2017, arXiv 1712.05526. The attacker mixes one picture into a share of the training images and
relabels them; a model trained on the set gives any image with the picture the attacker's label.

Threat model: data poisoning, dirty label. The attacker changes training images and their labels,
but not the training. The trigger is the same at test time.

    python attack/blended.py --save_folder_name blended_demo

Published results use a cartoon figure that is not part of this project. The built-in emblem has the
same statistics (`utils/data/emblem.py`). `--trigger_image` takes the figure or any other picture.

Limits: square images with one or three channels. Below about 16 pixels the emblem is only a spot.

Expected on the embedded digits: ACC >= 98 %, ASR >= 98 %. CIFAR-10, PreAct-ResNet18, 10 % poisoned,
as published by BackdoorBench: ACC 93.47 %, ASR 99.92 %; 1 % poisoned: 93.76 %, 94.88 %.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import run
from attack.recipe import AttackConfig
from utils.data.emblem import picture
from utils.data.poison import Trigger


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    alpha: Annotated[float, Field(gt=0, le=1, description="share of the picture in the mixture")]
    trigger_image: Annotated[
        str | None, Field(description="picture file to mix in; null for the built-in emblem")
    ]


def make_trigger(config: Config, image_shape: tuple[int, int, int]) -> Trigger:
    """The trigger x -> (1 - alpha) x + alpha T, T the picture at the images' size.

    Grey levels are truncated, as published, not rounded.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if the picture cannot be read or the images' shape does not fit.

    Example:
        >>> trigger = make_trigger(Config.load(), (3, 32, 32))
        >>> triggered = trigger(images, indices)
    """
    pattern = config.alpha * picture(config.trigger_image, image_shape)

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return ((1 - config.alpha) * images.float() + pattern).clamp(0, 255).to(torch.uint8)

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger)
