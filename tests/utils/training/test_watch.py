"""What watches a run: rows, phases, the scores of the model that comes out, and its time."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from utils.data.labelled import Dataset
from utils.metrics import Rate, Scores
from utils.process.script import Stopped, _Stop
from utils.records.folders import RunFolder
from utils.tensors import load_tensors
from utils.training.watch import Watch, scorer


class Numbered(nn.Module):
    """A model whose accuracy is its number, in percent."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(float(number)))


def score(model: nn.Module) -> Scores:
    assert isinstance(model, Numbered)
    return Scores(Rate(int(model.number), 100))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Signals are not put off when a test ends."""
    yield
    _Stop.is_deferred, _Stop.signal = False, None


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "x")
    run.start("lr: 0.1\n")
    return run


def rows(folder: RunFolder, name: str = "metrics.csv") -> list[dict[str, object]]:
    """A table without its times; cells without a value are left away."""
    table = pd.read_csv(folder.path / name).drop(columns="seconds")
    return [
        {str(key): value for key, value in row.items() if value == value}
        for row in table.to_dict("records")
    ]


def test_the_last_row_has_the_scores_of_the_model_that_comes_out(folder: RunFolder) -> None:
    """Not of the one that was trained; each is scored once."""
    trained = Numbered(10)
    watch = Watch(folder, "round", score, eval_every=1)
    loop = watch.start(score(Numbered(90)))
    for number in loop.rounds(3, model=trained):
        trained.number.data.fill_(10 * number)
        loop.log(1, loss=torch.tensor(float(number)))
    after = watch.finish(Numbered(77))
    assert after.acc == Rate(77, 100)
    assert rows(folder) == [
        {"round": 0, "acc": 0.9},
        {"round": 1, "acc": 0.1, "loss": 1.0},
        {"round": 2, "acc": 0.2, "loss": 2.0},
        {"round": 3, "acc": 0.77, "loss": 3.0},
    ]


def test_rounds_between_two_evaluations_are_not_scored(folder: RunFolder) -> None:
    watch = Watch(folder, "round", score, eval_every=2)
    for _ in watch.start().rounds(5, model=Numbered(50)):
        pass
    watch.finish(Numbered(60))
    assert [row.get("acc") for row in rows(folder)] == [None, 0.5, None, 0.5, 0.6]


def test_no_round_is_scored_where_none_shall_be(folder: RunFolder) -> None:
    watch = Watch(folder, "round", score, eval_every=None)
    for _ in watch.start().rounds(2, model=Numbered(50)):
        pass
    watch.finish(Numbered(60))
    assert [row.get("acc") for row in rows(folder)] == [None, 0.6]


def test_a_model_that_no_round_has_changed_is_scored_all_the_same(folder: RunFolder) -> None:
    """Row 0 stays what was before."""
    watch = Watch(folder, "round", score, eval_every=1)
    assert list(watch.start(score(Numbered(90))).rounds(0)) == []
    assert watch.finish(Numbered(80)).acc.value == 0.8
    assert rows(folder) == [{"round": 0, "acc": 0.9}]
    assert not _Stop.is_deferred


def test_earlier_phases_have_a_table_of_their_own(folder: RunFolder) -> None:
    """Where a phase has no model nothing is scored; the last round of such a phase may be."""
    watch = Watch(folder, "round", score, eval_every=1)
    loop = watch.start()
    for _ in loop.rounds(1, "search"):
        loop.log(1, norm=torch.tensor(3.0))
    for _ in loop.rounds(1, "teacher", model=Numbered(30)):
        loop.log(1, loss=torch.tensor(2.0))
    for _ in loop.rounds(1, model=Numbered(40)):
        pass
    watch.finish(Numbered(50))
    assert rows(folder, "phases.csv") == [
        {"phase": "search", "round": 1, "loss_norm": 3.0},
        {"phase": "teacher", "round": 1, "loss": 2.0, "acc": 0.3},
    ]
    assert rows(folder) == [{"round": 1, "acc": 0.5}]


def test_a_run_of_one_phase_has_no_table_of_phases(folder: RunFolder) -> None:
    watch = Watch(folder, "round", score, eval_every=1)
    for _ in watch.start().rounds(1, model=Numbered(1)):
        pass
    watch.finish(Numbered(1))
    assert not (folder.path / "phases.csv").exists()


def test_the_method_s_own_time_is_told_from_that_of_scores_and_files(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds of 5 seconds, and 2 more before the model is given; 100 for each score.

    The checkpoint of the last batch is made after 3 * 5 seconds, two scores, and two checkpoints.
    """
    clock = [70.0]
    monkeypatch.setattr("utils.training.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(model: nn.Module) -> Scores:
        clock[0] += 100
        return score(model)

    watch = Watch(folder, "round", slow, eval_every=1, checkpoint_every=0)
    loop = watch.start(score(Numbered(9)))
    write = folder.write_checkpoint

    def slowly(content: dict[str, object]) -> None:
        clock[0] += 1000
        write(content)

    monkeypatch.setattr(folder, "write_checkpoint", slowly)
    order = torch.Generator()
    for _ in loop.rounds(3, model=Numbered(1), order=order):
        for _ in loop.batches(1, 1, order):
            clock[0] += 5
    clock[0] += 2
    watch.finish(Numbered(1))
    assert watch.training_seconds == 17
    kept = load_tensors(folder.path / "checkpoint.pt")
    assert kept["training_seconds"] == 15
    assert kept["seconds"] == 15 + 2 * 100 + 2 * 1000
    again = Watch(folder, "round", slow, eval_every=1, checkpoint=kept)
    assert again.training_seconds == 15
    assert again.earlier == kept["seconds"]


def test_a_signal_ends_a_phase_that_has_no_batches(folder: RunFolder) -> None:
    """It waits for the end of the round, and there is no checkpoint to go on from."""
    watch = Watch(folder, "round", score, eval_every=1)
    rounds = watch.start().rounds(5, "search")
    assert [next(rounds), next(rounds)] == [1, 2]
    _Stop.signal = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped in search, round 2"):
        next(rounds)
    assert not _Stop.is_deferred
    assert not (folder.path / "checkpoint.pt").exists()


def test_signals_are_no_longer_put_off_once_the_last_round_is_over(folder: RunFolder) -> None:
    """What a method does after it, such as a selection, can be ended at once."""
    watch = Watch(folder, "round", score, eval_every=1)
    loop = watch.start()
    assert _Stop.is_deferred
    for _ in loop.rounds(1, "search"):
        pass
    assert _Stop.is_deferred
    for _ in loop.rounds(1):
        pass
    assert not _Stop.is_deferred


def test_the_last_round_is_the_one_that_calls_stop(folder: RunFolder) -> None:
    watch = Watch(folder, "round", score, eval_every=1)
    loop = watch.start()
    for number in loop.rounds(9, model=Numbered(20)):
        if number == 2:
            loop.stop()
    watch.finish(Numbered(70))
    assert [row.get("acc") for row in rows(folder)] == [0.2, 0.7]


def test_a_resumed_watch_goes_on_with_all_its_rows_and_its_seconds(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the phases before, too; a checkpoint that is older than these has none."""
    clock = [1000.0]
    monkeypatch.setattr("utils.training.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    kept = {
        "loop": None,
        "rows": [{"round": 0, "acc": 0.5, "seconds": 0.0}],
        "phase_rows": [{"phase": "search", "round": 1, "seconds": 30.0}],
        "seconds": 40.0,
    }
    watch = Watch(folder, "round", score, eval_every=1, checkpoint=kept)
    assert (watch.earlier, watch.training_seconds) == (40, 0)
    clock[0] += 5
    loop = watch.start()
    for _ in loop.rounds(1, "teacher"):
        pass
    for _ in loop.rounds(1):
        pass
    phases = pd.read_csv(folder.path / "phases.csv")
    assert phases["phase"].tolist() == ["search", "teacher"]
    assert phases["seconds"].tolist() == [30, 45]
    assert [(row["round"], row["seconds"]) for row in watch.metrics] == [(0, 0), (1, 45)]
    del kept["phase_rows"]
    fresh = Watch(folder, "round", score, eval_every=1, checkpoint=kept)
    for _ in fresh.start().rounds(1, "teacher"):
        pass
    assert pd.read_csv(folder.path / "phases.csv")["phase"].tolist() == ["teacher"]


def test_a_watch_without_a_folder_writes_nothing_and_keeps_signals(tmp_path: Path) -> None:
    watch = Watch(None, "epoch", score, eval_every=1, checkpoint_every=0)
    assert watch.findings.facts == {}
    loop = watch.start()
    assert watch.findings is loop.findings
    assert not _Stop.is_deferred
    order = torch.Generator()
    for _ in loop.rounds(2, model=Numbered(40)):
        for _ in loop.batches(3, 1, order):
            pass
    assert watch.finish(Numbered(60)).acc.value == 0.6
    assert [(row["epoch"], row["acc"]) for row in watch.metrics] == [(1, 0.4), (2, 0.6)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batches", "expected"), [(1, []), (2, [10]), (5, [10, 20, 25])])
def test_checkpoints_are_made_after_batches_that_are_late_enough_and_after_the_last_one(
    batches: int, expected: list[int], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 5 seconds and a checkpoint every 10. A run too short for one gets none."""
    clock, saved = [0.0], []
    monkeypatch.setattr("utils.training.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(folder, "write_checkpoint", lambda content: saved.append(clock[0]))
    watch = Watch(folder, "round", score, eval_every=1, checkpoint_every=10)
    loop, order = watch.start(), torch.Generator()
    for _ in loop.rounds(1, order=order):
        for _ in loop.batches(batches, 1, order):
            clock[0] += 5
    assert saved == expected


def test_a_resumed_run_has_a_checkpoint_after_its_last_batch(folder: RunFolder) -> None:
    """Earlier phases and rounds end without one."""
    watch = Watch(folder, "round", score, eval_every=1, checkpoint_every=0)
    loop, order = watch.start(), torch.Generator()
    for _ in loop.rounds(1, "search", order=order):
        next(batches := loop.batches(2, 1, order))
        next(batches)
        break
    kept = load_tensors(folder.path / "checkpoint.pt")
    saved: list[tuple[str, int, int]] = []
    again = Watch(folder, "round", score, eval_every=1, checkpoint=kept)
    loop = again.start()
    folder.write_checkpoint = lambda content: saved.append(  # type: ignore[method-assign]
        (content["loop"]["phase"], content["loop"]["round"], content["loop"]["batch"])
    )
    for phase in ("search", ""):
        for _ in loop.rounds(2 if phase == "" else 1, phase, order=order):
            for _ in loop.batches(2, 1, order):
                pass
    assert saved == [("", 2, 2)]


def test_a_signal_makes_a_checkpoint_and_says_where_it_stopped(folder: RunFolder) -> None:
    watch = Watch(folder, "round", score, eval_every=1)
    loop, order = watch.start(score(Numbered(90))), torch.Generator()
    list(loop.rounds(1, "search"))
    rounds = loop.rounds(3, "teacher", order=order)
    assert next(rounds) == 1
    batches = loop.batches(6, 2, order)
    assert len(next(batches)) == 2
    _Stop.signal = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        next(batches)
    said = "stopped in teacher, round 1 after batch 1 of 3; go on with --resume (and without"
    assert str(stopped.value).startswith(said)
    kept = load_tensors(folder.path / "checkpoint.pt")
    assert kept["rows"] == [{"round": 0, "acc": 0.9, "seconds": 0.0}]
    assert [(row["phase"], row["round"]) for row in kept["phase_rows"]] == [("search", 1)]
    assert (kept["loop"]["phase"], kept["loop"]["round"], kept["loop"]["batch"]) == (
        "teacher",
        1,
        1,
    )


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the progress bars are asked to do; their ETA is always 0:07."""
    asked: list[tuple[object, ...]] = []

    class Bar:
        def __init__(self, total: int, name: str, initial: int = 0) -> None:
            asked.append(("open", total, name, initial))

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            asked.append(("close",))

        def advance(self) -> None:
            asked.append(("advance",))

        def eta(self) -> str:
            return "0:07"

        def show(self, text: str) -> None:
            asked.append(("show", text))

    monkeypatch.setattr("utils.training.watch.Progress", Bar)
    return asked


def test_each_phase_has_a_bar_of_all_its_batches(
    folder: RunFolder, bars: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """Six images in twos are three batches per round: three for the teacher, and six."""
    caplog.set_level(logging.INFO, "sau")
    watch = Watch(folder, "round", score, eval_every=1)
    loop, order = watch.start(), torch.Generator()
    for _ in loop.rounds(1, "teacher", order=order):
        for index in loop.batches(6, 2, order):
            loop.log(len(index), loss=torch.tensor(2.0))
    for _ in loop.rounds(2, model=Numbered(40), order=order):
        for index in loop.batches(6, 2, order):
            loop.log(len(index), clean=torch.tensor(0.5), shared=torch.tensor(1.0))
    watch.finish(Numbered(50))
    assert bars == [
        *[("open", 3, "teacher", 0), *[("advance",)] * 3, ("show", ""), ("close",)],
        *[("open", 6, "round", 0), *[("advance",)] * 3, ("show", "ACC 40.00 %")],
        *[*[("advance",)] * 3, ("show", "ACC 40.00 %"), ("close",)],
    ]
    assert [record.message for record in caplog.records] == [
        "teacher, round 1/1  loss 2.0000  ",
        "round 1/2  clean 0.5000  shared 1.0000  ACC 40.00 %  ETA 0:07",
        "round 2/2  clean 0.5000  shared 1.0000  ",
        "result  ACC 50.00 %",
    ]


def test_the_bar_of_a_resumed_run_begins_where_it_was_cut_off(
    folder: RunFolder, bars: list[tuple[object, ...]]
) -> None:
    """After the first of three batches of the second round, so four of six were done before."""

    def run(watch: Watch, stop_at: int | None = None) -> None:
        loop, order = watch.start(), torch.Generator()
        for number in loop.rounds(2, order=order):
            for _ in loop.batches(6, 2, order):
                _Stop.signal = signal.SIGTERM if number == stop_at else None

    with pytest.raises(Stopped):
        run(Watch(folder, "round", score, eval_every=1), stop_at=2)
    assert bars == [
        ("open", 6, "round", 0),
        *[("advance",)] * 3,
        ("show", ""),
        ("advance",),
        ("close",),
    ]
    bars.clear()
    kept = load_tensors(folder.path / "checkpoint.pt")
    run(Watch(folder, "round", score, eval_every=1, checkpoint=kept))
    assert bars == [("open", 6, "round", 4), *[("advance",)] * 2, ("show", "")]


def test_seconds_are_kept_to_hundredths(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("utils.training.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch = Watch(folder, "round", score, eval_every=1)
    for _ in watch.start().rounds(1):
        clock[0] = 1.23456
    assert [row["seconds"] for row in watch.metrics] == [1.23]
    watch.finish(Numbered(1))
    assert [row["seconds"] for row in watch.metrics] == [1.23]


def test_a_scorer_asks_for_triggered_and_cross_images_each_time(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Dataset
) -> None:
    """An attack that trains its trigger has others each time; test images stay on the device."""
    given: list[tuple[object, ...]] = []
    kept = torch.ones(9, 3, 8, 8)
    monkeypatch.setattr(
        "utils.training.watch.keep_on", lambda *asked: kept if asked[0] == cpu else None
    )

    def evaluate(*arguments: object, cross: object) -> Scores:
        given.append((*arguments, cross))
        return Scores(Rate(1, 2))

    monkeypatch.setattr("utils.training.watch.evaluate", evaluate)
    numbers, model, cpu = iter(range(9)), Numbered(1), torch.device("cpu")
    of_all = scorer(tiny_data.test, lambda: next(numbers), cpu, lambda: next(numbers))
    of_clean = scorer(tiny_data.test, lambda: None, cpu)
    assert [of_all(model), of_all(model), of_clean(model)] == [Scores(Rate(1, 2))] * 3
    assert [(first, *others) for first, _, *others in given] == [
        *[(model, 0, cpu, 1), (model, 2, cpu, 3), (model, None, cpu, None)],
    ]
    assert all(test.images is kept for _, test, *_ in given)
    assert all(torch.equal(test.labels, tiny_data.test.labels) for _, test, *_ in given)


def test_the_scores_of_an_earlier_round_are_not_those_of_the_last_one(folder: RunFolder) -> None:
    """A method keeps the model of its first round."""
    trained = Numbered(10)
    watch = Watch(folder, "round", score, eval_every=1)
    loop = watch.start(score(Numbered(90)))
    for number in loop.rounds(2, model=trained):
        trained.number.data.fill_(10 * number)
        loop.log(1, loss=torch.tensor(float(number)))
    watch.findings.say("kept", best_round=1)
    assert watch.finish(Numbered(10)).acc == Rate(10, 100)
    assert rows(folder) == [
        {"round": 0, "acc": 0.9},
        {"round": 1, "acc": 0.1, "loss": 1.0},
        {"round": 2, "loss": 2.0},
    ]
