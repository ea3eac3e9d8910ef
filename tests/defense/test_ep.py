"""EP: entropies of histograms by hand, what enters BatchNorm, and which channels are pruned."""

import logging
import math

import pytest
import torch
from torch import nn

from defense.ep import Config, channel_entropy, largest_inputs, purify
from models import Classifier
from models.outputs import recording
from tests.networks import conv_net, differing, problem
from utils.errors import UserError
from utils.training.loop import Loop


def entropy(*shares: float) -> float:
    """-sum p ln p."""
    return -sum(p * math.log(p) for p in shares)


# the entropy of a channel


def test_the_entropy_of_three_values_by_hand() -> None:
    """-1, 0, 1 are standardized already. Range 2.

    Width 0.8: int(2.5) = 2 bins, (-1, -0.2) and (-0.2, 0.6); -1 is on an edge, 1 behind the last
    bin, so 0 alone counts: ln(3) / 3. Width 0.5: each value is on an edge. Width 0.3: six bins of
    which the fourth, (-0.1, 0.2), holds 0. Width 3: no bin at all.
    """
    values = torch.tensor([[-1.0, 0.0, 1.0]])
    for width, expected in ((0.8, 0.366204), (0.5, 0.0), (0.3, 0.366204), (3.0, 0.0)):
        found = channel_entropy(values, width)
        assert found.tolist() == pytest.approx([expected], abs=1e-6), width
        assert found.dtype == torch.float64
    assert math.log(3) / 3 == pytest.approx(0.366204, abs=1e-6)


@pytest.mark.parametrize("width", [1e-12, 1e-320])
def test_more_bins_than_memory_has_are_refused(width: float) -> None:
    with pytest.raises(UserError, match=r"--bin_width: .* makes more than 1,000,000 bins"):
        channel_entropy(torch.tensor([[0.0, 1.0, 5.0]]), width)


def test_scale_and_shift_of_a_channel_do_not_matter() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 20, dtype=torch.float64)
    moved = torch.tensor([[10.0], [0.1], [3.0]]) * values + torch.tensor([[7.0], [0.0], [-5.0]])
    assert torch.allclose(channel_entropy(moved, 0.3), channel_entropy(values, 0.3))


def test_channels_are_standardized_by_the_unbiased_deviation() -> None:
    """-1, 0, 1 have the range 2, in which no bin of 2.2 has room.

    Divided by the biased deviation, 0.8165, they would have 2.449, and one bin that holds the 0.
    """
    assert channel_entropy(torch.tensor([[-1.0, 0.0, 1.0]]), 2.2).tolist() == [0.0]


def test_the_bins_of_a_layer_begin_at_its_smallest_value() -> None:
    """z: a (-1, 0, 1), b (-1.1547, 0.5774, 0.5774) of 0, 3, 3. Lowest -1.1547, range 2.1547.

    Width 0.7: int(3.08) = 3 bins with edges -1.1547, -0.4547, 0.2453, 0.9453. a: -1 in the first,
    0 in the second, 1 behind the last. b: -1.1547 on an edge, two in the third. Alone, a would have
    edges -1, -0.3, 0.4 and count 0 alone.
    """
    values = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 3.0, 3.0]])
    found = channel_entropy(values, 0.7)
    assert found.tolist() == pytest.approx([entropy(1 / 3, 1 / 3), entropy(2 / 3)])
    alone = channel_entropy(values[:1], 0.7)
    assert alone.tolist() == pytest.approx([entropy(1 / 3)])


def test_the_smallest_value_and_the_tail_are_counted_nowhere() -> None:
    """-2 to 2: deviation sqrt(10 / 4) = 1.5811, so z is -1.265, -0.632, 0, 0.632, 1.265.

    Width 0.6: int(4.216) = 4 bins with edges -1.265, -0.665, -0.065, 0.535, 1.135: the three inner
    values are in three of them, the smallest is on an edge, the largest behind the last.
    """
    found = channel_entropy(torch.arange(-2.0, 3.0).view(1, 5), 0.6)
    assert found.tolist() == pytest.approx([3 * math.log(5) / 5])


def test_a_constant_channel_has_no_entropy_and_no_part_in_the_bins() -> None:
    """NaN; the other channel's bins begin at its own smallest value, -1."""
    for constant in (0.0, 5.0, 0.1, -1e6):
        values = torch.tensor([[constant] * 3, [-1.0, 0.0, 1.0], [constant] * 3])
        found = channel_entropy(values, 0.8)
        assert found.isnan().tolist() == [True, False, True]
        assert float(found[1]) == pytest.approx(math.log(3) / 3)


def test_a_layer_of_constant_channels_has_no_entropy() -> None:
    assert channel_entropy(torch.ones(4, 7), 0.1).isnan().all()


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_a_single_image_has_no_deviation() -> None:
    assert channel_entropy(torch.rand(4, 1), 0.1).isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_no_entropy(value: float) -> None:
    values = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, value, 1.0]])
    found = channel_entropy(values, 0.8)
    assert float(found[0]) == pytest.approx(math.log(3) / 3)
    assert found[1].isnan()


def test_the_entropy_equals_its_transcription() -> None:
    """Bin by bin and value by value, in Python's own numbers."""
    torch.manual_seed(0)
    values = torch.randn(6, 40).exp()
    deviation = values.double().std(1, keepdim=True)
    z = (values.double() - values.double().mean(1, keepdim=True)) / deviation
    low, high = float(z.min()), float(z.max())
    for width in (0.1, 0.37, 1.0):
        expected = []
        for row in z.tolist():
            shares = [
                sum(low + k * width < v < low + (k + 1) * width for v in row) / len(row)
                for k in range(int((high - low) / width))
            ]
            expected.append(entropy(*filter(None, shares)))
        assert channel_entropy(values, width).tolist() == pytest.approx(expected, rel=1e-12)


def test_two_modes_have_a_lower_entropy() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 200)
    values[1, :100] += 50
    one, two = channel_entropy(values, 0.1).tolist()
    assert two < one - 1


# what enters BatchNorm


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_largest_inputs_by_image(wrapped: bool) -> None:
    """Batches of 5, 5 and 2 are put together; eval mode, so an image's values are its own."""
    network = conv_net()
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3).double() if wrapped else network
    model.train()
    images, _ = problem()
    found = largest_inputs(model, images, batch_size=5)
    assert all(module.training for module in model.modules())
    network.eval()
    with torch.no_grad():
        entering = (images - 0.5) / 0.25 if wrapped else images
        first = network.conv1(entering)
        second = network.conv2(network.bn1(first).relu())
    expected = {"bn1": first.amax((2, 3)).T, "bn2": second.amax((2, 3)).T}
    assert list(found) == ["bn1", "bn2"]
    for name, values in found.items():
        assert values.shape == expected[name].shape
        assert values.dtype == torch.float32
        assert torch.allclose(values.double(), expected[name], rtol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_uint8_images_are_taken_as_floats() -> None:
    network = conv_net().float()
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    found = largest_inputs(network, images, batch_size=3)
    expected = largest_inputs(network, images.float() / 255, batch_size=7)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, atol=1e-5)


def test_a_layer_that_is_not_called_has_no_values() -> None:
    network = conv_net()
    network.unused = nn.BatchNorm2d(5).double()
    assert list(largest_inputs(network, problem()[0], 12)) == ["bn1", "bn2"]


# the whole defense


def test_the_defense_sees_the_poisoned_training_set_or_its_control() -> None:
    assert Config.load().sees == "poisoned"
    assert Config.load(data="clean").sees == "clean"


class Channels(nn.Module):
    """BatchNorm of an image's own channels; the logits are two of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        nn.init.uniform_(self.bn.weight, 1, 2)
        nn.init.constant_(self.bn.bias, 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn(images).mean(dim=(2, 3))[:, :2]


def mixture(channels: int, count: int = 300, side: int = 2) -> torch.Tensor:
    """Normal values in all channels but number 4, of which a part of the images lies far apart."""
    torch.manual_seed(0)
    images = 0.2 + 0.01 * torch.randn(count, channels, side, side)
    images[: count // 2, 4] += 0.6
    return images


NO_LABELS = torch.zeros(0, dtype=torch.int64)  # they are not read


@pytest.mark.parametrize(("channels", "expected"), [(10, []), (11, [4])])
def test_the_channel_of_two_modes_is_pruned(channels: int, expected: list[int]) -> None:
    """In a layer of ten the one outlier is 2.85 deviations away at most, so u = 3 finds none."""
    torch.manual_seed(0)
    network = Channels(channels)
    loop = Loop()
    pruned = purify(network, mixture(channels), NO_LABELS, Config.load(u=2.99), loop)
    assert torch.nonzero(pruned.bn.weight == 0).flatten().tolist() == expected
    assert loop.findings.tables["pruned"] == [{"layer": "bn", "channel": c} for c in expected]
    by_layer = {"bn": expected} if expected else {}
    assert loop.findings.facts == {"pruned_channels": len(expected), "pruned": by_layer}


@pytest.mark.parametrize(("prune_bias", "shift"), [(False, 0.5), (True, 0.0)])
def test_a_pruned_channel_gives_its_shift_or_nothing(prune_bias: bool, shift: float) -> None:
    network, images = Channels(12), mixture(12)
    pruned = purify(network, images, NO_LABELS, Config.load(u=2.5, prune_bias=prune_bias))
    with torch.no_grad(), recording(pruned, ["bn"]) as features:
        pruned(images)
    assert features["bn"][:, 4].unique().tolist() == [shift]
    changed = ["bn.weight", "bn.bias"] if prune_bias else ["bn.weight"]
    assert differing(pruned.state_dict(), network.state_dict()) == changed
    assert pruned.bn.weight[:4].tolist() == network.bn.weight[:4].tolist()


def test_a_constant_channel_is_never_pruned() -> None:
    """Its entropy is no number, not 0; the outlier beside it is found as if it were not there."""
    images = mixture(13)
    images[:, 7] = 0.25
    pruned = purify(Channels(13), images, NO_LABELS, Config.load(u=2.5))
    assert torch.nonzero(pruned.bn.weight == 0).flatten().tolist() == [4]
    nothing = purify(Channels(13), torch.zeros(20, 13, 2, 2), NO_LABELS, Config.load(u=0.0))
    assert bool((nothing.bn.weight != 0).all())


def test_the_largest_pixel_counts_not_the_mean() -> None:
    """One bright pixel makes the second mode where 16 pixels' mean would hardly move."""
    images = mixture(12, side=4)
    images[:150, 4] -= 0.6
    images[:150, 4, 2, 1] += 0.6
    pruned = purify(Channels(12), images, NO_LABELS, Config.load(u=2.5))
    assert torch.nonzero(pruned.bn.weight == 0).flatten().tolist() == [4]


def test_the_flags_choose_the_channels() -> None:
    """As the two functions and the rule for outliers say, layer by layer, at u = 0.8."""
    network = conv_net(widths=(20, 24))
    images, labels = problem(count=40)
    config = Config.load(u=0.8, bin_width=0.3)
    pruned = purify(network, images, labels, config)
    inputs = largest_inputs(network, images, 256)
    total = 0
    for name, norm in (("bn1", pruned.bn1), ("bn2", pruned.bn2)):
        scores = channel_entropy(inputs[name], 0.3)
        cut = scores.mean() - 0.8 * scores.std()
        assert torch.equal(norm.weight == 0, scores < cut)
        total += int((scores < cut).sum())
    assert 2 < total < 30


@pytest.mark.parametrize("flags", [{"u": 1e9}, {"u": float("inf")}, {"n_rounds": 0}])
def test_a_bound_without_end_and_no_rounds_change_nothing(
    flags: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    network = Channels(12)
    loop = Loop()
    with caplog.at_level(logging.INFO, "sau"):
        pruned = purify(network, mixture(12), NO_LABELS, Config.load(**flags), loop)
    assert pruned is not network
    assert differing(pruned.state_dict(), network.state_dict()) == []
    assert loop.findings.tables["pruned"] == []
    assert [record.message for record in caplog.records] == ["0 channels pruned"]


def test_a_second_round_looks_at_the_pruned_network() -> None:
    """Its second layer has other inputs once channels of the first are silent."""
    network = conv_net(widths=(20, 24))
    images, labels = problem(count=40)
    loops = [Loop(), Loop(), Loop()]
    once = purify(network, images, labels, Config.load(u=1.2, bin_width=0.3), loops[0])
    again = purify(once, images, labels, Config.load(u=1.2, bin_width=0.3), loops[1])
    twice = purify(network, images, labels, Config.load(u=1.2, bin_width=0.3, n_rounds=2), loops[2])
    assert differing(twice.state_dict(), again.state_dict()) == []
    rows = [loop.findings.tables["pruned"] for loop in loops]
    assert rows[2] == rows[0] + [row for row in rows[1] if row not in rows[0]]


def test_a_network_without_batchnorm_is_refused_in_a_line() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    for rounds in (0, 1):
        with pytest.raises(UserError, match=r"^[^\n]*BatchNorm[^\n]*$"):
            purify(network, mixture(12), NO_LABELS, Config.load(n_rounds=rounds))


@pytest.mark.filterwarnings("error")
def test_one_value_of_a_channel_has_no_entropy() -> None:
    """As NaN, like values that are all the same, and without a warning of torch."""
    assert channel_entropy(torch.zeros(3, 1), 0.1).isnan().all()


@pytest.mark.parametrize(("count", "is_told"), [(1, True), (2, False)])
def test_of_one_image_it_says_that_nothing_can_be_pruned(count: int, is_told: bool) -> None:
    loop = Loop()
    images, labels = problem(count=count)
    purify(conv_net(), images, labels, Config.load(n_rounds=1), loop)
    assert any("one image" in text for text in loop.findings.warnings) == is_told


def test_the_largest_of_all_calls_of_a_batchnorm_counts() -> None:
    """The second call has the larger values of channel 0, the first one those of channel 1."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2, eps=0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.norm(x)
            return self.norm(x * x.new_tensor([2.0, 0.5]).view(2, 1, 1)).mean((2, 3))

    images = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    (found,) = largest_inputs(Repeated(), images, 2).values()
    assert torch.equal(found, (images.amax((2, 3)) * torch.tensor([2.0, 1.0])).T)


def test_bins_without_a_value_take_no_memory() -> None:
    """512 channels with a million bins each would be four gigabytes."""
    values = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    entropy = channel_entropy(values, 2e-5)
    assert torch.allclose(entropy, torch.tensor(4.0).log().double().expand(512), atol=0.7)
