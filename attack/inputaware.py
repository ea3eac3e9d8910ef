"""Input-Aware: every image has its own trigger, which two networks make from the image.

Nguyen, Tran. *Input-Aware Dynamic Backdoor Attack.* NeurIPS 2020, arXiv 2010.08138. A mask network
says where to paint, and a pattern network says what to paint. In each batch, some images get their
own pattern and are relabelled. Others get the pattern of a different image and keep their label,
because a pattern must work only on its own image.

Threat model: control of training, dirty label. The attacker runs the training of the model. The
mask network is trained before the model, and the pattern network together with it. Test images get
their own pattern from the trained networks.

    python attack/inputaware.py --save_folder_name inputaware_demo

Limits: the side of the images must be a multiple of 4. The trigger is visible, and works for one
trained model only.

Expected on the embedded digits: ACC >= 99 %, ASR >= 95 %, cross ACC >= 88 %. On CIFAR-10 with
PreAct-ResNet18 and 10 % poisoned, as published by BackdoorBench: ACC 90.67 %, ASR 98.26 %.
The published run has 100 epochs, of which the first 25 train the mask. `epochs` counts the other
75. Published test images are truncated (`--truncate`); here this is not the default.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.controlled import ControlledConfig, labels_of_batch, run_controlled, warn_of_room
from attack.setting import Setting
from models import Normalize
from models.inputaware import Painter, PixelGenerator, threshold, widths_for
from models.modes import evaluating
from utils.data.batches import as_float, augment
from utils.data.poison import count_in_batch, partners
from utils.errors import UserError
from utils.perturb import EPSILON
from utils.process.seeds import generator
from utils.training.loop import Loop, batch_sizes
from utils.training.state import restore
from utils.training.watch import Watch

BETAS = (0.5, 0.9)  # of both Adams
MASK_MILESTONES = [10, 20]  # epochs after which the mask network's learning rate falls to a tenth


@dataclass(frozen=True, kw_only=True)
class Config(ControlledConfig):
    mask_density: Annotated[float, Field(ge=0, le=1, description="mask value that costs nothing")]
    mask_epochs: Annotated[int, Field(ge=1, description="epochs that train the mask network")]
    lambda_norm: Annotated[float, Field(ge=0, description="weight of the mask's size")]
    lambda_div: Annotated[float, Field(ge=0, description="weight of the diversity of both")]
    lr_M: Annotated[float, Field(gt=0, description="learning rate of Adam, mask network")]
    lr_G: Annotated[float, Field(gt=0, description="learning rate of Adam, pattern network")]
    double_tanh: Annotated[bool, Field(description="networks end in two tanh, as published")]
    accumulate_generator_grad: Annotated[
        bool, Field(description="never zero the pattern network's gradient, as published")
    ]


def paint(images: torch.Tensor, patterns: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """x + (pattern - x) * mask: the image where the mask is 0, the pattern where it is 1.

    The published code does so in normalized space, where the result is the same.

    Args:
        images, patterns: float (N, C, H, W) in [0, 1].
        masks: float (N, 1, H, W) in [0, 1].
    """
    return images + (patterns - images) * masks


def rms(differences: torch.Tensor) -> torch.Tensor:
    """The root mean square of each: (N, ...) -> (N,). Its gradient at 0 is 0."""
    flat = differences.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5


def diversity_loss(
    inputs: torch.Tensor, others: torch.Tensor, outputs: torch.Tensor, other_outputs: torch.Tensor
) -> torch.Tensor:
    """mean_i of rms(x_i - x'_i) / (rms(out_i - out'_i) + 1e-7): unlike images, unlike outputs.

    Args:
        inputs, others: normalized float (N, C, H, W).
        outputs, other_outputs: what a network makes of them, masks or normalized patterns.
    """
    return (rms(inputs - others) / (rms(outputs - other_outputs) + EPSILON)).mean()


def density_loss(masks: torch.Tensor, density: float) -> torch.Tensor:
    """The mean over all pixels of relu(mask - density)."""
    return (masks - density).relu().mean()


def augmented(images: torch.Tensor, config: Config, rng: torch.Generator) -> torch.Tensor:
    """uint8 images, each after a random crop and flip, as float; triggers come later."""
    return as_float(augment(images, config.crop_padding, config.flip, rng))


def adam(network: nn.Module, lr: float, setting: Setting) -> torch.optim.Adam:
    """The optimizer of both networks; on a GPU a single kernel."""
    fused = True if setting.device.type == "cuda" else None
    return torch.optim.Adam(network.parameters(), lr=lr, betas=BETAS, fused=fused)


def train_mask(
    network: PixelGenerator, normalize: Normalize, config: Config, setting: Setting, loop: Loop
) -> None:
    """Trains the mask network in place, on clean images and without labels.

    Small masks that differ where images differ: lambda_norm * density + lambda_div * diversity.
    """
    images, batch_size = setting.data.train.images, config.batch_size
    first_order, second_order = (
        generator(config.random_seed, f"{name} mask images") for name in ("first", "second")
    )
    augmentation = generator(config.random_seed, "mask augmentation", setting.device)
    optimizer = adam(network, config.lr_M, setting)
    network.train()
    sizes = batch_sizes(len(images), batch_size)
    called, other_called = loop.alone(network), loop.alone(network)
    others = torch.zeros(len(images), dtype=torch.int64)
    changing: dict[str, Any] = {"network": network, "optimizer": optimizer, "others": others}
    changing |= {"first_order": first_order, "second_order": second_order}
    changing |= {"augmentation": augmentation}
    for number in loop.rounds(config.mask_epochs, "mask", rate="--lr_M", **changing):
        done = loop.position.batches  # some, where a run goes on that was interrupted
        if not done:
            others.copy_(torch.randperm(len(images), generator=second_order))
        batches = loop.batches(len(images), batch_size, first_order, whole=True)
        for pair in zip(batches, others.split(sizes)[done:], strict=True):
            first, second = (
                normalize(augmented(images[i].to(setting.device), config, augmentation))
                for i in pair
            )
            masks, other_masks = threshold(called(first)), threshold(other_called(second))
            density = density_loss(masks, config.mask_density)
            diversity = diversity_loss(first, second, masks, other_masks)
            loss = config.lambda_norm * density + config.lambda_div * diversity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.log(len(first), loss=loss, area=masks.mean())
        for group in optimizer.param_groups:
            group["lr"] *= 0.1 if number in MASK_MILESTONES else 1


class InputAware:
    """The attacker's training: own patterns, other images' patterns and clean images in a batch.

    Raises:
        UserError: if the networks cannot halve the images twice.

    Example:
        >>> pattern, mask = (PixelGenerator(3, n, widths_for(32), True) for n in (3, 1))
        >>> triggered = paint(x := as_float(images), pattern(x), mask(x))
    """

    learns_trigger = True

    def __init__(self, config: Config, setting: Setting) -> None:
        self._config = config
        self._setting = setting
        data, seed = setting.data, config.random_seed
        channels, size, _ = data.image_shape
        widths = widths_for(size)
        if widths is None:
            raise UserError(f"--image_size: {size} is no multiple of 4; give one that is")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "pattern and mask networks").initial_seed())
            self.pattern, self.mask = (
                PixelGenerator(channels, outputs, widths, config.double_tanh).to(setting.device)
                for outputs in (channels, 1)
            )
        self.optimizer = adam(self.pattern, config.lr_G, setting)
        self._painter = Painter(self.pattern, self.mask)
        # Two calls of a network come before their backward pass, so each needs its own recording.
        self._called, self._other_called = (Loop.alone(self._painter) for _ in range(2))
        self._normalize = Normalize(data.mean, data.std).to(setting.device)
        self._rngs = {
            "others": generator(seed, "other images"),
            "augmentation": generator(seed, "augmentation", setting.device),
            "coin": generator(seed, "poisoned batches"),
        }
        self._partners = partners(len(data.train), generator(seed, "partners of stored images"))
        self._batches = 0
        self._batches_per_epoch = len(batch_sizes(len(data.train), config.batch_size))
        self._has_gradient = False
        warn_of_room(setting, config.pratio, config.pratio, "--pratio: cross samples")

    def before_training(self) -> None:
        """Trains the mask network, or reads it from the cache; from now on it is fixed."""
        config, data = self._config, self._setting.data
        names = (
            *("mask_density", "mask_epochs", "lambda_norm", "lambda_div", "lr_M", "double_tanh"),
            *("random_seed", "batch_size", "crop_padding", "flip"),
        )
        key = {name: getattr(config, name) for name in names}
        key |= {"mean": data.mean, "std": data.std}

        def train(watch: Watch) -> dict[str, torch.Tensor]:
            train_mask(self.mask, self._normalize, config, self._setting, watch.start())
            watch.end()
            return {name: value.cpu() for name, value in self.mask.state_dict().items()}

        state = self._setting.trained("mask", key, train)
        self.mask.load_state_dict(state)
        self.mask.eval()
        self.mask.requires_grad_(False)

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        poisoned = count_in_batch(self._config.pratio, batch_size, self._rngs["coin"])
        return poisoned, min(poisoned, batch_size - poisoned)

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        poisoned, crossed = self.poisoned_per_batch(len(images))
        images = augmented(images, self._config, self._rngs["augmentation"])
        self._has_gradient = poisoned > 0
        if poisoned == 0:
            return F.cross_entropy(model(images), labels)
        first, second, rest = images.split([poisoned, crossed, len(images) - poisoned - crossed])
        inputs, other_inputs = self._normalize(first), self._normalize(self._draw(poisoned))
        self.pattern.train()
        patterns, masks = self._called(inputs).tensor_split([-1], dim=1)
        other_patterns, other_masks = self._other_called(other_inputs).tensor_split([-1], dim=1)
        changed = [
            paint(first, patterns, masks),
            paint(second, other_patterns[:crossed], other_masks[:crossed]),
            rest,
        ]
        labels = labels_of_batch(self._config, labels, poisoned, len(self._setting.data.classes))
        diversity = diversity_loss(
            inputs, other_inputs, self._normalize(patterns), self._normalize(other_patterns)
        )
        logits = model(torch.cat(changed))
        return F.cross_entropy(logits, labels) + self._config.lambda_div * diversity

    def update(self) -> None:
        """One step of the pattern network; its rate falls to a tenth at epoch 200, 300, 400, 500.

        As published, the gradient is the sum over the whole training so far, see
        `accumulate_generator_grad`.
        """
        epoch = self._batches // self._batches_per_epoch
        self._batches += 1
        if not self._has_gradient:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.lr_G * 0.1 ** min(max(epoch // 100 - 1, 0), 4)
        self.optimizer.step()
        if not self._config.accumulate_generator_grad:
            self.optimizer.zero_grad()

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self._paint_of(images, images)

    def cross(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Images with the triggers of training images; an index always gets the same one."""
        other = self._setting.data.train.images[self._partners[indices % len(self._partners)]]
        return self._paint_of(images, as_float(other, images.device))

    def state_dict(self) -> dict[str, Any]:
        """All that training has changed, gradients included."""
        return {
            "pattern": self.pattern.state_dict(),
            "gradients": [parameter.grad for parameter in self.pattern.parameters()],
            "mask": self.mask.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rngs": {name: rng.get_state() for name, rng in self._rngs.items()},
            "batches": self._batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore("pattern", self.pattern, state["pattern"])
        for parameter, gradient in zip(self.pattern.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else torch.zeros_like(parameter)
            if parameter.grad is not None:
                restore("gradient", parameter.grad, gradient)
        restore("mask", self.mask, state["mask"])
        restore("optimizer", self.optimizer, state["optimizer"])
        for name, rng in self._rngs.items():
            rng.set_state(state["rngs"][name])
        if type(state["batches"]) is not int or state["batches"] < 0:
            raise ValueError("batches: is no number of batches")
        self._batches = state["batches"]

    def _draw(self, count: int) -> torch.Tensor:
        """Random training images, drawn for each batch; the published code has a second loader."""
        images = self._setting.data.train.images
        index = torch.randperm(len(images), generator=self._rngs["others"])[:count]
        drawn = images[index].to(self._setting.device)
        return augmented(drawn, self._config, self._rngs["augmentation"])

    def _paint_of(self, images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """The images with the triggers that belong to the sources, as at test time."""
        inputs = self._normalize(sources)
        with evaluating(self._painter):
            return paint(images, *self._painter(inputs).tensor_split([-1], dim=1))


if __name__ == "__main__":
    run_controlled(Config, InputAware)
