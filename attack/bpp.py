"""BPP: the image in fewer colours.

Wang, Zhai, Ma. *BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via
Image Quantization and Contrastive Adversarial Learning.* CVPR 2022, arXiv 2205.13383. In each batch
some images are quantized and relabelled. Others get the change that quantization made to another
image, and keep their label, so that the model learns quantization itself and not its traces.

Threat model: control of training, dirty label. The attacker runs the training of the model. The
trigger is quantization. It uses no random numbers, and is the same at test time.

    python attack/bpp.py --save_folder_name bpp_demo

Limits: images of few grey levels (line drawings, digits) hardly change; give fewer levels.

Expected on the embedded digits: ACC >= 98 %, ASR >= 98 %. CIFAR-10, PreAct-ResNet18, 10 % poisoned:
ASR > 98 % (BackdoorBench has no CIFAR-10 row; GTSRB: ACC 97.43 %, ASR 99.90 %). Published runs
augment all images of a batch alike (`--augment_per_batch`). They also truncate the images that they
store, and the negatives in training (`--truncate`). Here neither is the default.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.controlled import (
    AffineConfig,
    affine_augmentation,
    labels_of_batch,
    run_controlled,
    stored,
    warn_of_room,
)
from attack.setting import Setting
from utils.data.batches import as_float
from utils.data.poison import count_in_batch, partners
from utils.process.seeds import Draws, generator


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    squeeze_num: Annotated[int, Field(ge=2, le=255, description="levels that a channel keeps")]
    dithering: Annotated[bool, Field(description="spread the error to neighbours; Floyd-Steinberg")]
    neg_ratio: Annotated[
        float, Field(ge=0, le=1, description="images with another one's residual / batch")
    ]


def quantize(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Each value at the nearest of evenly spaced levels from 0 to 1; a tie goes to the even level.

    Shape:
        (N, C, H, W) float in [0, 1] -> the same.
    """
    return (images * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


def dither(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Quantization that hands each value's error on to neighbours (Floyd, Steinberg 1976).

    Raster order in each channel: 7/16 go right, 3/16 down left, 5/16 down, 1/16 down right. Pixels
    of one front, column + 2 row, do not need each other and are done at once.

    Shape:
        (N, C, H, W) float in [0, 1] -> the same, whole grey levels (multiples of 1/255).
    """
    count, channels, height, width = images.shape
    result = torch.empty_like(images)
    # The error of the pixel (i, j) is at [i + 1, j + 1]; nothing comes in over the border.
    error = images.new_zeros(count, channels, height + 1, width + 2)
    for front in range(width + 2 * (height - 1)):
        first = max(0, (front - width + 2) // 2)
        i = torch.arange(first, min(front // 2, height - 1) + 1, device=images.device)
        j = front - 2 * i
        above = error[..., i, j] + 5 * error[..., i, j + 1] + 3 * error[..., i, j + 2]
        wanted = images[..., i, j] + (above + 7 * error[..., i + 1, j]) / 16
        result[..., i, j] = quantize(wanted, levels)
        error[..., i + 1, j + 1] = wanted - result[..., i, j]
    return (result * 255).round() / 255


class Bpp(Draws):
    """The attacker's training: quantized, negative and clean images in every batch.

    A negative is x + (trigger(x') - x') for another training image x', clamped, labelled as x.

    Example:
        >>> quantized = quantize(as_float(images), levels=8)
        >>> triggered = dither(as_float(images), levels=8)
    """

    learns_trigger = False

    def __init__(self, config: Config, setting: Setting) -> None:
        self._config = config
        self._data = setting.data
        seed, count = config.random_seed, len(setting.data.train)
        self._crops = generator(seed, "augmentation", setting.device)
        self._augment = affine_augmentation(config, setting, self._crops)
        self._partner = generator(seed, "negative partners")
        self._fixed_partners = partners(count, generator(seed, "partners of stored images"))
        self._coin = generator(seed, "poisoned batches")
        warn_of_room(setting, config.pratio, config.neg_ratio, "--neg_ratio: negative samples")

    def before_training(self) -> None:
        pass

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        poisoned = count_in_batch(self._config.pratio, batch_size, self._coin)
        if poisoned == 0:
            return 0, 0
        negative = count_in_batch(self._config.neg_ratio, batch_size, self._coin)
        return poisoned, min(negative, batch_size - poisoned)

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        poisoned, negative = self.poisoned_per_batch(len(images))
        sizes = [poisoned, negative, len(images) - poisoned - negative]
        first, second, rest = as_float(images).split(sizes)
        other = torch.randint(len(self._data.train), (negative,), generator=self._partner)
        changed = [self._quantize(first), self._add_residual(second, other), rest]
        labels = labels_of_batch(self._config, labels, poisoned, len(self._data.classes))
        return F.cross_entropy(model(self._augment(torch.cat(changed))), labels)

    def update(self) -> None:
        pass

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self._quantize(images)

    def cross(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self._add_residual(images, self._fixed_partners[indices % len(self._fixed_partners)])

    def _quantize(self, images: torch.Tensor) -> torch.Tensor:
        apply = dither if self._config.dithering else quantize
        return apply(images, self._config.squeeze_num)

    def _add_residual(self, images: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Adds the change that the stored trigger makes to the training images `other`."""
        clean = as_float(self._data.train.images[other], images.device)
        changed = as_float(stored(self._quantize(clean), self._data, self._config.truncate))
        return (images + changed - clean).clamp(0, 1)


if __name__ == "__main__":
    run_controlled(Config, Bpp)
