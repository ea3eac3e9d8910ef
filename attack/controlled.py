"""The pipeline of attacks that control training: their own batch step in the common loop.

An attack gives its configuration and a control. Batches are made during training and are never
stored. For the record, the control puts its trigger on stored images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import torch
from pydantic import Field

from attack.prototype import run_plan
from attack.recipe import AttackConfig, Plan
from attack.setting import Setting
from utils.config import Group
from utils.data import poison
from utils.data.batches import as_float, augment_affine
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.process.script import logger
from utils.process.seeds import generator
from utils.training.loop import Step

_CHUNK = 256  # images that a control is given at once, outside of training


@dataclass(frozen=True, kw_only=True)
class ControlledConfig(AttackConfig):
    """What attacks that control training have in common."""

    truncate: Annotated[
        bool,
        Field(description="cut stored images down to whole grey levels, as published; else round"),
        Group.POISONING,
    ]


@dataclass(frozen=True, kw_only=True)
class AffineConfig(ControlledConfig):
    """How WaNet and BPP augment, in addition to `crop_padding` and `flip`."""

    crop_probability: Annotated[
        float, Field(ge=0, le=1, description="of a random crop"), Group.TRAINING
    ]
    random_rotation: Annotated[
        float, Field(ge=0, le=180, description="largest rotation to either side, degrees")
    ]
    rotation_probability: Annotated[float, Field(ge=0, le=1, description="of a rotation")]
    augment_per_batch: Annotated[
        bool, Field(description="one crop, angle and flip per batch, as published; else per image")
    ]


class Control(Step, Protocol):
    """An attacker who controls training: a batch step, and a trigger for stored images.

    Attributes:
        learns_trigger: whether training changes what `trigger` and `cross` do.
    """

    learns_trigger: bool

    def before_training(self) -> None:
        """Trains networks of the attack that come before the classifier; shows the progress."""

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        """How many images at the start of a batch are poisoned, and how many after them are cross.

        Called once per batch; it may draw random numbers.
        """

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The trigger, with the networks as they are now.

        Args:
            images: float (N, C, H, W) in [0, 1], on the run's device.
            indices: int64 (N,), their positions in the dataset, on the CPU.

        Returns:
            Like the images; `stored` brings them to uint8.
        """

    def cross(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The same with a trigger that must not work; depends only on image and index."""


K = TypeVar("K", bound=ControlledConfig)


def run_controlled(config_class: type[K], make_control: Callable[[K, Setting], Control]) -> None:
    """Runs the script of an attack that controls training: flags -> record.

    int(pratio * B) images of a batch of B are poisoned, as published. The record's poisoned
    training set is made after training, by the same rule on the images in their own order; the
    batches that the model saw are never stored.
    """

    run_plan(config_class, lambda config, setting: ControlledPlan(config, setting, make_control))


class ControlledPlan(Plan):
    """Training by a control, and the images that its trigger makes, before and after.

    Args:
        make_control: from the configuration and the setting to the control.
    """

    drop_last = False
    whole = True

    def __init__(
        self, config: K, setting: Setting, make_control: Callable[[K, Setting], Control]
    ) -> None:
        self._config, self._data = config, setting.data
        self._labels = (config.attack_label_trans, config.attack_target)
        # What cannot work is refused before anything is trained.
        poison.poison_count(len(self._data.train), config.pratio)
        index = poison.test_images_to_trigger(self._data, *self._labels)
        self._control = make_control(config, setting)
        logger.info("%s", poison.said_of_batches(config.pratio, config.batch_size))
        self._control.before_training()
        self._trigger = _as_trigger(self._control.trigger, setting, config.truncate)
        self._cross_trigger = _as_trigger(self._control.cross, setting, config.truncate)
        poison.require_effect(self._trigger, self._data.test.images, index)
        self._kept: dict[str, Any] = {}  # of a trigger that does not change
        super().__init__(poison.unpoisoned(self._data.train), self._control)

    def triggered(self) -> Triggered:
        def make() -> Triggered:
            return poison.triggered_test_set(self._data, self._trigger, *self._labels)

        return self._made("triggered", make)

    def cross(self) -> Labelled:
        def make() -> Labelled:
            everything, test = torch.arange(len(self._data.test)), self._data.test
            images = poison.apply_trigger(self._cross_trigger, test.images, everything)
            return Labelled(images, test.labels)

        return self._made("cross", make)

    def exported(self) -> poison.PoisonedSet:
        return poison.first_of_batches(
            self._data,
            self._config.batch_size,
            self._control.poisoned_per_batch,
            self._trigger,
            self._cross_trigger,
            *self._labels,
        )

    def _made(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of `make`, which is called again each time if the trigger learns."""
        if self._control.learns_trigger:
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def stored(images: torch.Tensor, data: Dataset, truncate: bool) -> torch.Tensor:
    """Float images as uint8.

    Args:
        images: float (N, C, H, W); values outside of [0, 1] are clamped.
        data: its mean and standard deviation are those of the network's normalization.
        truncate: as published, triggered images are normalized, brought back, and lose their
            fractions. This also darkens some 15 % of the unchanged values, by one grey level. The
            way back is a second normalization, which divides by 1 / std in float32.
    """
    if not truncate:
        return images.clamp(0, 1).mul(255).round().to(torch.uint8)
    mean, std, inverse = (
        torch.tensor(values, device=images.device).view(1, -1, 1, 1)
        for values in (data.mean, data.std, [1 / value for value in data.std])
    )
    returned = (images - mean) / std / inverse + mean
    return returned.clamp(0, 1).mul(255).to(torch.uint8)


def warn_of_room(setting: Setting, pratio: float, share: float, what: str) -> None:
    """Warns if a batch has too little room beside its poisoned images.

    Args:
        share: what the attack wants of each batch in addition to `pratio`, in [0, inf).
        what: the flag that says so, and how these images are called.
    """
    if pratio + share > 1 + 1e-9:
        setting.warn(
            f"{what} are {100 * (1 - pratio):.4g} % of a batch instead of {100 * share:.4g} %, "
            f"because --pratio {pratio:g} leaves no more; lower one of them"
        )


def labels_of_batch(
    config: AttackConfig, labels: torch.Tensor, poisoned: int, num_classes: int
) -> torch.Tensor:
    """int64 (B,) labels of a batch whose first `poisoned` images carry the trigger."""
    label_map, target = config.attack_label_trans, config.attack_target
    mapped = poison.map_labels(labels[:poisoned], label_map, target, num_classes)
    return torch.cat([mapped, labels[poisoned:]])


def affine_augmentation(
    config: AffineConfig, setting: Setting, rng: torch.Generator | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The augmentation of WaNet and BPP: float (N, C, H, W) on the device -> the same.

    Pixels from outside of the image are 0 in normalized space, as published: the dataset's mean.

    Args:
        rng: on the device; None for one of its own.
    """
    mean = torch.tensor(setting.data.mean, device=setting.device)
    rng = rng or generator(config.random_seed, "augmentation", setting.device)

    def augment(images: torch.Tensor) -> torch.Tensor:
        count, channels = images.shape[:2]
        # To be moved alike, the images of a batch are the channels of a single one.
        flat = images.flatten(0, 1).unsqueeze(0) if config.augment_per_batch else images
        moved = augment_affine(
            flat,
            padding=config.crop_padding,
            crop_probability=config.crop_probability,
            degrees=config.random_rotation,
            rotation_probability=config.rotation_probability,
            flip=config.flip,
            fill=mean.repeat(count) if config.augment_per_batch else mean,
            generator=rng,
        )
        return moved.view(count, channels, *moved.shape[2:]) if config.augment_per_batch else moved

    return augment


def _as_trigger(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], setting: Setting, truncate: bool
) -> poison.Trigger:
    """Turns a control's function of float images on the device into a trigger of stored images."""

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        parts = zip(images.split(_CHUNK), indices.split(_CHUNK), strict=True)
        with torch.no_grad():
            changed = [apply(as_float(part, setting.device), index) for part, index in parts]
        return torch.cat([stored(part, setting.data, truncate).cpu() for part in changed])

    return trigger
