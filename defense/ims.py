"""IMS: finds the channels that only triggered images need, by a mask and its inverse.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak. *Backdoor Mitigation via Invertible Pruning Masks.*
NeurIPS 2025, arXiv 2509.15497 (invertible masking using selection).

Two numbers for each output channel of each convolution are learned: a says on which side of the
mask the channel is, and s says how much the channel is changed at all. With the mask, the network
has to give the labels that it gave before. With the inverse mask (1 - a instead of a), it has to
give them only for perturbed images, which stand for triggered ones, and not for clean images. The
network is frozen and in eval mode.

    factor     k(a) = q + s (1 - q),  q = sigmoid(20 (a - 0.5));  mask: k(a), inverse: k(1 - a)
    agree      -log(p . r + 1e-8);   dis  -log(1 - p . r + 1e-8);   p, r softmaxes, h the network
    inner      d: min agree(inverse(x + d), h(x + d)) + dis(h(x + d), h(x)), image by image
    stage 1    min agree(mask(x), h(x)) + dis(inverse(x), h(x)) + lmd mean |1 - s|
    stage 2    the same + agree(mask(x + d), h(x)) + agree(inverse(x + d), h(x + d))
               + dis(inverse(x + d), h(x))

    python defense/ims.py --result_file badnet_demo

The result is the masked network: weights and biases of convolutions are multiplied by the factors.
It reads no labels and sees the clean images without augmentation. `n_rounds` counts the steps of
stage 2, each on `batch_size` images drawn with replacement; a stage ends earlier once its loss has
not fallen by 2 % for `patience` steps. At the start both networks are the given one, s is 1, and
the gradient for a is 0, so s moves first. AdamW has torch's decay, 0.01. x + d is not clipped.
Networks without a convolution are refused.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import CleanData, Rounds, checked, run
from models.channels import (
    called_with,
    convolutions,
    require_replaceable,
    scalable,
    scaled_convolutions,
)
from models.copies import copied
from models.parts import usual_weight
from utils.config import Group
from utils.data.batches import as_float, wide
from utils.process.seeds import generator
from utils.training.loop import Loop

STEEPNESS = 20.0  # of the sigmoid that makes q of a
BETTER = 0.98  # a loss under this share of the best one is an improvement
EPSILON = 1e-8  # in the logarithms

Network = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) -> logits (B, K)


@dataclass(frozen=True, kw_only=True)
class Config(CleanData, Rounds):
    stage1_steps: Annotated[int, Field(ge=0, description="most steps of stage 1, without d")]
    lr: Annotated[float, Field(gt=0, description="learning rate of AdamW on a and s")]
    lmd: Annotated[float, Field(ge=0, description="weight of the mean of 1 - s")]
    patience: Annotated[
        int, Field(ge=1, description="steps without a better loss to a stage's end")
    ]
    inner_steps: Annotated[int, Field(ge=0, description="steps of a perturbation")]
    adv_lr: Annotated[float, Field(gt=0, description="learning rate of its AdamW, pixels")]
    trigger_norm: Annotated[float, Field(ge=0, description="its largest value, pixels in [0, 1]")]
    n_rounds: Annotated[
        int, Field(ge=0, description="steps of the second stage; 0 changes nothing"), Group.TRAINING
    ]

    advice = "give fewer rounds, or more images (--ratio)"
    moves_images = True
    takes_float16 = False
    gives_back_early = True

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        layers = convolutions(model)
        if self.n_rounds:
            require_replaceable(model)
            scalable(layers, model)


def factors(a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """q + s (1 - q), q = sigmoid(20 (a - 0.5)): 1 where a is 1 or s is 1, near s where a is 0.

    Shape:
        (C,), (C,) float in [0, 1] -> (C,) float in [0, 1].
    """
    q = (STEEPNESS * (a - 0.5)).sigmoid()
    return q + s * (1 - q)


def agreement(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """-log(p . r + 1e-8), p and r the softmaxes of both: 0 where both are sure of the same label.

    Shape:
        (N, K), (N, K) float -> (N,) float.
    """
    return -(_overlap(logits, other) + EPSILON).log()


def disagreement(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """-log(1 - p . r + 1e-8): 0 where both are sure of different labels, at most 18.42.

    Shape:
        (N, K), (N, K) float -> (N,) float.
    """
    return -(1 - _overlap(logits, other) + EPSILON).log()


def _overlap(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (wide(logits).softmax(1) * wide(other).softmax(1)).sum(1)


def perturbation(
    network: Network, inverse: Network, images: torch.Tensor, config: Config
) -> torch.Tensor:
    """The inner problem: d for each image, by AdamW from 0, clamped after each step.

    Args:
        network, inverse: from (B, C, H, W) to (B, K); each row depends only on its own image.
        images: (B, C, H, W) float in [0, 1].

    Returns:
        d, of the same shape, each value in +-trigger_norm, pixel units.
    """
    with torch.no_grad():
        clean = network(images)
    delta = torch.zeros_like(images, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=config.adv_lr)
    for _ in range(config.inner_steps):
        logits = network(images + delta)
        losses = agreement(inverse(images + delta), logits) + disagreement(logits, clean)
        (delta.grad,) = torch.autograd.grad(losses.sum(), delta)
        optimizer.step()
        with torch.no_grad():
            delta.clamp_(-config.trigger_norm, config.trigger_norm)
    return delta.detach()


def mask_loss(
    network: Network,
    masked: Network,
    inverse: Network,
    images: torch.Tensor,
    delta: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of the masks on a batch, without the term in s; that of stage 1 without delta.

    Args:
        network, masked, inverse: from (B, C, H, W) to (B, K).
        images: x, (B, C, H, W) float in [0, 1].
        delta: d, of the same shape.

    Returns:
        A scalar, the mean over the images.
    """
    with torch.no_grad():
        clean = network(images)
    losses = agreement(masked(images), clean) + disagreement(inverse(images), clean)
    if delta is not None:
        with torch.no_grad():
            moved = network(images + delta)
        of_inverse = inverse(images + delta)
        losses = losses + agreement(masked(images + delta), clean)
        losses = losses + agreement(of_inverse, moved) + disagreement(of_inverse, clean)
    return losses.mean()


def stalls(search: dict[str, torch.Tensor], loss: float, patience: int) -> bool:
    """Whether a stage ends: so many steps in a row were not 2 % better than the best one.

    Args:
        search: the best loss so far, `best`, and the steps since, `stall`; changed.
        loss: of this step.
    """
    if loss < BETTER * search["best"]:
        search["best"].fill_(loss)
        search["stall"].fill_(0)
    else:
        search["stall"].add_(1)
    return bool(search["stall"] >= patience)


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier with masked channels; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with a convolution.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64; checked, but not read.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the steps.

    Returns:
        The masked model, in eval mode; without rounds, the model as it was.

    Raises:
        UserError: if the network has no convolution.

    Example:
        >>> config = Config.load(n_rounds=2)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    layers = convolutions(model)
    widths = {name: part.out_channels for name, part in layers.items()}
    result = copied(model, training=False)
    if config.n_rounds == 0:
        return result
    weight = usual_weight(model)
    model = copied(result)
    model.requires_grad_(False)
    a, s = (  # steps of 0.01 from 1 would be lost in half precision
        wide(weight.new_ones(sum(widths.values()))).requires_grad_() for _ in range(2)
    )

    def by_layer(side: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = factors(side, s).to(weight.dtype).split(list(widths.values()))
        return dict(zip(widths, parts, strict=True))

    def network_of(side: torch.Tensor) -> Network:
        changed = scaled_convolutions(model, by_layer(side))
        return lambda x: called_with(model, changed, x)

    order = generator(config.random_seed, "batches")
    for phase, steps in (("stage 1", config.stage1_steps), ("", config.n_rounds)):
        optimizer = torch.optim.AdamW([a, s], lr=config.lr)
        search = {"best": torch.tensor(torch.inf, dtype=torch.float64), "stall": torch.tensor(0)}
        for _ in loop.rounds(
            steps, phase, a=a, s=s, optimizer=optimizer, order=order, search=search
        ):
            for index in loop.batches(len(images), config.batch_size, order, steps=1):
                x, delta = as_float(images[index], weight.device), None
                if not phase:
                    with torch.no_grad():
                        fixed = network_of(1 - a)
                    delta = perturbation(model, fixed, x, config)
                loss = mask_loss(model, network_of(a), network_of(1 - a), x, delta)
                loss = loss + config.lmd * (1 - s).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    a.clamp_(0, 1)
                    s.clamp_(0, 1)
                loop.log(len(x), loss=loss)
            if stalls(search, loop.losses()["loss"], config.patience):
                loop.stop()
    with torch.no_grad():
        count = int((factors(a, s) < 0.5).sum())
        for name, value in scaled_convolutions(result, by_layer(a)).items():
            result.get_parameter(name).copy_(value)
    loop.findings.say(
        f"{count} of {len(a)} channels are scaled to less than a half",
        channels=len(a),
        masked_channels=count,
    )
    return result


if __name__ == "__main__":
    run(Config, purify)
