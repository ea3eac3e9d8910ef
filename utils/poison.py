"""Label maps, the choice of poisoned images, and the poisoned training and test sets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from utils.data import Dataset, Labelled, Triggered
from utils.errors import UserError
from utils.runtime import Progress

LabelMap = Literal["all2one", "all2all"]

# (uint8 images (N, C, H, W), their int64 dataset indices (N,)) -> uint8 images (N, C, H, W)
Trigger = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# What was done to a training image; the label of all but "poison" is the true one.
KINDS = ("poison", "cover", "cross")

_CHUNK = 1024  # images that a trigger is given at once


@dataclass(frozen=True)
class PoisonedSet:
    """A clean training set and the images that replace some of its own.

    Attributes:
        clean: the clean training set.
        index: int64 (P,), which images are replaced; ascending.
        images: uint8 (P, C, H, W), what they are replaced by.
        labels: int64 (P,), the labels that they are given.
        kinds: uint8 (P,), positions in `KINDS`.
    """

    clean: Labelled
    index: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor

    def __len__(self) -> int:
        return len(self.clean)


def map_labels(
    labels: torch.Tensor, label_map: LabelMap, target: int, num_classes: int
) -> torch.Tensor:
    """The labels that the attacker wants: the target for all, or y -> (y + 1) mod num_classes.

    Shape:
        (N,) int64 -> (N,) int64.
    """
    return torch.full_like(labels, target) if label_map == "all2one" else (labels + 1) % num_classes


def select_poisoned(count: int, pratio: float, generator: torch.Generator) -> torch.Tensor:
    """round(pratio * count) of `count` training images, without replacement, of any class.

    Args:
        count: number of training images.
        pratio: poisoning ratio in [0, 1], relative to the whole training set.
        generator: on the CPU.

    Returns:
        int64 indices, ascending.

    Raises:
        UserError: if that is no image at all.
    """
    chosen = round(pratio * count)
    if chosen == 0:
        raise UserError(
            f"--pratio: {pratio:g} of {count} training images poisons none; give at least "
            f"{1 / count:.2g}"
        )
    return torch.randperm(count, generator=generator)[:chosen].sort().values


def poison_training_set(
    data: Dataset,
    trigger: Trigger,
    pratio: float,
    label_map: LabelMap,
    target: int,
    rng: torch.Generator,
) -> PoisonedSet:
    """Dirty-label poisoning: chosen images get the trigger and the mapped label.

    The chosen images depend on the seed and the number of images only.
    """
    index = select_poisoned(len(data.train), pratio, rng)
    chosen = data.train.at(index)
    return PoisonedSet(
        clean=data.train,
        index=index,
        images=apply_trigger(trigger, chosen.images, index),
        labels=map_labels(chosen.labels, label_map, target, len(data.classes)),
        kinds=torch.zeros(len(index), dtype=torch.uint8),
    )


def triggered_test_set(
    data: Dataset, trigger: Trigger, label_map: LabelMap, target: int
) -> Triggered:
    """The test images that ASR and RA count.

    All-to-one leaves out images whose true label is the target; all-to-all uses every image.

    Raises:
        UserError: if no test image is left.
    """
    labels = data.test.labels
    targets = map_labels(labels, label_map, target, len(data.classes))
    index = torch.nonzero(labels != targets).flatten()
    if len(index) == 0:
        raise UserError(
            f"--attack_target: every test image has label {target}; give another target or more "
            "classes"
        )
    images = apply_trigger(trigger, data.test.images[index], index)
    return Triggered(images, targets[index], labels[index], index)


def apply_trigger(trigger: Trigger, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The trigger on many images, chunk by chunk.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), their positions in the dataset.

    Returns:
        uint8 (N, C, H, W), a copy.

    Raises:
        UserError: if the trigger changes not a single pixel (a silent failure that would look like
            label noise).
    """
    result = torch.empty_like(images)
    with Progress(len(images), "placing the trigger", "image") as progress:
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            result[part] = trigger(images[part].clone(), index[part])
            progress.advance(len(images[part]))
    if torch.equal(result, images):
        raise UserError("the trigger changes no pixel of any image; make it stronger or larger")
    return result


def unpoisoned(clean: Labelled) -> PoisonedSet:
    """A clean training set as a poisoned set of no poison."""
    none = torch.zeros(0, dtype=torch.int64)
    return PoisonedSet(clean, none, clean.images[:0], none, none.to(torch.uint8))
