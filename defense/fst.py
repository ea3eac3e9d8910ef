"""FST: gives the head new weights, and pushes them away from the old ones while all is tuned.

Min, Qin, Shen, Cheng. *Towards Stable Backdoor Purification through Feature Shift Tuning.* NeurIPS
2023, arXiv 2310.01875.

The head gets new random weights and is pushed away from the backdoored head while the whole network
is tuned. So the features must shift, and those of the trigger no longer lead to the target.

    min over weights   CE(h(x), y) + alpha <W, W0>    with ||W|| = ||W0|| after each step
                       W: the head's weight; W0: its value in the backdoored model

    python defense/fst.py --result_file badnet_demo

The values are the paper's for CIFAR-10 and GTSRB, and those for CIFAR-100 and Tiny ImageNet with
5 % of the images; the paper's own subset is 2 %. The penalty is the inner product, as published, so
its gradient is alpha W0 for every W. The last step is kept. FST sees the clean subset, and works on
every network with a linear layer. It costs accuracy, on photographs up to 13 points in RESULTS.md,
and the backdoor can be learned again from a few triggered images.
"""

import math
import sys
from collections.abc import Sequence
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
from models.heads import layer_or_last, require_use
from models.parts import changeable
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import fine_tune, rescale


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    alpha: Annotated[float, Field(ge=0, description="weight of the inner product with the old W")]
    reset_head: Annotated[bool, Field(description="start from a head that is drawn at random")]
    select_layer_name: Annotated[
        str | None, Field(description="the linear layer that is the head; null for the last one")
    ]

    advice = "lower --alpha, raise --n_rounds, or give more images (--ratio)"
    rates = "--lr, --alpha or --wd"

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        head_of(model, self.select_layer_name, image_shape)


def shift_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    initial: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """Cross-entropy, mean over images, plus alpha times the sum of W * W0.

    Shape:
        (N, K) float, (N,) int64, (K, D) float twice -> scalar.
    """
    return F.cross_entropy(logits, labels) + alpha * (weight * initial).sum()


def head_of(model: nn.Module, name: str | None, image_shape: Sequence[int]) -> nn.Linear:
    """The linear layer that is shifted.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if there is none, it is frozen, or the network does not use it.
    """
    name, head = layer_or_last(model, name, "--select_layer_name", image_shape)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"--select_layer_name: {name} is a {type(head).__name__}, but the head is shifted; "
            "give a linear layer, or null for the last one"
        )
    changeable({name: head}, model)
    if not head.weight.requires_grad:
        raise UserError(
            "the head's weight is frozen, but this method trains it; set its requires_grad, or "
            "give another --select_layer_name"
        )
    require_use(model, {name: head}, image_shape, "--select_layer_name")
    return head


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier with shifted features; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with a linear head.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode; as it was, without rounds.

    Raises:
        UserError: if there is no linear layer of that name, or it is frozen.

    Example:
        >>> config = Config.load(n_rounds=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    model = copied(model, training=False)
    head = head_of(model, config.select_layer_name, images.shape[1:])
    if config.n_rounds == 0:
        return model
    weight, initial = head.weight, head.weight.detach().clone()
    norm = torch.linalg.vector_norm(initial)
    if config.reset_head:
        draws = generator(config.random_seed, "head")
        for parameter in (each for each in head.parameters() if each.requires_grad):
            drawn = torch.rand(parameter.shape, generator=draws, dtype=torch.float32)
            uniform = drawn.to(parameter)
            with torch.no_grad():
                parameter.copy_((2 * uniform - 1) / math.sqrt(head.in_features))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return shift_loss(logits, labels, weight, initial, config.alpha)

    fine_tune(
        model, images, labels, config, loop, loss=loss, after_step=lambda: rescale(weight, norm)
    )
    return model


if __name__ == "__main__":
    run(Config, purify)
