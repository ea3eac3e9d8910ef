"""What the pipelines of attacks and defenses share during training: scores, log, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from utils.data.batches import keep_on
from utils.data.labelled import Labelled, Triggered
from utils.metrics import Scores
from utils.process import distributed
from utils.process.progress import Progress
from utils.process.script import Stopped, defer_signals, logger, stop_signal
from utils.training.evaluate import evaluate
from utils.training.findings import Findings
from utils.training.loop import Loop


class Keeper(Protocol):
    """Where a training's checkpoints and rows go; the folder of a run is one."""

    def write_checkpoint(self, content: Mapping[str, Any]) -> None: ...

    def write_metrics(
        self, rows: Sequence[Mapping[str, Any]], name: str = "metrics.csv"
    ) -> None: ...


class Watch:
    """Scores a model while it is trained, writes `metrics.csv` and the log, shows progress.

    The rows of `metrics.csv` are the rounds of the main phase. Rounds of earlier phases, if a
    method has some, are in `phases.csv`, with their losses.

    Args:
        folder: where checkpoints and rows go; None writes none.
        unit: "epoch" or "round".
        score: from a model to its scores; None if no model is to be scored.
        eval_every: rounds between two evaluations, >= 1; None for none. The last round is not
            scored, because `finish` scores the model that comes out.
        checkpoint_every: seconds between two checkpoints, >= 0; they are made after a batch. A run
            that has one gets another after its last batch, because scores and files may take long.
        checkpoint: where to continue, from `RunFolder.start`; None for a fresh run.
        advice: how a run goes on that was stopped.

    Attributes:
        scores: the latest ones.
        earlier: seconds of the run before, if this run continues it.
        training_seconds: what the method itself took so far, without scores, files and pictures.
    """

    def __init__(
        self,
        folder: Keeper | None,
        unit: str,
        score: Callable[[nn.Module], Scores] | None,
        eval_every: int | None,
        checkpoint_every: float = math.inf,
        checkpoint: Mapping[str, Any] | None = None,
        advice: str = "--resume (and without --overwrite)",
    ) -> None:
        self._folder = folder
        self._unit = unit
        self._score = score
        self._eval_every = eval_every
        self._advice = advice
        self._rows: list[dict[str, float]] = []
        self._phase_rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._phase = ""
        self._checkpoint = checkpoint
        self._checkpoint_every = checkpoint_every
        self._saved = self._resumed_at = time.monotonic()
        self._has_checkpoint = checkpoint is not None
        self._loop = Loop()
        self.scores: Scores | None = None
        self.earlier = 0.0
        self.training_seconds = 0.0
        if checkpoint is not None:
            self._rows = list(checkpoint["rows"])
            self._phase_rows = list(checkpoint.get("phase_rows", []))
            self.earlier = checkpoint["seconds"]
            self.training_seconds = checkpoint.get("training_seconds", 0.0)
            self._started -= self.earlier

    def start(self, before: Scores | None = None) -> Loop:
        """The loop that a method counts with; `before` becomes row 0."""
        resume = None if self._checkpoint is None else self._checkpoint["loop"]
        if before is not None and resume is None:
            self._rows.append({self._unit: 0, **before.values(), "seconds": 0.0})
        self._loop = Loop(self._after_round, self._after_batch, self._unit, resume)
        defer_signals(self._folder is not None)
        self._resumed_at = time.monotonic()
        return self._loop

    def finish(self, model: nn.Module) -> Scores:
        """The scores of the model that a method gave; they complete the last row.

        Not if the method says (`best_round`) that its model is that of an earlier round.
        """
        assert self._score is not None
        with self._paused():
            self._close()
            self.scores = self._score(model)
            last = self._rows[-1][self._unit] if self._rows else 0
            if last and self.findings.facts.get("best_round", last) == last:
                seconds = self._rows[-1].pop("seconds")
                self._rows[-1] |= {**self.scores.values(), "seconds": seconds}
            if self._folder is not None:
                self._folder.write_metrics(self._rows)
        defer_signals(False)
        logger.info("result  %s", self.scores)
        return self.scores

    def end(self) -> None:
        """In place of `finish`, if no model is to be scored."""
        self._close()
        defer_signals(False)

    def _close(self) -> None:
        if self._progress:
            self._progress.__exit__()

    @property
    def findings(self) -> Findings:
        """What the method found so far."""
        return self._loop.findings

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One row per round: the unit, mean losses, rates in [0, 1], seconds since the start."""
        return self._rows

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Time that passes inside is not counted as the method's own time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.training_seconds += time.monotonic() - self._resumed_at
        try:
            yield
        finally:
            self._resumed_at = time.monotonic()

    def _after_batch(self, batches: int) -> None:
        number, batch = self._loop.position
        if self._progress is None or self._phase != self._loop.phase:
            if self._progress is not None:
                self._progress.__exit__()
            self._phase = self._loop.phase
            done = (number - 1) * batches + batch - 1
            total, name = self._loop.total * batches, self._phase or self._unit
            self._progress = Progress(total, name, initial=done).__enter__()
        self._progress.advance()
        if self._folder is None:
            return
        is_end = self._loop.phase == "" and self._loop.is_last and batch == batches
        is_due = time.monotonic() - self._saved >= self._checkpoint_every
        is_due = is_due or (is_end and self._has_checkpoint)
        stop, is_due = distributed.agreed(stop_signal() or 0, is_due)
        if stop or is_due:
            with self._paused():
                self._save(stop, batches)

    def _save(self, stop: int, batches: int) -> None:
        """Writes a checkpoint; raises Stopped if this is the end."""
        assert self._folder is not None
        self._folder.write_checkpoint(
            {
                "loop": self._loop.snapshot(),
                "rows": self._rows,
                "phase_rows": self._phase_rows,
                "seconds": time.monotonic() - self._started,
                "training_seconds": self.training_seconds,
            }
        )
        self._saved, self._has_checkpoint = time.monotonic(), True
        if stop:
            self._close()
            number, batch = self._loop.position
            raise Stopped(
                stop,
                f"stopped in {self._name()} {number} after batch {batch} of {batches}; go on with "
                f"{self._advice}",
            )

    def _name(self) -> str:
        """The name of the counted unit: "round", or "teacher, round" in a phase of that name."""
        return f"{self._loop.phase}, {self._unit}" if self._loop.phase else self._unit

    def _after_round(
        self, number: int, total: int, losses: Mapping[str, float], state: Mapping[str, Any]
    ) -> None:
        with self._paused():
            self._report(number, total, losses, state.get("model"))
        if stop_signal() and self._loop.position.batches == 0:  # no batches, and so no checkpoint
            defer_signals(False)
            raise Stopped(stop_signal() or 0, f"stopped in {self._name()} {number}")

    def _report(
        self, number: int, total: int, losses: Mapping[str, float], model: nn.Module | None
    ) -> None:
        is_main, is_last = self._loop.phase == "", self._loop.is_last
        if is_main and is_last:
            defer_signals(False)
        row: dict[str, Any] = {self._unit: number}
        row |= {name if name == "loss" else f"loss_{name}": value for name, value in losses.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        is_due = self._eval_every and number % self._eval_every == 0 and not (is_main and is_last)
        if self._score is not None and model is not None and is_due:
            self.scores = self._score(model)
            row |= self.scores.values()
            text += f"  {self.scores}"
        row["seconds"] = round(time.monotonic() - self._started, 2)
        if is_main:
            self._rows.append(row)
        else:
            self._phase_rows.append({"phase": self._loop.phase, **row})
        if self._folder is not None and is_main:
            self._folder.write_metrics(self._rows)
        elif self._folder is not None:
            self._folder.write_metrics(self._phase_rows, "phases.csv")
        eta = f"ETA {self._progress.eta()}" if self._progress and not is_last else ""
        logger.info("%s %d/%d  %s  %s", self._name(), number, total, text, eta)
        if self._progress:
            self._progress.show(str(self.scores or ""))


def scorer(
    test: Labelled,
    triggered: Callable[[], Triggered | None],
    device: torch.device,
    cross: Callable[[], Labelled | None] = lambda: None,
) -> Callable[[nn.Module], Scores]:
    """`evaluate` on test images that stay on the device if they fit.

    Triggered and cross images are requested at each evaluation, because an attack that trains its
    trigger changes them.
    """
    test = replace(test, images=keep_on(device, test.images))
    return lambda model: evaluate(model, test, triggered(), device, cross=cross())
