"""How long scripts take to start, and what a grid saves by forking its cells.

    python perf/start.py --repeats 5

Each repeat takes all turns one after the other, so that other work on the machine meets all alike.
The table has medians of seconds by the clock: of `import torch` alone; of `--help` and a wrong flag
of some scripts, with the ratio to it; and of cells of a grid, as a fresh interpreter and as a fork.
The cells are an attack and a defense of one round, on the data set `random` with the network
`tiny`, so that nearly all of their time is start and end.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.workers import Workers
from utils.config import Parser, check_least
from utils.files import ROOT
from utils.process.script import run_script

SCRIPTS = ("attack/badnet.py", "defense/sau.py", "interop/backdoorbench.py", "benchmark/report.py")


def seconds_of(command: list[str]) -> float:
    """Seconds of a command by the clock, whatever its exit code."""
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, capture_output=True)
    return time.monotonic() - started


def seconds_of_cell(workers: Workers, script: str, arguments: list[str], log: Path) -> float:
    """Seconds of a cell by the clock.

    Raises:
        RuntimeError: if it fails.
    """
    started = time.monotonic()
    worker = workers.start(ROOT / script, arguments, log)
    if code := worker.wait():
        raise RuntimeError(f"{script}: exit code {code}\n{log.read_text()}")
    return time.monotonic() - started


def turns(folder: Path) -> dict[str, Callable[[], float]]:
    """What is measured, by its name."""
    python = [sys.executable]
    measured: dict[str, Callable[[], float]] = {
        "import torch": partial(seconds_of, [*python, "-c", "import torch"])
    }
    for script in SCRIPTS:
        for flag in ("--help", "--no_such_flag 1"):
            command = [*python, script, *flag.split()]
            measured[f"{script} {flag}"] = partial(seconds_of, command)
    for is_warm, how in ((False, "fresh"), (True, "forked")):
        workers = Workers(1, is_warm)
        where = ["--record_path", str(folder), "--overwrite", "true"]
        attack = ["--dataset", "random", "--model", "tiny", "--epochs", "1", *where]
        attack += ["--save_folder_name", how]
        defense = ["--result_file", how, "--n_rounds", "1", *where]
        for script, arguments in (("attack/badnet.py", attack), ("defense/ft.py", defense)):
            cell = partial(seconds_of_cell, workers, script, arguments, folder / "log.txt")
            measured[f"{script} as a cell, {how}"] = cell
    return measured


def main() -> None:
    """Measures, and prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, >= 1")
    flags = parser.parse_args()
    check_least(flags, repeats=1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        measured = turns(Path(folder))
        for measure in measured.values():
            measure()  # warms up the files, and starts the server
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(flags.repeats):
            for name, measure in measured.items():
                seconds[name].append(measure())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| what | seconds | / import torch |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians['import torch']:.2f} |")


if __name__ == "__main__":
    run_script(main)
