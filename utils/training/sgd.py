"""The fine-tuning that several defenses share: the recipe of `defense/ft.py`, with two hooks."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from utils.data import as_float, augment
from utils.runtime import generator
from utils.train import Loop, Schedule, Scheduler, batch_sizes

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Computes a loss, leaves its gradient on the weights, and gives the loss back.
Gradient = Callable[[Callable[[], torch.Tensor]], torch.Tensor]


class Recipe(Protocol):
    """The flags that fine-tuning reads."""

    @property
    def n_rounds(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def crop_padding(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def lr(self) -> float: ...
    @property
    def lr_scheduler(self) -> Schedule: ...
    @property
    def sgd_momentum(self) -> float: ...
    @property
    def wd(self) -> float: ...
    @property
    def random_seed(self) -> int: ...


def fine_tune(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Recipe,
    loop: Loop,
    *,
    phase: str = "",
    rounds: int | None = None,
    loss: Loss = F.cross_entropy,
    gradient: Gradient | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Trains a model in place as `defense/ft.py` does; it is in eval mode at the end.

    Args:
        model: from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W), uint8 or float in [0, 1].
        labels: (N,) int64.
        config: the flags of FT.
        loop: counts the rounds.
        phase: name of the phase; "" for the main one.
        rounds: how many; None for `n_rounds`.
        loss: of (B, K) logits and (B,) labels.
        gradient: leaves the gradient on the weights; None for a plain backward pass. It is given a
            function that computes the batch's loss, and may call it again.
        after_step: called after each step of the optimizer.
    """
    rounds = config.n_rounds if rounds is None else rounds
    device = next(model.parameters()).device
    learner = loop.parallel(model)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
        fused=device.type == "cuda",
    )
    steps = len(batch_sizes(len(images), config.batch_size))
    scheduler = Scheduler(optimizer, config.lr_scheduler, rounds, steps)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)

    def plain(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        value = compute()
        loop.backward(value)
        return value

    for _ in loop.rounds(
        rounds,
        phase,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        order=order,
        crops=crops,
    ):
        model.train()
        for index in loop.batches(len(images), config.batch_size, order):
            batch = augment(images[index], config.crop_padding, config.flip, crops, is_part=True)
            x, y = as_float(batch, device), labels[index].to(device)
            optimizer.zero_grad()
            value = (gradient or plain)(lambda x=x, y=y: loss(learner(x), y))  # type: ignore[misc]
            optimizer.step()
            if after_step is not None:
                after_step()
            scheduler.after_step()
            loop.log(len(index), loss=value)
        scheduler.after_epoch(loop.losses()["loss"])
    model.eval()
