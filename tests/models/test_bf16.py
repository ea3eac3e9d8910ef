"""Convolutions in bfloat16 on a CPU, where a tap of the kernel meets nothing but padding."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import Classifier, prepare
from models.bf16 import has_idle_tap, sound_gradients
from utils.training.guard import run_soundly

CPU = torch.device("cpu")


def test_a_tap_is_idle_if_no_place_of_the_kernel_puts_it_on_the_map() -> None:
    """Against all places and taps, written out; `same` may pad one pixel more at the end."""
    seen = set()
    for size, taps, stride, padding, dilation, more in itertools.product(
        range(1, 6), range(1, 6), range(1, 4), range(4), range(1, 3), range(2)
    ):
        count = (size + 2 * padding + more - dilation * (taps - 1) - 1) // stride + 1
        if count < 1:
            continue
        places = [
            [0 <= place * stride + tap * dilation - padding < size for place in range(count)]
            for tap in range(taps)
        ]
        is_idle = not all(map(any, places))
        assert has_idle_tap(size, taps, stride, padding, dilation, count) == is_idle
        seen.add(is_idle)
    assert seen == {True, False}


def spoil_memory(weight: torch.Tensor) -> None:
    """Frees tensors of NaN, of the weight's size, that the next ones may take the place of."""
    for kind in (torch.float32, torch.bfloat16):
        junk = [torch.full(weight.shape, float("nan"), dtype=kind) for _ in range(3)]
        del junk


def gradients(
    name: str, maps: torch.Tensor, weight: torch.Tensor, kind: torch.dtype, **flags: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gradient of the weight, and of the maps; the maps are of the type."""
    weight, maps = weight.clone().requires_grad_(), maps.to(kind).clone().requires_grad_()
    spoil_memory(weight)
    output = getattr(F, name)(maps, weight if kind == torch.float32 else weight.to(kind), **flags)
    output.float().square().sum().backward()
    assert weight.grad is not None
    assert maps.grad is not None
    return output.detach(), weight.grad, maps.grad


STRIDED = {"stride": 2, "padding": 1}


@pytest.mark.parametrize(
    ("name", "sides", "size", "flags", "is_unsound"),
    [
        ("conv2d", 2, 1, STRIDED, True),
        ("conv2d", 2, 1, {"stride": (1, 2), "padding": (0, 1)}, None),  # no output of a side
        ("conv2d", 2, 2, {"stride": 3, "padding": 1}, True),
        ("conv2d", 2, 1, {"padding": "same"}, True),
        ("conv2d", 2, 2, {"padding": "same"}, False),
        ("conv2d", 2, 3, {"padding": "same"}, False),
        ("conv2d", 2, 3, {"padding": "same", "dilation": 2}, False),
        ("conv2d", 2, 3, {"padding": "valid"}, False),
        ("conv2d", 2, 3, {"stride": (3, 1), "padding": 1}, True),  # along one side alone
        ("conv2d", 2, 4, STRIDED, False),
        ("conv2d", 2, 3, STRIDED, False),
        ("conv2d", 2, 1, {"stride": 2, "padding": 1, "groups": 2}, True),
        ("conv2d", 2, 1, {"padding": [2], "dilation": 2}, True),
        ("conv1d", 1, 1, STRIDED, True),
        ("conv3d", 3, 1, STRIDED, True),
        ("conv_transpose2d", 2, 1, STRIDED, True),
        ("conv_transpose2d", 2, 1, {"stride": 2}, False),
        ("conv_transpose2d", 2, 1, {"stride": 2, "padding": 1, "output_padding": 1}, True),
        ("conv_transpose2d", 2, 2, {"padding": 2, "dilation": 2}, True),
        ("conv_transpose2d", 2, 2, {"stride": 3, "padding": 2}, True),
        ("conv_transpose2d", 2, 2, {"stride": 3, "padding": (2, 0)}, True),  # along one side alone
        ("conv_transpose2d", 2, 2, {"stride": 3, "padding": 2, "output_padding": 1}, False),
        ("conv_transpose1d", 1, 1, STRIDED, True),
        ("conv_transpose3d", 3, 1, STRIDED, True),
    ],
)
def test_such_a_convolution_is_that_in_float32_and_no_other_is(
    name: str, sides: int, size: int, flags: dict[str, Any], is_unsound: bool | None
) -> None:
    """Of its rounded numbers, bit for bit; others are left to torch."""
    torch.manual_seed(0)
    groups = flags.get("groups", 1)
    maps = torch.randn(4, 16, *[size] * sides).bfloat16().float()
    weight = torch.randn(16, 16 // groups, *[3] * sides).bfloat16().float()
    if is_unsound is None:
        with pytest.raises(RuntimeError), sound_gradients(True):
            getattr(F, name)(maps.bfloat16(), weight.bfloat16(), **flags)
        return
    exact = gradients(name, maps, weight, torch.float32, **flags)
    with sound_gradients(True):
        sound = gradients(name, maps, weight, torch.bfloat16, **flags)
    assert sound[0].dtype == torch.bfloat16
    assert torch.equal(sound[0].float(), exact[0].bfloat16().float())
    for given, wanted in zip(sound[1:], exact[1:], strict=True):
        torch.testing.assert_close(given.float(), wanted, rtol=0.02, atol=0.02 * wanted.abs().max())
    with sound_gradients(True), torch.autocast("cpu", torch.bfloat16):
        fine = torch.randn(weight.shape)
        cast = getattr(torch, name)(maps, fine, **flags)
    func = getattr(F, name)
    unrounded = torch.equal(cast, func(maps, fine, **flags).bfloat16())
    rounded = torch.equal(cast, func(maps.bfloat16(), fine.bfloat16(), **flags))
    assert cast.dtype == torch.bfloat16
    assert (unrounded, rounded) == (is_unsound, not is_unsound)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_other_numbers_stay_what_they_are(kind: torch.dtype) -> None:
    maps, weight = torch.rand(1, 2, 1, 1, dtype=kind), torch.rand(3, 2, 3, 3, dtype=kind)
    expected = F.conv2d(maps, weight, padding=1)
    with sound_gradients(True):
        assert torch.equal(F.conv2d(input=maps, weight=weight, padding=1), expected)
    if kind == torch.float64:
        with sound_gradients(True), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(F.conv2d(maps, weight, padding=1), expected)
    with sound_gradients(True), torch.autocast("cpu", torch.float16):
        assert F.conv2d(maps.float(), weight.float(), padding=1).dtype == torch.float16


def test_arguments_may_be_named() -> None:
    maps, weight = torch.rand(1, 2, 1, 1).bfloat16(), torch.rand(3, 2, 3, 3)
    with sound_gradients(True), torch.autocast("cpu", torch.bfloat16):
        named = F.conv2d(input=maps, weight=weight, padding=1)
    assert torch.equal(named, F.conv2d(maps.float(), weight, padding=1).bfloat16())


def test_torch_s_functions_are_given_back() -> None:
    """Once nobody needs the others any more, and after errors, too."""
    before = {name: (getattr(F, name), getattr(torch, name)) for name in ("conv2d", "conv1d")}
    with sound_gradients(True):
        replaced = F.conv2d
        with pytest.raises(ZeroDivisionError), sound_gradients(True):
            1 / 0  # noqa: B018
        assert F.conv2d is replaced is not before["conv2d"][0]
    after = {name: (getattr(F, name), getattr(torch, name)) for name in before}
    assert after == before


class Functional(nn.Module):
    """A network with code of its own, which casts."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            maps = F.conv2d(images, self.kernel, stride=2, padding=1)
        return maps.float().flatten(1)


class Again(nn.Module):
    """Its convolution is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = nn.Conv2d(3, 8, 3, stride=2, padding=1), reentrant

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.clone().requires_grad_()  # reentrant checkpoints want one
        return checkpoint(self.part, images, use_reentrant=self.reentrant).flatten(1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_sound_as_well(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = prepare(Classifier(Again(reentrant), (0.0,) * 3, (1.0,) * 3), CPU, "bf16")
    exact = copy.deepcopy(model)
    exact.precision = "fp32"
    images = torch.rand(16, 3, 1, 1)
    with run_soundly(model):
        gradient = kernel_gradient(model, images)
    expected = kernel_gradient(exact, images)
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.02 * expected.abs().max())
    gradient[:, :, 1, 1] = 0
    assert not gradient.any()


def strided() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten())


def kernel_gradient(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    spoil_memory(torch.empty(8, 3, 3, 3))
    model(images).float().square().sum().backward()
    (kernel,) = [weight for weight in model.parameters() if weight.dim() == 4]
    assert kernel.grad is not None
    return kernel.grad.float()


@pytest.mark.parametrize("made_as", ["classifier", "own code", "half weights"])
def test_networks_learn_numbers_of_their_own(made_as: str) -> None:
    """Nine of ten taps meet no pixel of a map of one pixel, and have no gradient."""
    torch.manual_seed(0)
    images = torch.rand(16, 3, 1, 1)
    for _ in range(3):
        if made_as == "classifier":
            model = prepare(Classifier(strided(), (0.0,) * 3, (1.0,) * 3), CPU, "bf16")
            gradient = kernel_gradient(model, images)
        else:
            bare = Functional() if made_as == "own code" else strided().bfloat16()
            kind = next(bare.parameters()).dtype
            with run_soundly(bare):
                gradient = kernel_gradient(bare, images.to(kind))
        at_pixel = gradient[:, :, 1, 1].clone()
        gradient[:, :, 1, 1] = 0
        assert not gradient.any()
        assert at_pixel.isfinite().all()
        assert at_pixel.any()
