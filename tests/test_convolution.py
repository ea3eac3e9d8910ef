"""The fast weight gradient is that of the library's convolution."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from benchmark.literal import plain_network
from models import convolution
from models.convolution import Conv3x3, weight_gradient
from models.preactresnet import preactresnet18


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of the inputs whose weight gradient is made by matrices."""
    seen: list[torch.Size] = []

    def watched(images: torch.Tensor, gradient: torch.Tensor, stride: int) -> torch.Tensor:
        seen.append(images.shape)
        return weight_gradient(images, gradient, stride)

    monkeypatch.setattr(convolution, "weight_gradient", watched)
    return seen


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_equal_the_librarys_in_float64(
    calls: list[torch.Size], size: int, stride: int, memory: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layer = Conv3x3(128, 6, stride).double()
    images = torch.rand(3, 128, size, size).double().contiguous(memory_format=memory)
    found, wanted = images.clone().requires_grad_(), images.clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    output = layer(found)
    expected = F.conv2d(wanted, weight, stride=stride, padding=1)
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    factor = torch.rand_like(expected)
    (output * factor).sum().backward()
    (expected * factor).sum().backward()
    assert calls == [images.shape]
    assert found.grad is not None
    assert wanted.grad is not None
    assert torch.allclose(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-12)


def test_second_derivatives_exist() -> None:
    torch.manual_seed(0)
    layer = Conv3x3(128, 1).double()
    images = torch.rand(1, 128, 1, 1, requires_grad=True, dtype=torch.float64)
    output = layer(images).square().sum()
    (gradient,) = torch.autograd.grad(output, layer.weight, create_graph=True)
    gradient.square().sum().backward()
    plain = F.conv2d(images, layer.weight, padding=1).square().sum()
    (expected,) = torch.autograd.grad(plain, layer.weight, create_graph=True)
    (of_images,) = torch.autograd.grad(expected.square().sum(), images)
    assert images.grad is not None
    assert torch.allclose(images.grad, of_images, rtol=1e-10)


def test_by_hand() -> None:
    """One 2x2 image of ones and an output gradient of ones: tap (i, j) meets the image at
    (2 - |i - 1|)(2 - |j - 1|) of the four places, e.g. the middle one at all, a corner's at one."""
    ones = torch.ones(1, 1, 2, 2)
    assert weight_gradient(ones, ones, 1)[0, 0].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_it_is_used_for_small_maps_of_many_channels_when_a_weight_learns(
    calls: list[torch.Size],
) -> None:
    cases = {
        "many channels, small map": (Conv3x3(128, 4), 4, True),
        "large map": (Conv3x3(128, 4), 5, False),
        "few channels": (Conv3x3(64, 4), 4, False),
    }
    for name, (layer, size, used) in cases.items():
        calls.clear()
        layer(torch.rand(2, layer.in_channels, size, size)).sum().backward()
        assert bool(calls) == used, name
    calls.clear()
    layer = Conv3x3(128, 4).requires_grad_(False)
    images = torch.rand(2, 128, 2, 2, requires_grad=True)
    layer(images).sum().backward()
    layer.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert calls == []


def test_a_network_keeps_its_state_dict_and_its_gradients() -> None:
    """Against the same network whose convolutions are the library's own."""
    torch.manual_seed(0)
    network = preactresnet18(4).double().train()
    plain = plain_network(network)
    images = torch.rand(3, 3, 16, 16).double()
    for model in (network, plain):
        F.cross_entropy(model(images), torch.tensor([0, 1, 3])).backward()
    for mine, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-12)
