"""The command for a GPU: each part has its time, and one that fails does not stop the others."""

import sys
from pathlib import Path

import pytest

from perf import gpu
from perf.gpu import Part, run_part
from utils.errors import UserError


def saying(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    endless = saying("import time; print('begun', flush=True); time.sleep(600)")
    log = tmp_path / "part.txt"
    outcome = run_part(Part("speed", [endless, saying("print('next')")], 0.1), log, 2)
    assert outcome == "stopped after 2 s"
    assert "next" not in log.read_text()


def test_after_a_command_that_fails_a_part_ends(tmp_path: Path) -> None:
    log = tmp_path / "part.txt"
    commands = [saying("print('one')"), saying("exit(3)"), saying("print('three')")]
    assert run_part(Part("speed", commands, 0.1), log, 60) == "exit code 3"
    assert log.read_text() == "one\n"


def test_a_grid_is_told_its_budget(tmp_path: Path) -> None:
    """Ten seconds less than what the part has, for its end."""
    log = tmp_path / "part.txt"
    code = [*saying("import sys; print(sys.argv[1])"), "{budget}"]
    assert run_part(Part("grid", [code], None), log, 90) == "done"
    assert log.read_text() == "80\n"


def test_each_part_runs_whatever_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Part("tests", [saying("exit(1)")], 0.5), Part("grid", [saying("print(7)")], None)]
    monkeypatch.setattr(gpu, "parts", lambda to, grid, is_trial: made)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--to", str(tmp_path / "to"), "--seconds", "60"])
    with pytest.raises(UserError, match=r"^not done: tests; their texts are in "):
        gpu.main()
    assert (tmp_path / "to" / "grid.txt").read_text() == "7\n"


def test_shares_of_the_time_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report always has its seconds, and a grid has what the parts before it leave."""
    allowed: dict[str, float] = {}

    def run(part: Part, log: Path, seconds: float) -> str:
        allowed[part.name] = round(seconds)
        return "done"

    monkeypatch.setattr(gpu, "run_part", run)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--to", str(tmp_path), "--seconds", "400", "--trial"]
    )
    gpu.main()
    assert allowed == {"tests": 60, "speed": 100, "grid": 380, "report": 400}


def test_too_little_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--to", str(tmp_path), "--seconds", "59"])
    with pytest.raises(UserError, match="--seconds: 59 is not allowed; give 60 or more"):
        gpu.main()


@pytest.mark.slow
def test_a_trial_runs_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except the tests, of which one stands for all."""
    monkeypatch.setattr(gpu, "TESTS", (f"{__file__}::{test_a_grid_is_told_its_budget.__name__}",))
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--to", str(tmp_path), "--seconds", "3000", "--trial"]
    )
    gpu.main()
    assert "growth" in (tmp_path / "speed" / "speed.csv").read_text()
    assert "ft" in (tmp_path / "results" / "runs.jsonl").read_text()
