"""Reactivation: the loss by hand, and the perturbation in its bound."""

import math

import pytest
import torch

from analysis import reactivate
from models import build_model


def test_the_loss_of_reactivation() -> None:
    """p = (0.7, 0.2, 0.1), t = 1: -log 0.2 - log(1.0001 - 0.7). With t = 0 the other is 0.2."""
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    expected = -math.log(0.2) - math.log(1.0001 - 0.7)
    assert float(reactivate.reactivation_loss(logits, torch.tensor([1]))) == pytest.approx(expected)
    expected = -math.log(0.7) - math.log(1.0001 - 0.2)
    assert float(reactivate.reactivation_loss(logits, torch.tensor([0]))) == pytest.approx(expected)


def test_the_perturbation_stays_in_its_bound_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images, targets = torch.rand(10, 3, 8, 8), torch.zeros(10, dtype=torch.int64)
    losses = []
    for steps in (0, 30):
        config = reactivate.Config.load(outer_steps=steps, step_size=5.0)
        delta = reactivate.search(model, images, targets, config)
        assert delta.shape == (1, 3, 8, 8)
        assert 0.04 < delta.abs().max() <= 0.05
        logits = model(reactivate.with_delta(images, delta))
        losses.append(reactivate.reactivation_loss(logits, targets).item())
    assert losses[1] < losses[0]


def test_a_perturbed_image_is_clipped() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    delta = torch.tensor([-0.1, 0.1]).view(1, 1, 1, 2)
    assert reactivate.with_delta(image, delta).flatten().tolist() == [0.0, 1.0]
