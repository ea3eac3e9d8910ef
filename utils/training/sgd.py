"""Training a classifier with SGD."""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from utils.data.batches import as_float, augment, fits, release
from utils.data.poison import PoisonedSet
from utils.errors import UserError
from utils.process import distributed
from utils.process.seeds import Draws, generator
from utils.training.loop import Loop, Step, batch_sizes
from utils.training.state import restore

Schedule = Literal[
    "constant",
    "cosine",
    "cosine_100",
    "cosine_100_steps",
    "one_cycle",
    "multi_step",
    "reduce_on_plateau",
]


class Supervised(Draws):
    """Ordinary training: crop, flip, cross-entropy. The step of all attacks that only poison data.

    Args:
        augmentation: draws crops and flips, on the model's device.
    """

    def __init__(self, crop_padding: int, flip: bool, augmentation: torch.Generator) -> None:
        self.crop_padding = crop_padding
        self.flip = flip
        self.augmentation = augmentation

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.crop_padding or self.flip:
            images = augment(images, self.crop_padding, self.flip, self.augmentation, is_part=True)
        return F.cross_entropy(model(as_float(images)), labels)

    def update(self) -> None:
        pass


def require_batch(count: int, batch_size: int) -> None:
    """Raises UserError if a batch is larger than the set of `count` training images."""
    if count < batch_size:
        raise UserError(
            f"--batch_size: {batch_size} is more than the {count} training images; give "
            f"--batch_size {count} or less"
        )


def train_classifier(
    model: nn.Module,
    data: PoisonedSet,
    step: Step,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: Schedule,
    order: torch.Generator,
    loop: Loop,
    drop_last: bool = True,
    whole: bool = False,
) -> None:
    """Trains a model in place with SGD.

    Args:
        step: gives the loss of a batch.
        order: draws the order of the images; on the CPU.
        loop: counts epochs and batches.
        drop_last: whether an epoch skips a last batch that is not full.
        whole: whether the step needs the batch as a whole, also with several processes.

    Raises:
        UserError: if a batch is larger than the set, or a loss is not finite.
    """
    require_batch(len(data), batch_size)
    batches = _Batches(data, next(model.parameters()).device)
    learner = loop.parallel(model)
    if whole and distributed.processes() > 1:
        learner = distributed.Gathered(learner)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
    )
    steps_per_epoch = (
        len(data) // batch_size if drop_last else len(batch_sizes(len(data), batch_size))
    )
    scheduler = Scheduler(optimizer, schedule, epochs, steps_per_epoch)
    for _ in loop.rounds(
        epochs, model=model, optimizer=optimizer, scheduler=scheduler, order=order, step=step
    ):
        model.train()
        for index in loop.batches(len(data), batch_size, order, drop_last, whole):
            loss = step.loss(learner, *batches.take(index))
            optimizer.zero_grad(set_to_none=True)
            loop.backward(loss)
            optimizer.step()
            step.update()
            scheduler.after_step()
            loop.log(len(index), loss=loss)
        scheduler.after_epoch(loop.losses()["loss"])


class Scheduler:
    """The learning rate over a run: changed after each step, or after each epoch by its loss.

    `reduce_on_plateau` is torch's schedule with its default values, as published: the rate falls to
    a tenth if the mean training loss of an epoch has not fallen by a ten-thousandth of itself for
    more than 10 epochs. A negative loss, as those of D3 and FST, is measured by its size; torch
    takes an equal one for a better one. The other schedules are functions of the step, see
    `lr_multiplier`.

    Args:
        optimizer: whose learning rate, as it is now, is the peak.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self._scheduler: torch.optim.lr_scheduler.LRScheduler
        if schedule == "reduce_on_plateau":
            self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        else:
            multiplier = lr_multiplier(schedule, epochs, steps_per_epoch)
            self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)

    def state_dict(self) -> dict[str, Any]:
        """What has moved."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore("scheduler", self._scheduler, state)

    def after_step(self) -> None:
        if not isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step()

    def after_epoch(self, loss: float) -> None:
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            best = self._scheduler.best
            if best < 0 and loss >= best + 1e-4 * best:
                loss = math.inf  # torch would take it for a better one
            self._scheduler.step(loss)


def lr_multiplier(schedule: Schedule, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate's factor by optimizer step; not for `reduce_on_plateau`.

    `cosine` falls from 1 to 0 over the epochs, and is constant within an epoch. `cosine_100` does
    the same over 100 epochs, for any number of epochs, as published: after 50 epochs it is at a
    half, and after more than 100 epochs it rises again. `cosine_100_steps` does so over 100 steps,
    as FT-SAM was published. `one_cycle` changes at every step: linearly from 0.1 to 1 over the
    first quarter, then linearly to 0. `multi_step` falls to a tenth after 100, 200, 300 and 400
    epochs, as WaNet, Input-Aware and BPP were published. With 100 epochs or fewer it is constant.
    """
    total = max(epochs * steps_per_epoch, 1)

    def one_cycle(step: int) -> float:
        position = min(step / total, 1.0)
        return 0.1 + 0.9 * position / 0.25 if position < 0.25 else (1 - position) / 0.75

    return {
        "constant": lambda step: 1.0,
        "cosine": lambda step: (
            0.5 * (1 + math.cos(math.pi * min(step // steps_per_epoch, epochs) / max(epochs, 1)))
        ),
        "cosine_100": lambda step: 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / 100)),
        "cosine_100_steps": lambda step: 0.5 * (1 + math.cos(math.pi * step / 100)),
        "one_cycle": one_cycle,
        "multi_step": lambda step: 0.1 ** min(step // steps_per_epoch // 100, 4),
    }[schedule]


class _Batches:
    """Batches on a device; replaced images are looked up, never copied into the set."""

    def __init__(self, data: PoisonedSet, device: torch.device) -> None:
        has_room = fits(device, data.clean.images.nbytes + data.images.nbytes)
        self._images = data.clean.images.to(device) if has_room else data.clean.images
        self._slots, self._replaced, self._labels = (
            part.to(self._images.device)
            for part in (data.slots(), data.images, data.stored_labels())
        )
        self._device = device

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, C, H, W) and int64 (B,) at int64 CPU indices, on the device."""
        place = index.to(self._images.device, non_blocking=True)
        images = self._images[place]
        release(self._images)
        if len(self._replaced):
            slot = self._slots[place]
            replaced = self._replaced[slot.clamp(min=0)]
            images = torch.where((slot < 0).view(-1, 1, 1, 1), images, replaced)
        return images.to(self._device, non_blocking=True), self._labels[place].to(
            self._device, non_blocking=True
        )


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
        gradient: puts the gradient on the weights; None for a plain backward pass. It is given a
            function that computes the batch's loss, and may call this function several times.
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


@torch.no_grad()
def rescale(weight: torch.Tensor, norm: torch.Tensor) -> None:
    """Gives a weight this Frobenius norm, in place; one of zeros stays as it is.

    Args:
        weight: any shape.
        norm: scalar, >= 0.
    """
    size = torch.linalg.vector_norm(weight)
    weight.mul_(torch.where(size > 0, norm / size, 1))
