"""PAM: tunes on inverted triggers, with gradients from a point nearer to the backdoored weights.

Min, Qin, Zhang, Shen, Cheng. *Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense.* NeurIPS 2024, arXiv 2410.09838.

A purified model is close to weights with the backdoor: a few poisoned images bring it back. So each
step takes its gradient at a point moved towards the backdoored weights, and the model goes further
away from them. It learns on clean images and on images with an inverted trigger.

    inversion   as in `utils/training/inversion.py`, BTI-DBF's; a part of each batch x' is G(x)
    shift       w' = w + rho (w_bd - w) / ||w_bd - w||    one norm over all weights that learn
    step        SGD from w with the gradient of CE(h(x'), y) at w'

    python defense/pam.py --result_file badnet_demo

The very first step is at w_bd, where the shift is 0. Statistics of BatchNorm are not shifted; the
pass at w' moves them, so they are those of w', not of w. After a short tuning, which has not gone
further than rho, they do not fit: on a BadNets model of the digits ACC fell to 26 % within 60 steps
(and was 97 % with statistics that were measured anew). A step costs as much as one of plain
tuning. If re-learning still brings the backdoor back, raise `--rho` or `--generated_ratio`; if ACC
falls, lower `--rho`. The limits of the inversion are BTI-DBF's: see `defense/bti_dbf.py`.
"""

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

from defense.base import Inverted, checked, run
from models.copies import copied
from models.modes import moved
from models.parts import learning_weights
from utils.process.seeds import generator
from utils.training.inversion import Inversion
from utils.training.loop import Loop


@dataclass(frozen=True, kw_only=True)
class Config(Inverted):
    lr: Annotated[float, Field(gt=0, description="learning rate of SGD, constant")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    rho: Annotated[
        float, Field(ge=0, description="length of the shift towards the backdoored weights, L2")
    ]

    advice = "lower --rho or --lr, or give more images (--ratio)"
    rates = "--lr or --rho"


def towards(
    weights: Sequence[torch.Tensor], reference_weights: Sequence[torch.Tensor], rho: float
) -> list[torch.Tensor]:
    """The shift of each weight, rho (r - w) / ||r - w||_2, one norm over all; 0 where w is r.

    Args:
        weights, reference_weights: w and r, tensors of the same shapes.
        rho: >= 0; the norm of the shift over all weights. It may reach beyond r.

    Returns:
        Tensors of the same shapes.
    """
    ways = [r - w for w, r in zip(weights, reference_weights, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(way) for way in ways]))
    length = torch.where(norm > 0, rho / norm, 0)
    return [length * way for way in ways]


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier, tuned away from its own weights; the model itself stays.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with a last map of
            features.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds, and takes the detected class.

    Returns:
        The model after the last round, in eval mode; without rounds, the model as it was.

    Raises:
        UserError: if the network has no such map.

    Example:
        >>> config = Config.load(n_rounds=1, inversion_rounds=1, generator_width=4)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    reference = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    model = copied(model, training=False)
    if config.n_rounds == 0:
        return model
    weights = learning_weights(model)
    inversion = Inversion(model, images, labels, config, loop)
    learner = loop.alone(model)
    order = generator(config.random_seed, "batches")
    for number in range(1, config.inversion_rounds + 1):
        inversion.invert(model, number)
        optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=config.sgd_momentum)
        phase = "" if number == config.inversion_rounds else f"tuning {number}"
        for _ in loop.rounds(config.n_rounds, phase, model=model, optimizer=optimizer, order=order):
            model.train()
            for x, y in inversion.batches(order):
                mixed = inversion.mixed(x)
                with torch.no_grad():
                    shifts = towards(weights, reference, config.rho)
                optimizer.zero_grad()
                with moved(weights, shifts):
                    loss = F.cross_entropy(learner(mixed), y)
                    loss.backward()
                optimizer.step()
                loop.log(len(x), loss=loss)
        model.eval()
    return model


if __name__ == "__main__":
    run(Config, purify)
