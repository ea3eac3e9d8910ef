"""ANP: prunes the channels that are most sensitive to changes of their scale.

Wu, Wang. *Adversarial Neuron Pruning Purifies Backdoored Deep Models.* NeurIPS 2021, arXiv
2110.14430.

Channels that serve a backdoor are the most sensitive to changes of their scale. A mask for each
channel of BatchNorm is learned so that the network stays accurate under the worst changes of scales
and shifts. Channels whose mask has become small are pruned.

    outer   min over masks m in [0, 1]   alpha CE(gamma m, beta) + (1 - alpha) CE(noisy)
    inner   max over |d|, |e|            CE of the noisy network: gamma (m + d), beta (1 + e)

    python defense/anp.py --result_file badnet_demo

`selection val` prunes up to the level at which accuracy on held-out images begins to break;
`selection fixed` takes `pruning_number` (0.2 in the paper, which gives no rule for other networks).
Neither sees the ASR. Published tables often chose the level by the ASR on triggered test images, so
they cannot be compared with any other choice. ANP is sensitive to learning rate, level and seed.
"""

import sys
from collections.abc import Mapping
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
from utils.config import Group
from utils.data.batches import as_float, augment
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.pruning import clamp, full_masks, pruned_by_masks

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Config(Masked, Rounds, Augmented):
    lr: Annotated[float, Field(gt=0, description="learning rate of the masks' SGD, constant")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of the masks' SGD")]
    nb_iter: Annotated[int, Field(ge=0, description="steps in all, spread over the rounds")]
    anp_eps: Annotated[float, Field(ge=0, description="largest noise at the start, relative")]
    anp_steps: Annotated[int, Field(ge=0, description="inner steps, of eps / steps each")]
    anp_alpha: Annotated[float, Field(ge=0, le=1, description="weight of the loss without noise")]
    n_rounds: Annotated[
        int,
        Field(
            ge=0, description="parts of --nb_iter, each with a line in the log; 0 changes nothing"
        ),
        Group.TRAINING,
    ]

    in_train_mode = True


def adversarial_noise(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    masks: Tensors,
    noise: Tensors,
    config: Config,
) -> dict[str, torch.Tensor]:
    """Noise that raises the loss of the noisy network: signed steps from the noise given.

    Args:
        model: in the mode that it has; from (B, C, H, W) to (B, K).
        images: (B, C, H, W) float in [0, 1].
        labels: (B,) int64.
        masks: (C,) in [0, 1] by the BatchNorm's name.
        noise: (2, C) likewise: row 0 is added to the mask, row 1 to 1 for the shift. Not bounded.

    Returns:
        (2, C) by name.
    """
    noise = {name: value.detach() for name, value in noise.items()}
    masks = {name: value.detach() for name, value in masks.items()}
    for _ in range(config.anp_steps):
        noise = {name: value.requires_grad_() for name, value in noise.items()}
        loss = F.cross_entropy(_noisy(model, images, masks, noise), labels)
        # A layer that the network never calls has no gradient, and keeps its noise.
        gradients = torch.autograd.grad(loss, list(noise.values()), materialize_grads=True)
        step = config.anp_eps / config.anp_steps
        noise = {
            name: value.detach() + step * gradient.sign()
            for (name, value), gradient in zip(noise.items(), gradients, strict=True)
        }
    return dict(noise)


def mask_loss(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    masks: Tensors,
    noise: Tensors | None,
    config: Config,
) -> torch.Tensor:
    """anp_alpha CE of the masked network + (1 - anp_alpha) CE of the masked and noisy one.

    Args:
        As `adversarial_noise`; without noise there is only the first term.

    Returns:
        A scalar with a gradient for the masks.
    """
    logits = called_with(model, scaled(model, masks), images)
    loss = config.anp_alpha * F.cross_entropy(logits, labels)
    if noise is None:
        return loss
    noisy = F.cross_entropy(_noisy(model, images, masks, noise), labels)
    return loss + (1 - config.anp_alpha) * noisy


def _noisy(model: nn.Module, images: torch.Tensor, masks: Tensors, noise: Tensors) -> torch.Tensor:
    scales, shifts = {}, {}
    for name, mask in masks.items():
        of_scale, of_shift = noise[name]
        scales[name], shifts[name] = mask + of_scale, 1 + of_shift
    return called_with(model, scaled(model, scales, shifts), images)


def learned_masks(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> dict[str, torch.Tensor]:
    """A mask for each channel of each BatchNorm: (C,) in [0, 1] by the layer's name.

    Args:
        model: not changed; a copy is used in train mode, with the batches' statistics.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64.

    Raises:
        UserError: if the network has no BatchNorm.
    """
    loop = loop or Loop()
    model = copied(model, training=True)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    masks = full_masks(model)
    optimizer = torch.optim.SGD(list(masks.values()), lr=config.lr, momentum=config.sgd_momentum)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)
    start = generator(config.random_seed, "noise", device)

    def random_noise(mask: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(2, len(mask), device=device, dtype=mask.dtype, generator=start)
        return (2 * drawn - 1) * config.anp_eps

    for number in loop.rounds(
        config.n_rounds, masks=masks, optimizer=optimizer, order=order, crops=crops, start=start
    ):
        done, until = ((n * config.nb_iter) // config.n_rounds for n in (number - 1, number))
        steps = until - done
        for index in loop.batches(len(images), config.batch_size, order, steps=steps):
            batch = augment(images[index], config.crop_padding, config.flip, crops)
            x, y = as_float(batch, device), labels[index].to(device)
            noise = None
            if config.anp_eps > 0:
                drawn = {name: random_noise(mask) for name, mask in masks.items()}
                noise = adversarial_noise(model, x, y, masks, drawn, config)
            loss = mask_loss(model, x, y, masks, noise, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp(masks)
            loop.log(len(index), loss=loss)
    return {name: mask.detach() for name, mask in masks.items()}


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
        >>> config = Config.load(n_rounds=1, nb_iter=10)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    if config.n_rounds == 0:
        return silenced(model, {}, config.prune_bias)
    return pruned_by_masks(model, images, labels, config, loop, learned_masks)


if __name__ == "__main__":
    run(Config, purify)
