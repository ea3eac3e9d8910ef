"""Runs that are killed at their changes of the disk: a sample of them, and what is compared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from perf import matrix, stress
from tests.scripts import run_script
from utils.errors import UserError
from utils.files import ROOT


def run_matrix(*flags: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a fork of one that has trained cannot train."""
    return subprocess.run(
        [sys.executable, "perf/matrix.py", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_sample_of_the_matrix_gives_the_same_files(tmp_path: Path) -> None:
    """Each kind has dozens of changes; `perf/README.md` has the counts of all of them."""
    done = run_matrix("--every", 29, "--to", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert set(rows["run"]) == set(matrix.KINDS)
    assert set(rows["result"]) == {"identical"}
    assert len(rows) >= 2 * len(matrix.KINDS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kinds", "attack,reprot"), "error: --kinds: reprot is unknown; give some of attack,"),
        (("--every", 0), "error: --every: 0 is less than 1; give 1 for all changes"),
    ],
)
def test_wrong_flags(
    capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    assert run_script(ROOT / "perf/matrix.py", *flags) == 2
    assert message in capsys.readouterr().err


def test_less_than_no_kill_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(ROOT / "perf/stress.py", "--kills", -1) == 2
    assert "error: --kills: -1 is not allowed; give 0 or more" in capsys.readouterr().err


def test_the_place_of_the_table_is_made_before_the_first_row(tmp_path: Path) -> None:
    def work(table: stress.Table, root: Path) -> None:
        table.add("attack", "killed", lambda: "identical")

    path = tmp_path / "a/b/rows.csv"
    stress.fill(path, work)
    assert pd.read_csv(path)["result"].tolist() == ["identical"]
    with pytest.raises(UserError, match=r"--to: .*rows\.csv cannot be made"):
        stress.fill(path / "more.csv", lambda *_: pytest.fail("work was begun"))


def test_what_is_compared(tmp_path: Path) -> None:
    """Every file, folder and stray by its content; not times, and not what a log says."""
    folder = tmp_path / "x"
    folder.mkdir()
    files = {
        "summary.json": '{"acc": 0.5, "seconds": 1.0}',
        "config.yaml": "lr: 0.1\nresume: false\n",
        "metrics.csv": "epoch,acc,seconds\n1,0.5,1.0\n",
        "log.txt": "a line\n",
        "model.pt": "weights",
    }
    same = {
        "summary.json": '{"seconds": 2.0, "acc": 0.5}',
        "config.yaml": "lr: 0.1\nresume: true\n",
        "metrics.csv": "epoch,acc,seconds\n1,0.5,2.0\n",
        "log.txt": "another line\n",
    }
    other = {
        "summary.json": '{"acc": 0.4, "seconds": 1.0}',
        "config.yaml": "lr: 0.2\nresume: false\n",
        "metrics.csv": "epoch,acc,seconds\n1,0.4,1.0\n",
        "model.pt": "other weights",
        ".model.0123abcd.tmp.pt": "half",
        ".x.lock": "",
        "checkpoint.pt": "",
    }

    def kept_with(changes: dict[str, str]) -> dict[str, Any]:
        for path in folder.iterdir():
            path.unlink()
        for name, text in (files | changes).items():
            (folder / name).write_text(text)
        return matrix.kept(tmp_path)

    whole = kept_with({})
    for name, text in same.items():
        assert kept_with({name: text}) == whole
    for name, text in other.items():
        assert kept_with({name: text}) != whole
    kept_with({})
    (tmp_path / "y").mkdir()
    assert matrix.kept(tmp_path) != whole


def test_every_change_of_the_disk_is_seen(tmp_path: Path) -> None:
    """Of one folder alone, by whatever function, and before it is done."""
    program = """
import os, shutil, sys
from pathlib import Path
from perf.matrix import watch_changes
place = Path(sys.argv[1])
watch_changes(place, lambda number, what: print(number, what, flush=True))
(place / "a").mkdir()
(place / "a/x").write_text("x")
(place.parent / "y").write_text("y")
(place / "a/x").read_text()
os.close(os.open(place / "a/x", os.O_RDWR))
os.replace(place / "a/x", place / "a/.x.0123abcd.tmp")
os.truncate(place / "a/.x.0123abcd.tmp", 0)
shutil.rmtree(place / "a")
os.mkdir(place / "b")
os.rmdir(place / "b")
"""
    (tmp_path / "place").mkdir()
    call = [sys.executable, "-c", program, str(tmp_path / "place")]
    text = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    expected = [
        *("os.mkdir a", "open a/x", "open a/x", "os.rename a/x", "os.truncate a/.x.*.tmp"),
        *("os.remove a/.x.*.tmp", "os.rmdir a", "os.mkdir b", "os.rmdir b"),
    ]
    assert text.splitlines() == [f"{i} {what}" for i, what in enumerate(expected, start=1)]
