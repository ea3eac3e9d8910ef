"""Pruning of channels: those that stand out, or those whose learned mask is small.

The level of a mask is fixed, or chosen on a held-out part of the clean images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from models.channels import named_channels, norms, silenced
from utils.errors import UserError
from utils.training.evaluate import predict
from utils.training.findings import Findings
from utils.training.loop import Loop
from utils.training.selection import acceptable, fit_and_held_out, tried

MOST_LEVELS = 10_000


class Chosen(Protocol):
    """The flags that the choice of a level reads."""

    @property
    def val_ratio(self) -> float: ...
    @property
    def acc_ratio(self) -> float: ...
    @property
    def random_seed(self) -> int: ...


class Levels(Chosen, Protocol):
    """The flags that pruning by masks reads."""

    @property
    def selection(self) -> Literal["fixed", "val"]: ...
    @property
    def pruning_max(self) -> float: ...
    @property
    def pruning_step(self) -> float: ...
    @property
    def pruning_number(self) -> float: ...
    @property
    def prune_bias(self) -> bool: ...


C_contra = TypeVar("C_contra", bound=Levels, contravariant=True)


class Learn(Protocol[C_contra]):
    """How a method learns its masks."""

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: C_contra,
        loop: Loop | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """(C,) in [0, 1] by the layer's name."""


C = TypeVar("C", bound=Levels)
L = TypeVar("L", int, float)


def full_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Masks of 1 that learn, (C,) for each BatchNorm by its name.

    Raises:
        UserError: if the network has no BatchNorm.
    """
    return {
        name: torch.ones_like(norm.weight).requires_grad_() for name, norm in norms(model).items()
    }


@torch.no_grad()
def clamp(masks: Mapping[str, torch.Tensor]) -> None:
    """Brings masks back to [0, 1], in place, as after a step."""
    for mask in masks.values():
        mask.clamp_(0, 1)


def pruned_by_masks(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: C,
    loop: Loop,
    learn: Learn[C],
) -> nn.Module:
    """A copy of the model without the channels whose mask, to four decimals, is at most the level.

    `fixed` learns the masks on all images and takes the level `pruning_number`. `val` learns them
    on a part, goes through the levels 0, pruning_step, ... pruning_max, and takes the last one
    before the accuracy on the held-out images falls (`acceptable`).

    Returns:
        The copy, in eval mode; as it was, if no level is good or none can be chosen.

    Raises:
        UserError: if there are more levels than masks to four decimals can tell apart.
    """
    steps = config.pruning_max / config.pruning_step
    if config.selection == "val" and steps > MOST_LEVELS:
        raise UserError(
            f"--pruning_step: {config.pruning_step:g} makes more than {MOST_LEVELS:,} levels, and "
            "masks have four decimals; give a larger one"
        )
    if config.selection == "fixed":
        masks = learn(model, images, labels, config, loop)
        return _pruned(model, masks, config, loop, config.pruning_number)
    split = split_to_choose(model, images, labels, config, loop, purpose="learn from")
    if split is None:
        return silenced(model, {}, config.prune_bias)
    masks = learn(model, images[split.fit], labels[split.fit], config, loop)
    levels = [round(number * config.pruning_step, 10) for number in range(int(steps + 1e-9) + 1)]

    def of_level(level: float) -> nn.Module:
        return silenced(model, channels_up_to(masks, level), config.prune_bias)

    level = chosen_level(levels, of_level, split, loop, acc_ratio=config.acc_ratio)
    if level is None:
        return silenced(model, {}, config.prune_bias)
    return _pruned(model, masks, config, loop, level)


@dataclass(frozen=True)
class Split:
    """A clean subset of which a part is held out to choose a level with.

    Attributes:
        fit: int64 positions of the images to fit on.
        images, labels: the held-out ones, (N, C, H, W) float in [0, 1] or uint8, and (N,) int64.
        before: their accuracy by the model as it was given, in [0, 1].
    """

    fit: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    before: float


def split_to_choose(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Chosen,
    loop: Loop,
    *,
    purpose: str,
) -> Split | None:
    """Holds a part of the images out, and asks whether a level can be chosen with it.

    A model that gives every image the same class is as good as one without any channel. If the
    model's accuracy on the held-out images is not above that of the best such model, every level
    could pass. The exception is an `acc_ratio` of 1, with which every level is meant to pass.

    Args:
        model: as it was given.
        images: (N, C, H, W), float in [0, 1] or uint8.
        labels: (N,) int64.
        loop: takes the warning.
        purpose: as of `fit_and_held_out`.

    Returns:
        None if no level can be chosen, which is warned of.

    Raises:
        UserError: if all images are held out.
    """
    fit, held = fit_and_held_out(
        labels,
        config.val_ratio,
        config.random_seed,
        loop.findings,
        purpose=purpose,
        otherwise="no level can be chosen, and the model is given back as it was",
    )
    if len(held) == 0:
        return None
    split = Split(fit, images[held], labels[held], accuracy(model, images[held], labels[held]))
    constant = float(labels[held].bincount().max()) / len(held)
    if config.acc_ratio < 1 and split.before <= constant:
        loop.findings.warn(
            f"held-out accuracy is {_percent(split.before)} ({len(held)} images), and a network "
            f"that always gives the same class reaches {_percent(constant)}, so no level can be "
            "chosen, and the model is given back as it was; give more images (--ratio) or "
            "--selection fixed"
        )
        return None
    return split


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """In [0, 1], of a model in the mode that it has, on the device of its weights."""
    hits = predict(model, images, next(model.parameters()).device) == labels.cpu()
    return float(hits.double().mean())


def chosen_level(
    levels: Sequence[L],
    of_level: Callable[[L], nn.Module],
    split: Split,
    loop: Loop,
    *,
    acc_ratio: float,
) -> L | None:
    """The last level before the accuracy on held-out images falls, see `acceptable`.

    The tried levels go into the findings, and also a warning if no level is good.

    Args:
        levels: in the order in which they go further and further.
        of_level: the model pruned up to a level.
        split: has the held-out images.
        loop: takes what is found.
        acc_ratio: relative loss of accuracy that is accepted, in [0, 1].

    Returns:
        The level; None if no level is good.
    """
    accuracies = tried(
        levels,
        lambda level: accuracy(of_level(level), split.images, split.labels),
        split.before,
        acc_ratio,
    )
    count = acceptable(accuracies, split.before, acc_ratio)
    rows = [
        {"level": level, "held_out_acc": reached}
        for level, reached in zip(levels, accuracies, strict=False)
    ]
    by_level = (f"{row['level']:g}: {_percent(row['held_out_acc'])}" for row in rows)
    loop.findings.tables["levels"] = rows
    loop.findings.say(
        f"held-out accuracy {_percent(split.before)}; by level: {', '.join(by_level)}",
        held_out_images=len(split.images),
        held_out_acc_before=split.before,
        levels=list(levels[: len(accuracies)]),
        held_out_accs=accuracies,
    )
    if count == 0:
        loop.findings.warn(
            "no level of pruning kept the accuracy on held-out images, so the model is given back "
            "as it was; raise --acc_ratio"
        )
        return None
    return levels[count - 1]


def pruned_in_rounds(
    model: nn.Module,
    loop: Loop,
    channels_of: Callable[[nn.Module], Mapping[str, torch.Tensor]],
    *,
    n_rounds: int,
    prune_bias: bool,
) -> nn.Module:
    """A copy of the model without the channels that stand out, which are searched in each round.

    Args:
        loop: counts the rounds, and takes what was pruned.
        channels_of: from the model as it is now to the channels to prune: bool (C,) by the layer's
            name.
        n_rounds: how often they are searched.
        prune_bias: whether a pruned channel gives 0; else it gives its bias.

    Returns:
        The copy, in eval mode.
    """
    model = silenced(model, {}, prune_bias)
    rows: dict[tuple[int | str, ...], dict[str, int | str]] = {}
    for _ in loop.rounds(n_rounds):
        channels = channels_of(model)
        model = silenced(model, channels, prune_bias)
        # A channel that is pruned may stand out again, because what comes in there is as before.
        rows |= {tuple(row.values()): row for row in named_channels(channels)}
    pruned = list(rows.values())
    say_pruned(loop.findings, pruned, f"{len(pruned)} channels pruned")
    return model


def channels_up_to(masks: Mapping[str, torch.Tensor], level: float) -> dict[str, torch.Tensor]:
    """bool (C,) by name: which masks, rounded to four decimals, are at most the level."""
    return {name: (mask * 1e4).round() / 1e4 <= level + 1e-9 for name, mask in masks.items()}


def _pruned(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    config: Levels,
    loop: Loop,
    level: float,
) -> nn.Module:
    channels = channels_up_to(masks, level)
    pruned = named_channels(channels)
    total = sum(len(mask) for mask in masks.values())
    text = f"level {level:g}: {len(pruned)} of {total} channels pruned"
    say_pruned(loop.findings, pruned, text, level=level, channels=total)
    return silenced(model, channels, config.prune_bias)


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def say_pruned(
    findings: Findings, pruned: list[dict[str, int | str]], text: str, **facts: Any
) -> None:
    """Keeps the pruned channels, as a table and by layer for the summary, and logs them by layer.

    Args:
        pruned: a row for each channel, as `named_channels` gives them.
    """
    layers: dict[str, list[int]] = {}
    for row in pruned:
        layers.setdefault(str(row["layer"]), []).append(int(row["channel"]))
    findings.tables["pruned"] = pruned
    findings.say(text, **facts, pruned_channels=len(pruned), pruned=layers)
    for name, channels in layers.items():
        findings.say(f"pruned of {name}: {', '.join(map(str, channels))}")
