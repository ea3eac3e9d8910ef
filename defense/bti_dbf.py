"""BTI-DBF: inverts a trigger with a generator, and unlearns what it generates.

Xu, Huang, Li, Qin, Ren. *Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features.* ICLR 2024. This is its defense by unlearning, BTI-DBF(U).

A mask keeps those features of the last map that tell the label. A generator changes images so that
these features change least and the other ones change most, as with a trigger. The model learns to
give generated images their true labels and the features of the clean ones. This is done five times.

    mask and generator   as in `utils/training/inversion.py`, G(x) the generated image
    unlearning           min over weights   CE(h(x'), y) + MSE(f(x), f(x')),
                         x' a batch in which int(0.1 B) + 1 images are replaced by G(x)

    python defense/bti_dbf.py --result_file badnet_demo

f is the network's last map of features: the input of global pooling, PreAct-ResNet18's `layer4`. A
network without such a map, like a ViT, is refused. Images are not augmented. After the first
inversion, the label that most generated images get is the finding `targets`. A clean model has such
a label, too. `identity_only` is the share of the generator's steps that only learned the identity,
by inversion; from 0.9 on, a warning says so, and there is no `targets`. Published limits
are in units of normalized images. Here images are pixels, so `image_bound` is 0.019 for the
published 0.3 (the standard deviation of pixels is about a quarter), and the noise at the detection
is 0.03 pixel units. Each inversion and each unlearning begins with a new Adam. Both passes of a
step of unlearning are in train mode and change BatchNorm's statistics.
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

from defense.base import Inverted, checked, run
from models.copies import copied
from models.outputs import recording
from models.parts import learning_weights
from utils.data.batches import wide
from utils.process.seeds import generator
from utils.training.inversion import Inversion
from utils.training.loop import Loop


@dataclass(frozen=True, kw_only=True)
class Config(Inverted):
    lr: Annotated[float, Field(gt=0, description="learning rate of the unlearning's Adam")]


def unlearning_loss(
    model: nn.Module,
    layer: str,
    images: torch.Tensor,
    mixed: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """CE(h(x'), y) + MSE(f(x), f(x')); both terms have a gradient through x and x'.

    The mean squared error is computed at least in float32, also where the features are bfloat16.

    Args:
        model: in the mode that it has; from (B, C, H, W) to (B, K).
        layer: whose output is f.
        images: x, (B, C, H, W) float in [0, 1].
        mixed: x', the same, in which some images are replaced.
        labels: (B,) int64, true ones.

    Returns:
        A scalar.
    """
    with recording(model, [layer]) as features:
        model(images)
        clean = features[layer]
        logits = model(mixed)
    change = F.mse_loss(wide(features[layer]), wide(clean))
    return F.cross_entropy(logits, labels) + change


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier that has unlearned what the generator found; the model stays.

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
    model = copied(model, training=False)
    if config.n_rounds == 0:
        return model
    weights = learning_weights(model)
    inversion = Inversion(model, images, labels, config, loop)
    order = generator(config.random_seed, "batches")
    for number in range(1, config.inversion_rounds + 1):
        inversion.invert(model, number)
        optimizer = torch.optim.Adam(weights, lr=config.lr)
        phase = "" if number == config.inversion_rounds else f"unlearning {number}"
        for _ in loop.rounds(config.n_rounds, phase, model=model, optimizer=optimizer, order=order):
            model.train()
            for x, y in inversion.batches(order):
                loss = unlearning_loss(model, inversion.layer, x, inversion.mixed(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loop.log(len(x), loss=loss)
        model.eval()
    return model


if __name__ == "__main__":
    run(Config, purify)
