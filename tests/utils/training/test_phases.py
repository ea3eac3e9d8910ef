"""Phases of a loop: their order, what they keep, and how a cut run goes on in each of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.tensors import load_tensors
from utils.training.loop import Loop


class Cut(Exception):
    """The run was cut off."""


def two_phases(loop: Loop) -> dict[str, Any]:
    """A method with every kind of state: what it has at the end.

    The generator `order` is shared by both phases and draws for other things in between.
    """
    torch.manual_seed(0)
    teacher, model = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    masks = {"a": torch.ones(3), "b": torch.ones(2)}
    best: dict[str, torch.Tensor] = {}
    amount = torch.zeros(())
    for number in loop.rounds(2, "teacher", teacher=teacher, order=order, masks=masks, best=best):
        for index in loop.batches(6, 2, order):
            with torch.no_grad():
                teacher.weight += index.sum() * torch.rand(())  # the global generator
            masks["a"] *= torch.rand(3, generator=order)  # in the middle of a permutation
            loop.log(len(index), loss=teacher.weight.sum())
        if number == 2:
            best["mask"] = masks["a"].clone()
            loop.findings.facts["teacher"] = float(teacher.weight.sum())
    shift = torch.rand((), generator=order)
    for _ in loop.rounds(
        3, model=model, optimizer=optimizer, order=order, noise=noise, amount=amount, best=best
    ):
        for index in loop.batches(6, 2, order):
            loss = (model(teacher.weight) * torch.rand((), generator=noise) + shift).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            amount += index.float().mean()
            best["mask"] = best["mask"] + amount
            loop.log(len(index), loss=loss)
    return {
        "model": model.state_dict(),
        "teacher": teacher.state_dict(),
        "masks": masks,
        "best": best,
        "amount": {"amount": amount},
        "facts": dict(loop.findings.facts),
    }


def cut_after(batch: int, path: Path, losses: list[Any], resume: Any = None) -> Loop:
    """A loop that writes a snapshot after a batch of all that it gives, and ends there."""
    done = 0

    def after_batch(_: int) -> None:
        nonlocal done
        done += 1
        if done == batch:
            torch.save(loop.snapshot(), path)
            raise Cut

    loop = Loop(lambda *report: losses.append(report[:3]), after_batch, resume=resume)
    return loop


@pytest.mark.parametrize("batch", range(1, 16))
def test_a_run_cut_after_any_batch_of_any_phase_goes_on_bit_for_bit(
    tmp_path: Path, batch: int
) -> None:
    """Two rounds of three batches, then three: weights, masks, findings, and losses."""
    losses: list[Any] = []
    again: list[Any] = []
    whole = two_phases(Loop(lambda *report: losses.append(report[:3]), lambda _: None))
    with pytest.raises(Cut):
        two_phases(cut_after(batch, tmp_path / "x.pt", again))
    torch.rand(9)
    kept = load_tensors(tmp_path / "x.pt")
    resumed = two_phases(
        Loop(lambda *report: again.append(report[:3]), lambda _: None, resume=kept)
    )
    assert again == losses
    assert resumed.pop("facts") == whole.pop("facts")
    for name, tensors in whole.items():
        assert list(resumed[name]) == list(tensors)
        assert all(torch.equal(resumed[name][key], value) for key, value in tensors.items()), name


def test_a_phase_that_is_done_gives_no_round(tmp_path: Path) -> None:
    seen: list[str] = []

    def run(loop: Loop) -> None:
        order = torch.Generator()
        for phase in ("one", "two", ""):
            for number in loop.rounds(2, phase, order=order):
                seen.append(f"{phase}{number}")
                for _ in loop.batches(1, 1, order):
                    pass

    with pytest.raises(Cut):
        run(cut_after(3, tmp_path / "x.pt", []))
    assert seen == ["one1", "one2", "two1"]
    seen.clear()
    run(Loop(resume=load_tensors(tmp_path / "x.pt")))
    assert seen == ["two1", "two2", "1", "2"]


def test_a_phase_that_ended_early_is_done(tmp_path: Path) -> None:
    """The second round calls stop(): its report still comes, and a resumed run skips the phase."""
    reports: list[tuple[str, int, bool]] = []

    def run(loop: Loop) -> list[int]:
        order = torch.Generator()
        for number in loop.rounds(9, "search"):
            if number == 2:
                loop.stop()
        rounds = []
        for number in loop.rounds(1, order=order):
            rounds.append(number)
            list(loop.batches(2, 1, order))
        return rounds

    def after_round(number: int, *_: Any) -> None:
        reports.append((loop.phase, number, loop.is_last))

    def after_batch(_: int) -> None:
        torch.save(loop.snapshot(), tmp_path / "x.pt")

    loop = Loop(after_round, after_batch)
    assert run(loop) == [1]
    assert reports == [("search", 1, False), ("search", 2, True), ("", 1, True)]
    reports.clear()
    loop = Loop(after_round, after_batch, resume=load_tensors(tmp_path / "x.pt"))
    run(loop)
    assert reports == [("", 1, True)]


@pytest.mark.parametrize("second", ["search", ""])
def test_a_name_is_used_once_and_the_main_phase_is_the_last(second: str) -> None:
    loop = Loop(after_batch=lambda _: None)
    list(loop.rounds(1, second))
    with pytest.raises(ValueError, match="is run once, and none follows the main one"):
        next(loop.rounds(1, "search"))


def test_a_phase_that_was_left_by_break_is_noticed() -> None:
    loop = Loop()
    for _ in loop.rounds(3, "search"):
        break
    with pytest.raises(ValueError, match=r"left by stop\(\)"):
        next(loop.rounds(1))


def test_state_of_a_kind_that_cannot_be_kept_is_named() -> None:
    loop = Loop()
    next(loop.rounds(1, steps=[1, 2]))
    with pytest.raises(TypeError, match="steps: list is no state that can be kept"):
        loop.snapshot()
    for half in ("state_dict", "load_state_dict"):
        loop = Loop()
        next(loop.rounds(1, it=SimpleNamespace(**{half: dict})))
        with pytest.raises(TypeError, match="it: SimpleNamespace is no state that can be kept"):
            loop.snapshot()


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another phase": lambda kept: kept.update(phase="x"),
    "a part less": lambda kept: kept["objects"].pop("amount"),
    "a part more": lambda kept: kept["objects"].update(x=torch.zeros(1)),
    "another shape": lambda kept: kept["objects"].update(amount=torch.zeros(2)),
    "a phase that was done less": lambda kept: kept["done"].clear(),
    "no order": lambda kept: kept.pop("order_after"),
    "an order that is none": lambda kept: kept.update(order_after=torch.zeros(3)),
    "a round too many": lambda kept: kept.update(round=4),
    "no findings": lambda kept: kept.pop("findings"),
    "a list of phases": lambda kept: kept.update(done=[1]),
}


@pytest.mark.parametrize("way", SPOILED)
def test_a_snapshot_of_another_run_is_refused_in_one_line(tmp_path: Path, way: str) -> None:
    with pytest.raises(Cut):
        two_phases(cut_after(8, tmp_path / "x.pt", []))
    kept = load_tensors(tmp_path / "x.pt")
    SPOILED[way](kept)
    with pytest.raises(UserError, match="--resume: the checkpoint is not of this run") as caught:
        two_phases(Loop(resume=kept))
    assert len(str(caught.value).splitlines()) == 1


def test_a_refusal_of_a_snapshot_has_its_reason(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        two_phases(cut_after(8, tmp_path / "x.pt", []))
    kept = load_tensors(tmp_path / "x.pt") | {"phase": "x"}
    with pytest.raises(
        UserError, match=r"not of this run \(phase 'x' instead of ''\); give --overw"
    ):
        two_phases(Loop(resume=kept))


def test_batches_may_be_drawn_with_replacement() -> None:
    """Of three images, 50 batches of four: each has four, and some image is in a batch twice."""
    order = torch.Generator().manual_seed(0)
    batches = list(Loop().batches(3, 4, order, steps=50))
    assert [len(batch) for batch in batches] == [4] * 50
    assert set(torch.cat(batches).tolist()) == {0, 1, 2}
    assert list(Loop().batches(3, 4, order, steps=0)) == []
    again = list(Loop().batches(3, 4, torch.Generator().manual_seed(0), steps=50))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_a_loss_that_is_not_finite_names_phase_and_flag() -> None:
    loop = Loop()
    rounds = loop.rounds(2, "search", rate="--mask_lr")
    next(rounds)
    loop.log(1, loss=torch.tensor(torch.nan))
    with pytest.raises(UserError, match=r"round 1 of 2 \(search\); give a smaller --mask_lr"):
        next(rounds)


def test_a_snapshot_keeps_the_phases_that_are_done_and_not_the_main_one() -> None:
    """Only where somebody takes snapshots: else there is nothing to keep them for."""
    loop = Loop(after_batch=lambda _: None)
    for phase in ("one", "two", ""):
        list(loop.rounds(1, phase))
    assert list(loop.snapshot()["done"]) == ["one", "two"]
    alone = Loop()
    list(alone.rounds(1, "one"))
    assert alone.snapshot()["done"] == {}


def test_a_run_may_be_cut_again(tmp_path: Path) -> None:
    """In the main phase: the second snapshot has the phase that the first one had done, too."""
    path = tmp_path / "x.pt"
    whole = two_phases(Loop(after_batch=lambda _: None))
    with pytest.raises(Cut):
        two_phases(cut_after(8, path, []))
    with pytest.raises(Cut):
        two_phases(cut_after(3, path, [], resume=load_tensors(path)))
    resumed = two_phases(Loop(resume=load_tensors(path)))
    for name in ("model", "teacher", "masks", "best"):
        assert all(torch.equal(resumed[name][key], value) for key, value in whole[name].items())
