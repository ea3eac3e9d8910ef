"""Label maps, the choice of poisoned images, and the poisoned training and test sets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from utils.data.batches import release, whole_share
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.errors import UserError
from utils.process.progress import Progress

LabelMap = Literal["all2one", "all2all"]

# (uint8 images (N, C, H, W), their int64 dataset indices (N,)) -> uint8 images (N, C, H, W)
Trigger = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Triggers(NamedTuple):
    """An attack whose trigger differs between training and test images."""

    train: Trigger
    test: Trigger


_CHUNK = 1024  # images that a trigger is given at once

# What was done to a training image: "poison" shall teach the backdoor; "cover" and "cross" carry
# (part of) the trigger or another one with their true label, and shall hide or sharpen it.
KINDS = ("poison", "cover", "cross")


def is_kind(kinds: torch.Tensor, kind: str) -> torch.Tensor:
    """Which training images are of a kind.

    Shape:
        (P,) uint8, positions in `KINDS` -> (P,) bool.
    """
    return kinds == KINDS.index(kind)


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

    def stored_labels(self) -> torch.Tensor:
        """int64 (N,): the labels of the whole set, with the attacker's changes."""
        labels = self.clean.labels.clone()
        labels[self.index] = self.labels
        return labels

    def slots(self) -> torch.Tensor:
        """int64 (N,): the slot of each image among the replacements, or -1."""
        slots = torch.full((len(self),), -1, dtype=torch.int64)
        slots[self.index] = torch.arange(len(self.index))
        return slots

    def at(self, index: torch.Tensor) -> Labelled:
        """The rows at int64 indices, with the attacker's changes."""
        slot = self.slots()[index]
        images = self.clean.at(index).images.clone()
        images[slot >= 0] = self.images[slot[slot >= 0]]
        return Labelled(images, self.stored_labels()[index])


def map_labels(
    labels: torch.Tensor, label_map: LabelMap, target: int, num_classes: int
) -> torch.Tensor:
    """The labels that the attacker wants: the target for all, or y -> (y + 1) mod num_classes.

    Shape:
        (N,) int64 -> (N,) int64.
    """
    return torch.full_like(labels, target) if label_map == "all2one" else (labels + 1) % num_classes


@dataclass(frozen=True)
class Choice:
    """Which training images an attack replaces, ascending, and the labels that it gives them.

    index int64 (P,), labels int64 (P,), kinds uint8 (P,) positions in `KINDS`.
    """

    index: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor

    def check(self, count: int, num_classes: int) -> None:
        """Raises UserError if an attack's own choice is none of this kind, for so many images."""
        parts = {"index": torch.int64, "labels": torch.int64, "kinds": torch.uint8}
        ends = {"index": count, "labels": num_classes, "kinds": len(KINDS)}
        for name, dtype in parts.items():
            values = getattr(self, name)
            if values.dtype != dtype or values.shape != self.index.shape or values.ndim != 1:
                given = f"{str(values.dtype)[6:]} of {tuple(values.shape)}"
                wanted = f"{str(dtype)[6:]} of ({len(self.index)},)"
                raise UserError(f"the attack's choice: {name} is {given}; give {wanted}")
            if ((values < 0) | (values >= ends[name])).any():
                raise UserError(
                    f"the attack's choice: {name} has {int(values.min())} to {int(values.max())}; "
                    f"give 0 to {ends[name] - 1}"
                )
        if (self.index.diff() <= 0).any():
            raise UserError("the attack's choice: index is not ascending; give each image once")


def dirty_label(
    labels: torch.Tensor,
    pratio: float,
    label_map: LabelMap,
    target: int,
    num_classes: int,
    rng: torch.Generator,
) -> Choice:
    """round(pratio * N) images of any class, without replacement, with the mapped label.

    Args:
        labels: int64 (N,), true labels of the training set.
        pratio: poisoning ratio in [0, 1], relative to the whole training set.
        rng: on the CPU.

    Raises:
        UserError: if that is no image at all.
    """
    index = torch.randperm(len(labels), generator=rng)[: poison_count(len(labels), pratio)]
    index = index.sort().values
    return Choice(
        index,
        map_labels(labels[index], label_map, target, num_classes),
        torch.zeros(len(index), dtype=torch.uint8),
    )


def clean_label(labels: torch.Tensor, pratio: float, target: int, rng: torch.Generator) -> Choice:
    """round(pratio * N) images of the target class, labels kept.

    The ratio is relative to the whole training set. If the class has fewer images, all of them
    are chosen.

    Args:
        labels: int64 (N,), true labels of the training set.
        pratio: poisoning ratio in [0, 1].
        rng: on the CPU.

    Raises:
        UserError: if that is no image at all.
    """
    members = torch.nonzero(labels == target).flatten()
    wanted = poison_count(len(labels), pratio)
    if len(members) == 0:
        raise UserError(f"--attack_target: class {target} has no training image; give another")
    index = members[torch.randperm(len(members), generator=rng)[:wanted]].sort().values
    return Choice(index, labels[index], torch.zeros(len(index), dtype=torch.uint8))


def replace_images(clean: Labelled, choice: Choice, trigger: Trigger) -> PoisonedSet:
    """The training set whose chosen images carry the trigger.

    Raises:
        UserError: as `require_effect` says.
    """
    require_effect(trigger, clean.images, choice.index)
    images = apply_trigger(trigger, clean.images, choice.index)
    return PoisonedSet(clean, choice.index, images, choice.labels, choice.kinds)


def triggered_test_set(
    data: Dataset, trigger: Trigger, label_map: LabelMap, target: int
) -> Triggered:
    """The test images that ASR and RA count.

    Raises:
        UserError: as `test_images_to_trigger` and `require_effect` say.
    """
    labels = data.test.labels
    targets = map_labels(labels, label_map, target, len(data.classes))
    index = test_images_to_trigger(data, label_map, target)
    require_effect(trigger, data.test.images, index)
    images = apply_trigger(trigger, data.test.images, index)
    return Triggered(images, targets[index], labels[index], index)


def test_images_to_trigger(data: Dataset, label_map: LabelMap, target: int) -> torch.Tensor:
    """int64 (M,): all test images, without those whose true label is the target (all-to-one).

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
    return index


def apply_trigger(trigger: Trigger, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The trigger on many images of a split, chunk by chunk.

    Args:
        images: uint8 (N, C, H, W), the whole split.
        index: int64 (M,), which of them get it.

    Returns:
        uint8 (M, C, H, W), a copy.
    """
    result = torch.empty(len(index), *images.shape[1:], dtype=torch.uint8)
    with Progress(len(index), "placing the trigger", "image") as progress:
        for rows, part in zip(result.split(_CHUNK), index.split(_CHUNK), strict=True):
            clean = images[part]
            release(images)
            rows.copy_(_triggered(trigger, clean, part))
            progress.advance(len(part))
    return result


def _triggered(trigger: Trigger, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Images with the trigger; raises UserError if an attack's trigger gives something else."""
    given = trigger(images, index)
    if isinstance(given, torch.Tensor):
        told = f"{str(given.dtype)[6:]} of {tuple(given.shape)}"
    else:
        told = type(given).__name__
    wanted = f"{str(images.dtype)[6:]} of {tuple(images.shape)}"
    if told != wanted:
        raise UserError(
            f"the attack's trigger gives {told}, not {wanted}, which the images are; return images "
            "as it is given them"
        )
    return given


def require_effect(trigger: Trigger, images: torch.Tensor, index: torch.Tensor) -> None:
    """Refuses a trigger that changes nothing, a silent failure that would look like label noise.

    Tries the trigger on one part of the images after the other, until a pixel changes.

    Args:
        images: uint8 (N, C, H, W), the whole split.
        index: int64 (M,), which of them will get it.

    Raises:
        UserError: if not a single pixel would differ.
    """
    for part in index.split(_CHUNK // 16):
        clean = images[part]
        if not torch.equal(_triggered(trigger, clean.clone(), part), clean):
            return
    raise UserError("the trigger changes no pixel of any image; make it stronger or larger")


def poison_count(count: int, pratio: float) -> int:
    """round(pratio * count) images.

    Raises:
        UserError: if that is none.
    """
    chosen = round(pratio * count)
    if chosen == 0:
        raise UserError(
            f"--pratio: {pratio:g} of {count} training images poisons none; "
            f"give at least {1 / count:.2g}"
        )
    return chosen


def unpoisoned(clean: Labelled) -> PoisonedSet:
    """A clean training set as a poisoned set without poison."""
    none = torch.zeros(0, dtype=torch.int64)
    return PoisonedSet(clean, none, clean.images[:0], none, none.to(torch.uint8))


def count_in_batch(ratio: float, batch_size: int, rng: torch.Generator) -> int:
    """How many images of a batch an attack that controls training takes.

    See `whole_share`. If ratio * batch_size is below 1, it is the probability that the batch
    has one such image: with 8 % and batches of ten, four of five batches have one.

    Args:
        ratio: in [0, 1].
        rng: on the CPU; draws in the second case only.
    """
    whole = whole_share(ratio, batch_size)
    return whole or int(torch.rand((), generator=rng) < ratio * batch_size)


def said_of_batches(ratio: float, batch_size: int) -> str:
    """One line that says what `count_in_batch` gives for a poisoning ratio."""
    whole = whole_share(ratio, batch_size)
    if whole:
        share = 100 * whole / batch_size
        return f"{whole} of each batch of {batch_size} images are poisoned, {share:.2f} %"
    every = 1 / (ratio * batch_size)
    return (
        f"one image is poisoned in one of {every:.3g} batches of {batch_size}, drawn at random, "
        f"{100 * ratio:.2f} %"
    )


def partners(count: int, rng: torch.Generator) -> torch.Tensor:
    """A partner for each of `count` images, each used once: int64 (count,), a random cycle.

    No image is its own partner, unless it is the only one.
    """
    order = torch.randperm(count, generator=rng)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def first_of_batches(
    data: Dataset,
    batch_size: int,
    counts: Callable[[int], tuple[int, int]],
    trigger: Trigger,
    cross: Trigger,
    label_map: LabelMap,
    target: int,
) -> PoisonedSet:
    """The poisoned set of an attack that controls training, as its record keeps it.

    The set is cut into batches in its own order. The first images of each batch get the trigger and
    the mapped label. The next ones get the cross trigger and keep their own label.

    Args:
        counts: from a batch's size to the numbers of both kinds.
    """
    unchanged = len(KINDS)
    kinds = torch.full((len(data.train),), unchanged, dtype=torch.uint8)
    for batch in kinds.split(batch_size):
        poisoned, crossed = counts(len(batch))
        batch[:poisoned] = KINDS.index("poison")
        batch[poisoned : poisoned + crossed] = KINDS.index("cross")
    index = torch.nonzero(kinds != unchanged).flatten()
    kinds = kinds[index]
    is_poison = is_kind(kinds, "poison")
    chosen = data.train.at(index)
    images, labels = chosen.images.clone(), chosen.labels.clone()
    for mask, apply in ((is_poison, trigger), (~is_poison, cross)):
        if mask.any():
            images[mask] = apply_trigger(apply, data.train.images, index[mask])
    labels[is_poison] = map_labels(labels[is_poison], label_map, target, len(data.classes))
    return PoisonedSet(data.train, index, images, labels, kinds)
