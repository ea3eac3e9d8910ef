"""How a defense chooses on its own clean images: a held-out part, levels, and outliers.

No function here takes a test set.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from models.outside import buffers_outside, put_buffers
from utils.data.batches import least_share, none_of
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.findings import Findings

NOTABLE = 0.2  # of the wanted number of images; a larger difference is warned of

L = TypeVar("L", int, float)  # a level


def hold_out(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits images into a part to fit on and a held-out part, class by class.

    Of each class of n images, round(share * n) are held out, at least one if the class has two or
    more.

    Args:
        labels: int64 (N,).
        share: in [0, 1].
        seed: of the draw.

    Returns:
        Two int64 vectors of positions, ascending: to fit on, and held out.
    """
    held = drawn_by_class(labels, share, generator(seed, "held-out part"))  # on the CPU
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[held] = True
    return torch.nonzero(~is_held).flatten(), held


def fit_and_held_out(
    labels: torch.Tensor,
    val_ratio: float,
    seed: int,
    findings: Findings,
    *,
    purpose: str,
    otherwise: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `hold_out`, where an image to fit on is needed, and a warning if none is held out.

    Args:
        findings: take the warning.
        purpose: what the images to fit on are for, for the message: "learn from".
        otherwise: what is done if no image is held out, for the warning.

    Raises:
        UserError: if all images are held out.
    """
    fit, held = hold_out(labels, val_ratio, seed)
    if len(fit) == 0:
        raise UserError(
            f"--val_ratio: {val_ratio:g} of {len(labels)} images leaves none to {purpose}; give a "
            "smaller one, or more images (--ratio)"
        )
    if len(held) == 0:
        findings.warn(f"no image can be held out, so {otherwise}; give more images (--ratio)")
    return fit, held


def drawn_by_class(labels: torch.Tensor, share: float, rng: torch.Generator) -> torch.Tensor:
    """Positions of images drawn at random: of each class the same share, see `hold_out`.

    Args:
        labels: int64 (N,).
        share: in [0, 1].
        rng: on the CPU.

    Returns:
        int64 positions, ascending, on the CPU.
    """
    labels = labels.cpu()
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        count = max(round(share * len(members)), int(len(members) > 1))
        chosen.append(members[torch.randperm(len(members), generator=rng)[:count]])
    return torch.cat(chosen).sort().values


def drawn_share(labels: torch.Tensor, ratio: float, seed: int) -> torch.Tensor:
    """A share of each class of the training set, drawn at random.

    Args:
        labels: int64 (N,), of the training set.
        ratio: in (0, 1].

    Returns:
        int64 indices into the training set, ascending.

    Raises:
        UserError: if round(ratio N) is 0.
    """
    count = len(labels)
    if round(ratio * count) == 0:
        raise UserError(
            f"{none_of('--ratio', ratio, count, 'training images')}; give at least "
            f"{least_share(count)}"
        )
    rng = generator(seed, "clean subset")
    index = drawn_by_class(labels, ratio, rng)
    if len(index) == 0:  # each class has a single image, of which the share is none
        index = torch.randperm(count, generator=rng)[: round(ratio * count)].sort().values
    return index


def warn_of_number(index: torch.Tensor, count: int, ratio: float, findings: Findings) -> None:
    """Warns if many more or fewer images were drawn than the ratio says.

    The share of each class is rounded, and a class of two or more gives at least one image. So many
    small classes, or a small ratio, can give another number.

    Args:
        index: as `drawn_share` gives it.
        count: images of the training set.
        ratio: in (0, 1].
    """
    wanted = round(ratio * count)
    if abs(len(index) - wanted) > NOTABLE * wanted:
        findings.warn(
            f"--ratio: {ratio:g} of {count} training images would be {wanted}, but {len(index)} "
            "are drawn, because each class gives a whole number, at least one of two; compare with "
            "other ratios by the number of images"
        )


class Best:
    """The model of the last round that is as good as the best one, as far as a measure can tell.

    Its measure is at most one standard error above the smallest one.

    Args:
        model: as it is before the first round; `keep` is called with the same one.
        patience: rounds without a smaller value after which it is over, >= 1.
        least: rounds before which it is never over.

    Attributes:
        state: tensors by name, for a checkpoint.
    """

    def __init__(self, model: nn.Module, patience: int, least: int = 0) -> None:
        self._patience, self._least = patience, least
        self.state = {f"weights.{k}": v.clone() for k, v in _tensors(model).items()}
        self.state["smallest"] = torch.tensor([math.inf, 0.0], dtype=torch.float64)
        self.state["round"], self.state["since"] = torch.tensor(0), torch.tensor(0)

    @property
    def round(self) -> int:
        """The round that is kept, from 1; 0 before the first one."""
        return int(self.state["round"])

    def keep(self, model: nn.Module, value: float, error: float, number: int) -> bool:
        """Keeps a round's model if it is as good as the best one so far.

        Args:
            value: of the measure; NaN is no good value.
            error: its standard error.
            number: of the round, from 1.

        Returns:
            Whether it is over.
        """
        smallest = self.state["smallest"]
        if value < smallest[0]:
            smallest.copy_(torch.tensor([value, error], dtype=torch.float64))
            self.state["since"].fill_(number)
        if value <= smallest.sum():
            self.state["round"].fill_(number)
            for name, tensor in self._kept(model).items():
                self.state[f"weights.{name}"].copy_(tensor)
        return number >= self._least and number - int(self.state["since"]) >= self._patience

    def put_into(self, model: nn.Module) -> None:
        """Makes a model the one that is kept."""
        kept = {name: self.state[f"weights.{name}"] for name in self._kept(model)}
        model.load_state_dict(kept, strict=False)
        put_buffers(model, {name: kept[name] for name in buffers_outside(model) if name in kept})

    def _kept(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The model's tensors that the state has in the same shape.

        States of earlier versions have no non-persistent buffers, and a cache may grow.
        """
        shapes = {name: value.shape for name, value in self.state.items()}
        return {k: v for k, v in _tensors(model).items() if shapes.get(f"weights.{k}") == v.shape}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, without what a user's module adds to them (`get_extra_state`)."""
    state = {**buffers_outside(model), **model.state_dict()}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def acceptable(accuracies: Sequence[float], before: float, acc_ratio: float) -> int:
    """How many levels may be taken, of levels that go further and further.

    A level is good if its accuracy is at least (1 - acc_ratio) of the one before. The good levels
    are counted from the start to the first one that is not.

    Args:
        accuracies: on held-out images, level by level, in [0, 1].
        before: of the model as it was given, in [0, 1].
        acc_ratio: relative loss that is accepted, in [0, 1].

    Returns:
        0 to len(accuracies). 0: none is good, and the model stays as it is.
    """
    limit = (1 - acc_ratio) * before - 1e-9  # 0.9 * 0.78 is a little over 0.702
    is_good = [accuracy >= limit for accuracy in accuracies]  # of no image it is NaN, and not good
    return is_good.index(False) if False in is_good else len(is_good)


def tried(
    levels: Iterable[L],
    accuracy: Callable[[L], float],
    before: float,
    acc_ratio: float,
) -> list[float]:
    """The accuracies of levels, up to the first one that is not good (see `acceptable`)."""
    accuracies: list[float] = []
    for level in levels:
        accuracies.append(accuracy(level))
        if acceptable(accuracies, before, acc_ratio) < len(accuracies):
            break
    return accuracies


def outliers(scores: torch.Tensor, u: float, are_low: bool = False) -> torch.Tensor:
    """Which scores stand out: more than u standard deviations over the mean.

    The deviation is that of a sample (divides by n - 1). Scores that are not finite do not count in
    mean and deviation, and are no outliers. If one of n scores differs and the others are equal, it
    is (n - 1) / sqrt(n) deviations away, so u = 3 finds nothing among ten scores.

    Args:
        scores: (C,) float.
        u: >= 0.
        are_low: whether to look for scores under the mean instead.

    Returns:
        bool (C,).
    """
    is_finite = scores.isfinite()
    finite = scores[is_finite].double()
    if (
        len(finite) < 2 or finite.min() == finite.max()
    ):  # equal ones differ from their mean by rounding
        return torch.zeros_like(is_finite)
    above = (scores.double() - finite.mean()) * (-1 if are_low else 1)
    return is_finite & (above > u * finite.std())
