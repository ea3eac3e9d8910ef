"""The math of analyses, on values that are derived by hand."""

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from analysis import (
    features,
    gradcam,
    inspection,
    path,
    reactivate,
    retune,
    signals,
    similarity,
    stealth,
    weights,
)
from analysis.base import Results
from analysis.subject import Subject
from defense import sau
from models import build_model
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import PoisonedSet
from utils.errors import UserError
from utils.training.evaluate import head_features

# --- path ---------------------------------------------------------------------------------------


def test_the_ends_of_a_path_are_the_two_models_bit_for_bit() -> None:
    """1e8 + 1 (1 - 1e8) is 0 in float32, not 1."""
    start = {"w": torch.tensor([1e8, 0.1]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([1.0, 0.3]), "n": torch.tensor(5)}
    assert path.interpolated(start, end, 0.0)["w"].tolist() == start["w"].tolist()
    assert path.interpolated(start, end, 1.0)["w"].tolist() == end["w"].tolist()
    assert [int(path.interpolated(start, end, t)["n"]) for t in (0.0, 0.9, 1.0, 1.5)] == [
        3,
        3,
        5,
        5,
    ]


def test_beyond_the_end_variances_are_not_negative() -> None:
    """1 + 1.5 (0.2 - 1) = -0.2."""
    start, end = {"bn.running_var": torch.ones(1)}, {"bn.running_var": torch.full((1,), 0.2)}
    assert path.interpolated(start, end, 0.5)["bn.running_var"].item() == pytest.approx(0.6)
    assert path.interpolated(start, end, 1.5)["bn.running_var"].item() == 0


def test_crossing_is_linear_between_two_points() -> None:
    """From 0.8 at 0.5 to 0.2 at 1: 0.5 is half of the way."""
    assert path.crossing([0, 0.5, 1, 1.5], [1, 0.8, 0.2, 0.9]) == pytest.approx(0.75)
    assert path.crossing([0, 0.5, 1], [1, 0.8, 0.5]) is None  # the backdoor is still there
    assert path.crossing([0, 0.5, 1], [0.4, 0.3, 0.1]) is None  # there was none
    assert path.crossing([0, 0.5, 1], [1.0, 0.5, 0.0]) == 0.5


def test_of_several_crossings_the_last_one_on_the_way_down_counts() -> None:
    """Down between 0 and 0.25, up, and down from 0.6 at 0.75 to 0.2 at 1: a quarter of the way.

    Beyond t = 1 nothing counts.
    """
    ts = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert path.crossing(ts, [1, 0.2, 0.8, 0.6, 0.2, 0.9, 0.1]) == pytest.approx(0.8125)


def said_of_a_path(half: float, fall: float, beyond: float) -> str:
    """Of ASR 0.9 before and 0.1 after, and of ACC 0.8 before."""
    numbers = {"t_half": half, "acc_barrier": fall}
    return path._read("x", [0.0, 1.0, 1.5], [0.9, 0.1, beyond], 0.8, numbers)


def test_two_basins_are_a_fall_of_more_than_a_tenth_of_the_accuracy() -> None:
    """A tenth of 0.8 is 0.08."""
    assert "different basins" not in said_of_a_path(0.5, 0.079, 0.1)
    assert "ACC falls by 8.10 % in between" in said_of_a_path(0.5, 0.081, 0.1)
    assert "different basins" in said_of_a_path(0.5, 0.081, 0.1)


def test_the_edge_is_near_beyond_0_8_and_may_be_crossed_again() -> None:
    assert "well past the edge" in said_of_a_path(0.8, 0.0, 0.1)
    assert "just over the edge" in said_of_a_path(0.81, 0.0, 0.1)
    assert "rises" not in said_of_a_path(0.5, 0.0, 0.49)
    assert "beyond t = 1 it rises again to 50.00 %" in said_of_a_path(0.5, 0.0, 0.5)


def test_barrier_is_the_deepest_point_under_the_straight_line() -> None:
    """At t = 0.5 the line is at 0.8, and the rate at 0.3."""
    assert path.barrier([0.0, 0.5, 1.0, 1.5], [1.0, 0.3, 0.6, 0.0]) == pytest.approx(0.5)
    assert path.barrier([0.0, 0.5, 1.0], [0.5, 0.9, 0.5]) == 0


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 49])
def test_the_places_of_a_path_have_0_and_1(steps: int) -> None:
    for end in (1.0, 1.5, 1.05):
        ts = path.places(end, steps)
        assert ts[0] == 0
        assert 1.0 in ts
        assert ts[-1] == pytest.approx(end)
        assert all(0 < after - before < 1 / steps + 1e-9 for before, after in pairwise(ts))


def test_the_last_place_of_a_path_stands_once() -> None:
    """1.1 * 10 is 11.000000000000002."""
    assert path.places(1.1, 10)[-2:] == [1.0, 1.1]
    assert path.places(1.05, 10)[-2:] == [1.0, 1.05]


def test_statistics_are_measured_as_means_of_batches() -> None:
    """Batches of 0, 0 and 2, 4: means 0 and 3, so 1.5; variances (of a sample) 0 and 2, so 1."""
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    images = torch.tensor([0.0, 0.0, 2.0, 4.0]).view(4, 1, 1, 1)
    path.reestimate(model, images, batch_size=2)
    norm = model[0]
    assert (norm.running_mean.item(), norm.running_var.item()) == (1.5, 1.0)
    assert (norm.momentum, norm.training) == (0.1, False)


# --- retune -------------------------------------------------------------------------------------


def mixed(value: int, count: int, is_poisoned: bool) -> retune.Mixture:
    return retune.Mixture(
        torch.full((count, 3, 8, 8), value, dtype=torch.uint8),
        torch.full((count,), value),
        torch.full((count,), is_poisoned),
    )


def test_the_first_images_of_a_draw_are_replaced() -> None:
    both = retune.mixture(mixed(1, 4, False), mixed(2, 3, True), 2)
    assert both.labels.tolist() == [2, 2, 1, 1]
    assert both.images[:, 0, 0, 0].tolist() == [2, 2, 1, 1]
    assert both.is_poisoned.tolist() == [True, True, False, False]


def test_numbers_of_poisoned_images_that_are_too_large_are_skipped_with_a_line() -> None:
    results = Results()
    config = retune.Config.load(poisoned_images=(0, 3, 4, 3))
    assert retune.usable_counts(config, 3, results) == [0, 3]
    assert results.warnings == ["not tried with 4 poisoned images: there are only 3 images"]
    with pytest.raises(UserError, match="--poisoned_images: 9: there are only 3 images"):
        retune.usable_counts(retune.Config.load(poisoned_images=(9,)), 3, results)


def test_a_model_is_tuned_in_a_copy_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 3)
    before = copy.deepcopy(model.state_dict())
    config = retune.Config.load("random")
    data = mixed(1, 6, False)
    first, second = (retune.tuned(model, data, config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(first["network.linear.weight"], before["network.linear.weight"])


def test_the_order_of_the_images_is_drawn_from_the_seed() -> None:
    """Three batches of two random images, and nothing else is drawn: no crop, and no dropout."""
    torch.manual_seed(0)
    model, images = build_model("tiny", 3), torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    data = retune.Mixture(images, torch.arange(6) % 3, torch.zeros(6, dtype=torch.bool))
    still = {"crop_padding": 0, "flip": False, "batch_size": 2, "n_rounds": 1}
    first, other = (
        retune.tuned(model, data, retune.Config.load(**still, random_seed=seed)).state_dict()
        for seed in (0, 1)
    )
    assert not torch.allclose(first["network.linear.weight"], other["network.linear.weight"])


def test_which_images_are_replaced_and_by_which_is_drawn_from_the_seed(
    tiny_data: Dataset,
) -> None:
    """The same clean images in another order, and the same poisoned ones, each with its label."""
    index = torch.arange(1, 12)
    images = tiny_data.train.images[index] + 55
    kinds = torch.zeros(11, dtype=torch.uint8)
    stored = PoisonedSet(tiny_data.train, index, images, torch.full((11,), 2), kinds)
    subject = SimpleNamespace(
        data=tiny_data,
        poisoned_images=lambda _: stored,
        clean_draw=lambda *_: torch.arange(10),
    )
    orders = []
    for seed in (0, 0, 1):
        config = retune.Config.load(random_seed=seed)
        clean, poisoned, truth = retune.images_of(subject, config, Results())
        rows = [
            [int((known == image).flatten(1).all(1).nonzero()) for image in some]
            for known, some in (
                (tiny_data.train.images, clean.images),
                (images, poisoned.images),
            )
        ]
        orders.append(rows)
        assert sorted(rows[0]) == list(range(10))
        assert sorted(rows[1]) == list(range(11))
        assert clean.labels.tolist() == [row % 3 for row in rows[0]]
        assert truth.tolist() == [(row + 1) % 3 for row in rows[1]]
        assert poisoned.labels.tolist() == [2] * 11
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[2][0]
    assert orders[0][1] != orders[2][1]


def test_the_headline_of_retuning_is_that_of_five_images_or_the_nearest_number() -> None:
    rows = [
        {"poisoned_images": None, "asr": 0.1, "acc": 0.9},
        {"poisoned_images": 0, "asr": 0.2, "acc": 0.8},
        {"poisoned_images": 6, "asr": 0.7, "acc": 0.6},
        {"poisoned_images": 20, "asr": 1.0, "acc": 0.5},
    ]
    assert retune.headline(rows) == {
        "asr_retuned": 0.7,
        "asr": 0.1,
        "acc_retuned": 0.6,
        "poisoned_images": 6,
    }


@pytest.mark.parametrize(
    ("counts", "count"),
    [([0, 10], 10), ([10, 0], 10), ([4, 6], 6), ([6, 4], 6), ([0, 50], 50), ([0], None)],
)
def test_of_equally_near_numbers_the_headline_has_the_larger_one_and_never_0(
    counts: list[int], count: int | None
) -> None:
    rows = [{"poisoned_images": k, "asr": k, "acc": 0.5} for k in counts]
    numbers = retune.headline([{"poisoned_images": None, "asr": 0.1, "acc": 0.9}, *rows])
    assert (numbers["poisoned_images"], numbers["asr_retuned"]) == (count, count)
    assert (numbers["asr"], numbers["acc_retuned"]) == (0.1, None if count is None else 0.5)
    results = Results(headline={"ft": numbers})
    retune.conclude(results)
    assert len(results.conclusion) == (count is not None)


# --- reactivate ---------------------------------------------------------------------------------


def test_the_loss_of_reactivation() -> None:
    """p = (0.7, 0.2, 0.1), t = 1: -log 0.2 - log(1.0001 - 0.7). With t = 0 the other is 0.2."""
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    expected = -math.log(0.2) - math.log(1.0001 - 0.7)
    assert float(reactivate.reactivation_loss(logits, torch.tensor([1]))) == pytest.approx(expected)
    expected = -math.log(0.7) - math.log(1.0001 - 0.2)
    assert float(reactivate.reactivation_loss(logits, torch.tensor([0]))) == pytest.approx(expected)


def test_the_perturbation_stays_in_its_bound_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images, targets = torch.rand(10, 3, 8, 8), torch.zeros(10, dtype=torch.int64)
    losses = []
    for steps in (0, 30):
        config = reactivate.Config.load(outer_steps=steps, step_size=5.0)
        delta = reactivate.search(model, images, targets, config)
        assert delta.shape == (1, 3, 8, 8)
        assert 0.04 < delta.abs().max() <= 0.05
        logits = model(reactivate.with_delta(images, delta))
        losses.append(reactivate.reactivation_loss(logits, targets).item())
    assert losses[1] < losses[0]


def test_a_perturbed_image_is_clipped() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    delta = torch.tensor([-0.1, 0.1]).view(1, 1, 1, 2)
    assert reactivate.with_delta(image, delta).flatten().tolist() == [0.0, 1.0]


# --- similarity ---------------------------------------------------------------------------------


def test_cka_is_1_with_itself_and_does_not_change_under_rotation_and_scale() -> None:
    torch.manual_seed(0)
    features_, other = torch.randn(20, 6), torch.randn(20, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    first, moved = similarity.gram(features_), similarity.gram(3 * features_ @ rotation + 5)
    assert similarity.cka(first, first) == pytest.approx(1)
    assert similarity.cka(first, moved) == pytest.approx(1)
    x, y = (values.double() - values.double().mean(0) for values in (features_, other))
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert similarity.cka(first, similarity.gram(other)) == pytest.approx(float(expected))


def test_dead_channels_have_nothing_left() -> None:
    """Of the other model, they are different; of the backdoored one, they are no reference."""
    torch.manual_seed(0)
    alive = similarity.gram(torch.randn(10, 3))
    dead = similarity.gram(torch.full((10, 3), 0.1))
    assert not dead.any()
    assert similarity.cka(alive, dead) == 0
    assert math.isnan(similarity.cka(dead, alive))
    assert math.isnan(similarity.cka(dead, dead))


def test_a_model_whose_backdoor_channels_are_cut_is_not_similar(tiny_data: Dataset) -> None:
    """`cut` is dead in the only layer. Where the record's model itself is, a line says so."""
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    cut = copy.deepcopy(model)
    cut.network.conv.weight.data.zero_()
    index = torch.arange(len(tiny_data.test))
    changed = 255 - tiny_data.test.images
    triggered = Triggered(changed, torch.zeros_like(index), tiny_data.test.labels, index)

    def seen(backdoored: nn.Module) -> Results:
        subject = SimpleNamespace(
            model=backdoored,
            triggered=triggered,
            data=tiny_data,
            purified=[SimpleNamespace(name=name) for name in ("cut", "same")],
            same_network=lambda _, purified: {"cut": cut, "same": model}[purified.name],
            clean=None,
            same_clean_network=lambda _: None,
        )
        results = Results()
        similarity.look(subject, similarity.Config.load(), results)
        return results

    results = seen(model)
    assert results.headline["cut"] == {"similarity": 0, "bec": 0}
    assert results.headline["same"] == {"similarity": pytest.approx(1), "bec": pytest.approx(1)}
    assert not any(line.startswith("skipped") for line in results.warnings)
    results = seen(cut)
    assert results.headline == {}
    (line,) = [line for line in results.warnings if line.startswith("skipped")]
    assert line.startswith(
        "skipped: conv: the channels that the trigger changes most give the same"
    )


def test_bec_is_relative_to_the_least_similar_model() -> None:
    """(0.8 - 0.6) / (1 - 0.6) = 0.5."""
    bec = similarity.backdoor_existence({"a": 0.8, "b": 0.6})
    assert bec == {"a": pytest.approx(0.5), "b": 0}
    assert similarity.backdoor_existence({"a": 1.0}) == {"a": None}
    assert similarity.backdoor_existence({"a": 0.9}) == {"a": None}  # nothing to compare it with
    assert similarity.backdoor_existence({}) == {}


@pytest.mark.parametrize("seed", range(10))
def test_a_model_that_nothing_has_changed_has_no_bec(seed: int) -> None:
    """CKA of a matrix with itself is 1 up to rounding, now a little less, now a little more."""
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
    same = similarity.cka(similarity.gram(features), similarity.gram(features))
    bec = similarity.backdoor_existence({"a": same, "b": 1.0, "c": 1 - 1e-14})
    assert bec == {"a": None, "b": None, "c": None}


def test_the_convolutions_inside_the_blocks() -> None:
    """PreAct-ResNet18 has two in each of eight blocks; its first one and shortcuts do not count."""
    names = similarity.compared_layers(build_model("preactresnet18", 10))
    assert len(names) == 16
    assert names[0] == "layer1.0.conv1"
    assert similarity.compared_layers(build_model("tiny", 10)) == ["conv"]


def test_channels_that_the_trigger_changes() -> None:
    """A convolution that copies red, blue and green, of which the trigger moves red and blue.

    Red rises by 51 / 255 in one of two pixels and falls by as much in the other one: 0.2. Blue
    falls by 51 / 255 in one pixel of two of the images, and rises in that of the third: 0.1.
    """
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    model[0].weight.data = torch.eye(3)[[0, 2, 1]].view(3, 3, 1, 1)
    clean = torch.full((3, 3, 1, 2), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[:, 0, 0] = torch.tensor([151, 49])
    triggered[:, 2, 0, 0] = torch.tensor([49, 49, 151])
    change = similarity.changes(model, ["0"], clean, triggered, size=2)["0"]
    assert change.tolist() == pytest.approx([0.2, 0.1, 0])
    assert similarity.top_channels(change, 0.4).tolist() == [0]
    assert similarity.top_channels(torch.tensor([1.0, 3, 2]), 0.67).tolist() == [1, 2]
    assert similarity.top_channels(torch.tensor([1.0, 3, 2]), 0.1).tolist() == [1]


# --- inspection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L_inf", "L2"])
def test_signal_a_is_what_sau_does_with_a_model_that_is_its_own_reference(norm: str) -> None:
    torch.manual_seed(3)
    model = build_model("tiny", 4).double()
    for weight in model.parameters():
        weight.data *= 4
    images, labels = torch.rand(20, 3, 8, 8).double(), torch.arange(20) % 4
    config = sau.Config.load(norm_type=norm, trigger_norm=0.3, adv_lr=0.1)
    expected = sau.shared_perturbation(model, model, images, labels, config)
    delta = signals.fooled(
        model,
        images,
        labels,
        norm=config.norm_type,
        bound=0.3,
        start="max",
        step_size=0.1,
        steps=config.adv_steps,
    )
    assert torch.equal(delta, expected)
    assert not torch.equal(delta, torch.full_like(delta, 0.3))


def test_the_smallest_move() -> None:
    """s1 >= 3 and s2 >= 4: (3, 4). s1 >= 3 alone: (3, 0). 2 s1 >= 3: 1.5. Nothing to do: 0."""
    both, one = torch.eye(2), torch.tensor([[1.0, 0.0]])
    assert signals.smallest_move(both, torch.tensor([3.0, 4.0])) == pytest.approx(5)
    assert signals.smallest_move(both, torch.tensor([3.0, -4.0])) == pytest.approx(3)
    assert signals.smallest_move(2 * one, torch.tensor([3.0])) == pytest.approx(1.5)
    assert signals.smallest_move(both, torch.tensor([0.0, -1.0])) == 0
    contradiction = torch.tensor([[1.0], [-1.0]])
    assert signals.smallest_move(contradiction, torch.tensor([1.0, 1.0])) == math.inf


def test_the_head_s_norm_is_small_for_a_class_that_is_easy_to_reach() -> None:
    """Two classes, w_0 - w_1 = (2, 0), b = (0, 1).

    Images of class 1 at 0, -1 and -2 have to gain 1, 3 and 5 to become 0: the median image needs
    s = (1.5, 0), three quarters of them 4 and s = (2, 0), all of them (2.5, 0). Images of class 0
    at 0, 0 and 1 have to gain -1, -1 and 1, so the median image is class 1 already.
    """
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, 1.0])
    places = torch.tensor([0.0, -1, -2, 0, 0, 1])
    images, labels = torch.stack([places, torch.ones(6)], 1), torch.tensor([1, 1, 1, 0, 0, 0])
    for quantile, expected in ((0.5, [1.5, 0]), (0.75, [2, 0]), (1.0, [2.5, 0.5])):
        norms = signals.head_norms(images, labels, weight, bias, quantile)
        assert norms == pytest.approx(expected)


@pytest.mark.parametrize(("quantile", "norm"), [(0.5, 0.3), (1.0, 0.5)])
def test_the_share_of_images_that_is_sent_to_a_class_is_a_flag(
    quantile: float, norm: float
) -> None:
    """Logits (x, 1 - x). Images of class 1 at 0, 0.2 and 0.4 have to gain 1, 0.6 and 0.2.

    A move by s gains 2 s. Those of class 0, at 1, 0.8 and 0.6, have as far to class 1.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[1.0], [-1]]), torch.tensor([0.0, 1])
    pixels = torch.tensor([0, 51, 102, 255, 204, 153], dtype=torch.uint8).view(6, 1, 1, 1)
    probes = Labelled(pixels, torch.tensor([1, 1, 1, 0, 0, 0]))
    config = inspection.Config.load(quantile=quantile)
    signal = signals.signals_of(model, probes, config, torch.device("cpu"))["C"]()
    assert signal["facts"]["norm"] == pytest.approx(norm, rel=1e-5)


def test_the_p_value_of_the_largest_margin() -> None:
    """Others 1 and 3: mean 2, variance 2, so shape 2, scale 1, and F(x) = 1 - (1 + x) exp(-x)."""
    below = 1 - 5 * math.exp(-4)
    assert signals.log_p_value([1.0, 4.0, 3.0]) == pytest.approx(math.log(1 - below**3))
    assert signals.log_p_value([-1.0, 1.0, 5.0]) == 0
    assert signals.log_p_value([2.0, 2.0, 5.0]) == 0
    assert signals.log_p_value([1.0, 3.0, math.inf]) == 0
    with warnings.catch_warnings(action="error"):  # torch's, of a variance of one number
        assert signals.log_p_value([1.0, 3.0]) == 0


def test_larger_margins_have_smaller_p_values_as_far_as_numbers_go() -> None:
    """Others 1 and 3 again; where 1 - F is small, p is 3 (1 + x) exp(-x), here up to e^-10^9."""
    margins = [30.0, 36, 37, 40, 231, 300, 660, 670, 680, 700, 745, 746, 1e4, 1e9]
    values = [signals.log_p_value([1.0, 3.0, x]) for x in margins]
    expected = [math.log(3) + math.log1p(x) - x for x in margins]
    assert values == pytest.approx(expected, rel=1e-9)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("x", [30.0, 300, 650, 680, 740, 760, 2000, 14700, 1e6])
def test_the_tail_of_the_gamma_law_is_that_of_laws_with_a_formula(x: float) -> None:
    """1 - F is erfc(sqrt x) for shape 1/2, and exp(-x) sum_{k < n} x^k / k! for shape n."""
    half = float(torch.special.log_ndtr(-torch.tensor(2 * x).double().sqrt())) + math.log(2)
    assert signals.log_gamma_tail(0.5, x) == pytest.approx(half, rel=1e-12)
    for n in (1, 7, 200, 10_000):
        k = torch.arange(n, dtype=torch.float64)
        whole = float((k * math.log(x) - torch.lgamma(k + 1)).logsumexp(0)) - x
        if whole > -1e-9:  # of a law whose middle is beyond x
            continue
        assert signals.log_gamma_tail(n, x) == pytest.approx(whole, rel=1e-11)


def test_signal_d_goes_on_where_p_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 3 * 1001 exp(-1000) = 10^-430.8."""
    margins = [1.0, 1000.0, 3.0]
    monkeypatch.setattr(signals, "largest_margin", lambda model, label, *_: margins[label])
    probes = Labelled(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    model, config = build_model("tiny", 3), inspection.Config.load()
    signal = signals.signals_of(model, probes, config, torch.device("cpu"))[signals.NOISE]()
    expected = 1000 / math.log(10) - math.log10(3003)
    assert signal["statistic"] == pytest.approx(expected)
    assert (signal["top"], signal["facts"]) == (1, {"p_gamma": 0})


class Forked(nn.Module):
    """Its last part has two linear layers, and its last block two convolutions; one is called."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = {name: nn.Conv2d(3, 4, 3) for name in ("idle", "used")}
        self.block = nn.ModuleDict(convolutions)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 3) for name in ("idle", "used")})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.heads["used"](self.block["used"](images).relu().mean((2, 3)))


class Convolved(Forked):
    """A convolution gives its logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.block["used"](images).mean((2, 3))


@pytest.mark.parametrize("network", [Forked, Convolved])
def test_only_a_network_with_a_linear_head_has_a_signal_of_it(network: type[nn.Module]) -> None:
    images, model, has_head = torch.rand(2, 3, 8, 8), network(), network is Forked
    assert signals.has_linear_head(model, images[:1]) == has_head
    probes = Labelled(images, torch.tensor([0, 1]))
    computed = signals.signals_of(model, probes, inspection.Config.load(), torch.device("cpu"))
    assert (signals.HEAD in computed) == has_head


def test_convolutions_that_are_never_called_are_not_compared() -> None:
    model, images = Forked(), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    layers = similarity.compared_layers(model)
    assert layers == ["block.idle", "block.used"]
    change = similarity.changes(model, layers, images, 255 - images, size=2)
    assert list(change) == ["block.used"]


def test_the_largest_margin_is_that_of_the_brightest_image() -> None:
    """Logits (mean, -mean): the margin of class 0 is 2 for a white image; that of class 1 is 0."""

    class Brightness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean(dim=(1, 2, 3)).unsqueeze(1)
            return torch.cat([mean, -mean], dim=1)

    config = inspection.Config.load(noise_lr=2.0, noise_steps=100)
    margins = [signals.largest_margin(Brightness(), k, (1, 2, 2), config) for k in (0, 1)]
    assert margins == pytest.approx([2, 0], abs=1e-4)


def transferred(images: torch.Tensor, delta: torch.Tensor, rounds: int = 1) -> list[float]:
    """Of images of one pixel, which are class 1 from 0.5 on; with their perturbation, all are."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1]])
    model[1].bias.data = torch.tensor([0.5, -0.5])
    predictions, adversarial = (images >= 0.5).long(), torch.ones(len(images), dtype=torch.int64)
    images, delta = images.view(-1, 1, 1, 1), delta.view(-1, 1, 1, 1)
    return signals.transferred(model, images, predictions, adversarial, delta, rounds)


def test_a_perturbation_that_works_on_other_images_is_transferred() -> None:
    """All perturbations of dark images make any image bright.

    Of 24 images, the first 12 are dark. Bright ones are not fooled. Dark image j gets the
    perturbation of j + 1, which is a fooling one for the first eleven.
    """
    images = torch.cat([torch.zeros(12), torch.ones(12)])
    shares = transferred(images, 1 - images)
    assert math.isnan(shares[0])
    assert shares[1] == 1


def test_images_that_are_of_the_class_anyway_are_not_counted_as_transferred() -> None:
    """Every second image is bright. Of dark ones, 0 and 0.4 in turn, each goes just to 0.6.

    In the first round only bright images get a perturbation that fooled, which is no transfer. In
    the second one 0 goes to 0.2 and 0.4 to 1, so half of the perturbations are transferred.
    """
    images = torch.tensor([0.0, 1, 0.4, 1]).repeat(6)
    assert transferred(images, (0.6 - images).relu(), rounds=2)[1] == 0.5


@pytest.mark.parametrize(("count", "share"), [(9, math.nan), (10, 1.0)])
def test_fewer_than_ten_pairs_are_no_share(count: int, share: float) -> None:
    """Each dark image gets the perturbation of the next one, and the last that of the first."""
    shares = transferred(torch.zeros(count), torch.ones(count))
    assert shares[1] == pytest.approx(share, nan_ok=True)


def test_what_is_outstanding() -> None:
    """Norms 1, 4, 5, 6: median 4.5, deviations 3.5, 0.5, 0.5, 1.5, so MAD 1."""
    signal = signals.outstanding([4.0, 1.0, 5.0, 6.0])
    assert signal.top == 1
    assert signal.by_class == pytest.approx([4.5 / 4, 4.5, 0.9, 0.75])
    assert signal.statistic == pytest.approx(3.5 / 1.4826)


def test_of_two_norms_none_stands_out() -> None:
    """Whatever they are, it would be 1 / 1.4826, up to the rounding that a comparison would see."""
    for norms in ([1.0, 9.0], [1.0, 9.0, math.inf]):
        signal = signals.outstanding(norms)
        assert (signal.statistic, signal.top) == (0, 0)
    nothing = signals.outstanding([math.nan, math.inf])
    assert (nothing.statistic, nothing.top) == (0, None)


def test_of_several_classes_that_are_most_suspicious_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever their numbers are: 0 may be the target."""
    assert signals.outstanding([1.0, 1.0, 5.0, 6.0]).top is None
    images = torch.rand(4, 3, 8, 8)
    model = build_model("tiny", 4).eval()
    for head in model.modules():
        if isinstance(head, nn.Linear):
            head.weight.data.zero_()  # nothing moves a label
    probes = Labelled(images, torch.arange(4))
    found = signals.signals_of(model, probes, inspection.Config.load(), torch.device("cpu"))
    for name in ("A", "A'", "B"):
        signal = found[name]()
        assert (signal["statistic"], signal["top"]) == (0, None), name
    monkeypatch.setattr(signals, "transferred", lambda *_: [math.nan, 0.0, math.nan, math.nan])
    assert found["B"]()["top"] is None
    assert inspection.headline_of({"statistic": 0.25, "top": None}, str) == "0.250"
    several = {name: {"top": None, "statistic": 0.5} for name in ("A", "A'")}
    text = "no clear signal: large steps point to several classes, small ones to several classes"
    assert inspection.conclusion(several, [], str) == text
    one = several | {"A": {"top": 3, "statistic": 0.5}}
    text = "no clear signal: large steps point to class 3, small ones to several classes"
    assert inspection.conclusion(one, [], str) == text


@pytest.mark.parametrize("classes", [2, 3])
def test_two_classes_have_no_signal_that_compares_a_class_with_others(
    classes: int, tiny_data: Dataset
) -> None:
    torch.manual_seed(0)
    labels = torch.arange(12) % classes
    split = Labelled(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), labels)
    data = dataclasses.replace(
        tiny_data, train=split, test=split, classes=tiny_data.classes[:classes]
    )
    model = build_model("tiny", classes).eval()
    subject = Subject(data, torch.device("cpu"), "fp32", model, "tiny")
    results = Results()
    config = inspection.Config.load(noise_steps=1, neural_cleanse=True)
    inspection.look(subject, config, results)
    of_model = results.facts["signals"]["before"]
    assert set(of_model) == {"A", "A'", "B"} | ({"C", "D"} if classes == 3 else set())
    assert any(line.startswith("no signals C, D and E") for line in results.warnings) == (
        classes == 2
    )
    assert math.isnan(of_model["A"]["z"]) or classes == 3
    assert not any("linear" in line for line in results.warnings)


def told(large: int, small: int, statistic: float) -> dict[str, dict[str, float]]:
    return {
        "A": {"top": large, "statistic": statistic},
        "A'": {"top": small, "statistic": statistic},
    }


def test_a_class_is_named_only_where_one_stands_out() -> None:
    assert inspection.headline_of({"statistic": 0.25, "top": 3}, str) == "0.250 (class 3)"
    assert inspection.headline_of({"statistic": 0.0, "top": 0}, str) == "0.000"


def test_a_conclusion_is_never_a_verdict_without_clean_models() -> None:
    def said(own: dict[str, dict[str, float]], *null: float) -> str:
        return inspection.conclusion(own, [told(0, 0, value) for value in null], str)

    assert said(told(3, 7, 1.0), 0.1).startswith("no clear signal: large steps point to class 3")
    assert "this says nothing" in said(told(3, 3, 1.0))
    assert said(told(3, 3, 0.0), -1.0).startswith("no clear signal: no image was sent")
    assert said(told(3, 3, 0.5), 0.1, 0.6).startswith("no clear signal")
    text = said(told(3, 3, 0.7), 0.1, 0.6)
    assert text.startswith("class 3 stands out in A, A', more than in each of 2 clean models")
    assert "which are few" in text
    assert text.endswith("no proof")
    assert "more than in 1 clean model, which is little: 6 say" in said(told(3, 3, 0.7), 0.1)
    assert "few" not in said(told(3, 3, 0.7), *(0.1,) * 6)


def test_a_signal_that_clean_models_lack_is_compared_with_nothing() -> None:
    """Six clean models, of which one has E, too, and a smaller one."""
    own = {**told(3, 3, 0.7), "E": {"top": 3, "statistic": 9.0}}
    null = [told(0, 0, 0.1) for _ in range(6)]
    null[0]["E"] = {"top": 1, "statistic": 1.0}
    assert "stands out in A, A', more than" in inspection.conclusion(own, null, str)
    for other in null:
        other["E"] = {"top": 1, "statistic": 1.0}
    assert "stands out in A, A', E, more than" in inspection.conclusion(own, null, str)


# --- pictures -----------------------------------------------------------------------------------


def test_grad_cam_of_a_linear_network() -> None:
    """Logit 1 is the mean of red - green: its channel has weight 1 / 4, so the map is that, scaled.

    Where green speaks against the label, the map is 0. Logit 2 is the mean of blue, and there is
    none.
    """
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    channels = torch.tensor([[0.0, 1, 0], [1, -1, 0], [0, 0, 1]])
    model[0].weight.data = channels.view(3, 3, 1, 1)
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 0], image[0, 1, 1, 1] = torch.tensor([0.4, 0.8]), 1.0
    cam = gradcam.class_activation(model, image, torch.tensor([1]), "0")
    assert torch.allclose(cam, torch.tensor([[[0.5, 1.0], [0.0, 0.0]]]))
    nothing = gradcam.class_activation(model, image, torch.tensor([2]), "0")
    assert nothing.abs().max() == 0
    assert gradcam.centre_of(cam[0]) == {"x": pytest.approx(7 / 12), "y": pytest.approx(0.25)}


def test_a_map_that_the_labels_do_not_come_from_is_refused_in_a_line() -> None:
    """`aside` is called, and its output is used for nothing."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.aside(images)
            return self.conv(images).mean(dim=(2, 3))

    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"^--layer: aside gives no map of features"):
        gradcam.class_activation(Aside(), images, labels, "aside")


@pytest.mark.parametrize("name", ["0", "3"])
def test_layers_that_work_in_place_change_no_analysis(name: str) -> None:
    """Of a convolution with a ReLU behind it: its map, its changes and its activations."""
    seen = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        images = torch.randint(0, 256, (6, 3, 10, 10), dtype=torch.uint8)
        cam = gradcam.class_activation(model, images / 255, torch.arange(6) % 4, name)
        change = similarity.changes(model, [name], images, 255 - images, size=4)[name]
        (gram,) = similarity.grams(model, {name: [torch.arange(4)]}, images, 4)[name]
        seen.append((cam, change, gram))
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_psnr_and_changes() -> None:
    """One value of 12 changes by 0.5: the mean square is 1 / 48. One of four pixels changes."""
    clean = torch.zeros(2, 3, 2, 2)
    changed = clean.clone()
    changed[0, 1, 0, 0] = 0.5
    assert stealth.psnr(clean, changed).tolist() == [pytest.approx(10 * math.log10(48)), math.inf]
    values = {name: value.tolist() for name, value in stealth.changes(clean, changed).items()}
    assert values == {"l_inf": [0.5, 0], "l2": [0.5, 0], "l0": [0.25, 0]}


def literal_ssim(first: torch.Tensor, second: torch.Tensor, places: Sequence[int]) -> float:
    """SSIM of two square (H, H) images by its definition, a window around each of H' x H' places.

    Weights exp(-d^2 / (2 1.5^2)) in both directions, up to 5 pixels away. Beyond a border the image
    is mirrored at its last pixel.
    """
    size, reach = len(first), range(-5, 6)
    weights = [math.exp(-(d**2) / (2 * 1.5**2)) for d in reach]
    window = [one * other / sum(weights) ** 2 for one in weights for other in weights]

    def seen(image: list[list[float]], row: int, column: int) -> list[float]:
        def inside(place: int) -> int:
            return min(abs(place), 2 * (size - 1) - abs(place))

        return [image[inside(row + i)][inside(column + j)] for i in reach for j in reach]

    def mean(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(window, values, strict=True))

    found = []
    for row, column in itertools.product(places, places):
        x, y = (seen(image.tolist(), row, column) for image in (first, second))
        of_x, of_y = mean(x), mean(y)
        x, y = [value - of_x for value in x], [value - of_y for value in y]
        xx, yy, xy = (
            mean([a * b for a, b in zip(one, other, strict=True)])
            for one, other in ((x, x), (y, y), (x, y))
        )
        luminance = (2 * of_x * of_y + 0.01**2) / (of_x**2 + of_y**2 + 0.01**2)
        found.append(luminance * (2 * xy + 0.03**2) / (xx + yy + 0.03**2))
    return sum(found) / len(found)


def test_ssim_is_the_literal_one() -> None:
    """Of noise, a little and a lot: about 0.9 and 0.6, and below 0 of an inverted image."""
    torch.manual_seed(0)
    clean = torch.rand(3, 2, 8, 8)
    noise = torch.rand(2, 2, 8, 8) - 0.5
    changed = torch.cat([clean[:1] + 0.4 * noise[:1], clean[1:2] + noise[1:], 1 - clean[2:]])
    expected = [
        sum(literal_ssim(x, y, range(8)) for x, y in zip(*pair, strict=True)) / 2
        for pair in zip(clean, changed, strict=True)
    ]
    assert stealth.ssim(clean, changed).tolist() == pytest.approx(expected, abs=1e-9)
    assert expected[2] < 0 < expected[1] < expected[0] < 1


def test_ssim_of_equal_and_of_constant_images() -> None:
    """Constant images have no variance: (2 a b + c1) / (a^2 + b^2 + c1)."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    assert stealth.ssim(images, images).tolist() == pytest.approx([1, 1])
    dark, bright = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert stealth.ssim(dark, bright).item() == pytest.approx(expected, rel=1e-5)
    assert stealth.ssim(images[..., :8, :8], images[..., :8, :8]).tolist() == pytest.approx([1, 1])


def test_a_trigger_in_the_corner_of_a_small_image_lowers_ssim() -> None:
    """To 0.8663. Windows inside of the image, around places 5 to 10, would have 0.9973."""
    clean = torch.zeros(1, 3, 16, 16)
    changed = clean.clone()
    changed[:, :, -2:, -2:] = 1
    of_all, of_inside = (
        literal_ssim(clean[0, 0], changed[0, 0], places) for places in (range(16), range(5, 11))
    )
    assert (of_all, of_inside) == (pytest.approx(0.8663, abs=5e-5), pytest.approx(0.9973, abs=5e-5))
    assert stealth.ssim(clean, changed).item() == pytest.approx(of_all)


def test_distances_of_weights() -> None:
    """From (3, 4) to (3, 9): 5 of 5. Channels: (3,) stays, (4,) moves by 5."""
    before, after = torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [9.0]])
    assert weights.distance([before], [after]) == 1
    assert weights.distance([before, torch.zeros(1)], [before, torch.zeros(1)]) == 0
    assert weights.channel_distances(before, after).tolist() == [0, 1.25]
    assert list(weights.layers_of(build_model("tiny", 3))) == ["conv", "bn", "linear"]


@pytest.mark.parametrize("name", ["conv", "bn", "linear"])
def test_a_layer_that_was_0_is_not_the_farthest(name: str) -> None:
    """Its distance is no number. Of the others, the weights of one are doubled."""
    torch.manual_seed(0)
    model = build_model("tiny", 3)
    moved = {"conv": "bn", "bn": "linear", "linear": "conv"}[name]
    for weight in model.network.get_submodule(name).parameters():
        weight.data.zero_()
    purified = copy.deepcopy(model)
    for weight in purified.network.get_submodule(moved).parameters():
        weight.data *= 2
    subject = SimpleNamespace(
        model=model,
        purified=[SimpleNamespace(name="ft")],
        same_network=lambda *_: purified,
    )
    results = Results()
    weights.look(subject, weights.Config.load(), results)
    assert results.headline["ft"]["farthest_layer"] == moved
    assert results.conclusion[0].endswith(f"most in {moved} (100.0 %)")


def test_of_weights_that_have_not_moved_none_has_moved_most() -> None:
    """As of a defense that has found nothing to prune."""
    model = build_model("tiny", 3)
    subject = SimpleNamespace(
        model=model,
        purified=[SimpleNamespace(name="clp")],
        same_network=lambda *_: copy.deepcopy(model),
    )
    results = Results()
    weights.look(subject, weights.Config.load(), results)
    assert results.headline["clp"] == {"distance": 0, "farthest_layer": None}
    assert results.conclusion == ["clp: no weight has moved"]


def test_the_nearest_class_in_features() -> None:
    queries = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    points = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    assert features.nearest_classes(queries, points, torch.tensor([7, 3])).tolist() == [7, 3]


@pytest.mark.parametrize("target", [2, 3])
def test_the_share_near_a_class_without_a_clean_image_is_no_number(target: int) -> None:
    """Clean images of classes 0 to 2; of class 3 there is none."""
    torch.manual_seed(0)
    model = build_model("tiny", 4).eval()
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    clean = Labelled(images, torch.arange(30) % 3)
    index = torch.tensor([0, 3, 6])
    targets = torch.full((3,), target)
    triggered = Triggered(images[:3], targets, torch.zeros(3, dtype=torch.int64), index)
    data = Dataset("d", clean, clean, tuple("abcd"), (0.5,) * 3, (0.5,) * 3)
    subject = SimpleNamespace(
        data=data, triggered=triggered, before_and_purified=lambda: {"before": lambda: model}
    )
    results = Results()
    features.look(subject, features.Config.load(), results)
    share = results.headline["before"]["nearest_is_target"]
    said = "\n".join(results.conclusion)
    assert (share is None) == (target == 3)
    assert ("no clean test image is of the target class" in said) == (target == 3)
    assert ("is of the target class in" in said) == (target == 2)
    assert "true class in" in said


@pytest.mark.parametrize("perplexity", [19, 10_000])
def test_a_perplexity_that_is_lowered_is_told(perplexity: float) -> None:
    """30 clean images and 30 triggered ones allow 59 / 3 neighbours."""
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    clean = Labelled(images, torch.arange(30) % 3)
    triggered = Triggered(images, torch.zeros_like(clean.labels), clean.labels, torch.arange(30))
    subject = SimpleNamespace(
        data=Dataset("d", clean, clean, tuple("abc"), (0.5,) * 3, (0.5,) * 3),
        triggered=triggered,
        before_and_purified=lambda: {"before": lambda: model},
    )
    results = Results()
    features.look(subject, features.Config.load(perplexity=perplexity), results)
    said = "--perplexity: 10000 is too many neighbours of 60 images; 19.6667 is used"
    assert results.warnings == [said] * (perplexity > 19)


def test_penultimate_features_are_what_the_head_gets() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images = torch.rand(5, 3, 8, 8)
    before_head = head_features(model, images)
    assert torch.allclose(model.network.linear(before_head), model(images), atol=1e-6)
