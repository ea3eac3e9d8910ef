"""FT-SAM: fine-tunes with sharpness-aware minimization, which moves large weights the most.

Zhu, Wei, Shen, Fan, Wu. *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization.* ICCV 2023.

Weights that serve a backdoor are large. Before each step, all weights move to a point where the
loss is higher, and large weights move the most. The step then uses the gradient at that point:

    e = rho |w|^2 g / || |w| g ||    elementwise, one norm over all weights;  g: gradient at w
    step with the gradient at w + e

    python defense/ft_sam.py --result_file badnet_demo

The loss is cross-entropy with smoothed labels, as published: the label gets 1 - smoothing, and the
other classes share the rest. BatchNorm uses the batch's statistics in both passes and keeps those
of the first. As published, the learning rate goes down and up by a cosine of 200 steps
(`cosine_100_steps`); `--lr_scheduler cosine` falls once. rho for other networks is not published:
take the largest that costs less than 2 % of the accuracy on held-out images. It fails against
attackers who train with SAM.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import FineTuned, checked, run
from models.copies import copied
from models.modes import keeping_statistics
from utils.training.loop import Loop
from utils.training.sgd import fine_tune


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    rho: Annotated[float, Field(ge=0, description="length of the move of the weights, relative")]
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of a label that the other classes get")
    ]

    advice = "lower --rho or --lr, or give more images (--ratio)"
    rates = "--lr, --rho or --wd"


def adaptive_ascent(
    weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], rho: float
) -> list[torch.Tensor]:
    """The move of each weight, e = rho |w|^2 g / (|| |w| g ||_2 + 1e-12), one norm over all.

    Args:
        weights, gradients: tensors of the same shapes.
        rho: >= 0; the norm of e / |w| over all weights.

    Returns:
        Tensors of the same shapes.
    """
    pairs = list(zip(weights, gradients, strict=True))
    scaled = [(w.abs() * g).flatten() for w, g in pairs]
    norm = torch.linalg.vector_norm(torch.cat(scaled)) + 1e-12
    return [rho * w.abs().square() * g / norm for w, g in pairs]


def smoothed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """KL(target || softmax), mean over images; the other classes share `smoothing` evenly.

    Shape:
        (N, K) float, (N,) int64 -> scalar.
    """
    if smoothing == 0:
        return F.cross_entropy(logits, labels)
    target = torch.full_like(logits, smoothing / (logits.shape[1] - 1))
    target.scatter_(1, labels.unsqueeze(1), 1 - smoothing)
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier, fine-tuned with SAM; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode.

    Example:
        >>> config = Config.load(n_rounds=1, rho=0.1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    model = copied(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradient(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        here = loss()
        loop.backward(here)
        before = [weight.detach().clone() for weight in weights]
        moves = adaptive_ascent(before, [_gradient_of(weight) for weight in weights], config.rho)
        _set(weights, map(torch.add, before, moves))
        model.zero_grad()
        with keeping_statistics(model):
            loop.backward(loss())
        _set(weights, before)
        return here

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(logits, labels, config.label_smoothing)

    fine_tune(model, images, labels, config, loop, loss=loss, gradient=gradient)
    return model


@torch.no_grad()
def _set(weights: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _gradient_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight's gradient; 0 where the loss does not depend on it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


if __name__ == "__main__":
    run(Config, purify)
