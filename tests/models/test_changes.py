"""What a defense may add to a network, and how the same network is made again from plain data."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from models import changes
from models.changes import Polarizer, apply_changes, changes_of, insert, weights_without
from models.preactresnet import PreActResNet
from tests.networks import conv_net, copied, differing, problem
from utils.errors import UserError


def moved(part: nn.Module, seed: int = 0) -> None:
    """Weights and statistics as after training."""
    torch.manual_seed(seed)
    for value in part.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)


def test_a_polarizer_starts_as_the_identity() -> None:
    """In eval mode 1 becomes 1 / sqrt(1 + 1e-5) = 0.999995 and 0 stays 0."""
    part = Polarizer(5).eval()
    assert torch.equal(part[0].weight.flatten(1), torch.eye(5))
    assert part[0].bias is None
    with torch.no_grad():
        assert torch.allclose(
            part(torch.ones(2, 5, 3, 4)), torch.full((2, 5, 3, 4), 0.999995), rtol=0, atol=1e-7
        )
        features = torch.randn(2, 5, 3, 4)
        assert torch.allclose(part(features), features / math.sqrt(1 + 1e-5))
    norm = part[1]
    assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-5, 0.1, 1, 1)
    assert norm.weight.tolist() == [1.0] * 5
    assert norm.bias.tolist() == [0.0] * 5


def test_insert_puts_a_part_before_a_layer_in_place() -> None:
    """Between relu and conv2; at its start the features are only divided by sqrt(1 + 1e-5)."""
    network = conv_net()
    images, _ = problem()
    old, kept = network.conv2, copied(network.state_dict())
    part = insert(network, "polarizer", "conv2", 6)
    assert isinstance(part, Polarizer)
    assert network.conv2.polarizer is part
    assert network.conv2.part is part
    assert network.conv2.layer is old
    assert part[0].weight.dtype == torch.float64
    with torch.no_grad():
        features = network.bn1(network.conv1(images)).relu() / math.sqrt(1 + 1e-5)
        features = network.bn2(old(features)).relu()
        expected = network.linear(features.mean(dim=(2, 3)))
        assert torch.allclose(network.eval()(images), expected, rtol=1e-12)
    names = [f"conv2.polarizer.{name}" for name in part.state_dict()]
    others = {name.replace("conv2.", "conv2.layer."): value for name, value in kept.items()}
    state = network.state_dict()
    assert sorted(state) == sorted([*names, *others])
    assert differing({name: state[name] for name in others}, others) == []


@pytest.mark.parametrize("is_training", [False, True])
def test_what_insert_puts_in_has_the_mode_of_the_layer(is_training: bool) -> None:
    network = conv_net().train(is_training)
    insert(network, "polarizer", "conv2", 6)
    modes = {name: module.training for name, module in network.named_modules()}
    assert modes == dict.fromkeys(modes, is_training)


def test_insert_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    network = conv_net()
    before = torch.get_rng_state()
    insert(network, "polarizer", "conv2", 6)
    assert torch.equal(before, torch.get_rng_state())


def usual_network() -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet((2, 2, 2, 2), 4, widths=(4, 5, 6, 7)).eval()


# A part may stand inside a layer that has one itself, and two may stand before one layer.
def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


PLACES: list[list[tuple[str, int]]] = [
    [],
    [("layer4.1.conv1", 7)],
    [("conv1", 3)],
    [("layer2.0.conv1", 4), ("layer4", 6)],
    [("layer4", 6), ("layer4.layer.1.conv1", 7)],
    [("layer4.1.conv1", 7), ("layer4", 6)],
    [("layer3", 5), ("layer3", 5)],
]


@pytest.mark.parametrize("layers", PLACES)
def test_the_same_network_is_made_again(layers: list[tuple[str, int]]) -> None:
    """Its changes pass through JSON; then its weights fit and its logits are the same bits."""
    changed = usual_network()
    for name, channels in layers:
        insert(changed, "polarizer", name, channels)
    moved(changed.eval())
    changes = json.loads(json.dumps(changes_of(changed)))
    assert len(changes) == len(layers)
    fresh = usual_network()
    before = copied(fresh.state_dict())
    again = apply_changes(fresh, changes)
    again.load_state_dict(changed.state_dict())
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), changed(images))
    assert changes_of(again) == changes
    assert changes_of(fresh) == []  # a copy was changed
    assert differing(fresh.state_dict(), before) == []


@pytest.mark.parametrize("layers", PLACES)
def test_without_its_changes_a_network_has_the_names_and_shapes_of_before(
    layers: list[tuple[str, int]],
) -> None:
    network = usual_network()
    before = shapes(network.state_dict())
    for name, channels in layers:
        insert(network, "polarizer", name, channels)
    assert shapes(weights_without(network, network.state_dict())) == before


def test_changes_are_plain_data_in_the_order_of_the_layers() -> None:
    changed = usual_network()
    insert(changed, "polarizer", "layer4.1.conv1", 7)
    insert(changed, "polarizer", "conv1", 3)
    assert changes_of(changed) == [
        {"kind": "polarizer", "layer": "conv1", "channels": 3},
        {"kind": "polarizer", "layer": "layer4.1.conv1", "channels": 7},
    ]


def test_a_changed_network_can_be_copied() -> None:
    changed = usual_network()
    insert(changed, "polarizer", "layer4.1.conv1", 7)
    assert changes_of(copy.deepcopy(changed)) == changes_of(changed)


GOOD = {"kind": "polarizer", "layer": "conv2", "channels": 6}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "batchnorm"},
        {"kind": None},
        {"layer": "conv3"},
        {"layer": "conv2.weight"},
        {"layer": ""},  # the whole network is no layer of itself
        {"layer": None},
        {"channels": 0},
        {"channels": -1},
        {"channels": True},
        {"channels": "6"},
        {"channels": 6.0},
        {"channels": None},
    ],
)
def test_a_bad_change_is_refused_in_a_line(change: dict[str, object]) -> None:
    assert changes_of(apply_changes(conv_net(), [GOOD])) == [GOOD]
    with pytest.raises(UserError, match=r"^the change [^\n]* of a network is not known here$"):
        apply_changes(conv_net(), [{**GOOD, **change}])


@pytest.mark.parametrize("name", ["kind", "layer", "channels"])
def test_a_change_that_lacks_a_value_is_refused(name: str) -> None:
    lacking = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(UserError, match="is not known here"):
        apply_changes(conv_net(), [lacking])


@pytest.mark.parametrize("channels", [1, 1 << 16])
def test_a_part_has_up_to_65536_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused before it takes the memory of this machine."""
    asked: list[object] = []
    monkeypatch.setattr(changes, "insert", lambda network, *given: asked.append(given))
    apply_changes(conv_net(), [{**GOOD, "channels": channels}])
    assert asked == [("polarizer", "conv2", channels)]
    with pytest.raises(UserError, match="is not known here"):
        apply_changes(conv_net(), [{**GOOD, "channels": (1 << 16) + 1}])


def test_a_part_is_where_the_network_is() -> None:
    part = insert(conv_net().to("meta"), "polarizer", "conv2", 6)
    assert all(value.is_meta for value in part.state_dict().values())


def test_a_layer_under_two_names_is_changed_under_both() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    network.add_module("again", network[1])
    before = shapes(network.state_dict())
    assert "again.weight" in before
    insert(network, "polarizer", "1", 4)
    assert shapes(weights_without(network, network.state_dict())) == before
