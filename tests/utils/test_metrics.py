"""Scores as numbers."""

import math

import pytest

from utils.metrics import Rate, Scores, defense_effectiveness_rating, has_collapsed, rate_label


def scores(acc: int, asr: int | None = None) -> Scores:
    """Rates in hundredths."""
    return Scores(Rate(acc, 100), None if asr is None else Rate(asr, 100))


@pytest.mark.parametrize(
    ("before", "after", "der"),
    [
        ((95, 95), (93, 5), 0.94),  # dASR 0.90, dACC 0.02: (0.90 - 0.02 + 1) / 2
        ((93, 95), (95, 5), 0.95),  # ACC gained counts as 0: (0.90 - 0 + 1) / 2
        ((93, 95), (99, 5), 0.95),  # however much is gained
        ((95, 95), (95, 95), 0.5),  # nothing happened
        ((95, 50), (95, 80), 0.5),  # ASR that rises counts as 0
        ((95, 50), (85, 80), 0.45),  # and 0.10 of ACC lost: (0 - 0.10 + 1) / 2
        ((90, 100), (90, 0), 1.0),  # best
        ((100, 50), (0, 50), 0.0),  # worst
    ],
)
def test_der(before: tuple[int, int], after: tuple[int, int], der: float) -> None:
    found = defense_effectiveness_rating(scores(*before), scores(*after))
    assert found == pytest.approx(der, abs=1e-12)


def test_der_needs_an_asr_before_and_after() -> None:
    assert defense_effectiveness_rating(scores(90), scores(90)) is None
    assert defense_effectiveness_rating(scores(90, 50), scores(90)) is None
    assert defense_effectiveness_rating(scores(90), scores(90, 50)) is None


def test_an_attack_has_failed_under_half_of_the_triggered_images() -> None:
    assert scores(90, 49).attack_failed
    assert not scores(90, 50).attack_failed
    assert not scores(90).attack_failed  # there is none


def test_a_model_has_collapsed_under_half_of_its_accuracy() -> None:
    assert has_collapsed(0.44, 0.9)
    assert not has_collapsed(0.45, 0.9)


def test_a_rate_is_a_share_shown_in_percent() -> None:
    assert Rate(1, 4).value == 0.25
    assert str(Rate(1, 4)) == "25.00 %"
    assert str(Rate(2, 3)) == "66.67 %"


def test_a_rate_of_nothing_is_no_number() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert str(Rate(0, 0)) == "-"


def test_scores_keep_rates_in_order_with_their_counts() -> None:
    found = Scores(Rate(9, 10), Rate(1, 4), Rate(2, 4))
    assert list(found.rates()) == ["acc", "asr", "ra"]
    assert found.values() == {"acc": 0.9, "asr": 0.25, "ra": 0.5}
    assert found.counts() == {
        "acc": 0.9,
        "acc_hits": 9,
        "acc_total": 10,
        "asr": 0.25,
        "asr_hits": 1,
        "asr_total": 4,
        "ra": 0.5,
        "ra_hits": 2,
        "ra_total": 4,
    }
    assert str(found) == "ACC 90.00 %  ASR 25.00 %  RA 50.00 %"


def test_scores_without_a_trigger_are_acc_alone() -> None:
    found = Scores(Rate(9, 10))
    assert found.values() == {"acc": 0.9}
    assert found.counts() == {"acc": 0.9, "acc_hits": 9, "acc_total": 10}
    assert str(found) == "ACC 90.00 %"


@pytest.mark.parametrize(
    ("name", "label"), [("acc", "ACC"), ("asr", "ASR"), ("ra", "RA"), ("cross_acc", "cross ACC")]
)
def test_labels_of_rates(name: str, label: str) -> None:
    assert rate_label(name) == label
