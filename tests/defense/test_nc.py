"""Neural Cleanse: triggers by hand, the rules of its search, the verdict, and what is unlearned."""

import copy
import dataclasses
import logging
import math
import random
from typing import Any

import pytest
import torch
from torch import nn

from defense import nc
from defense.nc import (
    Config,
    adjust,
    flagged_classes,
    invert_trigger,
    outlier_index,
    purify,
    stamp,
)
from tests.networks import conv_net, copied, differing, problem
from utils.data.batches import augment
from utils.perturb import to_unit
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import fine_tune

NORMS = torch.tensor([10.0, 60, 62, 64, 66, 68, 70, 72, 74, 76])

# the trigger


def test_bounded_by_hand() -> None:
    """tanh(1) = 0.7615942, so 1 becomes 0.880797; 0 becomes 0.5, and no number leaves (0, 1)."""
    theta = torch.tensor([1.0, 0.0, -1.0, 50.0, -50.0], dtype=torch.float64)
    found = to_unit(theta)
    assert found[:3].tolist() == pytest.approx([0.880797, 0.5, 0.119203], abs=1e-6)
    assert float(found[3]) == pytest.approx(1 / (2 + 1e-7) + 0.5, abs=1e-15)
    assert 0 < float(found[4]) < 1e-7
    assert float(found[3]) < 1
    assert to_unit(torch.ones(1, 4, 5)).shape == (1, 4, 5)


def test_the_first_mask_of_the_usual_images_has_a_norm_of_902() -> None:
    """1024 * 0.880797 = 901.94."""
    assert float(to_unit(torch.ones(1, 32, 32)).sum()) == pytest.approx(901.94, abs=0.01)


def test_stamp_by_hand() -> None:
    """(1 - 0.25) 0.8 + 0.25 * 0.4 = 0.7 in the first pixel; elsewhere the mask is 0 or 1."""
    images = torch.full((2, 3, 1, 3), 0.8, dtype=torch.float64)
    mask = torch.tensor([[[0.25, 0.0, 1.0]]], dtype=torch.float64)
    pattern = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(3, 1, 1).expand(3, 1, 3)
    stamped = stamp(images, mask, pattern)
    assert stamped.shape == images.shape
    for number in range(2):
        assert stamped[number, 0, 0].tolist() == pytest.approx([0.7, 0.8, 0.4])
        assert stamped[number, 2, 0].tolist() == pytest.approx([0.75, 0.8, 0.6])


# the rules after a pass


def fresh(cost: float = 1e-3) -> dict[str, torch.Tensor]:
    """The state before the first pass."""
    inf = torch.tensor(torch.inf, dtype=torch.float64)
    return {
        "cost": torch.tensor(cost, dtype=torch.float64),
        "best_norm": inf.clone(),
        "compared_norm": inf.clone(),
        **{name: torch.tensor(0) for name in ("up", "down", "stall", "went_up", "went_down")},
    }


def theta_of(value: float) -> dict[str, torch.Tensor]:
    """A trigger that can be told apart from others."""
    return {
        "mask": torch.full((1, 2, 2), value, dtype=torch.float64, requires_grad=True),
        "pattern": torch.full((3, 2, 2), -value, dtype=torch.float64, requires_grad=True),
    }


class Search:
    """Passes one after the other: (success, norm), and the number of the pass as the trigger."""

    def __init__(self, **flags: Any) -> None:
        self.config = Config.load(**flags)
        self.state, self.best = fresh(self.config.init_cost), {}
        self.passes = 0

    def run(self, *passes: tuple[float, float]) -> list[bool]:
        ends = []
        for success, norm in passes:
            self.passes += 1
            theta = theta_of(self.passes / 8)
            ends.append(adjust(self.state, self.best, theta, success, norm, self.config))
        return ends

    @property
    def cost(self) -> float:
        return float(self.state["cost"])

    @property
    def stored(self) -> int | None:
        """The number of the pass whose trigger is kept."""
        if not self.best:
            return None
        numbers = torch.arange(1, self.passes + 1, dtype=torch.float64)
        mask, pattern = (
            torch.nonzero(to_unit(sign * numbers / 8) == self.best[name][0, 0, 0]).flatten() + 1
            for name, sign in (("mask", 1), ("pattern", -1))
        )
        assert mask.tolist() == pattern.tolist()
        return int(mask)


def test_a_trigger_is_stored_where_it_works_and_is_smaller() -> None:
    """98 % is enough, 97.9 % is not; an equal or larger mask is not stored."""
    search = Search()
    search.run((0.98, 50.0))
    assert search.stored == 1
    search.run((0.979, 10.0), (1.0, 50.0), (1.0, 60.0))
    assert search.stored == 1
    assert float(search.state["best_norm"]) == 50
    search.run((1.0, 49.9))
    assert search.stored == 5
    assert float(search.state["best_norm"]) == pytest.approx(49.9)


def test_what_is_stored_does_not_move_with_the_trigger() -> None:
    search = Search()
    theta = theta_of(1.0)
    adjust(search.state, search.best, theta, 1.0, 5.0, search.config)
    kept = copied(search.best)
    with torch.no_grad():
        theta["mask"] += 1
    assert differing(search.best, kept) == []
    assert not any(value.requires_grad for value in search.best.values())
    assert float(search.best["mask"][0, 0, 0]) == pytest.approx(0.880797, abs=1e-6)
    assert float(search.best["pattern"][0, 0, 0]) == pytest.approx(0.119203, abs=1e-6)


def test_without_a_success_the_first_pass_is_kept() -> None:
    """It does not count as the best norm: the first success replaces it, however large."""
    search = Search()
    search.run((0.5, 5.0), (0.97, 1.0), (0.0, 0.5))
    assert search.stored == 1
    assert math.isinf(search.state["best_norm"])
    search.run((0.99, 900.0))
    assert search.stored == 4
    assert float(search.state["best_norm"]) == 900


def test_the_cost_rises_after_patience_successes_in_a_row() -> None:
    """Five double it, ten make it four times as large; a failure starts the count anew."""
    search = Search(patience=5, cost_multiplier=2.0, init_cost=1e-3)
    search.run(*[(0.98, 50.0)] * 4)
    assert search.cost == 1e-3
    search.run((1.0, 50.0))
    assert search.cost == 2e-3
    search.run(*[(1.0, 50.0)] * 4, (0.9, 50.0), *[(1.0, 50.0)] * 4)
    assert search.cost == 2e-3
    search.run((1.0, 50.0))
    assert search.cost == 4e-3
    assert (int(search.state["went_up"]), int(search.state["went_down"])) == (1, 0)


def test_the_cost_falls_after_patience_failures_in_a_row() -> None:
    """By multiplier^1.5: 3^1.5 = 5.196; a success starts the count anew."""
    search = Search(patience=3, cost_multiplier=3.0, init_cost=1.0)
    search.run((0.9, 50.0), (0.0, 50.0))
    assert search.cost == 1.0
    search.run((1.0, 50.0), (0.9, 50.0), (0.9, 50.0))
    assert search.cost == 1.0
    search.run((0.9, 50.0))
    assert search.cost == pytest.approx(1 / 5.196152, rel=1e-6)
    assert (int(search.state["went_up"]), int(search.state["went_down"])) == (0, 1)
    search.run(*[(0.9, 50.0)] * 3)
    assert search.cost == pytest.approx(1 / 27, rel=1e-12)
    search.run(*[(1.0, 50.0)] * 3)
    assert search.cost == pytest.approx(3 / 27, rel=1e-12)


def test_the_first_store_does_not_stall_and_a_mask_less_than_a_hundredth_smaller_does() -> None:
    """Norms 100, 99 (0.99 of it: no better), 98 (98 < 98.01: better), 97.5, 97.02, 97.01.

    The comparison is with the pass before, whose best norm may have been a little smaller.
    """
    search = Search(patience=99, early_stop_threshold=0.99)
    stalls = []
    for norm in (100.0, 99.0, 98.0, 97.5, 97.02, 120.0, 96.0):
        search.run((1.0, norm))
        stalls.append(int(search.state["stall"]))
    # 99 >= 99; 98 < 98.01; 97.5 >= 97.02; 97.02 >= 96.525; best 97.02 >= 96.05; 96 < 96.0498.
    assert stalls == [0, 1, 0, 1, 2, 3, 0]
    assert float(search.state["compared_norm"]) == 96


def test_nothing_stalls_before_something_is_stored() -> None:
    search = Search(patience=99)
    search.run(*[(0.5, 10.0)] * 7)
    assert int(search.state["stall"]) == 0
    assert math.isinf(search.state["compared_norm"])
    search.run((1.0, 10.0), (0.5, 10.0), (0.5, 10.0))
    assert int(search.state["stall"]) == 2  # failures count from then on


def test_the_search_ends_once_the_cost_went_both_ways_and_the_mask_stalls() -> None:
    """Patience 2. Two successes: up. Two failures: down. Then three passes stall, four have."""
    search = Search(patience=2, early_stop_patience=4)
    ends = search.run((1.0, 10.0), (1.0, 10.0), (0.5, 10.0), (0.5, 10.0))
    assert int(search.state["stall"]) == 3
    assert (int(search.state["went_up"]), int(search.state["went_down"])) == (1, 1)
    assert ends == [False] * 4
    before = copied(search.state)
    assert search.run((1.0, 10.0)) == [True]
    assert int(search.state["stall"]) == 4
    assert differing(search.state, before) == ["stall"]  # without c and d


@pytest.mark.parametrize(("success", "way"), [(1.0, "went_up"), (0.5, "went_down")])
def test_the_search_goes_on_where_the_cost_went_one_way(success: float, way: str) -> None:
    """After the first store 21 passes stall, far more than three, and move the cost one way."""
    search = Search(patience=2, early_stop_patience=3)
    assert not any(search.run((1.0, 10.0), *[(success, 10.0)] * 21))
    assert int(search.state["stall"]) == 21
    went = [name for name in ("went_up", "went_down") if int(search.state[name])]
    assert went == [way]


def test_a_better_mask_is_stored_in_the_pass_before_the_search_may_end() -> None:
    """The stall that ends it is counted after the mask is stored: half of it is better."""
    search = Search(patience=1, early_stop_patience=2)
    search.run((1.0, 10.0), (0.5, 10.0))
    assert int(search.state["stall"]) == 1
    assert search.run((1.0, 5.0)) == [False]
    assert search.stored == 3
    assert search.run((1.0, 4.99), (1.0, 4.98)) == [False, True]
    assert search.stored == 5


def test_without_early_stop_the_search_goes_on() -> None:
    search = Search(patience=1, early_stop_patience=1, early_stop=False)
    assert not any(search.run(*[(1.0, 10.0), (0.5, 10.0)] * 20))
    assert int(search.state["stall"]) == 0


def literal_search(
    passes: list[tuple[float, float]], config: Config
) -> list[tuple[int | None, float, bool]]:
    """After each pass: which one is kept, the cost, whether the search ends; points a to d."""
    cost, best, old_best = config.init_cost, math.inf, math.inf
    kept, stall, up, down, was_up, was_down = None, 0, 0, 0, False, False
    rows: list[tuple[int | None, float, bool]] = []
    for number, (s, r) in enumerate(passes, 1):
        if s >= config.atk_succ_threshold and r < best:
            kept, best = number, r
        if config.early_stop and best < math.inf:
            stall = stall + 1 if best >= config.early_stop_threshold * old_best else 0
            old_best = min(old_best, best)
            if was_up and was_down and stall >= config.early_stop_patience:
                rows.append((kept, cost, True))
                break
        if s >= config.atk_succ_threshold:
            up, down = up + 1, 0
        else:
            up, down = 0, down + 1
        if up == config.patience:
            up, cost, was_up = 0, cost * config.cost_multiplier, True
        elif down == config.patience:
            down, cost, was_down = 0, cost / config.cost_multiplier**1.5, True
        kept = number if kept is None else kept
        rows.append((kept, cost, False))
    return rows


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_rules_equal_their_transcription_on_random_passes(early_stop: bool) -> None:
    source = random.Random(0)
    config = Config.load(patience=2, early_stop_patience=3, early_stop=early_stop)
    has_ended = 0
    for _ in range(20):
        passes, norm, works = [], 100.0, False
        for _ in range(20):
            works = works if source.random() < 0.7 else not works
            norm *= source.uniform(0.96, 1.02)
            passes.append((source.uniform(0.98, 1) if works else source.uniform(0.5, 0.98), norm))
        search = Search()
        search.config = config
        for row in literal_search(passes, config):
            (ends,) = search.run(passes[search.passes])
            assert (search.stored, ends) == (row[0], row[2])
            assert search.cost == pytest.approx(row[1], rel=1e-12)
            has_ended += ends
    assert (has_ended > 5) == early_stop


# the search for a trigger


def quick(**flags: Any) -> Config:
    """Passes of 5, 5 and 2 images, augmented."""
    values = {"nc_epoch": 4, "batch_size": 5, "crop_padding": 1, "flip": True, "mask_lr": 0.3}
    return Config.load(
        **{**values, "atk_succ_threshold": 0.5, "patience": 1, "random_seed": 3, **flags}
    )


def literal_passes(
    model: nn.Module, images: torch.Tensor, target: int, config: Config
) -> tuple[list[dict[str, torch.Tensor]], list[tuple[float, float]]]:
    """Trigger after each pass, and the pass's means over its batches, while the cost is constant.

    Adam written out: betas 0.5 and 0.9, both moments corrected, 1e-8.
    """
    side = images.shape[2]
    theta = [torch.ones(1, side, side), torch.ones(3, side, side)]
    first, second = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    order = generator(config.random_seed, f"batches of class {target}")
    crops = generator(config.random_seed, f"augmentation of class {target}")
    triggers, means, step = [], [], 0
    for _ in range(config.nc_epoch):
        successes, norms = [], []
        shuffled = torch.randperm(len(images), generator=order)
        for begin in range(0, len(images), config.batch_size):
            index = shuffled[begin : begin + config.batch_size]
            x = augment(images[index], config.crop_padding, config.flip, crops)
            theta = [t.detach().requires_grad_() for t in theta]
            mask, pattern = (t.tanh() / (2 + 1e-7) + 0.5 for t in theta)
            logits = model((1 - mask) * x + mask * pattern)
            cost = config.init_cost * mask.sum()
            loss = cost - logits.log_softmax(1)[:, target].mean()
            gradients = torch.autograd.grad(loss, theta)
            successes.append(float((logits.argmax(1) == target).double().mean()))
            norms.append(mask.sum().item())
            step += 1
            for i, g in enumerate(gradients):
                first[i] = 0.5 * first[i] + 0.5 * g
                second[i] = 0.9 * second[i] + 0.1 * g**2
                m, v = first[i] / (1 - 0.5**step), second[i] / (1 - 0.9**step)
                theta[i] = theta[i].detach() - config.mask_lr * m / (v.sqrt() + 1e-8)
        triggers.append({"mask": theta[0].clone(), "pattern": theta[1].clone()})
        means.append((sum(successes) / len(successes), sum(norms) / len(norms)))
    return triggers, means


def test_the_passes_follow_the_literal_procedure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 5, 5 and 2 count alike in the means, which are of before each batch's step."""
    network = conv_net(8)
    images, _ = problem(8)
    config = quick(init_cost=0.02)
    seen = []

    def spy(search: Any, best: Any, theta: Any, success: float, norm: float, _: Any) -> bool:
        seen.append((copied(theta), success, norm))
        best.update({name: to_unit(value.detach()) for name, value in theta.items()})
        return False

    monkeypatch.setattr(nc, "adjust", spy)
    mask, pattern = invert_trigger(network, images, 2, config)
    triggers, means = literal_passes(network, images, 2, config)
    assert len(seen) == 4
    for (theta, success, norm), expected, (s, r) in zip(seen, triggers, means, strict=True):
        for name in theta:
            assert torch.allclose(theta[name], expected[name], rtol=0, atol=1e-4)
        assert success == pytest.approx(s, abs=1e-6)
        assert norm == pytest.approx(r, rel=1e-5)
    # In the third pass 5, 5 and 1 images get there: (1 + 1 + 0.5) / 3, not 11 / 12.
    assert [s for s, _ in means] == pytest.approx([1, 1, 5 / 6, 19 / 30])
    assert torch.allclose(mask, to_unit(triggers[-1]["mask"]), rtol=0, atol=1e-4)
    assert (mask.shape, pattern.shape) == ((1, 8, 8), (3, 8, 8))


def test_the_cost_of_the_rules_is_that_of_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that the rules raise to a thousand lets the mask shrink; at 0 it has no reason to."""
    images, _ = problem()
    norms = {}
    for cost in (0.0, 1000.0):

        def spy(search: Any, best: Any, theta: Any, *_: Any, cost: float = cost) -> bool:
            search["cost"].fill_(cost)
            best.update({name: to_unit(value.detach()) for name, value in theta.items()})
            return False

        monkeypatch.setattr(nc, "adjust", spy)
        norms[cost] = float(invert_trigger(conv_net(), images, 1, quick(init_cost=0.0))[0].sum())
    assert norms[1000.0] < 0.6 * norms[0.0]


def test_the_rules_can_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def spy(search: Any, best: Any, theta: Any, *_: Any) -> bool:
        best.update({name: to_unit(value.detach()) for name, value in theta.items()})
        return len(rounds) == 1

    monkeypatch.setattr(nc, "adjust", spy)
    loop = Loop(lambda number, total, losses, state: rounds.append((loop.phase, number, total)))
    invert_trigger(conv_net(), problem()[0], 3, quick(), loop)
    assert rounds == [("class 3", 1, 4), ("class 3", 2, 4)]


def test_the_search_leaves_the_model_as_it_is_and_uses_eval_mode() -> None:
    """The same from either mode; no weight gets a gradient, and each keeps its requires_grad."""
    images, _ = problem()
    found = []
    for is_training in (False, True):
        network = conv_net().train(is_training)
        network.conv1.weight.requires_grad_(False)
        before = copied(network.state_dict())
        found.append(invert_trigger(network, images, 1, quick()))
        assert differing(network.state_dict(), before) == []
        assert network.bn1.training == is_training
        assert not network.conv1.weight.requires_grad
        assert network.linear.weight.requires_grad
        assert all(weight.grad is None for weight in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class FirstPixel(nn.Module):
    """logit_0 = 100 x the red of pixel (0, 0); the other two logits are 50."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(100.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixel = self.factor * images[:, 0, 0, 0]
        return torch.stack([pixel, *[torch.full_like(pixel, 50.0)] * 2], dim=1)


def test_the_mask_concentrates_on_the_pixel_that_decides() -> None:
    """Elsewhere only the cost acts. There 0.5 is needed, and of a dark image a mask m and a bright
    pattern make m.
    """
    images = 0.4 * torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    config = Config.load(
        nc_epoch=60, mask_lr=0.1, init_cost=0.1, batch_size=8, crop_padding=0, flip=False
    )
    mask, pattern = invert_trigger(FirstPixel(), images, 0, config)
    others = mask.flatten()[1:]
    assert 0.4 < float(mask[0, 0, 0]) < 0.6
    assert float(pattern[0, 0, 0]) > 0.95
    assert float(others.max()) < 0.01
    stamped = FirstPixel()(stamp(images, mask, pattern)).argmax(1)
    assert stamped.tolist() == [0] * 8


@pytest.mark.parametrize(
    ("passes", "failed", "said"),
    [
        (1, [1, 2], "classes 1, 2: their norms are of the first pass"),
        (40, [2], "class 2: its norm is of the first pass"),
    ],
)
def test_classes_whose_trigger_never_worked_are_named(
    passes: int, failed: list[int], said: str
) -> None:
    """A full mask sends all to class 0. Of classes 1 and 2, which have one logit, 1 is first."""
    images = problem()[0][:8]
    loop = Loop()
    flags = {"batch_size": 8, "crop_padding": 0, "flip": False, "n_rounds": 0, "mask_lr": 0.3}
    purify(FirstPixel(), images, torch.zeros(8).long(), Config.load(nc_epoch=passes, **flags), loop)
    assert loop.findings.facts["without_trigger"] == failed
    (line,) = [text for text in loop.findings.warnings if text.startswith("no trigger sent")]
    assert line.startswith(f"no trigger sent 98 % of the images to {said} and may mislead")


# outliers among the norms


def test_the_outlier_index_by_hand() -> None:
    """Median 66 (the lower one); distances 56 6 4 2 0 2 4 6 8 10, whose lower median is 4.

    1.4826 * 4 = 5.9304, 56 / 5.9304 = 9.4429; with the mean of the two middle values it would be
    7.6892.
    """
    index = outlier_index(NORMS)
    assert float(index[0]) == pytest.approx(9.4429, abs=1e-4)
    assert index[1:].tolist() == pytest.approx([n / 5.9304 for n in (6, 4, 2, 0, 2, 4, 6, 8, 10)])
    assert flagged_classes(NORMS) == [0]


def test_a_threshold_is_strict() -> None:
    """The index of class 0 itself is not over itself."""
    index = float(outlier_index(NORMS)[0])
    assert flagged_classes(NORMS, index) == []
    assert flagged_classes(NORMS, index - 1e-3) == [0]


def test_a_class_is_flagged_from_an_index_of_two() -> None:
    """Median 99, distances 0, 1, 1, 2, 3 and d, their median 1: the index is d / 1.4826."""
    for index, expected in ((1.9, []), (2.1, [5]), (2.9, [5])):
        norms = torch.tensor([100.0, 99, 101, 98, 102, 99 - 1.4826 * index])
        assert flagged_classes(norms) == expected


def test_large_masks_are_not_flagged() -> None:
    """300 is as far from the median as can be, but over it."""
    norms = torch.tensor([60.0, 62, 64, 66, 300])
    assert float(outlier_index(norms)[4]) > 50
    assert flagged_classes(norms) == []


def test_flagged_classes_come_smallest_first() -> None:
    norms = torch.tensor([70.0, 20, 66, 68, 10, 72, 64, 74])
    assert flagged_classes(norms) == [4, 1]
    norms[4] = 20.0
    assert flagged_classes(norms) == [1, 4]  # equal ones by their number


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_equal_norms_have_no_index(count: int) -> None:
    """0 / 0 is taken for 0."""
    norms = torch.full((count,), 5.0)
    assert outlier_index(norms).tolist() == [0.0] * count
    assert flagged_classes(norms) == []


def test_where_most_norms_are_equal_another_one_stands_out_without_bound() -> None:
    """The median distance is 0: what is the median has 0, all else infinity."""
    norms = torch.tensor([5.0, 5, 5, 1, 9])
    assert outlier_index(norms).tolist() == [0, 0, 0, math.inf, math.inf]
    assert flagged_classes(norms) == [3]


# unlearning


@dataclasses.dataclass
class Tuned:
    """What `fine_tune` was given."""

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    flags: Config


def given_triggers(patch: pytest.MonkeyPatch, norms: list[float]) -> list[nc.Trigger]:
    """Searches that give masks of these norms at once; patterns of which each is another one."""
    triggers = [
        (torch.full((1, 8, 8), norm / 64), torch.full((3, 8, 8), 0.1 * (label + 1)))
        for label, norm in enumerate(norms)
    ]
    patch.setattr(nc, "invert_trigger", lambda model, images, target, *_: triggers[target])
    return triggers


def spied_tuning(patch: pytest.MonkeyPatch) -> list[Tuned]:
    calls: list[Tuned] = []

    def spy(model: nn.Module, images: Any, labels: Any, flags: Any, loop: Loop) -> None:
        calls.append(Tuned(model, images, labels, flags))

    patch.setattr(nc, "fine_tune", spy)
    return calls


def numbered(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i has the value i / 100 everywhere, and the label i mod 4."""
    values = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1) / 100
    return values.expand(-1, 3, 8, 8).contiguous(), torch.arange(count) % 4


@pytest.mark.parametrize(
    ("norms", "flagged"), [([1.0, 31, 30, 32], [0]), ([31.0, 2, 30, 1, 32, 33, 34], [3, 1])]
)
def test_a_stamped_share_for_each_flagged_class(
    norms: list[float], flagged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 images a fifth, four, is stamped once for each flagged class; 16 stay as they are.

    True labels are kept.
    """
    triggers = given_triggers(monkeypatch, norms)
    calls = spied_tuning(monkeypatch)
    images, labels = numbered()
    network = conv_net(classes=len(norms)).float()
    config = Config.load(unlearning_ratio=0.2)
    purify(network, images, labels, config)
    (call,) = calls
    assert call.flags is config
    assert call.model is not network
    assert len(call.images) == len(call.labels) == 16 + 4 * len(flagged)

    rest = (call.images[:16, 0, 0, 0] * 100).round().long()
    share = sorted(set(range(20)) - set(rest.tolist()))
    assert len(share) == 4
    assert torch.equal(call.images[:16], images[rest])
    assert torch.equal(call.labels[:16], labels[rest])
    for number, label in enumerate(flagged):
        part = slice(16 + 4 * number, 20 + 4 * number)
        mask, pattern = triggers[label]
        numbers = ((call.images[part] - mask * pattern) / (1 - mask))[:, 0, 0, 0] * 100
        numbers = numbers.round().long()
        assert sorted(numbers.tolist()) == share
        expected = stamp(images[numbers], mask, pattern)
        assert torch.allclose(call.images[part], expected, rtol=0, atol=1e-6)
        assert torch.equal(call.labels[part], labels[numbers])


def test_the_number_of_stamped_images_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of 19 images is 3.8: four are stamped for each of two classes, and 15 stay."""
    norms = [31.0, 2, 30, 1, 32, 33, 34]
    given_triggers(monkeypatch, norms)
    calls = spied_tuning(monkeypatch)
    network = conv_net(classes=len(norms)).float()
    purify(network, *numbered(19), Config.load(unlearning_ratio=0.2))
    assert len(calls[0].images) == len(calls[0].labels) == 15 + 2 * 4


def test_the_share_is_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    given_triggers(monkeypatch, [1.0, 31, 30, 32])
    calls = spied_tuning(monkeypatch)
    for seed in (0, 0, 1):
        purify(conv_net().float(), *numbered(), Config.load(random_seed=seed))
    assert torch.equal(calls[0].images, calls[1].images)
    assert not torch.equal(calls[0].images, calls[2].images)


def test_uint8_images_are_stamped_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    given_triggers(monkeypatch, [1.0, 31, 30, 32])
    calls = spied_tuning(monkeypatch)
    images, labels = numbered()
    as_bytes = (images * 100).to(torch.uint8)
    purify(conv_net().float(), as_bytes, labels, Config.load())
    purify(conv_net().float(), as_bytes.float() / 255, labels, Config.load())
    assert calls[0].images.dtype == torch.float32
    assert torch.allclose(calls[0].images, calls[1].images, rtol=0, atol=1e-7)


def test_the_model_is_tuned_by_the_shared_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is what `fine_tune` makes of a copy and the stamped images."""
    given_triggers(monkeypatch, [1.0, 31, 30, 32])
    config = Config.load(n_rounds=2, batch_size=7, crop_padding=1)
    images, labels = numbered()
    network = conv_net().float().train()
    before = copied(network.state_dict())
    purified = purify(network, images, labels, config)
    calls = spied_tuning(monkeypatch)
    purify(network, images, labels, config)
    expected = copy.deepcopy(network)
    fine_tune(expected, calls[0].images, calls[0].labels, config, Loop())
    assert differing(purified.state_dict(), expected.state_dict()) == []
    assert differing(network.state_dict(), before) == []
    assert network.training
    assert not any(module.training for module in purified.modules())
    assert all(weight.requires_grad for weight in purified.parameters())


def test_without_a_flagged_class_the_model_is_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, as a copy in eval mode; a line says so."""
    given_triggers(monkeypatch, [30.0, 31, 32, 33])
    calls = spied_tuning(monkeypatch)
    network = conv_net().float().train()
    loop = Loop()
    with caplog.at_level(logging.INFO, "sau"):
        purified = purify(network, *numbered(), Config.load(), loop)
    assert calls == []
    assert purified is not network
    assert differing(purified.state_dict(), network.state_dict()) == []
    assert not purified.training
    assert network.training
    assert [r.message for r in caplog.records] == [
        "no class is flagged, so the model is given back as it was"
    ]
    assert loop.findings.verdict is not None
    assert not loop.findings.verdict.is_backdoored
    assert loop.findings.verdict.targets == ()


def test_the_verdict_names_targets_and_how_suspicious_each_class_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms of the outlier's example: classes over the median have no suspicion."""
    given_triggers(monkeypatch, NORMS.tolist())
    spied_tuning(monkeypatch)
    loop = Loop()
    purify(conv_net(classes=10).float(), *numbered(), Config.load(), loop)
    verdict = loop.findings.verdict
    assert verdict is not None
    assert verdict.is_backdoored
    assert verdict.targets == (0,)
    expected = [9.4429, 6 / 5.9304, 4 / 5.9304, 2 / 5.9304, 0, 0, 0, 0, 0, 0]
    assert list(verdict.suspicion) == pytest.approx(expected, abs=1e-4)
    rows = loop.findings.tables["norms"]
    assert [row["class"] for row in rows] == list(range(10))
    assert [row["mask_norm"] for row in rows] == pytest.approx(NORMS.tolist(), abs=1e-3)
    assert rows[9]["index"] == pytest.approx(10 / 5.9304, abs=1e-4)


def test_of_two_classes_none_is_flagged_and_there_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The smaller norm is the lower median; of three classes the smallest may be an outlier."""
    assert flagged_classes(torch.tensor([1.0, 900])) == []
    assert flagged_classes(torch.tensor([900.0, 1])) == []
    for classes, norms in ((2, [1.0, 30]), (3, [1.0, 30, 31])):
        given_triggers(monkeypatch, norms)
        spied_tuning(monkeypatch)
        loop, images = Loop(), problem(classes=classes)[0].float()
        purify(conv_net(classes=classes).float(), images, torch.arange(12) % 2, Config.load(), loop)
        warned = any(
            "of two classes none can be flagged" in text for text in loop.findings.warnings
        )
        assert warned == (classes == 2)
        assert (loop.findings.verdict is None) == (classes == 2)
        assert len(loop.findings.tables["norms"]) == classes


def test_a_higher_threshold_flags_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given_triggers(monkeypatch, NORMS.tolist())
    calls = spied_tuning(monkeypatch)
    network = conv_net(classes=10).float()
    purify(network, *numbered(), Config.load(mad_threshold=9.4))
    assert len(calls) == 1
    purify(network, *numbered(), Config.load(mad_threshold=9.5))
    assert len(calls) == 1


def test_the_picture_shows_the_eight_smallest_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    triggers = given_triggers(monkeypatch, NORMS.flip(0).tolist())
    spied_tuning(monkeypatch)
    images, labels = numbered()
    loop = Loop()
    purify(conv_net(classes=10).float(), images + 0.5, labels, Config.load(), loop)
    picture = loop.findings.pictures["triggers"]
    order = [9, 8, 7, 6, 5, 4, 3, 2]
    assert not picture.is_labelled
    assert [text.split("\n")[0] for text in picture.captions["mask"]] == [
        f"class {label}" for label in order
    ]
    assert {name: tuple(row.shape) for name, row in picture.rows.items()} == dict.fromkeys(
        ("mask", "pattern", "stamped"), (8, 3, 8, 8)
    )
    for place, label in enumerate(order):
        mask, pattern = triggers[label]
        assert torch.equal(picture.rows["mask"][place], mask.expand(3, -1, -1))
        assert torch.equal(picture.rows["pattern"][place], pattern)
        expected = stamp(images[:1] + 0.5, mask, pattern)[0]
        assert torch.allclose(picture.rows["stamped"][place], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_findings_of_grey_images_can_be_kept_and_restored(dtype: torch.dtype) -> None:
    """Masks, patterns and stamped images have one channel, and are float32."""
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    loop, other = Loop(), Loop()
    purify(network, images, torch.arange(6) % 3, Config.load(nc_epoch=1, n_rounds=0), loop)
    other.findings.load_state_dict(loop.findings.state_dict())
    rows = other.findings.pictures["triggers"].rows
    assert {tuple(row.shape) for row in rows.values()} == {(3, 1, 8, 8)}
    assert torch.equal(rows["mask"], loop.findings.pictures["triggers"].rows["mask"])


class Rows(nn.Module):
    """Eight classes: a logit is 100 x the red of pixel (0, 0), or of a row's mean, less 20."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(100.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0]
        return self.factor * (torch.cat([red[:, 0, :1], red[:, 1:].mean(2)], dim=1) - 0.2)


def test_a_search_for_each_class_finds_the_one_with_the_small_trigger() -> None:
    """A pixel moves class 0, a row of eight each other one. Without rounds no weight moves."""
    images = 0.4 * torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    config = Config.load(
        **{"nc_epoch": 40, "mask_lr": 0.3, "init_cost": 0.1, "batch_size": 16, "patience": 3},
        **{"atk_succ_threshold": 0.9, "crop_padding": 0, "flip": False},
        **{"n_rounds": 0, "lr_scheduler": "constant"},
    )
    phases: list[str] = []
    loop = Loop(lambda *_: phases.append(loop.phase))
    purified = purify(Rows(), images, torch.zeros(16, dtype=torch.int64), config, loop)
    assert loop.findings.verdict is not None
    assert loop.findings.verdict.targets == (0,)
    assert list(dict.fromkeys(phases)) == [f"class {label}" for label in range(8)]
    assert purified.factor.item() == 100


def test_a_search_compares_in_double_precision() -> None:
    """A norm rounded to single precision would be larger than itself, and so than a better one."""
    seen: list[dict[str, torch.Tensor]] = []
    loop = Loop(lambda number, total, losses, state: seen.append(state["search"]))
    invert_trigger(conv_net(), problem()[0], 0, Config.load(nc_epoch=1, crop_padding=0), loop)
    kinds = {name: seen[0][name].dtype for name in ("cost", "best_norm", "compared_norm")}
    assert kinds == dict.fromkeys(kinds, torch.float64)


def test_a_trigger_that_no_image_gets_is_told() -> None:
    """Of 14 images, 3 % is none; a ratio of 0 is the user's wish."""
    model, (images, labels) = conv_net(), problem(0, 14)
    for ratio, count in ((0.03, 1), (0.04, 0), (0.0, 0)):
        flags: dict[str, Any] = {"nc_epoch": 1, "n_rounds": 1, "mad_threshold": 0.0}
        flags |= {"crop_padding": 0, "flip": False}
        loop = Loop()
        purify(model, images, labels, Config.load(unlearning_ratio=ratio, **flags), loop)
        assert loop.findings.verdict is not None
        assert loop.findings.verdict.is_backdoored
        assert [w for w in loop.findings.warnings if "unlearning_ratio" in w] == [
            "--unlearning_ratio: 0.03 of 14 images is none, so no trigger is unlearned; give at "
            "least 0.0715, or more images"
        ][:count]
