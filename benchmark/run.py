"""Runs a grid of attacks and defenses; each cell is the user's script in a process of its own.

    python benchmark/run.py benchmark/grids/digits.yaml --jobs 2
    python benchmark/run.py benchmark/grids/digits.yaml --executor slurm

The records go to `record/<name of the YAML file>/`. An attack's record is made once and read by all
its defenses. Cells that are done are skipped. Interrupted cells continue from their checkpoint. If
a cell fails, the other cells go on, and failed cells are listed at the end with their logs. Ctrl-C
stops all running cells, with checkpoints; the same command continues. `--status` only says how far
the grid is.

With `--budget 600` the command ends after ten minutes. It takes the cells in the order of the YAML
file, and skips a cell that would take longer than what is left, by the time that cells of its kind
took before, unless it was begun already. A cell that still runs at the end is stopped with a
checkpoint.

With `--executor slurm` each cell is a SLURM job, and a defense waits for its attack. Ctrl-C (or
`--detach`) leaves the jobs in the queue; the same command finds them again. The `slurm` part of the
YAML says what a job asks for: partition, timeout_min, mem_gb, cpus_per_task, gpus_per_node, array
(one job array instead of single jobs), parallelism (of an array), cells_per_job (cells that a job
runs one after the other, without starting anew for each), directives (more lines of sbatch by
name).
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import slurm
from benchmark.cells import Cell
from benchmark.checks import cells_of
from benchmark.grid import read_grid
from benchmark.workers import Worker, Workers, ending_of
from utils.config import Parser
from utils.errors import UserError, counted, shown
from utils.files import ROOT, not_written
from utils.process.device import usable_cores
from utils.process.progress import Progress, clock
from utils.process.script import logger, run_script
from utils.records.folders import RunFolder
from utils.records.places import made_folder


class Board:
    """Shows the state of the grid: a bar on a terminal, elsewhere one line per change.

    Args:
        jobs: how many cells run at once; None if that is not known.
    """

    def __init__(self, cells: Sequence[Cell], jobs: int | None = None) -> None:
        self._jobs = jobs
        self.states = {cell.name: "done" if cell.is_done else "waiting" for cell in cells}
        self._progress = Progress(len(cells), "grid", "cell", self.count("done"), says=False)
        self._kind = {cell.name: cell.kind for cell in cells}
        self._since: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}  # of ended cells, by kind
        for cell in cells:
            if (seconds := cell.seconds) is not None:
                self._seconds.setdefault(self._kind[cell.name], []).append(seconds)

    def __enter__(self) -> "Board":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def count(self, state: str) -> int:
        return sum(other == state for other in self.states.values())

    def set(self, cell: Cell, state: str, note: str = "") -> None:
        """A cell's new state.

        Args:
            state: waiting, queued, running, interrupted, elsewhere, done, failed, or skipped.
        """
        if self.states[cell.name] == state:
            return
        self.states[cell.name] = state
        if state == "running":
            self._since[cell.name] = time.monotonic()
        elif state == "done" and cell.name in self._since:
            took = cell.seconds  # of all its parts, if it was interrupted
            took = time.monotonic() - self._since[cell.name] if took is None else took
            self._seconds.setdefault(self._kind[cell.name], []).append(took)
        if state in slurm.ENDED:
            self._progress.advance()
        logger.info("%-8s %s%s", state, cell.name, f"  ({note})" if note else "")
        self._progress.show(summary(self.states.values()))
        if state in slurm.ENDED and self._progress.done < self._progress.total:
            logger.info("%s, ETA %s", summary(self.states.values()), self.eta())

    def usual(self, cell: Cell) -> float | None:
        """Seconds that cells of the same kind took, on average; None if none has ended."""
        took = self._seconds.get(self._kind[cell.name])
        return sum(took) / len(took) if took else None

    def eta(self) -> str:
        """Time left: the usual time of each cell's kind, divided by how many run at once."""
        means = {kind: sum(took) / len(took) for kind, took in self._seconds.items()}
        if not means:
            return "?"
        others = sum(means.values()) / len(means)  # for a kind of which none has ended yet
        seconds = 0.0
        for name, state in self.states.items():
            if state not in slurm.ENDED:
                usual = means.get(self._kind[name], others)
                since = self._since.get(name) if state == "running" else None
                seconds += usual if since is None else max(0, usual - (time.monotonic() - since))
        cells = sum(state not in slurm.ENDED for state in self.states.values())
        return clock(seconds / max(1, min(self._jobs or self.count("running"), cells)))


def summary(states: Iterable[str]) -> str:
    """How many cells are in each state: '3 done, 1 running'."""
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))


def log_of(cell: Cell, root: Path) -> Path:
    """The file for a cell's messages: `<record>.log`, or `<record>/<result>.log`."""
    return root / ".grid" / "logs" / f"{cell.name}.log"


def mark_of(cell: Cell, root: Path) -> Path:
    """The file that says that a cell's last run has failed, and which signal has ended it."""
    return log_of(cell, root).with_suffix(".failed")


def mark_failed(cell: Cell, root: Path, code: int) -> None:
    """Says that a cell has failed; its log cannot say so itself if a signal has ended it.

    Raises:
        UserError: if it cannot be written.
    """
    what = f"{ending_of(code)}\n" if code < 0 else ""
    try:
        mark_of(cell, root).write_text(what)
        with log_of(cell, root).open("a") as log:
            log.write(what)
    except OSError as error:  # of a full disk, it names no file
        raise not_written(mark_of(cell, root), error) from None


def cause_of(cell: Cell, root: Path, queue: "slurm.Queue | None") -> str:
    """A text that names the signal that has ended a failed cell, if one has, and its log."""
    if queue is not None:
        return f"see {queue.log_of(cell)}"
    mark = mark_of(cell, root)
    what = mark.read_text(errors="replace").strip() if mark.exists() else ""
    return ", ".join(filter(None, (what, f"see {log_of(cell, root)}")))


def has_failed(cell: Cell, root: Path) -> bool:
    """Whether the cell's last run has failed; a later run by hand is not counted."""
    mark, checkpoint = mark_of(cell, root), RunFolder(cell.folder).checkpoint
    if not mark.exists():
        return False
    return not checkpoint.exists() or checkpoint.stat().st_mtime <= mark.stat().st_mtime


def is_elsewhere(cell: Cell) -> bool:
    """Whether another process is writing the cell, e.g. one of a terminal that was closed."""
    return not cell.is_done and RunFolder(cell.folder).is_taken


class _Running(NamedTuple):
    """A cell whose script runs."""

    worker: Worker
    cell: Cell


def threads_of_a_cell(jobs: int) -> int:
    """`OMP_NUM_THREADS` if it is set, as in every script; else the usable cores, shared out."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    number = int(given) if given.isdecimal() else usable_cores() // jobs
    return max(1, number)


class _Local:
    """A grid that runs on this machine: cells that wait, and cells that run.

    Args:
        until: when it has to end, of `time.monotonic`.
    """

    def __init__(
        self, cells: Sequence[Cell], root: Path, jobs: int, board: Board, until: float
    ) -> None:
        self.waiting = [cell for cell in cells if board.states[cell.name] == "waiting"]
        self.running: dict[int, _Running] = {}  # by slot
        self._root, self._jobs, self._board, self._until = root, jobs, board, until

    @property
    def is_full(self) -> bool:
        """Whether nothing can be started, since as many cells run as may."""
        return len(self.running) >= self._jobs

    def collect(self) -> None:
        """Takes cells whose processes have ended from those that run."""
        for slot, (worker, cell) in list(self.running.items()):
            code = worker.poll()
            if code is None:
                continue
            del self.running[slot]
            if code == 0 and cell.is_done:
                self._board.set(cell, "done")
            else:
                mark_failed(cell, self._root, code)
                self._board.set(cell, "failed", f"{ending_of(code)}, {log_of(cell, self._root)}")

    def drop_settled(self) -> None:
        """Takes cells from those that wait if others made them, or if what they need has failed."""
        for cell in [cell for cell in self.waiting if cell.is_done]:
            self._drop(cell, "done")
        for cell in list(self.waiting):
            states = self._board.states
            lost = [c for c in cell.needed if states[c.name] in ("failed", "skipped")]
            if lost:
                what = "attack" if lost[0] is cell.attack else lost[0].name
                self._drop(cell, "skipped", f"its {what} failed")

    def drop_bereft(self) -> None:
        """Takes cells from those that wait if what they need was done, and has been removed."""
        for cell in [cell for cell in self.waiting if cell.lacks is not None]:
            self._drop(cell, "skipped", f"its {cell.lacks} is gone")

    def start_ready(self, workers: Workers) -> int:
        """Starts a cell in each free slot; gives how many cells another process was found to run.

        Each slot looks at all cells anew, because one may have ended meanwhile.
        """
        elsewhere = 0
        for slot in set(range(self._jobs)) - set(self.running):
            ready = self._ready()
            while ready and is_elsewhere(ready[0]):
                self._board.set(ready.pop(0), "elsewhere", "another process runs it")
                elsewhere += 1
            if ready:
                cell = ready[0]
                note = "anew, since what it looks at has changed" if cell.is_outdated else ""
                self.waiting.remove(cell)
                self.running[slot] = _Running(_start(workers, cell, self._root, slot), cell)
                self._board.set(cell, "running", note)
        return elsewhere

    def _ready(self) -> list[Cell]:
        """Cells that can be started, and either were begun or fit into the time that remains."""
        remaining = self._until - time.monotonic()
        return [
            cell for cell in self.waiting if remaining > 0 and _fits(cell, self._board, remaining)
        ]

    def _drop(self, cell: Cell, state: str, note: str = "") -> None:
        self.waiting.remove(cell)
        self._board.set(cell, state, note)


def run_local(
    cells: Sequence[Cell], root: Path, jobs: int, board: Board, budget: float = math.inf
) -> None:
    """Runs the cells that are not done, `jobs` at once; threads and GPUs are shared out.

    A defense starts when its attack is done, and is skipped if the attack has failed. If another
    process is writing a cell, this one waits for it.

    Args:
        budget: seconds after which this ends; a cell that takes longer than what is left is not
            started.

    Raises:
        KeyboardInterrupt: once every process that ran has ended.
    """
    until = time.monotonic() + budget
    grid = _Local(cells, root, jobs, board, until)
    workers = Workers(threads_of_a_cell(jobs))
    try:
        if any(_fits(cell, board, budget) for cell in grid.waiting):
            workers.load()
        while grid.waiting or grid.running:
            grid.collect()
            elsewhere = 0
            if not grid.is_full:
                grid.drop_settled()
                elsewhere = grid.start_ready(workers)
            is_idle = not grid.running and not elsewhere
            if time.monotonic() >= until or (budget < math.inf and is_idle):
                break
            if is_idle:
                grid.drop_bereft()
            time.sleep(0.05)
    finally:
        _end(workers.started)
        for run in grid.running.values():
            board.set(run.cell, "done" if run.cell.is_done else "interrupted")


def _fits(cell: Cell, board: Board, seconds: float) -> bool:
    """Whether a cell can start now, and is expected to end within some seconds."""
    return cell.lacks is None and (cell.is_begun or (board.usual(cell) or 0) < seconds)


def _end(workers: Sequence[Worker]) -> None:
    """Asks cells to end and waits for them; asked again, they end at once, without a checkpoint."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.stop()
    try:
        for worker in running:
            worker.wait()
    except KeyboardInterrupt:
        for worker in running:
            worker.stop()
        raise


def _start(workers: Workers, cell: Cell, root: Path, slot: int) -> Worker:
    """Runs a cell's script."""
    log = log_of(cell, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    mark_of(cell, root).unlink(missing_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}
    return workers.start(ROOT / cell.script, cell.arguments(), log, **gpu)


def main() -> None:
    """Parses the flags, checks the grid, runs it, and reports the result."""
    parser = Parser(__doc__)
    parser.add_argument("grid", type=Path, help="YAML file, e.g. benchmark/grids/digits.yaml")
    parser.add_argument(
        "--jobs", type=int, help="processes at once (local), >= 1; share the cores; 1 if not given"
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--record_path", type=Path, help="folder of the grid's records")
    parser.add_argument("--status", action="store_true", help="say how far it is, start nothing")
    parser.add_argument("--budget", type=float, help="seconds after which it ends (local), > 0")
    parser.add_argument("--detach", action="store_true", help="slurm: submit, and do not wait")
    flags = parser.parse_args()
    _check_flags(flags)
    jobs = flags.jobs or 1
    grid = read_grid(flags.grid)
    root = (flags.record_path or ROOT / "record" / flags.grid.stem).resolve()
    cells = cells_of(grid, root, not flags.status, flags.executor == "local")
    many = counted(len(cells), "cell")
    queue = slurm.Queue(root, grid.slurm) if flags.executor == "slurm" else None
    if flags.status:
        states = states_of(cells, root, queue)
        for cell in cells:
            end = f"  ({cause_of(cell, root, queue)})" if states[cell.name] == "failed" else ""
            print(shown(f"{states[cell.name]:12} {cell.name}{end}"))
        print(f"{many}: {summary(states.values())}")
        return

    made_folder(root, "--record_path")
    RunFolder(root / ".grid").lock()
    logger.info("%s in %s, %d done", many, root, sum(c.is_done for c in cells))
    with Board(cells, None if queue else jobs) as board:
        try:
            if queue is not None:
                queue.run(cells, board.set, detach=flags.detach)
            else:
                run_local(cells, root, jobs, board, flags.budget or math.inf)
        except KeyboardInterrupt:
            has_run = board.count("interrupted") > 0
            of_local = "what ran has a checkpoint; " if has_run else ""
            rest = "the jobs stay in the queue; " if queue else of_local
            logger.info("%sthe same command goes on", rest)
            raise
    logger.info("%s: %s", many, summary(board.states.values()))
    if flags.budget is not None:
        _say_what_is_unfinished(cells, board, flags.budget)
    failed = [cell for cell in cells if board.states[cell.name] == "failed"]
    if failed:
        raise UserError(*(f"{c.name}: failed, {cause_of(c, root, queue)}" for c in failed))


def _check_flags(flags: argparse.Namespace) -> None:
    """Refuses values that are not allowed, and flags that do not fit together.

    Raises:
        UserError: if there is one.
    """
    if flags.jobs is not None and flags.jobs < 1:
        raise UserError(f"--jobs: {flags.jobs} is not allowed; give 1 or more")
    if flags.jobs is not None and flags.executor == "slurm":
        raise UserError("--jobs: is for --executor local; give parallelism in the YAML's slurm")
    if flags.detach and flags.executor == "local":
        raise UserError("--detach: needs --executor slurm; leave it out")
    if flags.budget is not None and not flags.budget > 0:
        raise UserError(f"--budget: {flags.budget:g} is not allowed; give seconds, more than 0")
    if flags.budget is not None and flags.executor == "slurm":
        raise UserError("--budget: is for --executor local; give timeout_min in the YAML's slurm")


def _say_what_is_unfinished(cells: Sequence[Cell], board: Board, budget: float) -> None:
    """Says whether the same command would finish cells that the budget did not suffice for."""
    unfinished = [cell for cell in cells if board.states[cell.name] not in slurm.ENDED]
    if not unfinished:
        return
    ready = [cell for cell in unfinished if cell.lacks is None]
    if ready and not any(_fits(cell, board, budget) for cell in ready):
        logger.info(
            "each cell that can start takes longer than the budget: %.0f s or more, as cells of "
            "its kind took; give a larger one",
            min(board.usual(cell) or 0 for cell in ready),
        )
    else:
        logger.info("the budget is used; the same command goes on")


def states_of(cells: Sequence[Cell], root: Path, queue: "slurm.Queue | None") -> dict[str, str]:
    """State of every cell, from the records, the notes beside them, and the queue."""
    queued = {} if queue is None else queue.states()
    states: dict[str, str] = {}
    for cell in cells:
        if cell.is_done:
            state = "done"
        elif queue is not None and cell.name in queued:
            state = queue.state_of(cell, queued)
        elif queue is None and is_elsewhere(cell):
            state = "running"
        elif any(states[needed.name] in ("failed", "skipped") for needed in cell.needed):
            state = "skipped"
        elif has_failed(cell, root) if queue is None else queue.has_lost(cell):
            state = "failed"
        elif cell.is_done:  # by now
            state = "done"
        else:
            state = "interrupted" if cell.is_begun else "waiting"
        states[cell.name] = state
    return states


if __name__ == "__main__":
    run_script(main)
