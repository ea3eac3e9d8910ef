"""i-BAU: unlearns one perturbation for all images, by the implicit hypergradient.

Zeng, Chen, Park, Mao, Jin, Jia. *Adversarial Unlearning of Backdoors via Implicit Hypergradient.*
ICLR 2022.

A minimax game with a single perturbation for all images, like a trigger: the perturbation changes
the network's labels, and the weights unlearn it. The gradient of the weights takes into account how
the best perturbation changes with them.

    inner   d* = argmin L_in = -CE(h(x + k d), h's own label of x) + pert_decay ||d||^2
    outer   min over weights   L_out = CE(h(x + k d* on a few images), y)
    step    dL_out/dw + (dPhi/dw)^T v,   Phi(d) = d - map_lr dL_in/dd
            v = (dPhi/dd)^T v + dL_out/dd, iterated K times from v = 0

k: the standard deviations of a `Classifier`'s normalization, because d is in normalized units; 1
for other modules.

    python defense/ibau.py --result_file badnet_demo

It sees clean images. BatchNorm's statistics stay as they are. As published, L_in of the outer steps
is that of the first cached batch, and `portion` of 0.01 perturbs 2 images of 256. The learning rate
is BackdoorBench's; the authors' is 1e-3, with 5,000 clean *test* images, which no defense here
sees. It costs a few points of accuracy, often misses Blended and LF, differs from seed to seed, and
needs about three times the memory of fine-tuning. It runs in float32 with every `--precision`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import Augmented, CleanData, Scored, checked, run
from models import Classifier
from models.copies import copied
from models.modes import evaluating, frozen, twice_differentiable
from models.parts import learning_weights
from utils.data.batches import as_float, augment, least_share, none_of, spread, whole_share
from utils.process.seeds import generator
from utils.training.findings import Picture
from utils.training.loop import Loop, batch_sizes

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels
Loss = Callable[[torch.Tensor], torch.Tensor]  # of a perturbation (1, C, H, W), a scalar


@dataclass(frozen=True, kw_only=True)
class Config(CleanData, Scored, Augmented):
    K: Annotated[int, Field(ge=0, description="iterations of the hypergradient; 0 goes without")]
    lr: Annotated[float, Field(gt=0, description="learning rate of Adam, constant")]
    wd: Annotated[float, Field(ge=0, description="weight decay of Adam")]
    adam_beta_1: Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")]
    adam_beta_2: Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")]
    amsgrad: Annotated[bool, Field(description="AMSGrad variant of Adam")]
    portion: Annotated[
        float, Field(ge=0, le=1, description="images of a batch that are perturbed, rounded down")
    ]
    pert_lr: Annotated[float, Field(gt=0, description="step size of the perturbation")]
    pert_decay: Annotated[float, Field(ge=0, description="weight of its squared L2 norm")]
    map_lr: Annotated[float, Field(gt=0, description="step size of Phi")]

    advice = "lower --lr, or give more images (--ratio)"
    rates = "--lr, --pert_lr, --map_lr or --wd"
    moves_images = True
    takes_float16 = False


def universal_perturbation(
    model: nn.Module, batches: Iterable[torch.Tensor], config: Config
) -> torch.Tensor:
    """One perturbation that changes the labels of all images: a gradient step for each batch.

    Args:
        model: from (B, C, H, W) float in [0, 1] to (B, K) logits; used in eval mode and left as it
            was.
        batches: (B, C, H, W) float in [0, 1], at least one.

    Returns:
        k delta: (1, C, H, W) float, pixel units, not bounded; images + k delta may leave [0, 1].
    """
    delta: torch.Tensor | None = None
    with evaluating(model), frozen(model):
        for images in batches:
            with torch.no_grad():
                labels = model(images).argmax(1)
            start = torch.zeros_like(images[:1]) if delta is None else delta
            moving = start.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                inner_loss(model, images, labels, moving, config), moving
            )
            delta = start - config.pert_lr * gradient
    assert delta is not None
    return pixels_of(model) * delta


def pixels_of(model: nn.Module) -> torch.Tensor:
    """k: the pixel units of a step of 1 in the normalized input; (1, C, 1, 1), or a scalar 1."""
    if isinstance(model, Classifier):
        return model.normalize.std
    return torch.ones((), device=next(model.parameters()).device)


def inner_loss(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    delta: torch.Tensor,
    config: Config,
) -> torch.Tensor:
    """L_in = -CE(h(x + k delta), labels) + pert_decay ||delta||_2^2.

    Shape:
        (B, C, H, W) float in [0, 1], (B,) int64, (1, C, H, W) float -> scalar.
    """
    logits = model(images + pixels_of(model) * delta)
    return config.pert_decay * delta.square().sum() - F.cross_entropy(logits, labels)


def outer_loss(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    delta: torch.Tensor,
    perturbed: torch.Tensor,
) -> torch.Tensor:
    """L_out: cross-entropy of the batch, in which the images at some positions are perturbed.

    Shape:
        (B, C, H, W) float in [0, 1], (B,) int64, (1, C, H, W) float, (P,) int64 -> scalar.
    """
    share = torch.zeros(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
    share[perturbed] = 1
    return F.cross_entropy(model(images + share * (pixels_of(model) * delta)), labels)


def hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    perturbation: torch.Tensor,
    weights: Sequence[torch.Tensor],
    steps: int,
    step_size: float,
) -> list[torch.Tensor]:
    """The gradient of the outer loss for the weights, with the perturbation as their function.

    The perturbation is taken for a fixed point of Phi(d) = d - step_size dL_in/dd. The iteration
    ends early once v changes by less than 1e-10.

    Args:
        outer_loss, inner_loss: scalars of the perturbation; each is called once.
        perturbation: any shape, where they are taken.
        weights: that the losses may depend on, with `requires_grad`.
        steps: iterations of v; 0 leaves the direct gradient.
        step_size: > 0, of Phi.

    Returns:
        Tensors like the weights; 0 for one that no loss depends on.
    """
    delta = perturbation.detach().requires_grad_()
    into_delta, *gradients = torch.autograd.grad(
        outer_loss(delta), [delta, *weights], materialize_grads=True
    )
    (slope,) = torch.autograd.grad(inner_loss(delta), delta, create_graph=True)
    phi = delta - step_size * slope
    v = torch.zeros_like(delta)
    for _ in range(steps):
        (carried,) = torch.autograd.grad(phi, delta, v, retain_graph=True)
        before, v = v, carried + into_delta
        if torch.linalg.vector_norm(v - before) < 1e-10:
            break
    indirect = torch.autograd.grad(phi, weights, v, materialize_grads=True)
    return [direct + more for direct, more in zip(gradients, indirect, strict=True)]


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier that unlearned universal perturbations; the model is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode; its buffers are the model's.

    Raises:
        UserError: if no weight has `requires_grad`, or a loss is not finite.

    Example:
        >>> config = Config.load(n_rounds=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    model = copied(model, training=False)
    weights = learning_weights(model)
    optimizer = torch.optim.Adam(
        weights,
        lr=config.lr,
        betas=(config.adam_beta_1, config.adam_beta_2),
        weight_decay=config.wd,
        amsgrad=config.amsgrad,
    )
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)
    chosen = generator(config.random_seed, "perturbed images")

    def batches(order: torch.Generator, crops: torch.Generator) -> Iterator[Batch]:
        """A pass over all images, augmented as they are now."""
        sizes = batch_sizes(len(images), config.batch_size, least=1)
        for index in torch.randperm(len(images), generator=order).split(sizes):
            batch = augment(images[index], config.crop_padding, config.flip, crops)
            yield batch, labels[index].to(device)

    cached = list(
        batches(
            generator(config.random_seed, "cached batches"),
            generator(config.random_seed, "augmentation of the cached batches", images.device),
        )
    )
    first_images, first_labels = cached[0]
    first = as_float(first_images, device)
    delta = torch.zeros_like(first[:1])
    _warn_of_portion(loop, len(first), config)

    def gradient(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """The hypergradient of a batch; logs its loss."""
        count = whole_share(config.portion, len(x))
        perturbed = torch.randperm(len(x), generator=chosen)[:count].to(device)

        def outer(delta: torch.Tensor) -> torch.Tensor:
            loss = outer_loss(model, x, y, delta, perturbed)
            loop.log(len(x), loss=loss)
            return loss

        def inner(delta: torch.Tensor) -> torch.Tensor:
            return inner_loss(model, first, first_labels, delta, config)

        return hypergradient(outer, inner, delta, weights, config.K, config.map_lr)

    for _ in loop.rounds(
        config.n_rounds,
        model=model,
        optimizer=optimizer,
        order=order,
        crops=crops,
        chosen=chosen,
        delta=delta,
    ):
        with twice_differentiable(model):
            number, done = loop.position
            if done == 0:  # a round that is resumed has its perturbation
                fresh = (as_float(x, device) for x, _ in batches(order, crops))
                perturbation = universal_perturbation(model, fresh, config)
                delta.copy_(perturbation / pixels_of(model))
                if number == 1:
                    loop.findings.pictures["perturbation"] = _drawn(images, perturbation)
            for _ in loop.batches(len(cached), 1, order, least=1):
                _, done = loop.position
                x, y = cached[done]
                for weight, value in zip(weights, gradient(as_float(x, device), y), strict=True):
                    weight.grad = value
                optimizer.step()
    return model


def _warn_of_portion(loop: Loop, batch_size: int, config: Config) -> None:
    """Warns if a share of a batch is rounded down to no image, so that nothing is unlearned."""
    if config.portion > 0 and whole_share(config.portion, batch_size) == 0:
        loop.findings.warn(
            f"{none_of('--portion', config.portion, batch_size, 'images of a batch')}, so no "
            f"perturbation is unlearned; give at least {least_share(batch_size)}"
        )


def _drawn(images: torch.Tensor, perturbation: torch.Tensor) -> Picture:
    """Up to eight images, without and with the perturbation of the model as it was given."""
    shown = spread(len(images), 8)
    clean = as_float(images[shown]).cpu().float()
    return Picture(
        "the universal perturbation of the model before; label before | after",
        {"clean": clean, "perturbed": clean + perturbation.cpu().float()},
        is_compared=True,
    )


if __name__ == "__main__":
    run(Config, purify)
