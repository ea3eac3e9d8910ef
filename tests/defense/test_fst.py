"""FST: the loss and the new head by hand, and its steps against a literal transcription."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import ft
from defense.fst import Config, purify, shift_loss
from tests.networks import TUNING, ConvNet, conv_net, differing, problem
from tests.tuning import tune_on_sphere
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator


def config(**changes: Any) -> Config:
    """Three rounds of three batches (5, 5 and 2 images), momentum and decay."""
    return Config.load(**{**TUNING, "random_seed": 3, **changes})


# the loss


def test_the_penalty_by_hand() -> None:
    """W0 (3, 4), W (4, 3): 0.2 (12 + 12) = 4.8; equal logits of two classes cost ln 2 beside it."""
    weight, initial = torch.tensor([[4.0, 3.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    logits, labels = torch.zeros(3, 2).double(), torch.tensor([0, 1, 1])
    found = shift_loss(logits, labels, weight, initial, 0.2)
    assert float(found) == pytest.approx(math.log(2) + 4.8, rel=1e-12)
    assert float(shift_loss(logits, labels, weight, initial, 0.0)) == pytest.approx(math.log(2))


def test_the_gradient_of_the_penalty_is_alpha_times_the_old_head() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    initial = torch.randn(2, 3)
    shift_loss(torch.zeros(1, 2), torch.tensor([0]), weight, initial, 0.3).backward()
    assert torch.allclose(weight.grad, 0.3 * initial)


# the head


def first_step(**changes: Any) -> ConvNet:
    """The network of a step that is too small to change anything but the head's norm."""
    tiny = {"n_rounds": 1, "batch_size": 12, "lr": 1e-30}
    return purify(conv_net(), *problem(), config(**tiny, **changes))


def test_the_head_is_drawn_anew_and_gets_the_norm_of_the_old_one() -> None:
    """Eight inputs: the bias is U(-0.3536, 0.3536), the weight in the same ratio to its maximum.

    What is drawn depends on the seed, and has both signs; nothing else moves.
    """
    network, found = conv_net(), first_step()
    old, weight, bias = (
        value.detach() for value in (network.linear.weight, found.linear.weight, found.linear.bias)
    )
    assert float(weight.norm()) == pytest.approx(float(old.norm()), rel=1e-12)
    assert 0.1 < float(bias.abs().max()) < 8**-0.5
    assert float(weight.min()) < 0 < float(weight.max())
    assert not torch.allclose(weight, old, atol=0.1)
    assert not torch.equal(first_step(random_seed=4).linear.bias, bias)
    weights = dict(network.named_parameters())
    assert differing(dict(found.named_parameters()), weights) == ["linear.weight", "linear.bias"]


def test_the_head_covers_its_whole_range() -> None:
    """The bias of 4,000 outputs of a layer of 9 inputs: U(-1/3, 1/3), of deviation 1 / sqrt(27).

    Draws on both sides come near the end, and the mean is near 0.
    """
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(9, 4000)).double()
    found = purify(network, *problem(), config(n_rounds=1, lr=1e-30, batch_size=12))
    bias = found[2].bias.detach()
    assert float(bias.max()) == pytest.approx(1 / 3, abs=0.001)
    assert float(bias.min()) == pytest.approx(-1 / 3, abs=0.001)
    assert float(bias.std()) == pytest.approx(27**-0.5, rel=0.03)
    assert abs(float(bias.mean())) < 0.01


def test_without_a_reset_the_head_is_the_old_one() -> None:
    network, found = conv_net(), first_step(reset_head=False)
    for name, weight in network.named_parameters():
        assert torch.allclose(found.get_parameter(name), weight, rtol=1e-15, atol=0), name


# the whole defense


def literal_tuning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """Head and loss written out; then tuning on the sphere."""
    model = copy.deepcopy(model)
    old = model.linear.weight.data.clone()
    draws = generator(config.random_seed, "head")
    for parameter in (model.linear.weight, model.linear.bias):
        uniform = torch.rand(parameter.shape, generator=draws).double()
        parameter.data = (2 * uniform - 1) / math.sqrt(8)
    crops = generator(config.random_seed, "augmentation")

    def gradients(index: torch.Tensor) -> Sequence[torch.Tensor]:
        x = augment(images[index], config.crop_padding, config.flip, crops)
        names, weights = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(F.cross_entropy(model(x), labels[index]), weights)
        of_head = {"linear.weight": config.alpha * old}
        return [g + of_head.get(name, 0) for name, g in zip(names, found, strict=True)]

    norm, order = old.square().sum().sqrt(), generator(config.random_seed, "batches")
    return tune_on_sphere(model, len(images), norm, order, config, gradients)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_tuning_follows_the_literal_procedure(alpha: float) -> None:
    """Nine steps with momentum, decay and augmentation; statistics, too."""
    network = conv_net()
    found = purify(network, *problem(), config(alpha=alpha)).state_dict()
    expected = literal_tuning(network, *problem(), config(alpha=alpha)).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-10), name


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"reset_head": False}, {"random_seed": 1}])
def test_each_flag_of_its_own_moves_all_weights(change: dict[str, Any]) -> None:
    network = conv_net()
    usual = purify(network, *problem(), config())
    other = purify(network, *problem(), config(**change))
    names = {name for name, _ in network.named_parameters()}
    assert names <= set(differing(usual.state_dict(), other.state_dict()))


def test_a_head_is_chosen_by_name() -> None:
    """The named layer goes to its sphere; the last one, free of it, to another norm."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    found = purify(network, *problem(), config(select_layer_name="1"))
    norms = [
        float(layer.weight.detach().norm() / network[place].weight.detach().norm())
        for place, layer in ((1, found[1]), (3, found[3]))
    ]
    assert norms[0] == pytest.approx(1, rel=1e-12)
    assert norms[1] != pytest.approx(1, rel=1e-6)


def test_what_is_no_head_is_told() -> None:
    network = conv_net()
    for name, said in (
        ("conv1", "conv1 is a Conv2d"),
        ("linaer", "linear"),
        ("x", "no layer"),
        ("", "not blank"),
    ):
        with pytest.raises(UserError, match=f"select_layer_name: .*{said}"):
            purify(network, *problem(), config(select_layer_name=name))
    network.linear.weight.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        purify(network, *problem(), config())
    without = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).double()
    with pytest.raises(UserError, match="no linear layer"):
        purify(without, *problem(), config())


def test_the_rest_is_tuned_as_ft_does() -> None:
    """A frozen sphere: with alpha 0, the old head and one step, only the head's norm differs."""
    network = conv_net()
    flags = {"n_rounds": 1, "batch_size": 12}
    found = purify(network, *problem(), config(alpha=0.0, reset_head=False, **flags))
    expected = ft.purify(network, *problem(), ft.Config.load(**{**TUNING, **flags}, random_seed=3))
    assert differing(found.state_dict(), expected.state_dict()) == ["linear.weight"]
    expected.linear.weight.data *= network.linear.weight.norm() / expected.linear.weight.norm()
    assert torch.allclose(found.linear.weight, expected.linear.weight, rtol=1e-12)


def test_a_layer_that_the_network_does_not_use_is_refused_in_a_line() -> None:
    """Nothing would be learned in it, without a word."""
    network = conv_net()
    network.idle = nn.Linear(2, 2).double()
    with pytest.raises(UserError, match=r"^--select_layer_name: [^\n]*depend on idle[^\n]*$"):
        purify(network, *problem(), config(select_layer_name="idle"))
