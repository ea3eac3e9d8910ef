"""Channels of BatchNorm layers and of convolutions."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from models import Classifier, build_model
from models.channels import (
    Pairs,
    convolutions,
    convolutions_before,
    named_channels,
    norms,
    running_norms,
    scalable,
    scaled,
    scaled_convolutions,
    silenced,
)
from models.outputs import recording, weighted
from models.preactresnet import PreActResNet
from tests.networks import ConvNet, Norms, classifier, conv_net, copied, differing, hooks, problem
from utils.errors import UserError


def without_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)).double()


# norms


def test_norms_are_batchnorm_of_maps_with_weights_in_the_order_of_registration() -> None:
    network = Norms()
    assert list(norms(network)) == ["z.0", "a"]  # a subclass counts, too
    assert norms(network)["z.0"] is network.z[0]
    assert list(norms(Classifier(network, (0.5,), (0.5,)))) == ["z.0", "a"]


def test_running_norms_keep_statistics() -> None:
    network = Norms()
    assert running_norms(network) == {"z.0": network.z[0]}


def test_a_network_without_batchnorm_is_refused_in_a_line() -> None:
    for ask in (norms, running_norms):
        with pytest.raises(UserError, match=r"^[^\n]*BatchNorm2d[^\n]*has none[^\n]*$"):
            ask(without_norms())
    lone = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(UserError, match=r"^[^\n]*running statistics of BatchNorm[^\n]*$"):
        running_norms(lone)


# convolutions_before


class Odd(nn.Module):
    """A BatchNorm before any convolution, one behind a sum, one of another width, one direct."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.summed = nn.BatchNorm2d(4)
        self.wide = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 5, 1)
        self.direct = nn.BatchNorm2d(5)
        self.forgetful = nn.BatchNorm2d(5, track_running_stats=False)
        self.linear = nn.Linear(5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv1(self.first(images))
        features = self.summed(features + 1)
        features = self.direct(self.conv2(self.wide(torch.cat([features, features], 1))))
        return self.linear(self.forgetful(features).mean(dim=(2, 3)))


def test_the_convolution_before_by_order() -> None:
    """`first` comes before any, `wide` has 8 channels where the last convolution gives 4."""
    network = Odd()
    pairs = convolutions_before(network, "order", (3, 8, 8))
    assert pairs == {"summed": network.conv1, "direct": network.conv2}


def test_a_convolution_of_another_kind_is_before_as_well() -> None:
    """Its layer would else be taken for one behind the convolution before it."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1)),
        *(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    )
    for pairs in ("order", "direct"):
        before = convolutions_before(network, pairs, (3, 8, 8))
        assert before == {"1": network[0], "5": network[4]}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("pairs", ["order", "direct"])
def test_a_weight_that_is_computed_is_that_of_the_state_dict(pairs: Pairs) -> None:
    """Loading a state dict does not compute it anew; a pass does."""
    trained, loaded = (
        nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)) for _ in range(2)
    )
    loaded.load_state_dict(trained.state_dict())
    (convolution,) = convolutions_before(loaded, pairs, (3, 8, 8)).values()
    assert torch.equal(convolution.weight, trained[0].weight)


def test_the_convolution_before_directly() -> None:
    """Only `direct` takes the very output of a convolution."""
    network = Odd().train()
    network.summed.eval()
    pairs = convolutions_before(network, "direct", (3, 8, 8))
    assert pairs == {"direct": network.conv2}
    assert network.direct.training
    assert not network.summed.training
    assert hooks(network) == 0
    assert float(network.direct.num_batches_tracked) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_convolution_with_a_layer_between_is_not_directly_before(inplace: bool) -> None:
    """One that works in place gives the very tensor of the convolution, with other values."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(inplace)),
    )
    assert convolutions_before(network, "direct", (3, 8, 8)) == {"4": network[3]}


def test_a_network_without_a_pair_is_refused_in_a_line() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    for pairs in ("order", "direct"):
        with pytest.raises(UserError, match=r"^[^\n]*no such pair[^\n]*$"):
            convolutions_before(network, pairs, (3, 8, 8))
        with pytest.raises(UserError, match="BatchNorm2d"):
            convolutions_before(without_norms(), pairs, (3, 8, 8))


# scaled


def factors(network: ConvNet, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.rand_like(norm.weight) for name, norm in norms(network).items()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("has_shifts", [False, True])
def test_scaled_weights_make_the_network_with_changed_weights(
    wrapped: bool, is_training: bool, has_shifts: bool
) -> None:
    network = conv_net()
    model = classifier(network) if wrapped else network
    scales, shifts = factors(network, 0), factors(network, 1)
    changed = copy.deepcopy(model).train(is_training)
    for name, norm in norms(changed).items():
        norm.weight.data *= scales[name]
        if has_shifts:
            norm.bias.data *= shifts[name]
    before = copied(model.state_dict())
    model.train(is_training)
    images, _ = problem()
    parameters = scaled(model, scales, shifts if has_shifts else None)
    with torch.no_grad():
        assert torch.equal(functional_call(model, parameters, (images,)), changed(images))
    kept = {name: value for name, value in model.state_dict().items() if "running" not in name}
    assert [n for n, v in kept.items() if not torch.equal(v, before[n]) and "num" not in n] == []


def test_scaled_takes_some_of_the_layers() -> None:
    """One factor of 0 on a layer's only used channel changes that layer alone."""
    network = conv_net()
    parameters = scaled(network, {"bn2": torch.zeros(8, dtype=torch.float64)})
    assert list(parameters) == ["bn2.weight"]
    assert parameters["bn2.weight"].tolist() == [0.0] * 8


def test_the_gradient_of_a_scale_is_gamma_times_that_of_the_weight() -> None:
    """The layer sees gamma m, so dL/dm = gamma dL/d(gamma m)."""
    network = conv_net()
    images, labels = problem()
    scales = {name: value.requires_grad_() for name, value in factors(network, 0).items()}
    logits = functional_call(network, scaled(network, scales), (images,))
    nn.functional.cross_entropy(logits, labels).backward()
    changed = copy.deepcopy(network)
    for name, norm in norms(changed).items():
        norm.weight.data *= scales[name].detach()
    changed.zero_grad()
    nn.functional.cross_entropy(changed(images), labels).backward()
    for name, norm in norms(network).items():
        expected = norm.weight * norms(changed)[name].weight.grad
        assert torch.allclose(scales[name].grad, expected, rtol=1e-12, atol=0)
        assert bool(expected.abs().max() > 0)


# silenced


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_silenced_channel_gives_a_constant(with_bias: bool) -> None:
    """Its scale is 0, so it gives its shift, or 0 with the bias, for each image and pixel."""
    network = conv_net()
    network.bn1.bias.data[2] = 0.5
    chosen = torch.zeros(6, dtype=torch.bool)
    chosen[2] = True
    quiet = silenced(network, {"bn1": chosen}, with_bias)
    with torch.no_grad(), recording(quiet, ["bn1"]) as features:
        quiet(problem()[0])
    assert features["bn1"][:, 2].unique().tolist() == [0.0 if with_bias else 0.5]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_silenced_leaves_all_else_bit_for_bit(with_bias: bool, wrapped: bool) -> None:
    network = conv_net()
    model = (classifier(network) if wrapped else network).train()
    before = copied(model.state_dict())
    chosen = torch.tensor([True, False] * 4)
    quiet = silenced(model, {"bn2": chosen}, with_bias)
    assert not any(module.training for module in quiet.modules())
    assert all(module.training for module in model.modules())
    assert differing(model.state_dict(), before) == []
    prefix = "network." if wrapped else ""
    moved = ["bn2.weight", "bn2.bias"] if with_bias else ["bn2.weight"]
    assert differing(quiet.state_dict(), before) == [f"{prefix}{name}" for name in moved]
    for name in moved:
        value = before[prefix + name].clone()
        value[chosen] = 0
        assert torch.equal(quiet.state_dict()[prefix + name], value)
    assert [w.requires_grad for w in quiet.parameters()] == [True] * len(list(model.parameters()))


def test_silencing_nothing_is_a_copy() -> None:
    network = conv_net()
    for channels in ({}, {"bn1": torch.zeros(6, dtype=torch.bool)}):
        quiet = silenced(network, channels, with_bias=True)
        assert differing(quiet.state_dict(), network.state_dict()) == []
        assert quiet.bn1.weight.data_ptr() != network.bn1.weight.data_ptr()


# named_channels


def test_the_chosen_channels_as_rows_of_a_table() -> None:
    chosen = {"a.bn": torch.tensor([False, True, True]), "b": torch.tensor([False])}
    assert named_channels({**chosen, "c": torch.tensor([True])}) == [
        {"layer": "a.bn", "channel": 1},
        {"layer": "a.bn", "channel": 2},
        {"layer": "c", "channel": 0},
    ]


# several of them on the usual network


def test_the_usual_network_has_sixteen_batchnorm_layers_of_3392_channels() -> None:
    """Two for each of eight blocks; the first of a stage has the channels of the stage before.

    First ones: 64 + 64 + 64 + 128 + 128 + 256 + 256 + 512 = 1472; second ones:
    2 (64 + 128 + 256 + 512) = 1920.
    """
    with torch.device("meta"):
        network = PreActResNet((2, 2, 2, 2), 10)
    found = norms(network)
    assert len(found) == 16
    assert sum(norm.num_features for norm in found.values()) == 3392
    assert list(found)[:2] == ["layer1.0.bn1", "layer1.0.bn2"]
    assert list(found)[-1] == "layer4.1.bn2"


def test_vgg19_has_sixteen_batchnorm_layers_of_5504_channels() -> None:
    """Two of 64, two of 128, four of 256, eight of 512: 128 + 256 + 1024 + 4096."""
    with torch.device("meta"):
        network = build_model("vgg19_bn", 10)
    assert [norm.num_features for norm in norms(network).values()] == [
        *[64] * 2,
        *[128] * 2,
        *[256] * 4,
        *[512] * 8,
    ]
    assert sum(norm.num_features for norm in norms(network).values()) == 5504


def test_convolutions_are_found_where_the_network_is() -> None:
    """On the device `meta` there are shapes alone, and another one's image would be refused."""
    network = conv_net().to("meta")
    found = convolutions_before(network, "direct", (3, 8, 8))
    assert found == {"bn1": network.conv1, "bn2": network.conv2}


# convolutions


@pytest.mark.parametrize("wrapped", [False, True])
def test_convolutions_are_scaled_by_output_channel(wrapped: bool) -> None:
    """Weights and the bias, for a functional call; the model's own stay, factors get gradients."""
    network = conv_net()
    network.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 6).double())
    model = classifier(network) if wrapped else network
    assert list(convolutions(model)) == ["conv1", "conv2"]
    images, _ = problem()
    factor = torch.linspace(0, 2, 6).double().requires_grad_()
    before = copied(network.state_dict())
    changed = scaled_convolutions(model, {"conv1": factor})
    prefix = "network." if wrapped else ""
    assert list(changed) == [f"{prefix}conv1.weight", f"{prefix}conv1.bias"]
    found = functional_call(model, changed, (images,))
    with weighted(model, "conv1", factor.view(-1, 1, 1)):
        expected = model(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert differing(network.state_dict(), before) == []
    found.sum().backward()
    assert factor.grad is not None


def test_a_network_without_a_convolution_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"^[^\n]*Conv2d[^\n]*has none[^\n]*$"):
        convolutions(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))


class Standardized(nn.Conv2d):
    """Its weight has mean 0 and deviation 1 for each channel, whatever factor is on it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(nn.functional.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


@pytest.mark.parametrize("flags", [{}, {"bias": False}, {"groups": 3, "dilation": 4, "stride": 2}])
def test_a_convolution_whose_factor_is_none_is_refused(flags: dict[str, Any]) -> None:
    for kind in (nn.Conv2d, Padded):
        network = nn.Sequential(kind(3, 6, 3, **flags), nn.Flatten())
        scalable(convolutions(network), network)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Standardized(3, 6, 3, **flags), nn.Flatten())
    with pytest.raises(UserError, match=r"^the layer 1 computes its weight from another one"):
        scalable(convolutions(network), network)
