"""The instrument for memory: what it refuses before any work."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from perf import memory
from tests.scripts import one_error, run_script
from utils.errors import UserError
from utils.files import ROOT


@pytest.mark.parametrize("number", ["0", "nan", "-1", "inf", "1e300"])
def test_a_size_that_measures_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], number: str
) -> None:
    assert run_script(ROOT / "perf/memory.py", "large", "--gib", number) == 2
    said = f"--gib: {float(number):g} is not allowed; give a number from 0.03 to 1024"
    assert said in one_error(capsys)


def test_a_disk_that_is_full_is_told_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(UserError, match=r"pictures: could not be written .encoder error -2"):
        memory.write_pictures(tmp_path / "pictures", 1)


def test_the_end_of_a_run_that_failed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that failed has said why."""
    monkeypatch.setattr(memory, "write_pictures", lambda folder, count: None)
    call = [sys.executable, "-c", "raise SystemExit(2)"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **more: run(call, **more))
    with pytest.raises(SystemExit, match=r"^attack/badnet\.py: exit code 2$"):
        memory.large(0.03, "cpu")
