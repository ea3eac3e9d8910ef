"""The inversion of BTI-DBF and PAM written out for a `ConvNet`, to compare the defenses with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.unet import UNet
from tests.networks import ConvNet
from utils.process.seeds import generator

# Flags with which everything is done twice, on `problem` in batches of 5, 5 and 2 images. Bounds
# that no step exceeds, so that each searches a trigger.
TWICE = {
    **dict.fromkeys(("inversion_rounds", "n_rounds"), 2),
    **dict.fromkeys(("identity_epochs", "mask_epochs", "generator_epochs"), 2),
    **{"batch_size": 5, "random_seed": 3, "image_bound": 100.0, "generator_width": 4},
    "feature_bound": 1e3,
}

# A step of the model: the model, x, x' and y. It is made anew for each round.
Step = Callable[[ConvNet, torch.Tensor, torch.Tensor, torch.Tensor], None]


def features_of(network: ConvNet, x: torch.Tensor) -> torch.Tensor:
    """What the last layer with a map gives, before the ReLU."""
    return network.bn2(network.conv2(network.bn1(network.conv1(x)).relu()))


def logits_of(network: ConvNet, features: torch.Tensor) -> torch.Tensor:
    return network.linear(features.relu().mean(dim=(2, 3)))


def mask_of(theta: torch.Tensor) -> torch.Tensor:
    return torch.tanh(theta) / (2 + 1e-7) + 0.5


def literal(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Any,
    make_step: Callable[[ConvNet], Step],
) -> tuple[ConvNet, UNet, int]:
    """Steps 1 to 6 on float64 images: the model, the generator, and the detected label."""
    model = copy.deepcopy(model)
    torch.manual_seed(config.random_seed)
    unet = UNet(3, config.generator_width).double()
    of_inversion = generator(config.random_seed, "batches of the inversion")
    order = generator(config.random_seed, "batches")
    target = -1

    def batches(rng: torch.Generator) -> Any:
        for index in torch.randperm(len(images), generator=rng).split(config.batch_size):
            yield images[index], labels[index]

    def learner() -> torch.optim.Adam:
        return torch.optim.Adam(unet.parameters(), lr=config.generator_lr)

    def make(optimizer: torch.optim.Optimizer, loss: torch.Tensor, weights: Any) -> None:
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()

    optimizer = learner()
    for _ in range(config.identity_epochs):
        for x, _ in batches(of_inversion):
            make(optimizer, (unet(x) - x).square().mean(), list(unet.parameters()))
    for number in range(1, config.inversion_rounds + 1):
        judge = copy.deepcopy(model).train()
        shape = features_of(judge, images[:2]).shape[1:]
        rng = generator(config.random_seed, f"mask {number}")
        theta = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=config.mask_lr)
        for _ in range(config.mask_epochs):
            for x, y in batches(of_inversion):
                f, m = features_of(judge, x), mask_of(theta)
                loss = F.cross_entropy(logits_of(judge, m * f), y)
                loss = loss - F.cross_entropy(logits_of(judge, (1 - m) * f), y)
                make(optimizer, loss, [theta])
        m = mask_of(theta.detach())

        model.eval()
        optimizer = learner()
        for _ in range(config.generator_epochs):
            for x, _ in batches(of_inversion):
                f, g = features_of(model, x), features_of(model, unet(x))
                change = (x - unet(x)).square().mean()
                benign = (m * (f - g)).square().mean()
                loss = change
                if change <= config.image_bound and benign <= config.feature_bound:
                    loss = 0.01 * benign - ((1 - m) * (f - g)).square().mean()
                    if number > 1:
                        wanted = torch.full((len(x),), target)
                        loss = loss + F.cross_entropy(logits_of(model, g), wanted)
                make(optimizer, loss, list(unet.parameters()))
        if number == 1:
            rng = generator(config.random_seed, "noise of the detection")
            parts = [
                x + 0.03 * torch.randn(x.shape, generator=rng, dtype=x.dtype)
                for x in images.split(config.batch_size)
            ]
            with torch.no_grad():
                predictions = model(unet(torch.cat(parts))).argmax(1)
            target = int(torch.bincount(predictions).argmax())

        step = make_step(model)
        for _ in range(config.n_rounds):
            model.train()
            for x, y in batches(order):
                mixed = x.clone()
                count = int(config.generated_ratio * len(x)) + 1
                mixed[:count] = unet(x[:count]).detach()
                step(model, x, mixed, y)
        model.eval()
    return model, unet, target
