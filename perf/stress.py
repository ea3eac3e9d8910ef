"""Kills runs at random moments and takes their disk away, and makes a table of the results.

    python perf/stress.py --kills 30 --to stress.csv

An attack and a defense on a small set are each run once undisturbed. Then

- `--kills` times, they are killed with SIGKILL after a random time and resumed until they are done:
  weights and metrics (without times) have to be the same, by sha256, and no temporary file is left;
- their disk is full (files of a largest size; a small file system where the user may mount one),
  read-only, or their folder removed: one line, exit code 2, no temporary file, and the files that
  stood there unchanged.

At last, the cost of a checkpoint is measured. Each row is written to `--to` as soon as it is known,
and the same command continues after the rows that are there. `matrix.py` kills runs before each of
their changes of the disk.
"""

import contextlib
import csv
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack import badnet
from models import build_model
from perf.fuzz import require_fork
from utils.config import Parser, check_least
from utils.files import ROOT, replaced
from utils.process.progress import Progress
from utils.process.script import run_script
from utils.records.contents import METRICS_FILE
from utils.records.folders import RunFolder
from utils.records.places import made_folder
from utils.tensors import load_tensors
from utils.training.loop import Loop

COMMANDS = {
    "attack": ("attack/badnet.py", "--save_folder_name", "x", "--image_size", "8", "--epochs", "2"),
    "defense": ("defense/sau.py", "--result_file", "x", "--n_rounds", "6", "--ratio", "0.05"),
}
COMMON = ("--checkpoint_every", "1")
LARGEST = (200, 100_000, 10_000_000)  # bytes of a file
FREE = (4_096, 200_000, 20_000_000)  # bytes of a file system beside what stands in it
SHARE = 0.02  # of the time that checkpoints may take


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for a signal, and what it printed."""

    code: int
    text: str


def start(kind: str, root: Path, *flags: str, largest: int | None = None) -> subprocess.Popen[str]:
    """A script as a user starts it.

    Args:
        root: folder of records.
        largest: bytes that a file may have.
    """

    import resource  # which Windows lacks

    def limit() -> None:
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    call = [sys.executable, *COMMANDS[kind], "--record_path", str(root), *COMMON, *flags]
    return subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def folder_of(kind: str, root: Path) -> Path:
    return root / "x" if kind == "attack" else root / "x" / "defense" / "sau"


def fingerprint(folder: Path) -> str:
    """sha256 of the weights, and of metrics.csv without its times."""
    digest = hashlib.sha256()
    for name, value in load_tensors(next(folder.glob("*_result.pt")))["model"].items():
        digest.update(name.encode() + value.numpy().tobytes())
    digest.update(pd.read_csv(folder / METRICS_FILE).drop(columns="seconds").to_csv().encode())
    return digest.hexdigest()


def finish(process: subprocess.Popen[str]) -> Ended:
    """Waits for the end of a script, and keeps its messages."""
    with process:
        _, text = process.communicate()
    return Ended(process.returncode, text)


def strays(root: Path) -> list[str]:
    """Files that must not be there after a run: temporary files, locks, checkpoints."""
    return sorted(path.name for name in (".*", "checkpoint*") for path in root.rglob(name))


def prepared(kind: str, whole: Path, root: Path) -> Path:
    """A folder of records for a run: for a defense it holds the attack's, for an attack a file."""
    root.mkdir(exist_ok=True)
    (root / "notes.txt").write_text("of the user", encoding="utf-8")
    if kind == "defense":
        shutil.copytree(whole / "x", root / "x", ignore=shutil.ignore_patterns("defense"))
    return root


# --- kills --------------------------------------------------------------------------------------


class Killed(NamedTuple):
    """How often a run was killed, and what went wrong in the end; "" if nothing did."""

    kills: int
    problem: str


def kill_and_resume(kind: str, root: Path, seconds: float, rng: random.Random) -> Killed:
    """Kills a run after a random time, now and then its continuation too, and lets it end.

    Args:
        seconds: that the run takes when it is not disturbed.
    """
    kills = 0
    while True:
        process = start(kind, root, *(("--resume",) if kills else ()))
        try:
            process.wait(rng.uniform(0, seconds) if kills < 2 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        end = finish(process)
        if end.code != -signal.SIGKILL:
            return Killed(kills, f"exit code {end.code}: {end.text}" if end.code else "")


def killed(kind: str, whole: Path, root: Path, seconds: float, rng: random.Random) -> str:
    """How a run that is killed at least once, and resumed, ends."""
    run = Killed(0, "")
    while not run.kills and not run.problem:  # else it ended before its time had come
        shutil.rmtree(root, ignore_errors=True)
        run = kill_and_resume(kind, prepared(kind, whole, root), seconds, rng)
    problem, folder = run.problem, folder_of(kind, root)
    if not problem and fingerprint(folder) != fingerprint(folder_of(kind, whole)):
        problem = "another result"
    if not problem and strays(root):
        problem = f"left {strays(root)}"
    how = f"FAILED: {problem}," if problem else "identical"
    return f"{how} after {run.kills} kills"


# --- disks --------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, str]:
    """sha256 by path of the files in a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes at a folder.

    Raises:
        subprocess.CalledProcessError: if the user may not mount one.
    """
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(call, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def refusal_of(root: Path, before: dict[str, str], process: subprocess.Popen[str]) -> str:
    """How a run ends if its disk refuses to write.

    Args:
        before: what `contents` gave before the run; none of it may change.
    """
    end = finish(process)
    errors = [line for line in end.text.splitlines() if line.startswith("error:")]
    problems = []
    if end.code != 2:
        problems.append(f"exit code {end.code}")
    if len(errors) != 1 or "Traceback" in end.text:
        problems.append(end.text[-300:])
    problems += [f"left {name}" for name in strays(root) if ".tmp" in name]
    after = contents(root)
    problems += [f"{name} differs" for name, digest in before.items() if after.get(name) != digest]
    return f"FAILED: {'; '.join(problems)}" if problems else "one line, exit code 2"


def large_files(kind: str, whole: Path, root: Path, largest: int) -> str:
    """A run whose files may not grow beyond a size."""
    before = contents(prepared(kind, whole, root))
    return refusal_of(root, before, start(kind, root, largest=largest))


def full(kind: str, whole: Path, root: Path, free: int) -> str:
    """A run on a file system that has a few bytes left."""
    need = sum(path.stat().st_size + 8192 for path in (whole / "x").rglob("*"))
    try:
        with small_disk(root, (need if kind == "defense" else 8192) + free):
            before = contents(prepared(kind, whole, root))
            return refusal_of(root, before, start(kind, root))
    except subprocess.CalledProcessError:
        return "not tried: no file system can be mounted here"


def read_only(kind: str, whole: Path, root: Path) -> str:
    """A run on a file system that is read-only."""
    try:
        with small_disk(root, 1 << 30):
            before = contents(prepared(kind, whole, root))
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            return refusal_of(root, before, start(kind, root))
    except subprocess.CalledProcessError:
        return "not tried: no file system can be mounted here"


def removed(kind: str, whole: Path, root: Path) -> str:
    """A run whose folder is removed after its first checkpoint."""
    before = contents(prepared(kind, whole, root))
    process = start(kind, root)
    folder = folder_of(kind, root)
    while process.poll() is None and not RunFolder(folder).checkpoint.exists():
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return refusal_of(root, before, process)


# --- checkpoints --------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "attack": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "defense": lambda weights: torch.optim.Adam(weights, lr=1e-4),  # of SAU
}


def checkpoint_cost(kind: str, _: Path, root: Path) -> str:
    """The time for a checkpoint of PreAct-ResNet18, as a share of the whole time."""
    every = badnet.Config.load().checkpoint_every
    model = build_model("preactresnet18", 10)
    optimizer = OPTIMIZERS[kind](model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    folder, loop, seconds = RunFolder(root), Loop(), []
    folder.start("")
    for _round in loop.rounds(1, model=model, optimizer=optimizer):
        for _repeat in range(7):
            started = time.monotonic()
            folder.write_checkpoint({"loop": loop.snapshot(), "rows": [], "seconds": 0.0})
            seconds.append(time.monotonic() - started)
    mib = folder.checkpoint.stat().st_size / 2**20
    usual = statistics.median(seconds)
    return (
        f"{'' if usual < SHARE * every else 'FAILED: '}{100 * usual / every:.2f} %: {mib:.0f} MiB "
        f"in {usual:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), every {every:g} s"
    )


# --- table --------------------------------------------------------------------------------------


class Table:
    """Rows that are written to a file at once.

    Args:
        path: a CSV file, whose rows are kept; None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, run: str, what: str, find: Callable[[], str]) -> None:
        """Adds a row, which is measured unless the table has it already."""
        if any((row["run"], row["what"]) == (run, what) for row in self.rows):
            return
        self.rows.append({"run": run, "what": what, "result": find()})
        if self._path is not None:
            with replaced(self._path) as partial:
                pd.DataFrame(self.rows).to_csv(partial, index=False)

    def summary(self) -> str:
        """The rows; those that differ only in their number are counted together."""
        frame = pd.DataFrame(self.rows, columns=["run", "what", "result"])
        frame["what"] = frame["what"].str.replace(
            r"^killed (before change )?\d+ .*", "killed", regex=True
        )
        frame["result"] = frame["result"].str.replace(r" after \d kills$", "", regex=True)
        counts = frame.groupby(["run", "what", "result"], sort=False).size()
        return counts.rename("runs").reset_index().to_string(index=False)


def stress(table: Table, kills: int, seed: int, root: Path) -> None:
    """Fills the table.

    Args:
        kills: how many runs of each kind are killed.
        root: an empty folder.
    """
    whole, place = root / "whole", root / "place"
    with Progress(2 * (kills + 3 + len(LARGEST) + len(FREE)), "runs", "run") as progress:
        for kind in COMMANDS:
            started = time.monotonic()
            end = finish(start(kind, whole))
            assert end.code == 0, end.text
            seconds = time.monotonic() - started

            def run(what: str, find: Callable[..., str], *rest: Any, kind: str = kind) -> None:
                table.add(kind, what, lambda: find(kind, whole, place, *rest))
                shutil.rmtree(place, ignore_errors=True)
                progress.advance()

            for number in range(kills):
                rng = random.Random(f"{seed} {kind} {number}")
                run(f"killed {number} of seed {seed}", killed, seconds, rng)
            for largest in LARGEST:
                run(f"files of at most {largest:,} bytes", large_files, largest)
            for free in FREE:
                run(f"a file system with {free:,} bytes left", full, free)
            run("a read-only file system", read_only)
            run("its folder removed in mid-run", removed)
            run("what checkpoints take of the time", checkpoint_cost)


def fill(path: Path | None, work: Callable[[Table, Path], None]) -> None:
    """Fills a table, in an empty folder, and prints it, also a part of it.

    Args:
        path: as for `Table`.

    Raises:
        UserError: if the table's folder cannot be made.
        SystemExit: with 1 if a row has failed.
    """
    if path is not None:
        made_folder(path.parent)
    table = Table(path)
    try:
        with tempfile.TemporaryDirectory() as root:
            work(table, Path(root))
    finally:
        print(table.summary())
    if any("FAILED" in row["result"] for row in table.rows):
        raise SystemExit(1)


def main() -> None:
    """Parses the flags and runs."""
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="killed runs of each kind, >= 0")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--to", type=Path, help="CSV of all rows; what it has is not done again")
    flags = parser.parse_args()
    check_least(flags, kills=0)
    require_fork()
    fill(flags.to, lambda table, root: stress(table, flags.kills, flags.seed, root))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(main)
