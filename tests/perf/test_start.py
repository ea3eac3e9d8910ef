"""The instrument for starts: its table, and that each turn can be taken."""

import sys
from pathlib import Path

import pytest

from perf import start
from utils.errors import UserError


def test_the_table_has_medians_and_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of each is for warming up."""
    torch, script = iter([9.0, 2.0, 1.0, 4.0]), iter([9.0, 3.0, 3.0, 8.0])
    monkeypatch.setattr(
        start, "turns", lambda _: {"import torch": torch.__next__, "x --help": script.__next__}
    )
    monkeypatch.setattr(sys, "argv", ["start.py", "--repeats", "3"])
    start.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| import torch | 2.00 | 1.00 |",
        "| x --help | 3.00 | 1.50 |",
    ]


def test_no_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["start.py", "--repeats", "0"])
    with pytest.raises(UserError, match="--repeats: 0 is not allowed"):
        start.main()


@pytest.mark.slow
def test_each_turn_runs(tmp_path: Path) -> None:
    for name, measure in start.turns(tmp_path).items():
        assert measure() > 0, name
