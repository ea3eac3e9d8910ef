"""Choices on the defender's own images: the held-out part, levels, outliers; by hand."""

import math

import pytest
import torch
from torch import nn

from utils.process.seeds import generator
from utils.training.findings import Findings
from utils.training.selection import (
    Best,
    acceptable,
    drawn_by_class,
    drawn_share,
    hold_out,
    outliers,
    tried,
    warn_of_number,
)

# Classes 0, 1, 2, 3 with ten, five, two and one image, mixed.
LABELS = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 3, 1, 0, 0, 1, 2, 0, 1, 0, 0])


def counts(positions: torch.Tensor) -> list[int]:
    return torch.bincount(LABELS[positions], minlength=4).tolist()


def test_hold_out_takes_a_share_of_each_class() -> None:
    """A fifth of 10, 5, 2 and 1: 2, 1, round(0.4) = 0 but at least one, round(0.2) = 0."""
    fit, held = hold_out(LABELS, 0.2, seed=0)
    assert counts(held) == [2, 1, 1, 0]
    assert counts(fit) == [8, 4, 1, 1]


def test_hold_out_splits_the_positions() -> None:
    """Each position is in one of the two parts, in ascending order."""
    fit, held = hold_out(LABELS, 0.4, seed=3)
    assert fit.dtype == held.dtype == torch.int64
    assert fit.tolist() == sorted(fit.tolist())
    assert held.tolist() == sorted(held.tolist())
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(LABELS)))


def test_hold_out_draws_from_its_seed() -> None:
    """The same seed gives the same part; over 40 seeds each image of a large class is held."""
    parts = [hold_out(LABELS, 0.2, seed)[1].tolist() for seed in range(40)]
    assert parts[5] == hold_out(LABELS, 0.2, 5)[1].tolist()
    held = {position for part in parts for position in part}
    assert held == set(range(len(LABELS))) - {8}  # the only image of class 3 stays


def test_hold_out_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    hold_out(LABELS, 0.2, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, [1, 1, 1, 0]), (0.3, [3, 2, 1, 0]), (0.6, [6, 3, 1, 1]), (1.0, [10, 5, 2, 1])],
)
def test_drawn_by_class_rounds_and_takes_one_where_there_are_two(
    share: float, expected: list[int]
) -> None:
    """0.3 of 10, 5, 2, 1 is 3, 1.5 (to even: 2), 0.6, 0.3; 0.6 is 6, 3, 1.2, 0.6."""
    drawn = drawn_by_class(LABELS, share, torch.Generator().manual_seed(0))
    assert counts(drawn) == expected
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.dtype == torch.int64


def test_drawn_by_class_moves_its_generator_and_is_what_is_held_out() -> None:
    rng = generator(7, "held-out part")
    first, second = (drawn_by_class(LABELS, 0.5, rng) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert first.tolist() == hold_out(LABELS, 0.5, 7)[1].tolist()


def test_drawn_by_class_of_nothing_is_nothing() -> None:
    drawn = drawn_by_class(torch.zeros(0, dtype=torch.int64), 0.5, torch.Generator())
    assert drawn.tolist() == []
    assert drawn.dtype == torch.int64


@pytest.mark.parametrize(
    ("accuracies", "before", "ratio", "expected"),
    [
        ([0.90, 0.88, 0.85, 0.89], 0.9, 0.05, 2),  # limit 0.855; what follows a bad one is not good
        ([0.90, 0.88, 0.86, 0.89], 0.9, 0.05, 4),
        ([0.85, 0.90], 0.9, 0.05, 0),
        ([0.75, 0.7499], 1.0, 0.25, 1),  # exactly at the limit is good
        ([0.0, 0.0], 0.9, 1.0, 2),
        ([0.9, 0.8999], 0.9, 0.0, 1),
        ([0.9, 0.95], 0.9, 0.0, 2),
        ([], 0.9, 0.05, 0),
        ([351 / 500], 390 / 500, 0.1, 1),  # exactly at the limit, but for rounding
        ([350 / 500], 390 / 500, 0.1, 0),
    ],
)
def test_acceptable_counts_good_levels_from_the_start(
    accuracies: list[float], before: float, ratio: float, expected: int
) -> None:
    assert acceptable(accuracies, before, ratio) == expected


def test_tried_stops_after_the_first_bad_level() -> None:
    """Levels 1, 2, 3 of accuracies 0.9, 0.85 and 0.89 beside a limit of 0.855: 3 is not tried."""
    asked = []

    def accuracy(level: float) -> float:
        asked.append(level)
        return {1: 0.9, 2: 0.85, 3: 0.89}[level]

    assert tried([1, 2, 3], accuracy, before=0.9, acc_ratio=0.05) == [0.9, 0.85]
    assert asked == [1, 2]


def test_tried_goes_through_all_levels_where_all_are_good() -> None:
    assert tried([1, 2, 3], lambda level: 0.9 - 0.01 * level, 0.9, 0.05) == pytest.approx(
        [0.89, 0.88, 0.87]
    )
    assert tried([], lambda level: 1.0, 0.9, 0.05) == []


@pytest.mark.parametrize(
    ("classes", "each", "ratio", "drawn"),
    [(200, 500, 0.001, 200), (10, 3, 0.5, 20), (4, 1, 0.6, 4), (10, 500, 0.05, None)],
)
def test_another_number_of_images_than_the_ratio_says_is_warned_of(
    classes: int, each: int, ratio: float, drawn: int | None
) -> None:
    """One of each of 200 classes instead of half a one; two of three; all instead of 60 %."""
    labels, findings = torch.arange(classes * each) % classes, Findings()
    index = drawn_share(labels, ratio, seed=0)
    warn_of_number(index, len(labels), ratio, findings)
    assert len(findings.warnings) == (drawn is not None)
    if drawn:
        wanted = round(ratio * len(labels))
        assert f"training images would be {wanted}, but {drawn} are drawn" in findings.warnings[0]


def test_a_warning_about_number_is_about_a_fifth_or_more() -> None:
    findings = Findings()
    for count in (80, 120):
        warn_of_number(torch.arange(count), 1000, 0.1, findings)
    assert findings.warnings == []
    for count in (79, 121):
        warn_of_number(torch.arange(count), 1000, 0.1, findings)
    assert len(findings.warnings) == 2


@pytest.mark.parametrize(("channels", "expected"), [(10, []), (11, [4])])
@pytest.mark.parametrize("are_low", [False, True])
def test_one_outlier_among_equal_channels(
    channels: int, expected: list[int], are_low: bool
) -> None:
    """It is (n - 1) / sqrt(n) deviations away: 2.846 of ten channels, 3.015 of eleven."""
    scores = torch.zeros(channels)
    scores[4] = -2.5 if are_low else 2.5
    assert outliers(scores, 3.0, are_low).nonzero().flatten().tolist() == expected
    assert not outliers(scores, 3.0, not are_low).any()


@pytest.mark.parametrize("channels", [10, 11, 64, 512])
def test_an_outlier_s_distance_in_deviations(channels: int) -> None:
    """Just under (n - 1) / sqrt(n) it counts, just over it does not."""
    scores = torch.zeros(channels)
    scores[0] = 1
    distance = (channels - 1) / math.sqrt(channels)
    assert outliers(scores, 0.999 * distance).tolist() == [True] + [False] * (channels - 1)
    assert not outliers(scores, 1.001 * distance).any()


def test_an_outlier_is_strictly_over_the_bound() -> None:
    """-1, 0, 1: mean 0, unbiased deviation 1, so 1 is not over 0 + 1 * 1."""
    scores = torch.tensor([-1.0, 0.0, 1.0])
    assert outliers(scores, 1.0).tolist() == [False, False, False]
    assert outliers(scores, 0.99).tolist() == [False, False, True]
    assert outliers(scores, 1.0, are_low=True).tolist() == [False, False, False]
    assert outliers(scores, 0.99, are_low=True).tolist() == [True, False, False]


def test_the_low_outlier_of_a_hundred_channels() -> None:
    """99 of 3 and one of 1: mean 2.98, variance (99 * 0.02^2 + 1.98^2) / 99 = 0.04, cut 2.38.

    The one is 1.98 / 0.2 = 9.9 deviations away.
    """
    scores = torch.full((100,), 3.0)
    scores[17] = 1.0
    assert math.isclose(scores.mean(), 2.98, rel_tol=1e-6)
    assert math.isclose(scores.std(), 0.2, rel_tol=1e-5)
    assert outliers(scores, 3.0, are_low=True).nonzero().flatten().tolist() == [17]
    assert outliers(scores, 9.89, are_low=True).nonzero().flatten().tolist() == [17]
    assert not outliers(scores, 9.91, are_low=True).any()


@pytest.mark.parametrize("u", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("value", [0.5, 0.1, math.log(3) / 3, 123.456])
def test_equal_scores_have_no_outlier(value: float, u: float) -> None:
    """The deviation is 0, and nothing is over the mean, whatever the rounding."""
    for channels in (2, 3, 7, 64, 100, 512):
        for dtype in (torch.float32, torch.float64):
            scores = torch.full((channels,), value, dtype=dtype)
            assert not outliers(scores, u).any()
            assert not outliers(scores, u, are_low=True).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_take_no_part(value: float) -> None:
    """Beside eleven channels with one outlier the twelfth changes nothing and is none itself."""
    scores = torch.zeros(12)
    scores[4], scores[7] = 1, value
    expected = [False] * 12
    expected[4] = True
    assert outliers(scores, 3.0).tolist() == expected
    assert outliers(-scores, 3.0, are_low=True).tolist() == expected


def test_fewer_than_two_finite_scores_have_no_outlier() -> None:
    for scores in ([], [1.0], [math.nan, 5.0, math.inf], [math.nan, math.nan]):
        assert outliers(torch.tensor(scores), 0.0).tolist() == [False] * len(scores)


def test_a_bound_without_end_finds_nothing() -> None:
    torch.manual_seed(0)
    scores = torch.randn(64)
    assert outliers(scores, 0.5).any()
    assert not outliers(scores, math.inf).any()
    assert not outliers(scores, 1e9).any()


def test_of_two_scores_either_is_less_than_a_deviation_away() -> None:
    """1 / sqrt(2) of it; a single score has no deviation."""
    scores = torch.tensor([0.0, 2.0, math.inf])
    assert outliers(scores, 0.7).tolist() == [False, True, False]
    assert outliers(scores, 0.71).tolist() == [False, False, False]
    assert outliers(scores[1:], 0.0).tolist() == [False, False]


def test_the_best_model_is_kept_until_it_is_over() -> None:
    """The last one within the error of the smallest value; NaN is none; 3 without a smaller end it.

    Round 3 has the smallest value, and its error counts, not that of another round.
    """
    model = nn.BatchNorm1d(1)
    best = Best(model, patience=3)
    assert best.round == 0
    values = [(0.3, 9.0), (math.nan, 0.0), (0.125, 0.125), (0.25, 0.0), (0.1875, 0.0), (0.26, 9.0)]
    ends, kept = [], []
    for number, (value, error) in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(number)
            model.running_mean.fill_(10 * number)
        ends.append(best.keep(model, value, error, number))
        kept.append(best.round)
    assert ends == [False, False, False, False, False, True]
    assert kept == [1, 1, 3, 4, 5, 5]
    other = nn.BatchNorm1d(1)
    best.put_into(other)
    assert (other.weight.item(), other.running_mean.item()) == (5, 50)
    assert (model.weight.item(), model.running_mean.item()) == (6, 60)


@pytest.mark.parametrize(("least", "last"), [(0, 3), (3, 3), (4, 4), (6, 6)])
def test_it_is_not_over_before_the_least_round(least: int, last: int) -> None:
    best, model = Best(nn.Linear(1, 1), patience=2, least=least), nn.Linear(1, 1)
    ends = [best.keep(model, 0.7, 0.0, number) for number in range(1, 7)]
    assert ends.index(True) + 1 == last
    assert best.round == 6  # of equal ones the last


def test_the_best_model_goes_on_from_its_state() -> None:
    model = nn.Linear(1, 1)
    best = Best(model, patience=3)
    best.keep(model, 1.0, 0.0, 1)
    copied = Best(nn.Linear(1, 1), patience=3)
    for name, tensor in copied.state.items():
        tensor.copy_(best.state[name])
    assert copied.round == 1
    assert not copied.keep(nn.Linear(1, 1), 1.5, 0.0, 2)
    copied.put_into(other := nn.Linear(1, 1))
    assert torch.equal(other.weight, model.weight)


class WithNote(nn.Linear):
    """A user's module whose state dict has more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def test_the_best_of_a_network_with_more_than_tensors_is_kept() -> None:
    model = WithNote(1, 1)
    best = Best(model, patience=3)
    with torch.no_grad():
        model.weight.fill_(3)
    best.keep(model, 1.0, 0.0, 1)
    best.put_into(other := WithNote(1, 1))
    assert other.weight.item() == 3


class WithBuffers(nn.Linear):
    """Has a buffer outside its state dict, and a cache that grows."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)


def test_the_best_of_a_network_has_its_buffers() -> None:
    model = WithBuffers()
    best = Best(model, patience=3)
    model.mean.fill_(7)
    model.table = torch.ones(5)
    best.keep(model, 1.0, 0.0, 1)
    model.mean.fill_(9)
    best.put_into(model)
    assert model.mean.tolist() == [7, 7]
    assert model.table.tolist() == [1] * 5


def test_a_best_model_of_an_earlier_version_has_its_state_dict_alone() -> None:
    model = WithBuffers()
    best = Best(model, patience=3)
    del best.state["weights.mean"]
    with torch.no_grad():
        model.weight.fill_(3)
    best.keep(model, 1.0, 0.0, 1)
    best.put_into(other := WithBuffers())
    assert other.weight.item() == 3
