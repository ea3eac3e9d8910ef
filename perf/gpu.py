"""What a GPU is to be asked, in one command that ends in time.

    python perf/gpu.py --to gpu --seconds 480

tests    the tests that need a GPU
speed    a round of SAU and an epoch of training beside plain implementations, and how a round grows
         with images, steps, classes and image size
grid     the cells of `--grid`, the most important first, with all the time that is left; its
         records go to `--to`/record, and tables, runs and curves to `--to`/results
report   writes these tables, also if the grid was stopped

Each part writes what it prints to `--to`/<part>.txt. A part that takes longer than its share of the
time is stopped, and the next one starts. `--trial` is for a machine without a GPU: all parts run
with a tiny network on random images, so that nothing is found to be wrong on the GPU first.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser, check_least
from utils.errors import UserError
from utils.files import ROOT
from utils.process.script import logger, run_script
from utils.records import places

TESTS = (
    str(ROOT / "tests/models/test_graphed.py"),
    str(ROOT / "tests/utils/process/test_reproducible.py"),
)
REPORT_SECONDS = 20.0
TRIAL_GRID = """
datasets: {random: {epochs: 1}}
models: [tiny]
attacks: {badnet: null}
defenses: {ft: {n_rounds: 1}}
seeds: [0]
"""


@dataclass(frozen=True)
class Part:
    """A command, and the share of the whole time after which it is stopped.

    Attributes:
        share: in (0, 1]; None for all that is left.
    """

    name: str
    commands: Sequence[Sequence[str]]
    share: float | None


def parts(to: Path, grid: Path, is_trial: bool) -> list[Part]:
    """What is run, in this order; `{budget}` in a command is the seconds that it has."""
    python, record = sys.executable, str(to / "record")
    where = ["--record_path", record]
    attack = [python, str(ROOT / "attack/badnet.py"), "--save_folder_name", "speed", *where]
    speed = [python, str(ROOT / "perf/speed.py"), "--result_file", "speed", *where]
    speed += ["--to", str(to / "speed"), "--repeats", "1", "--parts", "round", "epoch", "growth"]
    if is_trial:
        attack += ["--dataset", "random", "--model", "tiny", "--epochs", "1"]
        speed += ["--images", "8", "--epoch_images", "16", "--batch_size", "8"]
    else:
        speed += ["--images", "1280", "--epoch_images", "5120"]
    attack += ["--image_size", "32", "--resume"]
    cells = str(to / "record" / grid.stem)
    in_time = ["--record_path", cells, "--budget", "{budget}"]
    tables = ["--under", cells, "--to", str(to / "results"), "--keep", "--formats", "md"]
    return [
        Part("tests", [[python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]], 0.15),
        Part("speed", [attack, speed], 0.25),
        Part("grid", [[python, str(ROOT / "benchmark/run.py"), str(grid), *in_time]], None),
        Part("report", [[python, str(ROOT / "benchmark/report.py"), *tables]], None),
    ]


def run_part(part: Part, log: Path, seconds: float) -> str:
    """Runs the commands of a part one after the other, as long as they end well.

    Args:
        log: takes what they print.
        seconds: after which the part is stopped.

    Returns:
        How it ended, for a line of the table.
    """
    end = time.monotonic() + seconds
    with log.open("wb") as out:
        for command in part.commands:
            left = end - time.monotonic()
            # A grid stops by itself, with checkpoints.
            budget = f"{max(1.0, left - 10):.0f}"
            filled = [word.replace("{budget}", budget) for word in command]
            with subprocess.Popen(filled, stdout=out, stderr=subprocess.STDOUT) as process:
                try:
                    code = process.wait(max(1.0, left))
                except subprocess.TimeoutExpired:
                    process.terminate()  # a run writes its checkpoint
                    return f"stopped after {seconds:.0f} s"
            if code:
                return f"exit code {code}"
    return "done"


def main() -> None:
    """Runs all parts, and says how each ended."""
    parser = Parser(__doc__)
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seconds", type=int, default=480, help="of all parts together, >= 60")
    parser.add_argument(
        "--grid",
        type=Path,
        default=ROOT / "benchmark" / "grids" / "photographs_paper.yaml",
        help="cells to run",
    )
    parser.add_argument("--trial", action="store_true", help="tiny runs, which need no GPU")
    flags = parser.parse_args()
    check_least(flags, seconds=60)
    places.made_folder(flags.to)
    to = flags.to.resolve()
    grid = flags.grid.resolve()
    if flags.trial:
        grid = to / "trial.yaml"
        grid.write_text(TRIAL_GRID)
    end = time.monotonic() + flags.seconds
    failed = []
    for part in parts(to, grid, flags.trial):
        started = time.monotonic()
        left = end - started
        if part.name != "report":
            left -= REPORT_SECONDS
        allowed = left if part.share is None else min(left, part.share * flags.seconds)
        outcome = run_part(part, to / f"{part.name}.txt", max(1.0, allowed))
        logger.info("%s: %s, %.0f s", part.name, outcome, time.monotonic() - started)
        if outcome != "done":
            failed.append(part.name)
    if failed:
        raise UserError(f"not done: {', '.join(failed)}; their texts are in {to}")


if __name__ == "__main__":
    run_script(main)
