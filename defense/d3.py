"""D3: pushes the head as far from the backdoored one as the loss on clean images allows.

Wei, Liu, Zha. *Distance-Driven Detoxification.* ICCV 2025, arXiv 2411.09585.

Some weights, usually the head's, are pushed as far as possible from the backdoored ones while the
loss on clean images stays under a bound. Their norm is fixed, so that they cannot get farther away
just by growing.

    min over weights   lmd mean_i max(0, CE_i - eps) - sum over W of ||W - W0||_F
                       divided by lmd + 1 where lmd > 1;  ||W|| = ||W0|| after each step

    python defense/d3.py --result_file badnet_demo

W are the weights of all linear and convolution layers inside `select_layer_name`; biases and all
other weights are tuned only with the clean loss. The distance is at most 2 ||W0||, at -W0. The
bound is on each image, as in the authors' program (on the mean in the paper). lmd is 0.5 in the
program and 10 in the paper, and it is not known which one gave the paper's table: try both on
held-out images. D3 sees the clean subset, and works on every network. It costs accuracy, on
photographs up to 12 points in RESULTS.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import FineTuned, checked, run
from models.copies import copied
from models.heads import layer_or_last, require_use
from models.parts import changeable
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import fine_tune, rescale

Start = Literal["random", "far", "middle", "near", "noise"]


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    lmd: Annotated[float, Field(ge=0, description="weight of the clean loss over its bound")]
    eps: Annotated[float, Field(ge=0, description="bound of an image's cross-entropy")]
    warm_up_method: Annotated[
        Start, Field(description="where W starts: at random, -W0, 0, W0, or W0 plus noise")
    ]
    select_layer_name: Annotated[
        str | None,
        Field(description="layer whose weights are W; null for the last linear layer"),
    ]

    advice = "raise --lmd, or give more images (--ratio)"

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        pushed_weights(model, self.select_layer_name, image_shape)


def distance_loss(
    losses: torch.Tensor,
    weights: Sequence[torch.Tensor],
    initial: Sequence[torch.Tensor],
    lmd: float,
    eps: float,
) -> torch.Tensor:
    """The loss that is minimised; if W = W0, the gradient of the distance is 0.

    Args:
        losses: (N,) float, the cross-entropy of each image.
        weights, initial: W and W0, tensors of the same shapes.
        lmd: >= 0, weight of the part of the losses over the bound.
        eps: >= 0, the bound.

    Returns:
        lmd mean max(0, losses - eps) - sum ||W - W0||; where lmd > 1, over lmd + 1. A scalar.
    """
    pairs = zip(weights, initial, strict=True)
    distance = torch.stack([torch.linalg.vector_norm(w - before) for w, before in pairs]).sum()
    loss = lmd * (losses - eps).clamp(min=0).mean() - distance
    return loss / (lmd + 1) if lmd > 1 else loss


def start_of(initial: torch.Tensor, method: Start, draws: torch.Generator) -> torch.Tensor:
    """Where a weight starts.

    Args:
        initial: W0, any shape.
        method: `random` is U(-0.5, 0.5) scaled to the norm of W0; `far` is -W0; `middle` is 0;
            `near` is W0; `noise` adds N(0, 1) times the standard deviation of W0's values.
        draws: on the CPU.

    Returns:
        W, of W0's shape.
    """
    if method == "random":
        drawn = (torch.rand(initial.shape, generator=draws, dtype=torch.float32) - 0.5).to(initial)
        rescale(drawn, torch.linalg.vector_norm(initial))
        return drawn
    if method == "noise":
        noise = torch.randn(initial.shape, generator=draws, dtype=torch.float32).to(initial)
        return initial + noise * (initial.std() if initial.numel() > 1 else 0)
    return initial * {"far": -1, "middle": 0, "near": 1}[method]


def pushed_weights(
    model: nn.Module, name: str | None, image_shape: Sequence[int]
) -> list[torch.Tensor]:
    """The weights of all linear and convolution layers inside a layer.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if there is none, one is frozen, or the network uses none.
    """
    name, chosen = layer_or_last(model, name, "--select_layer_name", image_shape)
    inside = {
        ".".join(filter(None, (name, part_name))): part
        for part_name, part in chosen.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    }
    changeable(inside, model)
    layers = list(inside.values())
    if not layers:
        raise UserError(
            f"--select_layer_name: {name} has no linear or convolution layer inside; give one "
            "that has, or null for the last linear layer"
        )
    if not all(part.weight.requires_grad for part in layers):
        raise UserError(
            "a weight that this method pushes is frozen; set its requires_grad, or give another "
            "--select_layer_name"
        )
    require_use(model, inside, image_shape, "--select_layer_name")
    return [part.weight for part in layers]


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier, far from it in some weights; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode; as it was, without rounds.

    Raises:
        UserError: if there is no weight to push, or it is frozen.

    Example:
        >>> config = Config.load(n_rounds=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    model = copied(model, training=False)
    weights = pushed_weights(model, config.select_layer_name, images.shape[1:])
    if config.n_rounds == 0:
        return model
    initial = [weight.detach().clone() for weight in weights]
    norms = [torch.linalg.vector_norm(before) for before in initial]
    draws = generator(config.random_seed, "start of the weights")
    with torch.no_grad():
        for weight, before in zip(weights, initial, strict=True):
            weight.copy_(start_of(before, config.warm_up_method, draws))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return distance_loss(losses, weights, initial, config.lmd, config.eps)

    def after_step() -> None:
        for weight, norm in zip(weights, norms, strict=True):
            rescale(weight, norm)

    fine_tune(model, images, labels, config, loop, loss=loss, after_step=after_step)
    return model


if __name__ == "__main__":
    run(Config, purify)
