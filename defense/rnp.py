"""RNP: makes a copy forget clean images, and prunes the channels that its recovery needs least.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang. *Reconstructive Neuron Pruning for Backdoor Defense.* ICML 2023,
arXiv 2305.14876.

A copy of the network is made to forget the clean images by gradient ascent, and then recovers them
only by masks of its channels. Channels that the recovery switches off served the backdoor, which
the copy had not forgotten; they are pruned in the network as it was given.

    unlearn   max over weights             CE on clean images    until accuracy <= clean_threshold
    recover   min over masks m in [0, 1]   alpha CE with gamma m, of the copy that forgot
    prune     m <= level

    python defense/rnp.py --result_file badnet_demo

It sees clean images. `selection val` holds a part of them out to choose the level: it prunes up to
the level at which accuracy on that part begins to break. `selection fixed` takes `pruning_number`.
Its 0.7 is the default of BackdoorBench's command line, not of the authors; in the authors' own log
it costs 12 points of accuracy. Published levels were chosen by the ASR on triggered test images, so
they cannot be compared with any other choice. RNP fails if the ascent is too short or too long,
which depends on the number of steps, so the log has the accuracy of each epoch. It also fails if
all masks stay near 1. Published code clips a gradient before it is computed, which does nothing;
here no gradient is clipped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import Augmented, Masked, Rounds, checked, run
from models.channels import called_with, scaled, silenced
from models.copies import copied
from utils.data.batches import as_float, augment
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.pruning import clamp, full_masks, pruned_by_masks

Epoch = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Config(Masked, Rounds, Augmented):
    unlearning_epochs: Annotated[int, Field(ge=0, description="most passes of the ascent")]
    unlearning_lr: Annotated[float, Field(gt=0, description="learning rate of the ascent's SGD")]
    schedule: Annotated[
        tuple[Epoch, ...],
        Field(description="epochs of the ascent after which its rate falls to a tenth"),
    ]
    clean_threshold: Annotated[
        float, Field(ge=0, le=1, description="training accuracy at which the ascent ends")
    ]
    recovering_lr: Annotated[float, Field(gt=0, description="learning rate of the masks' SGD")]
    alpha: Annotated[float, Field(ge=0, description="weight of the masks' loss")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD, both times")]
    wd: Annotated[float, Field(ge=0, description="weight decay of the ascent")]

    in_train_mode = True


def unlearned(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of the model that has forgotten the images, by gradient ascent on their cross-entropy.

    The ascent ends after the first epoch whose accuracy is at most `clean_threshold`. It is
    measured in the epoch's own passes, in train mode.

    Args:
        model: from (N, C, H, W) float in [0, 1] to (N, K) logits; left as it is.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64.
        loop: counts the epochs as the phase `unlearning`.

    Returns:
        The copy, in train mode.
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    model = copied(model, training=True)
    for weight in model.parameters():
        weight.requires_grad_(weight.is_floating_point() or weight.is_complex())
    learner = loop.alone(model)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.unlearning_lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
    )
    order = generator(config.random_seed, "batches of the ascent")
    crops = generator(config.random_seed, "augmentation of the ascent", images.device)
    for number in loop.rounds(
        config.unlearning_epochs,
        "unlearning",
        rate="--unlearning_lr",
        forgetting=model,
        optimizer=optimizer,
        order=order,
        crops=crops,
    ):
        falls = sum(number > epoch for epoch in config.schedule)
        optimizer.param_groups[0]["lr"] = config.unlearning_lr * 0.1**falls
        for index in loop.batches(len(images), config.batch_size, order):
            batch = augment(images[index], config.crop_padding, config.flip, crops)
            y = labels[index].to(device)
            logits = learner(as_float(batch, device))
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            (-loss).backward()
            optimizer.step()
            loop.log(len(index), loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        accuracy = loop.losses()["accuracy"]
        loop.findings.facts |= {"unlearning_epochs": number, "unlearned_acc": accuracy}
        if accuracy <= config.clean_threshold:
            loop.stop()
        elif loop.is_last:
            loop.findings.warn(
                f"the network has not forgotten the images: its accuracy is {100 * accuracy:.2f} % "
                f"after {number} epochs, above --clean_threshold; raise --unlearning_lr or "
                "--unlearning_epochs"
            )
    if config.unlearning_epochs == 0:
        loop.findings.warn(
            "--unlearning_epochs is 0, so the network has not forgotten the images, and the masks "
            "recover nothing; give at least 1"
        )
    return model


def recovered_masks(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> dict[str, torch.Tensor]:
    """A mask for each channel of each BatchNorm: (C,) in [0, 1] by the layer's name.

    Args:
        model: that has forgotten; left as it is. A copy is in train mode, with the batches'
            statistics, and learns nothing but the masks, which start at 1.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64.

    Raises:
        UserError: if the network has no BatchNorm.
    """
    loop = loop or Loop()
    loop.findings.warn_without_loss(alpha=config.alpha)
    device = next(model.parameters()).device
    model = copied(model, training=True)
    model.requires_grad_(False)
    masks = full_masks(model)
    optimizer = torch.optim.SGD(
        masks.values(), lr=config.recovering_lr, momentum=config.sgd_momentum
    )
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)
    for _ in loop.rounds(
        config.n_rounds,
        rate="--recovering_lr",
        masks=masks,
        optimizer=optimizer,
        order=order,
        crops=crops,
    ):
        for index in loop.batches(len(images), config.batch_size, order):
            batch = augment(images[index], config.crop_padding, config.flip, crops)
            x, y = as_float(batch, device), labels[index].to(device)
            logits = called_with(model, scaled(model, masks), x)
            loss = config.alpha * F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp(masks)
            loop.log(len(index), loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        loop.findings.facts["recovered_acc"] = loop.losses()["accuracy"]
    return {name: mask.detach() for name, mask in masks.items()}


def masks_of(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> dict[str, torch.Tensor]:
    """`recovered_masks` of the model's `unlearned` copy."""
    loop = loop or Loop()
    forgetful = unlearned(model, images, labels, config, loop)
    return recovered_masks(forgetful, images, labels, config, loop)


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier without the channels of small masks; the model is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with BatchNorm.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds, and takes what was selected.

    Returns:
        The pruned model, in eval mode; only BatchNorm's weights differ from the model's.

    Raises:
        UserError: if the network has no BatchNorm.

    Example:
        >>> config = Config.load(n_rounds=1, unlearning_epochs=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    unchanged = silenced(model, {}, config.prune_bias)
    if config.n_rounds == 0:
        return unchanged
    return pruned_by_masks(model, images, labels, config, loop, masks_of)


if __name__ == "__main__":
    run(Config, purify)
