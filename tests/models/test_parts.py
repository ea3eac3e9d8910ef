"""Parts of networks by name: the bare network, its top-level parts, layers."""

import pytest
import torch
from torch import nn

from models.parts import bare, layer, top_level
from tests.networks import classifier, conv_net
from utils.errors import UserError

# the bare network


def test_the_bare_network_of_a_classifier_and_of_any_other_module() -> None:
    network = conv_net()
    assert bare(network) is network
    assert bare(classifier(network)) is network


# top_level


class Around(nn.Module):
    """A network inside another one, perhaps with a scale, or with a layer, of the outer one."""

    def __init__(self, scale: int = 0) -> None:
        super().__init__()
        self.mean, self.net = nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        if scale:
            self.scale = nn.Parameter(torch.ones((3,) * scale))


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), ["0", "1"]),
        (nn.Sequential(Around()), ["0.net.0", "0.net.1"]),
        (nn.DataParallel(Around()), ["module.net.0", "module.net.1"]),
        (Around(1), ["net.0", "net.1"]),
        (Around(2), ["mean", "net"]),
        (nn.Linear(3, 2), []),
    ],
)
def test_the_parts_of_a_network_inside_others_are_its_own(
    network: nn.Module, names: list[str]
) -> None:
    found = top_level(network)
    assert list(found) == names
    assert all(part is network.get_submodule(name) for name, part in found.items())


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
