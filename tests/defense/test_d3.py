"""D3: the loss and the starts by hand, and its steps against a literal transcription."""

import copy
import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.d3 import Config, Start, distance_loss, purify, pushed_weights, start_of
from models import Classifier
from tests.networks import TUNING, ConvNet, conv_net, differing, problem
from tests.tuning import tune_on_sphere
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.sgd import rescale


def config(**changes: Any) -> Config:
    """Three rounds of three batches (5, 5 and 2 images), momentum and decay."""
    return Config.load(**{**TUNING, "random_seed": 3, **changes})


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# the loss


def test_the_loss_by_hand() -> None:
    """W0 (3, 4), W (0, 5): distance sqrt(10). CE 0.05, 0.30 over 0.1: (0 + 0.2) / 2 = 0.1.

    0.5 * 0.1 - 3.162278 = -3.112278; (10 * 0.1 - 3.162278) / 11 = -0.196571; 0.1 - 3.162278 for 1.
    """
    losses, weight, initial = double(0.05, 0.30), double(0, 5), double(3, 4)
    for lmd, expected in ((0.5, -3.112278), (10, -0.196571), (1, -3.062278), (0, -3.162278)):
        found = distance_loss(losses, [weight], [initial], lmd, 0.1)
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_distances_of_several_weights_add_up() -> None:
    """Of two weights sqrt(10) and 1, each by itself: together they would be sqrt(11)."""
    weights, initial = [double(0, 5), double(2)], [double(3, 4), double(1)]
    found = distance_loss(double(0.0), weights, initial, 0.5, 0.1)
    assert float(found) == pytest.approx(-math.sqrt(10) - 1, rel=1e-12)
    with pytest.raises(ValueError, match="zip"):
        distance_loss(double(0.0), weights, initial[:1], 0.5, 0.1)


def test_the_gradients_by_hand() -> None:
    """Of an image over the bound lmd / N, of one under it 0; of W away from W0, and 0 at W0."""
    losses = double(0.05, 0.30).requires_grad_()
    weight, still = double(0, 5).requires_grad_(), double(1, 2).requires_grad_()
    distance_loss(losses, [weight, still], [double(3, 4), double(1, 2)], 0.5, 0.1).backward()
    assert losses.grad.tolist() == [0, 0.25]
    assert weight.grad.tolist() == pytest.approx([3 / math.sqrt(10), -1 / math.sqrt(10)])
    assert still.grad.tolist() == [0, 0]


# the start


def test_the_starts_by_hand() -> None:
    """W0 of 1,000 values, norm n: U(-0.5, 0.5) has the largest value sqrt(12 / 1000) / 2 n."""
    torch.manual_seed(1)
    initial = torch.randn(10, 100, dtype=torch.float64) * 3 + 1
    starts = {
        method: start_of(initial, method, generator(0, "start")) for method in get_args(Start)
    }
    assert torch.equal(starts["far"], -initial)
    assert torch.equal(starts["near"], initial)
    assert starts["middle"].abs().max() == 0
    drawn = starts["random"]
    assert float(drawn.norm()) == pytest.approx(float(initial.norm()), rel=1e-12)
    largest = math.sqrt(12 / 1000) / 2 * float(initial.norm())
    assert float(drawn.max()) == pytest.approx(largest, rel=0.05)
    assert float(drawn.min()) == pytest.approx(-largest, rel=0.05)
    noise = starts["noise"] - initial
    assert float(noise.std()) == pytest.approx(float(initial.std()), rel=0.1)
    assert abs(float(noise.mean())) < 0.3
    assert noise.unique().numel() == 1000


def test_rescaling_by_hand() -> None:
    """(3, 4) of norm 5 becomes (6, 8) of norm 10; zeros stay, whatever the norm."""
    weight = double(3, 4)
    rescale(weight, torch.tensor(10.0).double())
    assert weight.tolist() == [6, 8]
    for kind in (torch.float16, torch.float32):
        zeros = torch.zeros(2, dtype=kind)
        rescale(zeros, torch.tensor(10.0, dtype=kind))
        assert zeros.tolist() == [0, 0]


# the whole defense


def literal_tuning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """Start and loss written out for the head; then tuning on the sphere."""
    model = copy.deepcopy(model)
    old = model.linear.weight.data.clone()
    uniform = torch.rand(old.shape, generator=generator(3, "start of the weights")).double() - 0.5
    model.linear.weight.data = uniform / uniform.norm() * old.norm()
    crops = generator(config.random_seed, "augmentation")

    def gradients(index: torch.Tensor) -> Sequence[torch.Tensor]:
        logits = model(augment(images[index], config.crop_padding, config.flip, crops))
        each = F.cross_entropy(logits, labels[index], reduction="none")
        clean = sum((value - config.eps).relu() for value in each) / len(each)
        loss = config.lmd * clean - (model.linear.weight - old).square().sum().sqrt()
        loss = loss / (config.lmd + 1) if config.lmd > 1 else loss
        return torch.autograd.grad(loss, list(model.parameters()))

    norm, order = old.square().sum().sqrt(), generator(config.random_seed, "batches")
    return tune_on_sphere(model, len(images), norm, order, config, gradients)


@pytest.mark.parametrize("lmd", [0.5, 10.0])
def test_tuning_follows_the_literal_procedure(lmd: float) -> None:
    """Nine steps with momentum, decay and augmentation; statistics, too."""
    network = conv_net()
    found = purify(network, *problem(), config(lmd=lmd)).state_dict()
    expected = literal_tuning(network, *problem(), config(lmd=lmd)).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-10), name


STARTS = [{"warm_up_method": method} for method in get_args(Start) if method != "random"]


@pytest.mark.parametrize("change", [{"lmd": 10.0}, {"eps": 0.5}, {"random_seed": 1}, *STARTS])
def test_each_flag_of_its_own_moves_all_weights(change: dict[str, Any]) -> None:
    network = conv_net()
    usual = purify(network, *problem(), config())
    other = purify(network, *problem(), config(**change))
    names = {name for name, _ in network.named_parameters()}
    assert names <= set(differing(usual.state_dict(), other.state_dict()))


@pytest.mark.parametrize("start", get_args(Start))
def test_the_norm_is_kept_and_the_distance_is_at_most_twice_it(start: str) -> None:
    """Also from 0, where the first step alone gives a direction; from -W0 it is the largest."""
    network = conv_net()
    found = purify(network, *problem(), config(warm_up_method=start))
    old, new = network.linear.weight.detach(), found.linear.weight.detach()
    assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-12)
    assert 0 < float((new - old).norm()) <= 2 * float(old.norm()) * (1 + 1e-12)
    still = {"n_rounds": 1, "lr": 1e-30, "batch_size": 12}
    found = purify(network, *problem(), config(warm_up_method=start, **still))
    distance = float((found.linear.weight.detach() - old).norm())
    assert (start == "far") == (distance == pytest.approx(2 * float(old.norm()), rel=1e-9))


# the layers


def test_noise_of_a_weight_with_one_value_is_none() -> None:
    """A single value has no standard deviation."""
    weight = torch.full((1, 1, 1, 1), 3.0)
    assert torch.equal(start_of(weight, "noise", torch.Generator()), weight)


def test_the_weights_of_all_layers_inside_are_pushed() -> None:
    """By name; without one those of the last linear layer. Norms' and biases are not among them."""
    network = ConvNet(4, (6, 8))
    network.conv1 = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(8, 8))
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3)

    def names(name: str | None) -> list[str]:
        pushed = [id(weight) for weight in pushed_weights(model, name, (3, 8, 8))]
        return [key for key, weight in network.named_parameters() if id(weight) in pushed]

    assert names("conv1") == ["conv1.0.weight", "conv1.2.weight"]
    assert names("conv2") == ["conv2.weight"]
    assert names("linear") == ["linear.weight"]
    assert names(None) == ["linear.weight"]


def test_each_weight_keeps_its_own_norm() -> None:
    network = nn.Sequential(conv_net(), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))).double()
    found = purify(network, *problem(), config(select_layer_name="1"))
    for old, new in zip(network[1], found[1], strict=True):
        assert float(new.weight.norm()) == pytest.approx(float(old.weight.norm()), rel=1e-12)
        assert not torch.allclose(new.weight, old.weight, atol=0.01)
        assert float(new.bias.norm()) != pytest.approx(float(old.bias.norm()), rel=1e-6)


def test_what_has_no_weight_to_push_is_told() -> None:
    network = conv_net()
    for name, said in (
        ("bn1", "bn1 has no linear"),
        ("linaer", "linear"),
        ("x", "no layer"),
        ("", "not blank"),
    ):
        with pytest.raises(UserError, match=f"select_layer_name: .*{said}"):
            purify(network, *problem(), config(select_layer_name=name))
    network.linear.weight.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        purify(network, *problem(), config())


@pytest.mark.parametrize("method", ["random", "noise"])
def test_a_start_does_not_depend_on_the_default_type(method: Start) -> None:
    initial = torch.rand(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    expected = start_of(initial, method, torch.Generator().manual_seed(0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = start_of(initial, method, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_a_layer_that_the_network_does_not_use_is_refused_in_a_line() -> None:
    """Nothing would be learned in it, without a word."""
    network = conv_net()
    network.idle = nn.Linear(2, 2).double()
    with pytest.raises(UserError, match=r"^--select_layer_name: [^\n]*depend on idle[^\n]*$"):
        purify(network, *problem(), config(select_layer_name="idle"))
