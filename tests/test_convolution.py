"""The fast convolution is the library's, forwards and backwards."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from models.fast import convolution
from models.fast.convolution import Conv3x3, constant_weights, patch_gradient
from models.preactresnet import preactresnet18
from perf.literal import plain_network


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of our own ways is used: `transform` once a pass for each part of a weight by tiles."""
    seen: list[str] = []

    def watch(name: str) -> None:
        function = getattr(convolution, name)

        def watched(*arguments: object) -> object:
            seen.append(name)
            return function(*arguments)

        monkeypatch.setattr(convolution, name, watched)

    for name in ("transform", "untransform", "patch_gradient"):
        watch(name)
    return seen


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are used whatever the channels and the batch."""
    for name in ("FEWEST_CHANNELS", "FEWEST_CHANNELS_LEARNING", "FEWEST_TILES"):
        monkeypatch.setattr(convolution, name, 1)


def gradients_equal(layer: Conv3x3, images: torch.Tensor) -> None:
    """Outputs and both gradients against the library's, to 1e-12 of float64."""
    found, wanted = images.clone().requires_grad_(), images.clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    output = layer(found)
    expected = F.conv2d(wanted, weight, stride=layer.stride, padding=1)
    factor = torch.rand_like(expected)
    (output * factor).sum().backward()
    (expected * factor).sum().backward()
    pairs = ((output, expected), (found.grad, wanted.grad), (layer.weight.grad, weight.grad))
    for mine, other in pairs:
        assert mine is not None
        assert other is not None
        assert mine.shape == other.shape
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("block", "product", "times"), [(1, 1, 7), (10**9, 10**9, 1), (1, 800, 2)])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 4), (4, 16)])
@pytest.mark.usefixtures("anywhere")
def test_tiles_equal_the_library_in_float64(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    block: int,
    product: int,
    times: int,
    memory: torch.memory_format,
) -> None:
    """An image and an output at a time, all at once, and parts that are not equal: outputs by 4
    and 3; images of one tile by 3 and 2, larger ones singly."""
    monkeypatch.setattr(convolution, "BLOCK", block)
    monkeypatch.setattr(convolution, "PRODUCT", product)
    torch.manual_seed(0)
    images = torch.rand(5, 5, *size).double().contiguous(memory_format=memory)
    gradients_equal(Conv3x3(5, 7).double(), images)
    assert calls == ["transform"] * times + ["transform", "untransform"] * times


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_equal_the_library_in_float64(
    calls: list[str], size: int, stride: int, memory: torch.memory_format
) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 128, size, size).double().contiguous(memory_format=memory)
    gradients_equal(Conv3x3(128, 6, stride).double(), images)
    assert calls == ["patch_gradient"]


@pytest.mark.parametrize(("channels", "size", "way"), [(128, 1, "patch_gradient"), (2, 4, "tiles")])
def test_second_derivatives_exist(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, channels: int, size: int, way: str
) -> None:
    """Of both gradients, by the weight and by the image."""
    if way == "tiles":
        for name in ("FEWEST_CHANNELS_LEARNING", "FEWEST_TILES"):
            monkeypatch.setattr(convolution, name, 1)
    torch.manual_seed(0)
    layer = Conv3x3(channels, 2).double()
    images = torch.rand(1, channels, size, size, requires_grad=True, dtype=torch.float64)
    results = []
    for output in (layer(images), F.conv2d(images, layer.weight, padding=1)):
        first = torch.autograd.grad(output.pow(3).sum(), (images, layer.weight), create_graph=True)
        penalty = first[0].square().sum() + first[1].square().sum()
        results.append(torch.autograd.grad(penalty, (images, layer.weight)))
    for mine, other in zip(*results, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)
    assert ("patch_gradient" in calls, "transform" in calls) == (way != "tiles", way == "tiles")


def test_a_tile_by_hand() -> None:
    """Along one side: (1, 2, 3, 4, 5, 6) with the taps (1, 0, -1) is always -2."""
    m = convolution.matrices(torch.float64)
    values, taps = torch.arange(1.0, 7.0).double(), torch.tensor([1.0, 0, -1]).double()
    found = m["A"] @ ((m["B"] @ values) * (m["G"] @ taps))
    assert torch.allclose(found, torch.full((4,), -2.0).double(), rtol=1e-12)


def test_patches_by_hand() -> None:
    """One 2x2 image of ones and an output gradient of ones: tap (i, j) meets the image at
    (2 - |i - 1|)(2 - |j - 1|) of the four places, e.g. the middle one at all, a corner's at one."""
    ones = torch.ones(1, 1, 2, 2)
    assert patch_gradient(ones, ones, 1)[0, 0].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


@pytest.mark.usefixtures("anywhere")
def test_the_error_in_float32_is_nearly_the_librarys(calls: list[str]) -> None:
    """Relative, 1.1e-6 as documented; the library has 0.2e-6 to 0.9e-6, by the kernel it takes.

    The usual points 0, 1, -1, 2, -2 would have three times as much.
    """
    torch.manual_seed(0)
    layer = Conv3x3(128, 128)
    images = torch.randn(8, 128, 8, 8)
    exact = F.conv2d(images.double(), layer.weight.double(), padding=1)
    with torch.no_grad():
        found = layer(images)
    assert calls == ["transform"]
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 1.5e-6


@pytest.mark.parametrize(
    ("channels", "size", "count", "stride", "learns", "expected"),
    [
        (128, 4, 64, 1, True, ["transform", "transform", "untransform"]),
        (128, 4, 64, 1, False, []),
        (128, 4, 63, 1, True, ["patch_gradient"]),
        (128, 8, 16, 1, True, ["transform", "transform", "untransform"]),
        (64, 8, 16, 1, True, ["transform", "transform", "untransform"]),
        (32, 8, 16, 1, True, []),
        (128, 6, 64, 1, True, []),
        (128, 8, 64, 2, True, ["patch_gradient"]),
        (64, 4, 64, 2, True, []),
    ],
)
def test_where_which_way_is_used(
    calls: list[str],
    channels: int,
    size: int,
    count: int,
    stride: int,
    learns: bool,
    expected: list[str],
) -> None:
    layer = Conv3x3(channels, channels, stride).requires_grad_(learns)
    layer(torch.rand(count, channels, size, size, requires_grad=True)).sum().backward()
    assert calls == expected


@pytest.mark.parametrize(
    ("channels", "count", "expected"),
    [(128, 64, ["transform"]), (128, 63, []), (64, 64, [])],
)
def test_tiles_where_nothing_has_a_gradient(
    calls: list[str], channels: int, count: int, expected: list[str]
) -> None:
    layer = Conv3x3(channels, channels).requires_grad_(False)
    layer(torch.rand(count, channels, 4, 4))
    assert calls == expected


def test_the_gradient_of_an_image_alone_is_the_librarys_bit_by_bit() -> None:
    torch.manual_seed(0)
    layout = {"memory_format": torch.channels_last}  # the library rounds by it
    network = preactresnet18(4).eval().requires_grad_(False).to(**layout)
    plain = plain_network(network).to(**layout)
    images = torch.rand(64, 3, 32, 32)
    gradients = []
    for model in (network, plain):
        moving = images.clone().requires_grad_()
        gradients += torch.autograd.grad(model(moving).square().sum(), moving)
    assert torch.equal(*gradients)


def test_autocast_and_other_types_are_the_librarys(calls: list[str]) -> None:
    layer = Conv3x3(128, 128)
    images = torch.rand(64, 128, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    layer.bfloat16()(images.bfloat16()).float().sum().backward()
    assert calls == []


@pytest.mark.parametrize("product", [10**9, 128 * 36 * 50])
def test_weights_are_transformed_once_while_they_stay(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, product: int
) -> None:
    """Also from inference mode, whose tensors could not be used for gradients later; and after
    the context a changed weight counts. All outputs at a time, and 43, 43 and 42 of them."""
    monkeypatch.setattr(convolution, "PRODUCT", product)
    layer = Conv3x3(128, 128).requires_grad_(False)
    images = torch.rand(16, 128, 4, 4)
    with constant_weights():
        with torch.inference_mode():
            layer(images)
        with constant_weights():
            before = layer(images)
    assert calls == ["transform"]
    assert torch.allclose(before, F.conv2d(images, layer.weight, padding=1), rtol=1e-4, atol=1e-5)
    layer.weight.mul_(2)
    with constant_weights():
        after = layer(images)
    assert calls == ["transform"] * 2
    assert torch.allclose(after, 2 * before, rtol=1e-4, atol=1e-5)


def test_a_network_keeps_its_state_dict_and_its_gradients(calls: list[str]) -> None:
    """Against the same network whose convolutions are the library's own."""
    torch.manual_seed(0)
    network = preactresnet18(4).double().train()
    plain = plain_network(network)
    assert list(plain.state_dict()) == list(network.state_dict())
    images = torch.rand(4, 3, 32, 32).double()
    for model in (network, plain):
        F.cross_entropy(model(images), torch.tensor([0, 1, 3, 2])).backward()
    for mine, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-8, atol=1e-12)
    assert {"transform", "untransform", "patch_gradient"} == set(calls)
