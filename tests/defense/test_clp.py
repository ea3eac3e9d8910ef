"""CLP: Lipschitz bounds by hand, which convolution belongs to a BatchNorm, and what is pruned."""

import logging
import math

import pytest
import torch
from torch import nn

from defense.clp import Config, channel_lipschitz, purify
from models import Classifier
from models.channels import convolutions_before
from models.outputs import recording
from models.preactresnet import PreActResNet
from tests.networks import ConvNet, conv_net, copied, differing, problem
from utils.errors import UserError
from utils.training.loop import Loop

NO_IMAGES = torch.zeros(0, 3, 8, 8, dtype=torch.float64)
NO_LABELS = torch.zeros(0, dtype=torch.int64)

# the bound of a channel


@pytest.mark.parametrize(
    ("gamma", "variance", "expected"), [(2.0, 4.0, 4.0), (-3.0, 0.25, 24.0), (0.0, 1.0, 0.0)]
)
def test_the_bound_by_hand(gamma: float, variance: float, expected: float) -> None:
    """W = diag(3, 4), of two input channels and two pixels, has the largest singular value 4.

    4 * 2 / sqrt(4) = 4; 4 * 3 / sqrt(0.25) = 24.
    """
    weight = torch.diag(torch.tensor([3.0, 4.0]))
    for shape in ((1, 2, 1, 2), (1, 2, 2, 1)):
        found = channel_lipschitz(
            weight.view(shape), torch.tensor([gamma]), torch.tensor([variance])
        )
        assert found.tolist() == pytest.approx([expected], rel=1e-6)


def test_a_channel_s_kernel_is_a_matrix_of_inputs_by_pixels() -> None:
    """Each has its own: [[1, 1], [1, 1]] 2, [[0, 5], [0, 0]] 5, and the identity 1.

    As one row the identity would have sqrt(2).
    """
    weight = torch.stack([torch.ones(2, 2), torch.eye(2), torch.tensor([[0.0, 5], [0, 0]])])
    found = channel_lipschitz(weight.view(3, 2, 1, 2), torch.ones(3), torch.ones(3))
    assert found.tolist() == pytest.approx([2, 1, 5], rel=1e-6)


def test_the_bounds_equal_the_singular_values_of_each_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, 3, 3)
    gamma, variance = torch.randn(7), torch.rand(7) + 0.1
    expected = [
        float(torch.linalg.svdvals(weight[k].reshape(5, 9).double())[0])
        * abs(float(gamma[k]))
        / math.sqrt(float(variance[k]))
        for k in range(7)
    ]
    found = channel_lipschitz(weight, gamma, variance)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_grouped_convolution_has_fewer_inputs() -> None:
    """Depthwise: one input, so the value is the length of the kernel: 5 of (3, 4)."""
    weight = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 1, 2, 2).repeat(6, 1, 1, 1)
    found = channel_lipschitz(weight, torch.ones(6), torch.ones(6))
    assert found.tolist() == pytest.approx([5.0] * 6, rel=1e-6)


def test_no_epsilon_stands_beside_the_variance() -> None:
    """1e-8 gives 1e4; 0 gives infinity, or with gamma 0 no number: neither is finite."""
    weight = torch.ones(3, 1, 1, 1)
    gamma, variance = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1e-8, 0.0, 0.0])
    found = channel_lipschitz(weight, gamma, variance)
    assert float(found[0]) == pytest.approx(1e4, rel=1e-5)
    assert math.isinf(found[1])
    assert math.isnan(found[2])


def test_bounds_are_float32_without_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(2, 3, 1, 1, dtype=torch.bfloat16))
    gamma = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = channel_lipschitz(weight, gamma, torch.ones(2, dtype=torch.float64))
    assert found.dtype == torch.float32
    assert not found.requires_grad


# pairs


def usual_network() -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet((2, 2, 2, 2), 4, widths=(4, 6, 8, 10)).eval()


def named(model: nn.Module, pairs: str) -> dict[str, str]:
    """BatchNorm -> convolution, both by name."""
    names = {module: name for name, module in model.named_modules()}
    found = convolutions_before(model, pairs, (3, 16, 16))
    return {name: names[convolution] for name, convolution in found.items()}


def test_the_pairs_of_the_usual_network_by_order() -> None:
    """bn1 of a block goes with what was registered last before it.

    That is the second convolution of the block before, or the projection there, which only the
    first blocks of the stages 2 to 4 have.
    """
    expected = {"layer1.0.bn1": "conv1"}
    for stage in (1, 2, 3, 4):
        before = f"layer{stage - 1}.1.conv2" if stage > 1 else "conv1"
        inside = f"layer{stage}.0.shortcut.0" if stage > 1 else "layer1.0.conv2"
        expected |= {
            f"layer{stage}.0.bn1": before,
            f"layer{stage}.0.bn2": f"layer{stage}.0.conv1",
            f"layer{stage}.1.bn1": inside,
            f"layer{stage}.1.bn2": f"layer{stage}.1.conv1",
        }
    assert len(expected) == 16
    assert named(usual_network(), "order") == expected


def test_the_direct_pairs_of_the_usual_network() -> None:
    """Each bn2, and the first bn1, behind the stem; all others normalize a sum."""
    expected = {"layer1.0.bn1": "conv1"} | {
        f"layer{stage}.{block}.bn2": f"layer{stage}.{block}.conv1"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
    }
    assert named(usual_network(), "direct") == expected


def test_both_kinds_of_pairs_are_the_same_in_a_plain_network() -> None:
    network = conv_net()
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3).double()
    for pairs in ("order", "direct"):
        assert named(network, pairs) == {"bn1": "conv1", "bn2": "conv2"}
        found = convolutions_before(model, pairs, (3, 8, 8))
        assert found == {"bn1": network.conv1, "bn2": network.conv2}


def test_a_batchnorm_before_any_convolution_is_left_out() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for pairs in ("order", "direct"):
        assert named(network, pairs) == {"2": "1"}


# the whole defense


def with_outlier(channels: int = 11, score: float = 20.0, bias: float = 0.5) -> ConvNet:
    """conv1, bn1 with bounds of 1 but that of channel 4; conv2, bn2 with equal bounds."""
    network = conv_net(widths=(channels, 12))
    for convolution, norm in ((network.conv1, network.bn1), (network.conv2, network.bn2)):
        nn.init.zeros_(convolution.weight)
        convolution.weight.data[:, 0, 1, 1] = 1
        nn.init.ones_(norm.weight)
        nn.init.ones_(norm.running_var)
        nn.init.constant_(norm.bias, bias)
    network.conv1.weight.data[4, 0, 1, 1] = score
    return network


def silent(network: nn.Module, name: str = "bn1") -> list[int]:
    norm = network.get_submodule(name)
    return torch.nonzero(norm.weight == 0).flatten().tolist()


@pytest.mark.parametrize(("channels", "expected"), [(10, []), (11, [4])])
@pytest.mark.parametrize("pairs", ["order", "direct"])
def test_the_outlying_channel_is_pruned(channels: int, expected: list[int], pairs: str) -> None:
    """2.846 deviations in a layer of ten, 3.015 in one of eleven; the equal layer keeps all."""
    loop = Loop()
    network = with_outlier(channels)
    pruned = purify(network, NO_IMAGES, NO_LABELS, Config.load(pairs=pairs), loop)
    assert silent(pruned) == expected
    assert silent(pruned, "bn2") == []
    rows = [{"layer": "bn1", "channel": channel} for channel in expected]
    assert loop.findings.tables["pruned"] == rows
    by_layer = {"bn1": expected} if expected else {}
    assert loop.findings.facts == {"pruned_channels": len(expected), "pruned": by_layer}


def test_grouped_convolutions_work_as_they_are() -> None:
    """Each of twelve channels sees one of three inputs; one kernel is twenty times as large."""
    convolution = nn.Conv2d(3, 12, 3, groups=3, bias=False)
    nn.init.ones_(convolution.weight)
    convolution.weight.data[7] = 20
    network = nn.Sequential(convolution, nn.BatchNorm2d(12))
    for pairs in ("order", "direct"):
        pruned = purify(network, NO_IMAGES.float(), NO_LABELS, Config.load(pairs=pairs))
        assert silent(pruned, "1") == [7]


def test_a_small_bound_is_no_outlier() -> None:
    assert silent(purify(with_outlier(12, 0.0), NO_IMAGES, NO_LABELS, Config.load())) == []


@pytest.mark.parametrize(
    ("where", "value"), [("weight", -20.0), ("running_var", 1 / 400), ("weight", 20.0)]
)
def test_scale_and_variance_make_an_outlier_too(where: str, value: float) -> None:
    """|gamma| 20, or a deviation of a twentieth."""
    network = with_outlier(12, 1.0)
    getattr(network.bn1, where).data[7] = value
    assert silent(purify(network, NO_IMAGES, NO_LABELS, Config.load())) == [7]


def test_a_channel_of_variance_zero_is_left_out() -> None:
    """Its bound is infinite; the outlier among the other eleven is found all the same."""
    network = with_outlier(12)
    network.bn1.running_var[0] = 0
    assert silent(purify(network, NO_IMAGES, NO_LABELS, Config.load())) == [4]


@pytest.mark.parametrize(("prune_bias", "shift"), [(True, 0.0), (False, 0.5)])
def test_a_pruned_channel_gives_nothing_or_its_shift(prune_bias: bool, shift: float) -> None:
    network = with_outlier()
    before = copied(network.state_dict())
    pruned = purify(network, NO_IMAGES, NO_LABELS, Config.load(prune_bias=prune_bias))
    with torch.no_grad(), recording(pruned, ["bn1"]) as features:
        pruned(problem()[0])
    assert features["bn1"][:, 4].unique().tolist() == [shift]
    changed = ["bn1.weight", "bn1.bias"] if prune_bias else ["bn1.weight"]
    assert differing(pruned.state_dict(), before) == changed
    assert differing(network.state_dict(), before) == []


def test_the_bias_is_pruned_unless_told_otherwise() -> None:
    assert Config.load().prune_bias
    assert Config.load().pairs == "order"
    assert Config.load().u == 3.0
    assert Config.load("tiny").u == 5.0


def test_the_defense_sees_nothing() -> None:
    """Neither images nor labels, and there are no flags for any; images give a shape alone."""
    config = Config.load()
    assert config.sees == "nothing"
    assert not hasattr(config, "ratio")
    assert not hasattr(config, "index")
    none = purify(with_outlier(), NO_IMAGES, NO_LABELS, config)
    some = purify(with_outlier(), torch.rand(2, 3, 8, 8).double(), torch.tensor([1, 0]), config)
    assert differing(none.state_dict(), some.state_dict()) == []


def test_the_pairs_decide_which_channels_are_pruned(caplog: pytest.LogCaptureFixture) -> None:
    """An outlier in layer2.1.bn1, behind a sum, is looked for by order alone.

    By order its bound is that of the projection; both of its factors are made equal but in one
    channel of twelve.
    """
    torch.manual_seed(0)
    caplog.set_level("INFO", "sau")
    network = PreActResNet((2, 2, 2, 2), 4, widths=(4, 12, 8, 10)).eval()
    projection = network.layer2[0].shortcut[0]
    nn.init.zeros_(projection.weight)
    projection.weight.data[:, 0] = 1
    network.layer2[1].bn1.weight.data[3] = 50
    images = torch.zeros(0, 3, 16, 16)
    loops = Loop(), Loop()
    by_order = purify(network, images, NO_LABELS, Config.load(), loops[0])
    directly = purify(network, images, NO_LABELS, Config.load(pairs="direct"), loops[1])
    assert [loop.findings.warnings for loop in loops] == [[], []]
    assert "7 of 16 BatchNorm layers are not looked at, since what they read is" in caplog.text
    assert silent(by_order, "layer2.1.bn1") == [3]
    assert silent(directly, "layer2.1.bn1") == []


@pytest.mark.parametrize("flags", [{"u": 1e9}, {"u": float("inf")}, {"n_rounds": 0}])
def test_a_bound_without_end_and_no_rounds_change_nothing(
    flags: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    network = with_outlier()
    loop = Loop()
    with caplog.at_level(logging.INFO, "sau"):
        pruned = purify(network, NO_IMAGES, NO_LABELS, Config.load(**flags), loop)
    assert pruned is not network
    assert differing(pruned.state_dict(), network.state_dict()) == []
    assert loop.findings.tables["pruned"] == []
    assert [record.message for record in caplog.records] == ["0 channels pruned"]


def test_a_second_round_prunes_what_then_stands_out() -> None:
    """Beside 400 the 20 does not stand out; once 400 has become 0 it does, among twenty ones."""
    network = with_outlier(22)
    network.conv1.weight.data[9, 0, 1, 1] = 400
    once = purify(network, NO_IMAGES, NO_LABELS, Config.load())
    twice = purify(network, NO_IMAGES, NO_LABELS, Config.load(n_rounds=2))
    assert silent(once) == [9]
    assert silent(twice) == [4, 9]


def test_a_network_without_a_pair_is_refused_in_a_line() -> None:
    without = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    before = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).double()
    for rounds in (0, 1):
        config = Config.load(n_rounds=rounds)
        with pytest.raises(UserError, match=r"^[^\n]*BatchNorm[^\n]*$"):
            purify(without, NO_IMAGES, NO_LABELS, config)
        with pytest.raises(UserError, match=r"^[^\n]*no such pair[^\n]*$"):
            purify(before, NO_IMAGES, NO_LABELS, config)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_network_is_refused_by_the_pairs_that_are_asked_for(rounds: int) -> None:
    """A ReLU stands between convolution and BatchNorm: in order they are a pair, directly not."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    images = torch.zeros(0, 3, 8, 8)
    purify(network, images, NO_LABELS, Config.load(pairs="order", n_rounds=rounds))
    with pytest.raises(UserError, match="no such pair"):
        purify(network, images, NO_LABELS, Config.load(pairs="direct", n_rounds=rounds))
