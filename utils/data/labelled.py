"""Images with labels, and datasets of them."""

import hashlib
from dataclasses import dataclass

import torch

from utils.data.batches import as_float, release, spread
from utils.errors import listed, shown

LARGEST_SIDE = 1024  # of an image, in pixels


MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Labelled:
    """Images with their labels: uint8 (N, C, H, W) and int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: torch.Tensor) -> "Labelled":
        """The rows at int64 indices."""
        chosen = Labelled(self.images[index], self.labels[index])
        release(self.images)
        return chosen


@dataclass(frozen=True)
class Triggered:
    """Triggered images of one clean split.

    Attributes:
        images: uint8 (M, C, H, W), with the trigger.
        targets: int64 (M,), the labels that the attacker wants.
        labels: int64 (M,), the true labels.
        index: int64 (M,), the positions in the clean split.
    """

    images: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """A clean classification dataset in memory (or mapped from a cache file).

    Attributes:
        train, test: the two splits.
        classes: names by label.
        mean, std: per-channel constants of the network's normalization, pixel units in [0, 1].
        warnings: about unusual things in its files, one line each.
    """

    name: str
    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def named(self, label: int) -> str:
        """A class by number and name: '2 (dog)'; just '2' if that is its name."""
        name = self.classes[label]
        return f"{label}" if name == str(label) else f"{label} ({shown(name, 40)})"

    def listed(self) -> str:
        """The names of the classes; if there are many, the first ten."""
        return listed(self.classes, limit=40)

    def tensors(self) -> list[torch.Tensor]:
        """All images and labels, the training set first."""
        return [self.train.images, self.train.labels, self.test.images, self.test.labels]

    def fingerprint(self) -> str:
        """sha256 over all labels and about 500 evenly spaced images of each split.

        It tells whether a record's indices still mean the same images.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogatepass"))
        for split in (self.train, self.test):
            digest.update(split.labels.numpy().tobytes())
            digest.update(split.images[:: max(1, len(split) // 500)].contiguous().numpy().tobytes())
            release(split.images)
        return digest.hexdigest()


def examples(triggered: Triggered, data: Dataset, count: int = 8) -> tuple[torch.Tensor, ...]:
    """Evenly spaced test images, clean and triggered.

    Returns:
        Two float tensors (count, C, H, W) in [0, 1].
    """
    chosen = spread(len(triggered.index), count)
    clean = data.test.images[triggered.index[chosen]]
    return as_float(clean), as_float(triggered.images[chosen])
