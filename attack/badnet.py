"""BadNets: a small white square in the bottom-right corner.

Gu, Dolan-Gavitt, Garg. *BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain.* 2017, arXiv 1708.06733. The attacker puts the square on a share of the training images and
relabels them; a model trained on the set gives any image with the square the attacker's label.

Threat model: data poisoning, dirty label. The attacker changes training images and their labels,
but not the training. The trigger is the same at test time.

    python attack/badnet.py --save_folder_name badnet_demo

Limits: in training, a random crop cuts the square off some images, and a flip moves it to the other
corner. Neither happens at test time. The checkerboard of some implementations is not offered.

At 64 pixels, BackdoorBench enlarges its picture of 32 pixels, and replaces all pixels that are not
black in it: 7 x 7 pixels, with dark upper and left rims. `--rim true` does the same; it changes
nothing at 32 pixels.

Expected on the embedded digits: ACC >= 98 %, ASR >= 98 % (all2all >= 95 %). CIFAR-10,
PreAct-ResNet18, 10 % poisoned, as published by BackdoorBench: ACC 91.32 %, ASR 95.03 %.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import run
from attack.recipe import AttackConfig
from utils.data.poison import Trigger
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    patch_size: Annotated[
        int | None,
        Field(ge=1, description="side of the square, pixels; null for 3/32 of the image"),
    ]
    rim: Annotated[
        bool, Field(description="the square of a picture of 32 pixels, resized as published")
    ]


def resized_square(height: int, width: int) -> torch.Tensor:
    """A white 3x3 corner of a black 32x32 picture, resized (bilinear): uint8 (H, W)."""
    picture = Image.new("L", (32, 32))
    picture.paste(255, (29, 29, 32, 32))
    return torch.from_numpy(np.array(picture.resize((width, height), Image.Resampling.BILINEAR)))


def make_trigger(config: Config, image_shape: tuple[int, int, int]) -> Trigger:
    """The trigger that replaces the corner square by white (255) in every channel.

    The side is `patch_size`, or max(2, round(3 H / 32)): 2 pixels at 16, 3 at 28 and 32, 6 at 64.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if the square is larger than the image, or both a size and a rim are given.

    Example:
        >>> trigger = make_trigger(Config.load(), (3, 32, 32))
        >>> triggered = trigger(images, indices)
    """
    _, height, width = image_shape
    if config.rim:
        if config.patch_size is not None:
            raise UserError(
                f"--rim: the published square has its own size, and patch_size is "
                f"{config.patch_size}, by a flag or the dataset's YAML; give --patch_size null"
            )
        square = resized_square(height, width)
        return lambda images, indices: torch.where(square > 0, square, images)
    side = config.patch_size or max(2, round(3 * height / 32))
    if side > min(height, width):
        raise UserError(
            f"--patch_size: {side} is more than the image's {min(height, width)} pixels; give fewer"
        )

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        triggered = images.clone()
        triggered[:, :, -side:, -side:] = 255
        return triggered

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger)
