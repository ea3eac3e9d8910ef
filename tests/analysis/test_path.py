"""The path between two models: its ends, its basins and its edge, by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from analysis import path


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


def test_complex_weights_are_on_the_line_as_well() -> None:
    start, end = {"w": torch.tensor([1 + 0j])}, {"w": torch.tensor([1 + 4j])}
    assert path.interpolated(start, end, 0.25)["w"].tolist() == [1 + 1j]


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
