"""Cells of a grid as SLURM jobs, through submitit.

The submitting process may end at any time. `.grid/jobs.json` beside the records says which job
belongs to which cell, the records say what is done, and SLURM's own queue says what waits or runs.
Accounting (sacct) is not needed. A job that is preempted, or reaches its time limit, is put back
into the queue and continues from its checkpoint.
"""

import getpass
import json
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.cells import Cell
from benchmark.grid import Slurm
from benchmark.workers import Workers, ending_of
from utils.errors import UserError, one_line
from utils.files import ROOT, read_object
from utils.process.script import logger
from utils.records.folders import RunFolder

ENDED = ("done", "failed", "skipped")
_POLL = 5.0  # seconds
_LOST = 3  # polls after which a job that is neither queued nor done counts as failed
Report = Callable[..., None]


class Job:
    """Cells, one after the other; each continues where an earlier turn of the job was stopped.

    Args:
        cells: of a grid.
        threads: of each cell, >= 1.
    """

    def __init__(self, cells: Sequence[Cell], threads: int) -> None:
        self._cells = list(cells)
        self._threads = threads

    def __call__(self) -> None:
        workers = Workers(self._threads, is_warm=len(self._cells) > 1)
        codes = {cell.name: self._run(cell, workers) for cell in self._cells}
        failed = [f"{name}: {ending_of(code)}" for name, code in codes.items() if code]
        if failed:
            raise SystemExit("\n".join(failed))

    def _run(self, cell: Cell, workers: Workers) -> int:
        """Runs a cell; gives its exit code, which is 0 if a cell that it needs has failed."""
        lost = cell.lacks
        if lost is not None:
            print(f"{cell.name}: skipped, its {lost} failed", flush=True)
            return 0
        worker = workers.start(ROOT / cell.script, cell.arguments(), None)
        try:
            code = worker.wait()
        finally:
            worker.stop()
            worker.wait()
        if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            time.sleep(60)  # stopped from outside: SLURM is about to put this job back
        return code

    def checkpoint(self) -> Any:
        """The work that submitit puts back into the queue: the same cells, which resume."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # the name that later versions look for


class Queue:
    """The jobs of one grid.

    Args:
        root: folder of the grid's records, which every node sees.
        wants: what each job asks for.

    Raises:
        UserError: if this machine has no SLURM, or submitit is missing.
    """

    def __init__(self, root: Path, wants: Slurm) -> None:
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise UserError(
                "--executor: slurm is not allowed here, where there is no sbatch; give local, or "
                "run this on a login node"
            )
        try:
            import submitit
        except ImportError:
            raise UserError("--executor: slurm needs submitit; pip install submitit") from None
        self._submitit = submitit
        self._wants = wants
        self._folder = RunFolder(root / ".grid")
        self._logs = root / ".grid" / "slurm"
        self._waits_until: float | None = None

    @property
    def _ids(self) -> dict[str, str]:
        """Job of every cell that was ever submitted."""
        path = self._folder.path / "jobs.json"
        try:
            ids = read_object(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            ids = None
        if ids is None or not all(isinstance(job, str) for job in ids.values()):
            raise UserError(
                f"{path}: is damaged; remove it (jobs that are still in the queue are then not "
                "known, so cancel them first)"
            )
        return ids

    def states(self) -> dict[str, str]:
        """`queued` or `running` for every cell that SLURM still knows.

        Raises:
            UserError: if the queue cannot be asked.
        """
        call = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %T"]
        answer = subprocess.run(call, capture_output=True, text=True)
        if answer.returncode:
            said = " ".join(answer.stderr.split())
            raise UserError(f"squeue: {said}; ask again when SLURM answers")
        queued = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
        running = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
        return {
            name: "running" if queued[job].strip() in running else "queued"
            for name, job in self._ids.items()
            if job in queued
        }

    def state_of(self, cell: Cell, states: Mapping[str, str]) -> str:
        """`queued` or `running` for a cell of `states`; one of a running job may still wait."""
        waits = self._wants.cells_per_job > 1 and not cell.is_begun
        return "queued" if waits else states[cell.name]

    def has_lost(self, cell: Cell) -> bool:
        """Whether a cell that is not queued was submitted and is not done: its job failed.

        Waits a little for a shared file system, which may be late; for all cells together.
        """
        if cell.name not in self._ids:
            return False
        if self._waits_until is None:
            self._waits_until = time.monotonic() + _POLL
        while not cell.is_finished and time.monotonic() < self._waits_until:
            time.sleep(0.5)
        return not cell.is_finished  # one that is outdated was not lost

    def log_of(self, cell: Cell) -> str:
        return str(self._logs / f"{self._ids.get(cell.name, '*')}_0_log.out")

    def run(self, cells: Sequence[Cell], report: Report, detach: bool) -> None:
        """Submits cells that are neither done nor queued, then watches until all have ended.

        Args:
            report: is called with each cell's new state.
            detach: do not watch.
        """
        queued = self.states()
        self._submit([cell for cell in cells if not cell.is_done and cell.name not in queued])
        ids = self._ids
        missing = dict.fromkeys((cell.name for cell in cells), 0)
        open_cells = [cell for cell in cells if not cell.is_done]
        while open_cells:
            queued = self.states()
            for cell in list(open_cells):
                if cell.is_done:
                    report(cell, "done")
                elif cell.name in queued:
                    missing[cell.name] = 0
                    report(cell, self.state_of(cell, queued), f"job {ids[cell.name]}")
                    continue
                elif missing[cell.name] < _LOST:  # a shared file system may be late
                    missing[cell.name] += 1
                    continue
                else:
                    self._report_end(cell, report)
                open_cells.remove(cell)
            if detach:
                logger.info("submitted; the same command, or --status, tells how far they are")
                return
            time.sleep(_POLL if open_cells else 0)

    def _report_end(self, cell: Cell, report: Report) -> None:
        """Reports the end of a cell that SLURM no longer knows and that is not done."""
        lost = cell.lacks
        if lost is not None:
            report(cell, "skipped", f"its {lost} failed")
        else:
            report(cell, "failed", self.log_of(cell))

    def _submit(self, cells: Sequence[Cell]) -> None:
        """Attacks first; defenses and analyses wait for the jobs whose results they read."""
        if self._wants.cells_per_job > 1:
            self._submit_chunks(cells)
            return
        attacks = [cell for cell in cells if cell.attack is None]
        groups = {"attack": attacks} if self._wants.array else {c.name: [c] for c in attacks}
        for name, group in groups.items():
            self._submit_group(name, group, None)
        defenses = [cell for cell in cells if cell.attack is not None and not cell.others]
        for name in dict.fromkeys(cell.folder.name for cell in defenses):
            ready: list[Cell] = []
            after: dict[str, list[Cell]] = {}  # cells by the job, or the array, that they wait for
            for cell in (cell for cell in defenses if cell.folder.name == name):
                assert cell.attack is not None
                if cell.attack.is_done:
                    ready.append(cell)
                else:
                    after.setdefault(self._ids[cell.attack.name].split("_")[0], []).append(cell)
            for group in [ready] if self._wants.array else [[cell] for cell in ready]:
                self._submit_group(name, group, None)
            for job, group in after.items():
                in_step = len(group) > 1 and [
                    self._ids[cell.attack.name] for cell in group if cell.attack
                ] == [f"{job}_{task}" for task in range(len(group))]
                if in_step:  # task by task: a defense starts when its own attack is done
                    self._submit_group(name, group, f"aftercorr:{job}")
                else:
                    for cell in group:
                        assert cell.attack is not None
                        self._submit_group(name, [cell], f"afterok:{self._ids[cell.attack.name]}")

        for cell in (cell for cell in cells if cell.others):
            self._submit_group(cell.name, [cell], self._dependency([cell]))

    def _submit_chunks(self, cells: Sequence[Cell]) -> None:
        """Jobs of several cells; one waits for jobs that have what its cells read."""
        for number, chunk in enumerate(_chunks(cells, self._wants.cells_per_job)):
            self._submit_jobs(f"cells-{number}", [chunk], self._dependency(chunk))

    def _dependency(self, chunk: Sequence[Cell]) -> str | None:
        """The jobs of all cells that a chunk reads, and that are neither done nor in it."""
        needed = [other for cell in chunk for other in cell.needed if other not in chunk]
        jobs = dict.fromkeys(self._ids[other.name] for other in needed if not other.is_done)
        return f"afterany:{':'.join(jobs)}" if jobs else None

    def _submit_group(self, name: str, cells: Sequence[Cell], dependency: str | None) -> None:
        """One job for one cell, an array for several."""
        if cells:
            self._submit_jobs(name, [[cell] for cell in cells], dependency)

    def _submit_jobs(
        self, name: str, chunks: Sequence[Sequence[Cell]], dependency: str | None
    ) -> None:
        """A job per chunk, several as one array; submitted jobs are written down at once."""
        wants = self._wants
        executor = self._submitit.SlurmExecutor(self._logs, max_num_timeout=1000)
        parameters: dict[str, Any] = {
            "job_name": f"{self._folder.path.parent.name}-{name.replace('/', '-')}",
            "time": wants.timeout_min,
            "cpus_per_task": wants.cpus_per_task,
            "stderr_to_stdout": True,
            "array_parallelism": wants.parallelism,
            "signal_delay_s": min(90, 15 * wants.timeout_min),
            "setup": [
                f"export PYTHONPATH={shlex.quote(str(ROOT))}",
                f"export OMP_NUM_THREADS={wants.cpus_per_task}",
            ],
            "additional_parameters": {
                "requeue": True,
                "kill-on-invalid-dep": "yes",
                **wants.directives,
            },
        }
        if wants.partition is not None:
            parameters["partition"] = wants.partition
        if wants.mem_gb is not None:
            parameters["mem"] = f"{round(1024 * wants.mem_gb)}MB"
        if wants.gpus_per_node:
            parameters["gpus_per_node"] = wants.gpus_per_node
        if dependency is not None:
            parameters["dependency"] = dependency
        executor.update_parameters(**parameters)
        try:
            with executor.batch():  # one call is a single job, several are an array
                jobs = [executor.submit(Job(chunk, wants.cpus_per_task)) for chunk in chunks]
        except (subprocess.CalledProcessError, self._submitit.core.utils.FailedJobError) as error:
            raise UserError(
                f"sbatch refuses the job of {chunks[0][0].name}: {one_line(error)}"
            ) from None
        of_job = zip(chunks, jobs, strict=True)
        ids = self._ids | {cell.name: job.job_id for chunk, job in of_job for cell in chunk}
        self._folder.write_text("jobs.json", json.dumps(ids, indent=1) + "\n")


def _chunks(cells: Sequence[Cell], size: int) -> Iterator[Sequence[Cell]]:
    """The cells in their order, `size` at a time."""
    for first in range(0, len(cells), size):
        yield cells[first : first + size]
