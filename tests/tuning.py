"""SGD with momentum, and tuning with it, written out: what tests hold defenses to.

Nothing here calls code of the project.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


class Momentum:
    """v becomes momentum v + gradient + decay w, and then w becomes w - rate v; v starts as 0.

    Args:
        weights: are changed in place.
        momentum: of all weights.
        decay: of all weights.
    """

    def __init__(
        self, weights: Iterable[torch.Tensor], momentum: float, decay: float = 0.0
    ) -> None:
        self.weights, self.momentum, self.decay = list(weights), momentum, decay
        self.velocity: list[torch.Tensor | None] = [None] * len(self.weights)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        """A step of all weights, whose gradients are given in their order."""
        for i, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            pull = gradient.add(weight, alpha=self.decay)
            before = self.velocity[i]
            moving = pull if before is None else before * self.momentum + pull
            self.velocity[i] = moving
            weight.add_(moving, alpha=-rate)


def tune_on_sphere(
    model: Any,
    count: int,
    norm: torch.Tensor,
    order: torch.Generator,
    config: Any,
    gradients: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> nn.Module:
    """Tunes a `ConvNet`, whose head is scaled to a norm after each step, in place.

    The rate is that of a cosine over the rounds.

    Args:
        count: of the images.
        norm: of the head's weight.
        order: draws the order of the images in each round.
        config: has the values of the recipe.
        gradients: of the model's parameters, for the indices of a batch.
    """
    model.train()
    sgd = Momentum(model.parameters(), config.sgd_momentum, config.wd)
    for number in range(config.n_rounds):
        rate = config.lr * (1 + math.cos(math.pi * number / config.n_rounds)) / 2
        for index in torch.randperm(count, generator=order).split(config.batch_size):
            sgd.step(gradients(index), rate)
            head = model.linear.weight.data
            head *= norm / head.square().sum().sqrt()
    return model
