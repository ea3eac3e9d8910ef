"""Neural Polarizer: puts a linear layer into the model that blocks the features of triggers.

Zhu, Wei, Zha, Wu. *Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying
Poisoned Features.* NeurIPS 2023, arXiv 2306.16697.

The model is frozen. One linear layer put before a late convolution learns to let clean features
pass and to block those of a trigger, which is estimated image by image: a small perturbation
towards the second most likely class.

    inner   x' = x + d,  d = argmin over ||d|| <= trigger_norm   CE(h(x'), t)
    outer   min over the polarizer   lmd1 CE(h(x), y) + lmd2 CE(h(x'), o)
                                     - lmd3 log(1 - p'_y2) - lmd4 log(1 - p'_t)

o: the label that h gives x; t: the most likely label of x except the true one; y2: that of x'.

    python defense/npd.py --result_file badnet_demo

The result is the model with the polarizer before `target_layer_name`; `load_defense` loads it
again. `layer4.1.conv1` is for PreAct-ResNet18; for other networks, name a late convolution. NPD
fails if the trigger's class is not the second most likely one.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import CleanData, Scored, checked, run
from models.changes import insert
from models.copies import copied
from models.modes import evaluating, keeping_statistics
from models.outputs import recording
from models.parts import bare, black_images, layer
from utils.data.batches import as_float
from utils.errors import UserError, one_line
from utils.perturb import Norm, project
from utils.process.seeds import generator
from utils.training.loop import Loop

ENOUGH = 0.6  # share of a batch that goes to its targets, above which the inner loop ends


@dataclass(frozen=True, kw_only=True)
class Config(CleanData, Scored):
    lr: Annotated[float, Field(gt=0, description="learning rate of the polarizer's SGD, constant")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    wd: Annotated[float, Field(ge=0, description="weight decay of SGD")]
    warm_epochs: Annotated[int, Field(ge=0, description="passes on clean images alone, first")]
    warm_lr: Annotated[float, Field(gt=0, description="learning rate of these passes")]
    inner_steps: Annotated[int, Field(ge=0, description="most steps of a perturbation")]
    adv_lr: Annotated[float, Field(gt=0, description="inner step size, pixels in [0, 1]")]
    adv_sign: Annotated[bool, Field(description="step by the gradient's sign; else by itself")]
    norm_type: Annotated[Norm, Field(description="ball of the perturbation; Reg is no bound")]
    trigger_norm: Annotated[float, Field(ge=0, description="its radius, pixels in [0, 1]")]
    lmd1: Annotated[float, Field(ge=0, description="weight of the cross-entropy on x")]
    lmd2: Annotated[float, Field(ge=0, description="weight of the one on x' with h's label of x")]
    lmd3: Annotated[float, Field(ge=0, description="weight of the term in y2")]
    lmd4: Annotated[float, Field(ge=0, description="weight of the term in t")]
    target_layer_name: Annotated[str, Field(description="layer before which the polarizer stands")]
    polarizer_train: Annotated[
        bool, Field(description="polarizer in train mode where it learns, not in eval mode")
    ]

    advice = "lower --lr or --trigger_norm, or give more images (--ratio)"
    rates = "--lr, --adv_lr or --wd"
    moves_images = True
    gives_back_early = True  # and the polarizer would count statistics twice

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        images = black_images(model, image_shape)
        channels = input_channels(model, self.target_layer_name, images)
        if self.n_rounds:
            model = copied(model)
            insert(bare(model), "polarizer", self.target_layer_name, channels)
            _require_pass(model, self.target_layer_name, images)


def target_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The most likely label after the true one's logit is replaced by -10, as published.

    It is the most likely one except the true one, unless all others have logits under -10; then it
    is the true one.

    Shape:
        (N, K) float, (N,) int64 -> (N,) int64.
    """
    return logits.scatter(1, labels.unsqueeze(1), -10.0).argmax(1)


def targeted_perturbation(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, config: Config
) -> torch.Tensor:
    """Perturbations that send images to their targets, each within its ball.

    The steps end once more than 60 % of the batch are sent there.

    Args:
        model: in the mode that it has, frozen or not.
        images: (N, C, H, W) float in [0, 1].
        targets: (N,) int64.

    Returns:
        delta: (N, C, H, W) float, pixel units; images + delta is clipped to [0, 1] by its users.
    """
    delta = torch.zeros_like(images)
    for step in range(config.inner_steps):
        moved = images + delta
        adversarial = moved.clamp(0, 1).requires_grad_()
        logits = model(adversarial)
        if step and (logits.argmax(1) == targets).float().mean() > ENOUGH:
            break
        loss = F.cross_entropy(logits, targets, reduction="none").clamp(max=80).mean()
        (gradient,) = torch.autograd.grad(loss, adversarial)
        # Of what is clipped there is no gradient; black and white are not clipped.
        gradient = gradient.where((moved >= 0) & (moved <= 1), 0)
        direction = gradient.sign() if config.adv_sign else gradient
        delta = delta - config.adv_lr * direction
        delta = project(delta, config.trigger_norm, config.norm_type)
    return delta


def polarizer_loss(
    logits: torch.Tensor,
    adv_logits: torch.Tensor,
    labels: torch.Tensor,
    predictions: torch.Tensor,
    targets: torch.Tensor,
    config: Config,
) -> dict[str, torch.Tensor]:
    """The outer objective on one batch.

    Args:
        logits, adv_logits: (N, K) float, on x and on x'.
        labels: (N,) int64, true ones.
        predictions: (N,) int64, the labels of x before this step (o).
        targets: (N,) int64 (t).

    Returns:
        Scalars `clean`, `robust`, `second` and `target`, without their weights, and `total`.
    """
    probabilities = adv_logits.softmax(1)
    top = adv_logits.topk(2, dim=1).indices
    second = torch.where(top[:, 0] == labels, top[:, 1], top[:, 0])

    def away_from(classes: torch.Tensor) -> torch.Tensor:
        p = probabilities.gather(1, classes.unsqueeze(1))
        return -(1.0001 - p + 1e-12).log().mean()

    losses = {
        "clean": F.cross_entropy(logits, labels),
        "robust": F.cross_entropy(adv_logits, predictions),
        "second": away_from(second),
        "target": away_from(targets),
    }
    weights = (config.lmd1, config.lmd2, config.lmd3, config.lmd4)
    total = torch.stack([w * loss for w, loss in zip(weights, losses.values(), strict=True)]).sum()
    return losses | {"total": total}


def input_channels(model: nn.Module, name: str, images: torch.Tensor) -> int:
    """Channels of what enters a layer.

    Raises:
        UserError: if there is no such layer, or no map of channels enters it.
    """
    layer(model, name, "--target_layer_name")
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), recording(model, [name], of="input") as inputs:
        model(as_float(images[:1], device))
    if name not in inputs or not isinstance(inputs[name], torch.Tensor) or inputs[name].dim() != 4:
        raise UserError(
            f"--target_layer_name: no map (N, C, H, W) enters {name}, which a polarizer needs; "
            "give a late convolution of a convolutional network"
        )
    return inputs[name].shape[1]


def _require_pass(model: nn.Module, name: str, image: torch.Tensor) -> None:
    """Raises UserError if the network, with a polarizer before a layer, does not take an image."""
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    except Exception as error:  # the network's own code may ask the layer for anything
        raise UserError(
            f"--target_layer_name: the network does not run with a polarizer before {name} "
            f"({type(error).__name__}: {one_line(error)}); give a layer that takes one map alone, "
            "and whose attributes are not used elsewhere"
        ) from None


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier with a polarizer in it; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode; without rounds, the model as it was.

    Raises:
        UserError: if no map of channels enters `target_layer_name`.

    Example:
        >>> config = Config.load(n_rounds=1, target_layer_name="conv2")
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    channels = input_channels(model, config.target_layer_name, images)
    model = copied(model, training=False)
    if config.n_rounds == 0:
        return model
    loop.findings.warn_without_loss(
        lmd1=config.lmd1, lmd2=config.lmd2, lmd3=config.lmd3, lmd4=config.lmd4
    )
    device = next(model.parameters()).device
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    polarizer = insert(bare(model), "polarizer", config.target_layer_name, channels)
    order = generator(config.random_seed, "batches")

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in loop.batches(len(images), config.batch_size, order):
            yield as_float(images[index], device), labels[index].to(device)

    optimizer = torch.optim.SGD(polarizer.parameters(), lr=config.warm_lr)
    for _ in loop.rounds(config.warm_epochs, "warm-up", model=model, rate="--warm_lr", order=order):
        polarizer.train()
        for x, y in batches():
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.log(len(x), loss=loss)
    polarizer.eval()

    optimizer = torch.optim.SGD(
        polarizer.parameters(),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
    )
    for _ in loop.rounds(config.n_rounds, model=model, optimizer=optimizer, order=order):
        for x, y in batches():
            with torch.no_grad():
                clean = model(x)
            targets = target_labels(clean, y)
            adversarial = (x + targeted_perturbation(model, x, targets, config)).clamp(0, 1)
            polarizer.train(config.polarizer_train)
            logits = model(x)
            with keeping_statistics(polarizer):
                adv_logits = model(adversarial)
            polarizer.eval()
            losses = polarizer_loss(logits, adv_logits, y, clean.argmax(1), targets, config)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            loop.log(len(x), **losses)
    for weight in learning:
        weight.requires_grad_(True)
    return model


if __name__ == "__main__":
    run(Config, purify)
