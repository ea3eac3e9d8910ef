"""Scripts, run as a user runs them, in this process; on the images of the fixture `workplace`."""

import contextlib
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils.data.images
from utils.files import ROOT


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """At the end, Ctrl-C means to this process what it did before; a script leaves it otherwise."""
    numbers = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(path: Path, *flags: object) -> int:
    """The script as `python path flags`, in this process; its exit code."""
    argv, sys.argv = sys.argv, [str(path), *map(str, flags)]
    search = list(sys.path)
    try:
        with own_signals():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv, sys.path[:] = argv, search
    return 0


def attack_flags(workplace: Path, name: str, **changes: object) -> list[object]:
    values = {
        "save_folder_name": name,
        "record_path": workplace / "record",
        "dataset": "folder",
        "dataset_path": workplace / "images",
        "image_size": 16,
        "batch_size": 12,
        "epochs": 2,
        "pratio": 0.25,
        "precision": "fp32",
    }
    values |= changes
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def defense_flags(workplace: Path, name: str, **changes: object) -> list[object]:
    values = {
        "result_file": name,
        "record_path": workplace / "record",
        "ratio": 0.5,
        "batch_size": 9,
        "n_rounds": 1,
        "precision": "fp32",
    }
    values |= changes
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def trained(workplace: Path, name: str, patch: pytest.MonkeyPatch, **changes: object) -> Path:
    """The record of a BadNets run, made before a test's own `cache` is there."""
    patch.setattr(utils.data.images, "ROOT", workplace)
    flags = attack_flags(workplace, name, **changes)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    return workplace / "record" / name


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error that a script has written; there is no traceback."""
    text = capsys.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    return errors[0]
