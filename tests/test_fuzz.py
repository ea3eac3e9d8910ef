"""Damaged files are read or refused; a few of the many that `benchmark/fuzz.py` makes."""

from pathlib import Path

import pytest

import models
from benchmark import fuzz
from utils import datasets


def test_damaged_files_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CONSTRUCTORS, "preactresnet18", fuzz.small)
    monkeypatch.setitem(datasets._LOADERS, "cifar10", lambda path, image_size: fuzz.make_data())
    table, problems = fuzz.run_cases(180, 1, tmp_path)
    assert problems == []
    assert table.to_numpy().sum() == 180
    assert (table["refused"] > 5).all()
    assert (table["read"] > 0).any()


def test_what_should_not_happen_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a hang and a file elsewhere are each told."""

    def write_elsewhere(place: Path, _: object) -> None:
        (place.parent / "elsewhere").touch()

    def hang(*_: object) -> None:
        while True:
            pass

    broken = {"a": lambda *_: 1 / 0, "b": hang, "c": write_elsewhere}
    monkeypatch.setattr(fuzz, "cases", lambda good: broken)
    monkeypatch.setattr(fuzz, "write_good", lambda good, data: None)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    _, problems = fuzz.run_cases(3, 0, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == [
        "case 0 (a)",
        "case 1 (b)",
        "written outside",
    ]
