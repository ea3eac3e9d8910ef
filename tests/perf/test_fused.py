"""Fused pieces compute what the network computes; how fast they are is for a GPU to say."""

import copy

import pytest
import torch
from torch import nn

from models.preactresnet import PreActResNet
from perf import fused
from perf.fused import FusedBlock


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return PreActResNet((2, 1, 1, 1), 10, widths=(4, 6, 8, 8)).double()


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_network_is_the_same_function(
    network: nn.Module, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, gradients, BatchNorm's statistics; its pieces are not compiled here."""
    monkeypatch.setattr(fused, "compiled", lambda: fused._piece)
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    other = fused.fuse(copy.deepcopy(network))
    assert sum(type(module) is FusedBlock for module in other.modules()) == 5
    seen = []
    for model in (network, other):
        model.train(training)
        inputs = images.clone().requires_grad_()
        outputs = model(inputs)
        outputs.square().sum().backward()
        gradients = [weight.grad for weight in model.parameters()]
        seen.append([outputs, inputs.grad, *gradients, *model.buffers()])
    for own, expected in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_the_difference_is_that_of_the_losses() -> None:
    def fresh(is_fused: bool) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(3 * 8 * 8, 10)
        with torch.no_grad():
            layer.weight *= 2 if is_fused else 1
        return nn.Sequential(nn.Flatten(), layer)

    data = fused.random_images(6, 8)
    cpu = torch.device("cpu")
    assert fused.difference(lambda _: fresh(False), data, 4, cpu) == 0
    assert fused.difference(fresh, data, 4, cpu) > 0.01
