"""Retuning: which images are replaced, and what the headline tells."""

import copy
from types import SimpleNamespace

import pytest
import torch

from analysis import retune
from analysis.base import Results
from models import build_model
from utils.data.labelled import Dataset
from utils.data.poison import PoisonedSet
from utils.errors import UserError


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
