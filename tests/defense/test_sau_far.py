"""SAU-Far against a transcription of its three changes; its losses are tested with SAU."""

import copy
import math

import pytest
import torch
from torch import nn

from defense.sau import shared_perturbation, unlearning_loss
from defense.sau_far import Config, purify
from tests.defense.test_sau import problem, small_network
from utils.training.loop import Loop
from utils.training.sgd import Scheduler


def config_of(**changes: object) -> Config:
    values = {"n_rounds": 3, "batch_size": 12, "crop_padding": 0, "flip": False, "lr": 0.01}
    return Config.load(**{**values, "trigger_norm": 0.3, "adv_lr": 0.3, **changes})


def transcription(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """All images are one batch; the rate of round k of n is lr (1 + cos(pi k / n)) / 2."""
    reference = copy.deepcopy(model).eval()
    model = copy.deepcopy(model).eval()
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=config.lr, amsgrad=True)
    for number in range(config.n_rounds):
        delta = shared_perturbation(model, reference, images, labels, config)
        with torch.no_grad():
            before, before_adv = reference(images), reference(images + delta)
        model.train()
        after = model(images)
        kept = copy.deepcopy(list(model.buffers()))
        after_adv = model(images + delta)
        loss = unlearning_loss(after, after_adv, before, before_adv, labels, config)["total"]
        gradients = torch.autograd.grad(loss, weights)
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.data = value
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.param_groups[0]["lr"] = (
            config.lr * (1 + math.cos(math.pi * number / config.n_rounds)) / 2
        )
        optimizer.step()
        model.eval()
    return model


def test_three_rounds_are_the_transcription() -> None:
    """The falling rate, batch statistics of each kind of image, running ones of the clean alone."""
    for seed in range(3):
        model, (images, labels) = small_network(seed, True), problem(seed)
        config = config_of(lmd_1=0.7, lmd_2=0.2)
        expected = transcription(model, images, labels, config)
        found = purify(model, images, labels, config)
        for own, other in zip(
            found.state_dict().values(), expected.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
        assert not found.training


def test_each_part_of_the_loss_counts_once() -> None:
    """The clean part has a backward pass of its own."""
    model, (images, labels) = small_network(0, True), problem(0)
    assert sum(
        not torch.equal(own, other)
        for own, other in zip(
            purify(model, images, labels, config_of()).parameters(),
            purify(model, images, labels, config_of(lmd_3=0.0)).parameters(),
            strict=True,
        )
    )
    plain = purify(model, images, labels, config_of(lmd_3=0.0))
    elsewhere = purify(model, images, labels, config_of(lmd_3=0.0, adv_steps=0, pgd_init="min"))
    for own, other in zip(plain.parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(own, other)  # without its weight, delta has no part in anything


def test_a_plateau_of_the_loss_lowers_the_rate() -> None:
    """Steps so short that no round is better by a ten-thousandth: the twelfth lowers the rate."""
    rates: list[float] = []

    def watch(number: int, total: int, losses: object, state: dict) -> None:
        rates.append(state["optimizer"].param_groups[0]["lr"])

    config = config_of(lr=1e-7, lr_scheduler="reduce_on_plateau", n_rounds=14, adv_steps=0)
    purify(small_network(0, True), *problem(0), config, Loop(watch))
    assert rates == pytest.approx([1e-7] * 11 + [1e-8] * 3)


def test_the_plateau_is_that_of_the_round_s_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches in each of three rounds."""
    seen: list[float] = []
    means: list[float] = []
    monkeypatch.setattr(Scheduler, "after_epoch", lambda self, loss: seen.append(loss))
    loop = Loop(lambda number, total, losses, state: means.append(losses["total"]))
    purify(small_network(0, True), *problem(0), config_of(batch_size=6), loop)
    assert seen == means
    assert len(set(seen)) == 3


def test_images_are_cropped_before_they_are_perturbed() -> None:
    """Labels and images in one order; crops differ between rounds."""
    model, (images, labels) = small_network(1, False), problem(1)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    purify(model, images, labels, config_of(crop_padding=2, n_rounds=2, adv_steps=0), Loop())
    batches = [batch for batch in seen if len(batch) == len(images)][1:]  # the first shows classes
    assert not torch.equal(batches[0], batches[-1])
    corner = batches[0][:, :, 0, 0]
    assert (corner == 0).all(1).any()  # of a crop that begins outside


def test_a_model_too_certain_for_the_loss_is_named() -> None:
    images, labels = problem(1, count=24)
    for factor, is_named in ((1, False), (300, True)):
        model = small_network(1, False)
        with torch.no_grad():
            model[-1].weight.mul_(factor)
            model[-1].bias.mul_(factor)
        loop = Loop()
        purify(model, images, labels, config_of(n_rounds=1, crop_padding=0, flip=False), loop)
        assert any("--exact_sar" in text for text in loop.findings.warnings) == is_named
