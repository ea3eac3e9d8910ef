"""Damaged files are read or refused; a few of the many that `perf/fuzz.py` makes."""

import os
import time
from pathlib import Path

import pytest

from perf import fuzz, hostile
from tests.scripts import one_error, run_script
from utils.files import ROOT


@pytest.mark.parametrize(
    ("flag", "number", "least"), [("--cases", 0, 1), ("--cases", -1, 1), ("--only", -3, 0)]
)
def test_numbers_that_test_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], flag: str, number: int, least: int
) -> None:
    assert run_script(ROOT / "perf/fuzz.py", flag, number) == 2
    assert f"{flag}: {number} is not allowed; give {least} or more" in one_error(capsys)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    table, problems = fuzz.run_cases(110, 1, tmp_path)
    assert problems == []
    assert table.to_numpy().sum() == 110
    assert (table["refused"] + table["read"] == 10).all()
    assert (table["refused"] > 0).sum() >= 9
    assert (table["read"] > 0).sum() >= 6


@pytest.mark.slow
def test_good_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing that is done to them would be the reason of a refusal."""
    monkeypatch.setattr(fuzz, "spoil", lambda *_: None)
    monkeypatch.setattr(hostile, "name", lambda rng: f"class {rng.random():.3f}")
    table, problems = fuzz.run_cases(11, 0, tmp_path)
    assert problems == []
    refused = table.index[table.get("refused", 0) > 0].tolist()
    # One has a user's file in it, the other is sometimes given a name that is no dataset.
    assert set(refused) <= {"folder of a run", "YAML"}


@pytest.mark.slow
def test_what_should_not_happen_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a hang, an endless loop, memory, a signal, a long message, a file elsewhere."""

    def write_elsewhere(place: Path, _: object) -> None:
        (place.parent / "elsewhere").touch()

    def hang(*_: object) -> None:
        time.sleep(60)

    def work(*_: object) -> None:
        while True:
            pass

    def take(*_: object) -> int:
        return len(bytes(1 << 20) * 200)

    def end(*_: object) -> None:
        os.kill(os.getpid(), 15)

    def talk(*_: object) -> None:
        raise fuzz.UserError("x" * 30_000)

    def leave(*_: object) -> None:
        raise SystemExit(0)

    broken = {
        "a": lambda *_: 1 / 0,
        "b": hang,
        "c": write_elsewhere,
        "d": take,
        "e": end,
        "f": talk,
        "g": leave,
        "h": work,
    }
    monkeypatch.setattr(fuzz, "cases", lambda good: broken)
    monkeypatch.setattr(fuzz, "write_good", lambda good: None)
    monkeypatch.setattr(fuzz, "SPARE", 100 << 20)
    monkeypatch.setattr(fuzz, "SECONDS", 4)
    monkeypatch.setattr(fuzz, "WAIT", 30)
    table, problems = fuzz.run_cases(8, 0, tmp_path)
    told = {problem.split(":")[0]: problem for problem in problems}
    assert "ZeroDivisionError" in told["case 0 (a)"]
    assert "more than 30 s" in told["case 1 (b)"]
    assert "MiB of memory" in told["case 3 (d)"]
    assert "signal 15" in told["case 4 (e)"]
    assert "too long a message" in told["case 5 (f)"]
    assert "SystemExit" in told["case 6 (g)"]
    assert "more than 4 s of a processor" in told["case 7 (h)"]
    assert problems[-1] == f"written outside: {tmp_path / 'elsewhere'}"
    assert len(problems) == 8
    assert table.loc["c", "read"] == 1
