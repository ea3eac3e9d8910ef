"""Where adversarial images go, by hand."""

import math

import pytest
import torch

from utils.training.labelshare import Tally, add, alone, label_share, robust_z


def test_shares_are_of_images_that_are_of_other_classes() -> None:
    """Five images: true classes 0 0 1 1 2, of which the last one is taken for a 0 when clean.

    To class 0 go images 2 and 3, of the two that are no 0 by label and by prediction: share 1. To
    class 1 goes image 0, of images 0, 1 and 4: a third. Nothing goes to 2. Three images are sent,
    2 : 1 : 0. The image that stays and the one that was a 0 before are not counted as sent.
    """
    tally = Tally(3)
    labels = torch.tensor([0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 1, 1, 0])
    adversarial = torch.tensor([1, 0, 0, 0, 0])
    add(tally, labels[:2], predictions[:2], adversarial[:2])
    add(tally, labels[2:], predictions[2:], adversarial[2:])
    assert tally["matrix"].tolist() == [[1, 1, 0], [2, 0, 0], [1, 0, 0]]
    share = label_share(tally)
    assert share.share == pytest.approx((1, 1 / 3, 0))
    assert share.top == 0
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert share.entropy == pytest.approx(expected)
    assert share.z == pytest.approx((1 - 1 / 3) / (1.4826 / 3))


def test_a_tally_of_nothing() -> None:
    share = label_share(Tally(3))
    assert all(math.isnan(value) for value in share.share)
    assert (share.top, share.z) == (None, 0)
    assert share.entropy == 1


def test_of_several_largest_shares_none_is_the_top() -> None:
    assert alone(torch.tensor([0.5, 0.1, 0.5])) is None
    assert alone(torch.tensor([math.nan, 0.1, 0.5])) == 2
    assert alone(torch.tensor([math.nan, math.nan])) is None
    tally = Tally(3)
    labels = torch.tensor([0, 1, 2])
    add(tally, labels, labels, torch.tensor([1, 0, 2]))
    assert label_share(tally).top is None
    add(tally, labels, labels, torch.tensor([0, 0, 0]))
    assert label_share(tally).top == 0
    zeros = torch.zeros(4, dtype=torch.int64)
    same = Tally(2)
    add(same, zeros, zeros, zeros)  # class 1 alone has a share, of nothing
    assert label_share(same).share[1] == 0
    assert label_share(same).top is None
    one = Tally(3)
    add(one, labels, labels, torch.tensor([0, 1, 0]))
    assert str(label_share(one).entropy) == "0.0"  # and not -0.0


def test_the_robust_deviation_of_the_largest_value() -> None:
    """1 2 3 9: median 2.5, deviations 1.5 0.5 0.5 6.5, so MAD 1."""
    assert robust_z(torch.tensor([1.0, 2, 3, 9, math.nan])) == pytest.approx(6.5 / 1.4826)
    assert robust_z(torch.tensor([1.0, 1, 1, 9])) == math.inf
    assert robust_z(torch.tensor([1.0, 1, 1])) == 0


def test_of_two_values_none_stands_out() -> None:
    """Both are equally far from the median: it would be 1 / 1.4826, whatever they are."""
    assert math.isnan(robust_z(torch.tensor([0.1, 0.9, math.nan])))
    assert math.isnan(robust_z(torch.tensor([0.9])))
    assert robust_z(torch.tensor([0.1, 0.2, 0.9])) > 2
