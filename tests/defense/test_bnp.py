"""BNP: divergences by hand, statistics of what enters BatchNorm, and which channels are pruned."""

import logging
import math

import pytest
import torch
from torch import nn

from defense.bnp import Config, channel_divergence, input_moments, moments, pooled, purify
from models import Classifier
from models.outputs import recording
from tests.networks import conv_net, copied, differing, problem
from utils.errors import UserError
from utils.training.loop import Loop


def divergence(mean: float, variance: float, running_mean: float, running_var: float) -> float:
    """`channel_divergence` of one channel."""
    values = (torch.tensor([v]) for v in (mean, variance, running_mean, running_var))
    return float(channel_divergence(*values))


# the divergence of a channel


def test_the_divergence_by_hand() -> None:
    """v1 1, v2 4, shift 2: ln(4) / 2 + (1 + 4) / 8 - 1/2 = 0.8181472.

    The other way round, v1 4 and v2 1: ln(1 / 4) / 2 + (4 + 4) / 2 - 1/2 = 2.8068528. With ln(4)
    instead of its half the first would be 1.5112944.
    """
    for shift in (2.0, -2.0):
        assert divergence(3.0 + shift, 1.0, 3.0, 4.0) == pytest.approx(0.8181472, abs=1e-7)
    assert divergence(2.0, 4.0, 0.0, 1.0) == pytest.approx(2.8068528, abs=1e-7)
    assert math.log(4) + 5 / 8 - 1 / 2 == pytest.approx(1.5112944, abs=1e-7)


def test_equal_statistics_have_no_divergence() -> None:
    torch.manual_seed(0)
    mean, variance = torch.randn(5), torch.rand(5) + 0.1
    found = channel_divergence(mean, variance, mean, variance)
    assert found.tolist() == [0.0] * 5
    assert found.dtype == torch.float64


def test_the_divergence_is_torch_s() -> None:
    torch.manual_seed(0)
    means, variances = torch.randn(2, 9).double(), torch.rand(2, 9).double() + 0.1
    clean, running = (
        torch.distributions.Normal(mean, variance.sqrt())
        for mean, variance in zip(means, variances, strict=True)
    )
    found = channel_divergence(means[0], variances[0], means[1], variances[1])
    expected = torch.distributions.kl_divergence(clean, running)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_without_variance_the_divergence_is_not_finite() -> None:
    assert divergence(0.0, 0.0, 0.0, 1.0) == math.inf
    assert not math.isfinite(divergence(1.0, 1.0, 0.0, 0.0))


# what enters BatchNorm


def test_moments_by_hand() -> None:
    """0, 2, 4, 6 of a channel: mean 3, squares 9 + 1 + 1 + 9 = 20, variance 20 / 3."""
    values = torch.stack([torch.tensor([0.0, 2, 4, 6]), torch.full((4,), 5.0)])
    for shape in ((4, 1, 1), (2, 2, 1), (1, 2, 2)):
        images = values.view(2, *shape).transpose(0, 1)
        found = moments(images)
        assert found.count == 4
        assert found.mean.tolist() == [3, 5]
        assert found.squares.tolist() == [20, 0]
        assert found.variance.tolist() == pytest.approx([20 / 3, 0])


def test_parts_are_pooled_and_not_averaged() -> None:
    """0, 2 and 4, 6, 8, of which the second part weighs more: mean 4, variance 40 / 4.

    The parts have means 1 and 6 and squares 2 and 8; 2 + 8 + 2 * 9 + 3 * 4 = 40.
    """
    parts = [torch.tensor(values).view(-1, 1, 1, 1) for values in ([0.0, 2], [4.0, 6, 8])]
    found = pooled([moments(part) for part in parts])
    assert found.count == 5
    assert found.mean.tolist() == [4]
    assert found.variance.tolist() == pytest.approx([10])


def test_a_single_value_has_no_variance() -> None:
    assert moments(torch.ones(1, 3, 1, 1)).variance.isnan().all()


def test_moments_of_half_precision_are_those_of_float32() -> None:
    """300 values of 1 sum to 300, which bfloat16 does not know, and 0.01 is lost beside 100."""
    torch.manual_seed(0)
    values = (100 + torch.randn(300, 2, 3, 3)).bfloat16()
    found = moments(values)
    expected = values.double().transpose(0, 1).flatten(1)
    assert torch.allclose(found.mean, expected.mean(1), rtol=1e-5)
    assert torch.allclose(found.variance, expected.var(1), rtol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("batch_size", [5, 12, 100])
def test_the_moments_of_what_enters(wrapped: bool, batch_size: int) -> None:
    """All images and pixels count once, whatever the batches; in eval mode, without hooks left."""
    network = conv_net()
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3).double() if wrapped else network
    model.train()
    before = copied(model.state_dict())
    images, _ = problem()
    found = input_moments(model, images, batch_size)
    assert all(module.training for module in model.modules())
    assert differing(model.state_dict(), before) == []
    network.eval()
    with torch.no_grad():
        first = network.conv1((images - 0.5) / 0.25 if wrapped else images)
        second = network.conv2(network.bn1(first).relu())
    assert list(found) == ["bn1", "bn2"]
    for name, values in (("bn1", first), ("bn2", second)):
        channels = values.transpose(0, 1).flatten(1)
        assert torch.allclose(found[name].mean, channels.mean(1), rtol=0, atol=1e-6), name
        assert torch.allclose(found[name].variance, channels.var(1), rtol=1e-5), name
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_is_not_called_has_no_moments() -> None:
    network = conv_net()
    network.unused = nn.BatchNorm2d(5).double()
    assert list(input_moments(network, problem()[0], 12)) == ["bn1", "bn2"]


# the whole defense


def test_the_defense_sees_clean_images_and_the_published_u() -> None:
    """3 deviations, 4 for Tiny ImageNet; the shift is kept, and one round looks once."""
    config = Config.load()
    assert (config.sees, config.u, config.prune_bias, config.n_rounds) == ("clean", 3.0, False, 1)
    assert Config.load("tiny").u == 4.0
    assert Config.load("digits").n_rounds == 1


class Channels(nn.Module):
    """BatchNorm of an image's own channels; the logits are two of their means.

    The running statistics are those of `clean`, but for channel 4, whose mean is 0.3 higher.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        nn.init.uniform_(self.bn.weight, 1, 2)
        nn.init.constant_(self.bn.bias, 0.5)
        values = clean(channels).transpose(0, 1).flatten(1)
        self.bn.running_mean.copy_(values.mean(1))
        self.bn.running_mean[4] += 0.3
        self.bn.running_var.copy_(values.var(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn(images).mean(dim=(2, 3))[:, :2]


def clean(channels: int) -> torch.Tensor:
    torch.manual_seed(0)
    return (0.5 + 0.1 * torch.randn(60, channels, 3, 3)).clamp(0, 1)


LABELS = torch.zeros(60, dtype=torch.int64)  # they are not read


def pruned_channels(network: nn.Module) -> list[int]:
    return torch.nonzero(network.bn.weight == 0).flatten().tolist()


@pytest.mark.parametrize(("channels", "expected"), [(10, []), (11, [4])])
def test_the_channel_whose_statistics_differ_is_pruned(channels: int, expected: list[int]) -> None:
    """In a layer of ten the one outlier is 2.85 deviations away at most, so u = 3 finds none."""
    loop = Loop()
    pruned = purify(Channels(channels), clean(channels), LABELS, Config.load(), loop)
    assert pruned_channels(pruned) == expected
    assert loop.findings.tables["pruned"] == [{"layer": "bn", "channel": c} for c in expected]
    by_layer = {"bn": expected} if expected else {}
    assert loop.findings.facts == {"pruned_channels": len(expected), "pruned": by_layer}


def test_a_variance_that_differs_is_as_suspect() -> None:
    network = Channels(12)
    network.bn.running_mean[4] -= 0.3
    network.bn.running_var[7] *= 20
    assert pruned_channels(purify(network, clean(12), LABELS, Config.load())) == [7]


@pytest.mark.parametrize(("prune_bias", "shift"), [(False, 0.5), (True, 0.0)])
def test_a_pruned_channel_gives_its_shift_or_nothing(prune_bias: bool, shift: float) -> None:
    network, images = Channels(12), clean(12)
    pruned = purify(network, images, LABELS, Config.load(prune_bias=prune_bias))
    with torch.no_grad(), recording(pruned, ["bn"]) as features:
        pruned(images)
    assert features["bn"][:, 4].unique().tolist() == [shift]
    changed = ["bn.weight", "bn.bias"] if prune_bias else ["bn.weight"]
    assert differing(pruned.state_dict(), network.state_dict()) == changed
    assert pruned.bn.weight[:4].tolist() == network.bn.weight[:4].tolist()


def test_a_constant_channel_is_never_pruned() -> None:
    """Its divergence is infinite; the outlier beside it is found as if it were not there."""
    images = clean(12)
    images[:, 7] = 0.25
    assert pruned_channels(purify(Channels(12), images, LABELS, Config.load())) == [4]


def test_the_flags_choose_the_channels() -> None:
    """As the formula and the rule for outliers say, layer by layer, at u = 0.8."""
    network = conv_net(widths=(20, 24))
    images, labels = problem(count=40)
    pruned = purify(network, images, labels, Config.load(u=0.8, batch_size=7))
    with torch.no_grad():
        first = network.conv1(images)
        second = network.conv2(network.bn1(first).relu())
    total = 0
    for name, values in (("bn1", first), ("bn2", second)):
        channels, norm = values.transpose(0, 1).flatten(1), getattr(network, name)
        v1, v2 = channels.var(1), norm.running_var
        away = (channels.mean(1) - norm.running_mean).square()
        scores = (v2 / v1).log() / 2 + (v1 + away) / (2 * v2) - 1 / 2
        chosen = scores > scores.mean() + 0.8 * scores.std()
        assert torch.equal(getattr(pruned, name).weight == 0, chosen)
        total += int(chosen.sum())
    assert 2 < total < 20


@pytest.mark.parametrize("flags", [{"u": 1e9}, {"u": float("inf")}, {"n_rounds": 0}])
def test_a_bound_without_end_and_no_rounds_change_nothing(
    flags: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    network = Channels(12)
    with caplog.at_level(logging.INFO, "sau"):
        pruned = purify(network, clean(12), LABELS, Config.load(**flags))
    assert pruned is not network
    assert differing(pruned.state_dict(), network.state_dict()) == []
    assert [record.message for record in caplog.records] == ["0 channels pruned"]


def test_a_second_round_looks_at_the_pruned_network() -> None:
    """Its second layer has other inputs once channels of the first are silent."""
    network = conv_net(widths=(20, 24))
    images, labels = problem(count=40)
    loops = [Loop(), Loop(), Loop()]
    once = purify(network, images, labels, Config.load(u=1.0), loops[0])
    again = purify(once, images, labels, Config.load(u=1.0), loops[1])
    twice = purify(network, images, labels, Config.load(u=1.0, n_rounds=2), loops[2])
    assert differing(twice.state_dict(), again.state_dict()) == []
    rows = [loop.findings.tables["pruned"] for loop in loops]
    assert rows[2] == rows[0] + [row for row in rows[1] if row not in rows[0]]
    assert rows[0] != rows[2]


def test_a_channel_that_stands_out_in_each_round_is_pruned_once() -> None:
    """What comes into a layer does not change with its own weights."""
    loops = [Loop(), Loop()]
    for loop, rounds in zip(loops, (1, 3), strict=True):
        config = Config.load(u=1.2, n_rounds=rounds)
        purify(conv_net(widths=(20, 24)), *problem(count=40), config, loop)
    rows = loops[1].findings.tables["pruned"]
    assert {row["layer"] for row in rows} == {"bn1", "bn2"}
    first = [
        [row for row in loop.findings.tables["pruned"] if row["layer"] == "bn1"] for loop in loops
    ]
    assert first[0] == first[1]
    assert loops[1].findings.facts["pruned_channels"] == len(rows)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_network_without_running_statistics_is_refused_in_a_line(rounds: int) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    forgetful = conv_net()
    forgetful.bn1 = nn.BatchNorm2d(6, track_running_stats=False)
    forgetful.bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    for network in (plain, forgetful.double()):
        with pytest.raises(UserError, match=r"^[^\n]*BatchNorm[^\n]*$"):
            purify(network, *problem(), Config.load(n_rounds=rounds))


class Repeated(nn.Module):
    """Calls a convolution and its BatchNorm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.norm(self.conv(x))
        return x.mean((2, 3))


def test_all_calls_of_a_batchnorm_count() -> None:
    torch.manual_seed(0)
    model, images = Repeated().eval(), torch.rand(6, 3, 4, 4)
    (found,) = input_moments(model, images, 4).values()
    with torch.no_grad():
        first = model.conv(images)
        second = model.conv(model.norm(first))
        expected = torch.cat([first, second])
    assert found.count == 2 * 6 * 16
    assert torch.allclose(found.mean, expected.mean((0, 2, 3)).double(), atol=1e-6)
    variance = expected.double().var((0, 2, 3), correction=0)
    assert torch.allclose(found.squares / found.count, variance, atol=1e-6)
