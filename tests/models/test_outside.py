"""State outside the state dict: what matters is named, and what does not is passed over."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import CONSTRUCTORS, Classifier, build_model
from models.outside import Outside, buffers_outside, put_buffers, state_outside

NONE = Outside([], [])
NORMALIZATION = ["normalize.mean", "normalize.std"]


class Net(nn.Module):
    """A linear layer of 4 x 4 images, and what a test does with its features in each call."""

    def __init__(self, start: Callable[[Any], object], use: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(48, 3)
        self.norm = nn.BatchNorm1d(3)
        self.use = use
        start(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.use(self, self.norm(self.linear(images.flatten(1))))


def outside(start: Callable[[Any], object], use: Callable[[Any, Any], Any]) -> Outside:
    first, second = (Classifier(Net(start, use), (0.0,) * 3, (1.0,) * 3) for _ in range(2))
    return state_outside(first, second, 4)


def buffer(net: Any, value: float = 0.0) -> None:
    net.register_buffer("mean", torch.full((3,), value), persistent=False)


def follow(net: Any, x: torch.Tensor) -> None:
    if net.training:
        net.mean = 0.5 * net.mean + 0.5 * (x.detach() ** 2).mean(0)


def centre(net: Any, x: torch.Tensor) -> torch.Tensor:
    follow(net, x)
    return x - net.mean


def centre_in_train_mode(net: Any, x: torch.Tensor) -> torch.Tensor:
    follow(net, x)
    return x - net.mean if net.training else x


def counting(act: Callable[[int, torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], Any]:
    def use(net: Any, x: torch.Tensor) -> torch.Tensor:
        net.calls += net.training
        return act(net.calls, x)

    return use


def zero(net: Any) -> None:
    net.calls = 0


def no_state(net: Any) -> None:
    pass


# Python's state, which matters


class Schedule:
    """An object that is no module."""

    share = 1.0

    def step(self) -> float:
        self.share = 0.5 * self.share
        return self.share


def list_of_calls(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.seen.append(1)
    return x / len(net.seen)


def own_generator(net: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(1, generator=net.rng) if net.training else x


def first_batch(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Weights that begin with the first batch."""
    if net.training and not net.is_ready:
        net.is_ready = True
        net.norm.bias.data.sub_(1)
        return x - 1
    return x


def frozen_after(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.left = net.left - 0.001
    return x if net.left > 0 else x.detach() * 0


MATTERS: dict[str, tuple[Any, Any, str]] = {
    "a count": (zero, counting(lambda calls, x: x * (1 - 0.5 * min(calls / 10, 1))), "calls"),
    "a count from 1000 on": (zero, counting(lambda n, x: x / 2 if n > 1000 else x), "calls"),
    "a place in a list": (zero, counting(lambda calls, x: x * [1, 0.5][calls // 9]), "calls"),
    "a float from below zero on": (lambda net: setattr(net, "left", 1.0), frozen_after, "left"),
    "a tensor": (lambda net: setattr(net, "mean", torch.zeros(3)), centre, "mean"),
    "a list": (lambda net: setattr(net, "seen", []), list_of_calls, "seen"),
    "an object": (
        lambda net: setattr(net, "schedule", Schedule()),
        lambda net, x: x * net.schedule.step(),
        "schedule",
    ),
    "a generator": (
        lambda net: setattr(net, "rng", torch.Generator().manual_seed(0)),
        own_generator,
        "rng",
    ),
    "a first batch": (lambda net: setattr(net, "is_ready", False), first_batch, "is_ready"),
    "a random constant": (
        lambda net: setattr(net, "share", np.random.rand(1)),
        lambda net, x: x * float(net.share[0]),
        "share",
    ),
}


@pytest.mark.parametrize("case", MATTERS)
def test_state_of_python_that_logits_depend_on_is_named(case: str) -> None:
    start, use, name = MATTERS[case]
    assert outside(start, use) == Outside([], [f"network.{name}"])


def test_state_that_no_module_has_is_told() -> None:
    """A variable of the user's file, which copies share."""
    calls = [0]

    def use(net: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += net.training
        return x / (1 + calls[0])

    found = outside(no_state, use)
    assert found == Outside([], ["something that is no attribute of its modules"])


# what does not matter


def keep_features(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.features, net.largest = x, float(x.detach().max())
    return x


def cached(net: Any, x: torch.Tensor) -> torch.Tensor:
    if "table" not in net._buffers:
        net.register_buffer("table", torch.arange(3.0), persistent=False)
    return x + net.table


def kept_for_a_shape(net: Any, x: torch.Tensor) -> torch.Tensor:
    if net.mean.shape != x.shape:
        net.register_buffer("mean", torch.ones_like(x).cumsum(0).detach(), persistent=False)
    return x + net.mean


def drawing(net: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(1) + random.random() + np.random.rand()


DOES_NOT: dict[str, tuple[Any, Any]] = {
    "nothing": (no_state, lambda net, x: x),
    "dropout": (lambda net: setattr(net, "drop", nn.Dropout(0.5)), lambda net, x: net.drop(x)),
    "draws in eval mode": (no_state, drawing),
    "a count that nobody asks": (zero, counting(lambda calls, x: x)),
    "features of the last call": (no_state, keep_features),
    "a table of the first call": (no_state, cached),
    "a table that grows": (buffer, kept_for_a_shape),
    "a constant": (buffer, lambda net, x: x + net.mean),
    "a buffer for train mode, which checkpoints keep": (buffer, centre_in_train_mode),
    "a hook": (
        lambda net: net.norm.register_forward_hook(lambda *_: None),
        lambda net, x: x,
    ),
    "a persistent buffer": (
        lambda net: net.register_buffer("mean", torch.zeros(3)),
        centre,
    ),
}


@pytest.mark.parametrize("case", DOES_NOT)
def test_what_does_not_change_the_logits_is_passed_over(case: str) -> None:
    assert outside(*DOES_NOT[case]) == NONE


@pytest.mark.parametrize(
    ("start", "use"),
    [(buffer, centre), (lambda net: buffer(net, random.random()), lambda net, x: x * net.mean)],
)
def test_buffers_without_which_a_record_is_another_network_are_named(start: Any, use: Any) -> None:
    """A buffer that training changes, and one of which each network has another value."""
    assert outside(start, use) == Outside(["network.mean"], [])


def test_generators_are_left_as_they_were() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    first, second = (Classifier(nn.Sequential(nn.Flatten()), (0.0,), (1.0,)) for _ in range(2))
    state_outside(first, second, 4)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[2])


NAMES = (
    *CONSTRUCTORS,
    *("alexnet", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v3_small"),
    *("regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_16"),
)


@pytest.mark.parametrize(
    "name", [n if n in CONSTRUCTORS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_networks_of_ours_and_of_torchvision_have_none(name: str) -> None:
    size = 8 if name in CONSTRUCTORS else 64
    first, second = (build_model(name, 4, image_size=size) for _ in range(2))
    assert state_outside(first, second, size) == NONE


# buffers_outside, put_buffers


def test_buffers_outside_are_those_that_no_state_dict_has() -> None:
    model = Classifier(Net(buffer, centre), (0.0,) * 3, (1.0,) * 3)
    model.network.register_buffer("later", None, persistent=False)
    assert [*buffers_outside(model)] == [*NORMALIZATION, "network.mean"]
    assert not buffers_outside(model).keys() & model.state_dict().keys()


def test_buffers_are_put_in_place_or_made() -> None:
    """In place where they fit; in another shape, or where there is none yet, they are copies."""
    net = Net(lambda net: (buffer(net), buffer(net.norm)), centre)
    mean, wide = net.mean, torch.ones(5)
    put_buffers(net, {"mean": torch.ones(3), "norm.mean": wide, "linear.table": torch.ones(2)})
    assert net.mean is mean
    assert mean.tolist() == [1] * 3
    assert torch.equal(net.norm.mean, wide)
    assert net.norm.mean is not wide
    assert [*buffers_outside(net)] == ["mean", "linear.table", "norm.mean"]


@pytest.mark.parametrize("name", ["other.mean", "norm.running_mean", "linear.weight", "forward"])
def test_buffers_replace_nothing_else(name: str) -> None:
    with pytest.raises((AttributeError, KeyError)):
        put_buffers(Net(buffer, centre), {name: torch.ones(3)})
