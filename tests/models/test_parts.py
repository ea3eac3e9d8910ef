"""Parts of networks by name: the bare network, heads, layers."""

import pytest
import torch
from torch import nn

from models import build_model
from models.parts import bare, head, layer, top_level
from tests.networks import classifier, conv_net
from utils.errors import UserError

# the bare network


def test_the_bare_network_of_a_classifier_and_of_any_other_module() -> None:
    network = conv_net()
    assert bare(network) is network
    assert bare(classifier(network)) is network


# head


@pytest.mark.parametrize(
    ("model", "network_size", "name", "features"),
    [
        ("preactresnet18", None, "linear", 512),
        ("resnet18", None, "fc", 512),
        ("vgg19_bn", None, "classifier.0", 25_088),
        ("vit_b_16", None, "heads.head", 768),
        ("resnet18", 64, "1.fc", 512),
        ("vit_b_16", 224, "1.heads.head", 768),
    ],
)
def test_the_head_is_the_first_linear_layer_of_the_last_part(
    model: str, network_size: int | None, name: str, features: int
) -> None:
    """VGG's features are 512 x 7 x 7 = 25,088; its other two linear layers come later."""
    with torch.device("meta"):
        network = build_model(model, 10, network_size=network_size)
    found, module = head(network)
    assert found == name
    assert module is network.network.get_submodule(name)
    assert module.in_features == features


class TwoLinear(nn.Module):
    """Its features go through two linear layers, each a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2)


class Normalized(nn.Module):
    """Prepares images for a network inside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.mean, self.net = nn.Identity(), network
        self.mean.register_buffer("value", torch.zeros(3))


class Scaled(Normalized):
    """Has a weight of its own, so it does more than prepare images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.scale = nn.Parameter(torch.ones(3))


WRAPPED = {
    "fc2": TwoLinear,
    "1.fc2": lambda: nn.Sequential(nn.Identity(), TwoLinear()),
    "net.fc2": lambda: Normalized(TwoLinear()),
    "module.fc2": lambda: nn.DataParallel(TwoLinear()),
    "module.net.1.fc2": lambda: nn.DataParallel(
        Normalized(nn.Sequential(nn.Identity(), TwoLinear()))
    ),
    "1.2": lambda: nn.Sequential(  # the first network of many tutorials
        nn.Flatten(), nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
    ),
    # A part that is a layer, or one part that is everything, or not all, is as it stands.
    "net.fc1": lambda: Scaled(TwoLinear()),
    "1": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 2)),
    "0.0": lambda: nn.Sequential(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_head_of_a_network_inside_another_one_is_its_own(name: str) -> None:
    model = WRAPPED[name]()
    assert head(model)[0] == name
    assert head(model)[1] is model.get_submodule(name)
    assert name in top_level(model) or name in ("0.0", "net.fc1")


def test_the_head_of_a_plain_module() -> None:
    """A sequence of two whose first part is no Resize is not looked through."""
    network = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), nn.Linear(5, 3))
    assert head(network) == ("1", network[1])
    linear = nn.Linear(12, 3)
    assert head(linear) == ("", linear)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 1)),  # its linear layer is not in the last
        nn.Conv2d(3, 4, 1),
    ],
)
def test_a_network_without_a_head_is_refused_in_a_line(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*last part has no linear layer[^\n]*$"):
        head(network)


# layer


def test_a_layer_by_its_name_in_the_bare_network() -> None:
    network = conv_net()
    assert layer(network, "bn2", "--flag") is network.bn2
    assert layer(classifier(network), "bn2", "--flag") is network.bn2


def test_an_unknown_layer_names_its_flag_and_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"^--flag: bn3 is no layer[^\n]*did you mean bn\d[^\n]*$"):
        layer(conv_net(), "bn3", "--flag")


def test_an_unknown_layer_far_from_all_names_the_last_convolutions() -> None:
    with pytest.raises(UserError, match=r"^--flag: xyz is no layer[^\n]*conv1, conv2$"):
        layer(conv_net(), "xyz", "--flag")
    with pytest.raises(UserError, match=r"^--flag: xyz is no layer[^\n]*own$"):
        layer(nn.Sequential(nn.Linear(3, 3)), "xyz", "--flag")


def test_the_whole_network_is_no_layer() -> None:
    with pytest.raises(UserError, match="--flag: "):
        layer(conv_net(), "", "--flag")
