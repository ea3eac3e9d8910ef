"""Where adversarial images go: a backdoor draws them to its target."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from utils.process import distributed
from utils.training.evaluate import confusion

FEWEST_TO_STAND_OUT = 3  # values, of which one can be farther from the median than the others


class Tally(dict[str, torch.Tensor]):
    """Counts, at first 0: int64 `matrix` (K, K) from true class to adversarial label, and `sent`,
    `others` (K,).

    Each of several processes counts its own images. A state has those of all; what goes on from it
    has them in the first process, and nothing in the others.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(
            matrix=torch.zeros(classes, classes, dtype=torch.int64),
            sent=torch.zeros(classes, dtype=torch.int64),
            others=torch.zeros(classes, dtype=torch.int64),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: distributed.total(counts).clone() for name, counts in self.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, counts in self.items():
            counts.copy_(state[name] if distributed.is_main() else torch.zeros_like(counts))


@dataclass(frozen=True)
class LabelShare:
    """What a tally says.

    Attributes:
        share: for each class, of the images of other classes (by label and by clean prediction),
            how many became adversarial images of the class; in [0, 1], NaN without such images.
        top: the class with the largest share; None if that is 0, or several have it.
        entropy: of the classes that images were sent to, over that of equal shares, in [0, 1]; 1 if
            no image was sent to another class.
        z: how far the largest share is over the median; see `robust_z`.
    """

    share: tuple[float, ...]
    top: int | None
    entropy: float
    z: float


def add(
    tally: Tally, labels: torch.Tensor, predictions: torch.Tensor, adversarial: torch.Tensor
) -> None:
    """Counts images; in place.

    Args:
        labels: int64 (N,), true ones.
        predictions: int64 (N,), of the clean images.
        adversarial: int64 (N,), of the images with their perturbations.
    """
    labels, predictions, adversarial = (
        values.cpu() for values in (labels, predictions, adversarial)
    )
    classes = len(tally["sent"])
    tally["matrix"] += confusion(labels, adversarial, classes)
    for label in range(classes):
        is_other = (labels != label) & (predictions != label)
        tally["others"][label] += is_other.sum()
        tally["sent"][label] += (is_other & (adversarial == label)).sum()


def label_share(tally: Tally) -> LabelShare:
    """What a tally says; several processes get that of all their images."""
    sent, others = (distributed.total(tally[name]).double() for name in ("sent", "others"))
    share = sent / others  # 0 / 0 is NaN
    parts = sent / sent.sum()
    entropy = -torch.special.xlogy(parts, parts).sum() / math.log(max(2, len(sent)))
    return LabelShare(
        share=tuple(share.tolist()),
        top=alone(share) if sent.any() else None,
        entropy=abs(float(entropy)) if sent.any() else 1.0,
        z=robust_z(share),
    )


def alone(values: torch.Tensor) -> int | None:
    """The index of the largest value without NaN; None if there is none, or if several have it.

    Args:
        values: float (K,).
    """
    largest = values.nan_to_num(nan=-math.inf).max()
    (places,) = (values == largest).nonzero(as_tuple=True)
    return int(places) if len(places) == 1 else None


def robust_z(values: torch.Tensor) -> float:
    """(max - median) / (1.4826 MAD), without NaN; the median is the mean of two middle values.

    Args:
        values: float (K,).

    Returns:
        Infinity if the MAD is 0 and the largest value is not the median; 0 if it is, or if there is
        no value. NaN for one or two: two values are always equally far from their median.
    """
    values = values.double()[~values.isnan()]
    if len(values) < FEWEST_TO_STAND_OUT:
        return math.nan if len(values) else 0.0
    middle = values.quantile(0.5)
    apart = float(values.max() - middle)
    mad = float((values - middle).abs().quantile(0.5))
    return apart / (1.4826 * mad) if mad > 0 else (math.inf if apart > 0 else 0.0)
