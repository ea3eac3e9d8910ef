"""WaNet: the whole image is bent by one smooth warp.

Nguyen, Tran. *WaNet - Imperceptible Warping-based Backdoor Attack.* ICLR 2021, arXiv 2102.10369.
In each batch some images are warped and relabelled; others get the same warp with noise and keep
their label, so that the model learns this one warp and not warps in general.

Threat model: control of training, dirty label. The attacker runs the training of the model. The
warp is drawn once from the seed, and is the same at test time.

    python attack/wanet.py --save_folder_name wanet_demo

Limits: the warp moves pixels by about a quarter pixel (on the digits it is stronger, and visible),
and changes nothing in areas of one colour. With few poisoned images it is not learned (ASR 12.63 %
at 1 %).

Expected on the embedded digits, with a stronger warp: ACC >= 98 %, ASR >= 95 % (half of the
channels >= 60 %), cross ACC >= 93 %; before epoch 16 to 28 ASR goes up and down. With half of the
channels, one seed of five ended at 63.58 %, the others at 99 % or more. CIFAR-10, PreAct-ResNet18,
10 % poisoned, as published by BackdoorBench: ACC 91.25 %, ASR 89.73 %; 5 % poisoned: 91.76 %,
85.50 %. Published runs augment all images of a batch alike (`--augment_per_batch`) and truncate
test images (`--truncate`). Here neither is the default.
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
    warn_of_room,
)
from attack.setting import Setting
from utils.data.batches import as_float, least_share, none_of, whole_share
from utils.data.poison import count_in_batch
from utils.process.seeds import Draws, generator


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    s: Annotated[float, Field(gt=0, description="strength of the warp")]
    k: Annotated[
        int, Field(ge=2, le=1024, description="side of the coarse grid that the warp is drawn on")
    ]
    grid_rescale: Annotated[float, Field(gt=0, description="factor on the grid, 1 keeps the image")]
    cross_ratio: Annotated[
        float, Field(ge=0, description="noisily warped images / poisoned images of a batch")
    ]


def flow_field(k: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """A smooth random field of directions, of mean magnitude 1 on its coarse grid.

    Uniform in [-1, 1] on k x k points, divided by the mean magnitude, upsampled bicubically; the
    corners of the coarse grid are those of the image.

    Returns:
        float (1, size, size, 2): horizontal, vertical.
    """
    coarse = torch.rand(1, 2, k, k, generator=rng) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fine.permute(0, 2, 3, 1)


def warping_grid(field: torch.Tensor, s: float, rescale: float = 1.0) -> torch.Tensor:
    """Where each pixel of the warped image comes from: (identity + s * field / H) * rescale.

    A field of 1 moves by s (H - 1) / (2 H) pixels, about a quarter pixel at s = 0.5 and any H.

    Args:
        field: (1, H, H, 2).

    Returns:
        float (1, H, H, 2) in [-1, 1], for `warp`.
    """
    size = field.shape[1]
    axis = torch.linspace(-1, 1, size, device=field.device)
    vertical, horizontal = torch.meshgrid(axis, axis, indexing="ij")
    identity = torch.stack([horizontal, vertical], dim=-1)
    return ((identity + s * field / size) * rescale).clamp(-1, 1)


def add_noise(grid: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The grid with up to half a pixel of noise, for cross images.

    Args:
        grid: (1, H, H, 2) in [-1, 1].
        noise: (N, H, H, 2) in [-1, 1].

    Returns:
        (N, H, H, 2) in [-1, 1].
    """
    return (grid + noise / grid.shape[1]).clamp(-1, 1)


def warp(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Bilinear samples of the images at the grid's places.

    The published code warps normalized images. Bilinear weights sum to 1 and the grid never leaves
    the image, so warping pixels gives the same.

    Args:
        images: float (N, C, H, H).
        grid: (1, H, H, 2) or (N, H, H, 2) in [-1, 1].

    Returns:
        float (N, C, H, H).
    """
    grid = grid.expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class WaNet(Draws):
    """The attacker's training: warped, noisily warped and clean images in every batch.

    Example:
        >>> grid = warping_grid(flow_field(k=4, size=32, rng=torch.Generator()), s=0.5)
        >>> triggered = warp(as_float(images), grid)
    """

    learns_trigger = False

    def __init__(self, config: Config, setting: Setting) -> None:
        self._config = config
        self._num_classes = len(setting.data.classes)
        seed, size = config.random_seed, setting.data.image_shape[-1]
        self._crops = generator(seed, "augmentation", setting.device)
        self._augment = affine_augmentation(config, setting, self._crops)
        field = flow_field(config.k, size, generator(seed, "warp"))
        self.grid = warping_grid(field, config.s, config.grid_rescale).to(setting.device)
        self._noise = generator(seed, "warp noise", setting.device)
        self._coin = generator(seed, "poisoned batches")
        warn_of_room(
            setting,
            config.pratio,
            config.pratio * config.cross_ratio,
            "--cross_ratio: cross samples",
        )
        poisoned = max(1, whole_share(config.pratio, config.batch_size))
        if config.cross_ratio and not whole_share(config.cross_ratio, poisoned):
            setting.warn(
                f"{none_of('--cross_ratio', config.cross_ratio, poisoned, 'poisoned images')} of "
                f"a batch, so there is no cross sample; give at least {least_share(poisoned)}"
            )

    def before_training(self) -> None:
        pass

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        poisoned = count_in_batch(self._config.pratio, batch_size, self._coin)
        return poisoned, min(whole_share(self._config.cross_ratio, poisoned), batch_size - poisoned)

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        poisoned, crossed = self.poisoned_per_batch(len(images))
        sizes = [poisoned, crossed, len(images) - poisoned - crossed]
        first, second, rest = as_float(images).split(sizes)
        shape = (crossed, *self.grid.shape[1:])
        noise = torch.rand(shape, generator=self._noise, device=self.grid.device) * 2 - 1
        warped = [warp(first, self.grid), warp(second, add_noise(self.grid, noise)), rest]
        labels = labels_of_batch(self._config, labels, poisoned, self._num_classes)
        return F.cross_entropy(model(self._augment(torch.cat(warped))), labels)

    def update(self) -> None:
        pass

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return warp(images, self.grid)

    def cross(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        shape, seed = self.grid.shape[1:], self._config.random_seed
        rngs = [generator(seed, f"warp noise of image {index}") for index in indices.tolist()]
        noise = torch.stack([torch.rand(shape, generator=rng) * 2 - 1 for rng in rngs])
        return warp(images, add_noise(self.grid, noise.to(self.grid.device)))


if __name__ == "__main__":
    run_controlled(Config, WaNet)
