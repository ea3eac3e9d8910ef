"""Kills runs at random moments, resumes them, and compares them with one that was left alone.

    python benchmark/stress.py --kills 30

An attack and a defense on a small set are each run once undisturbed. Then, `--kills` times, they
are killed with SIGKILL after a random time, and resumed until they are done: weights and metrics
(without times) have to be the same, by sha256, and no temporary file may be left. At last each is
run with a limit on the size of a file, as if the disk were full: one line, exit code 2.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runtime import ROOT, Progress, logger, run_script
from utils.tensors import load_tensors

COMMANDS = {
    "attack": ("attack/badnet.py", "--save_folder_name", "x", "--image_size", "8", "--epochs", "2"),
    "defense": ("defense/sau.py", "--result_file", "x", "--n_rounds", "6", "--ratio", "0.05"),
}
COMMON = ("--checkpoint_every", "1")


def start(kind: str, root: Path, *flags: str, largest: int | None = None) -> subprocess.Popen[str]:
    """A script as a user starts it.

    Args:
        root: folder of records.
        largest: bytes that a file may have.
    """

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
    digest.update(pd.read_csv(folder / "metrics.csv").drop(columns="seconds").to_csv().encode())
    return digest.hexdigest()


def finish(kind: str, root: Path, *flags: str) -> tuple[int, str]:
    """Exit code and messages of an undisturbed run."""
    with start(kind, root, *flags) as process:
        _, text = process.communicate()
    return process.returncode, text


def kill_and_resume(kind: str, root: Path, seconds: float, rng: random.Random) -> str:
    """Kills a run after a random time, now and then its continuation too, and lets it end."""
    kills = 0
    while True:
        with start(kind, root, *(("--resume",) if kills else ())) as process:
            try:
                if kills < 2:
                    process.communicate(timeout=rng.uniform(0, seconds))
                else:
                    process.communicate()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
        if process.returncode == 0:
            return f"{kills} kills"
        return f"exit code {process.returncode} after {kills} kills"


def fill_disk(kind: str, root: Path, limits: tuple[int, ...]) -> list[str]:
    """What is wrong with a run whose files may not grow beyond a limit."""
    problems = []
    for largest in limits:
        with start(kind, root, "--overwrite", largest=largest) as process:
            _, text = process.communicate()
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        if process.returncode != 2 or len(errors) != 1 or "Traceback" in text:
            problems.append(f"{largest} bytes: exit code {process.returncode}, {text[-300:]}")
        problems += [f"{largest} bytes: left {path}" for path in root.rglob(".*.tmp*")]
    return problems


def main() -> None:
    """Parses the flags, runs, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="killed runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    rows, problems = [], []
    with tempfile.TemporaryDirectory() as name, Progress(2 * flags.kills, "killing") as progress:
        whole = Path(name) / "whole"
        for kind in COMMANDS:
            started = time.monotonic()
            code, text = finish(kind, whole)
            assert code == 0, text
            seconds = time.monotonic() - started
            wanted = fingerprint(folder_of(kind, whole))
            same = 0
            for number in range(flags.kills):
                root = Path(name) / f"{kind} {number}"
                root.mkdir()
                if kind == "defense":
                    shutil.copytree(
                        whole / "x", root / "x", ignore=shutil.ignore_patterns("defense")
                    )
                ended = kill_and_resume(kind, root, seconds, rng)
                folder = folder_of(kind, root)
                is_same = "exit" not in ended and fingerprint(folder) == wanted
                stray = [path.name for path in folder.glob(".*")] + [
                    path.name for path in folder.glob("checkpoint*")
                ]
                same += is_same and not stray
                if not is_same or stray:
                    problems.append(f"{kind} {number}: {ended}, same: {is_same}, left {stray}")
                shutil.rmtree(root)
                progress.advance()
            rows.append({"run": kind, "killed and resumed": flags.kills, "bit-identical": same})
            full = fill_disk(kind, whole, (200, 100_000, 10_000_000))
            problems += [f"{kind}, full disk: {problem}" for problem in full]
            if kind == "attack":
                assert finish(kind, whole, "--overwrite")[0] == 0  # the defense needs it whole
    logger.info("%s", pd.DataFrame(rows).to_string(index=False))
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(main)
