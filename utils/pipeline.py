"""What the attack and the defense pipeline share: watching a run, its pictures and facts."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from utils import plot
from utils.config import Config, parse_yaml
from utils.data import Labelled, Triggered, keep_on
from utils.evaluate import evaluate
from utils.folders import FREE_TO_CHANGE, RunFolder
from utils.metrics import Scores
from utils.runtime import (
    Progress,
    Stopped,
    defer_signals,
    environment,
    logger,
    peak_memory_mib,
    stop_signal,
)
from utils.train import Loop


class Watch:
    """Scores a model while it is trained, writes `metrics.csv` and the log, shows progress.

    Args:
        folder: where `metrics.csv` goes; None writes none.
        unit: "epoch" or "round".
        score: from a model to its scores.
        eval_every: rounds between two evaluations, >= 1; the last round is always evaluated.
        checkpoint_every: seconds between two checkpoints, >= 0; they are made after a batch.
        checkpoint: from where to go on, from `RunFolder.start`; None for a fresh run.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        unit: str,
        score: Callable[[nn.Module], Scores],
        eval_every: int,
        checkpoint_every: float = math.inf,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._unit = unit
        self._score = score
        self._eval_every = eval_every
        self._rows: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._rounds = 0
        self._checkpoint = checkpoint
        self._checkpoint_every = checkpoint_every
        self._saved = time.monotonic()
        self._loop = Loop()
        self.scores: Scores | None = None
        self.earlier = 0.0
        if checkpoint is not None:
            self._rows = list(checkpoint["rows"])
            self.earlier = checkpoint["seconds"]
            self._started -= self.earlier

    def start(self, rounds: int, before: Scores | None = None) -> Loop:
        """The loop that a method counts with; `before` becomes row 0."""
        self._rounds = rounds
        resume = None if self._checkpoint is None else self._checkpoint["loop"]
        if before is not None and resume is None:
            self._rows.append({self._unit: 0, **before.values(), "seconds": 0.0})
        self._loop = Loop(self._after_round, self._after_batch, resume=resume)
        defer_signals(self._folder is not None)
        return self._loop

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a round: the unit, mean losses, rates in [0, 1], seconds since the start."""
        return pd.DataFrame(self._rows)

    def _after_batch(self, batches: int) -> None:
        number, batch = self._loop.position
        if self._progress is None:
            done = (number - 1) * batches + batch - 1
            self._progress = Progress(self._rounds * batches, self._unit, initial=done).__enter__()
        self._progress.advance()
        stop = stop_signal()
        if self._folder is None or not (
            stop or time.monotonic() - self._saved >= self._checkpoint_every
        ):
            return
        self._folder.write_checkpoint(
            {
                "loop": self._loop.snapshot(),
                "rows": self._rows,
                "seconds": time.monotonic() - self._started,
            }
        )
        self._saved = time.monotonic()
        if stop:
            self._progress.__exit__()
            raise Stopped(
                stop,
                f"stopped in {self._unit} {number} after batch {batch} of {batches}; go on with "
                "the same command and --resume",
            )

    def _after_round(
        self, number: int, total: int, losses: Mapping[str, float], state: Mapping[str, Any]
    ) -> None:
        is_last = number == total
        row: dict[str, float] = {self._unit: number}
        row |= {name if name == "loss" else f"loss_{name}": value for name, value in losses.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        if is_last or number % self._eval_every == 0:
            self.scores = self._score(state["model"])
            row |= self.scores.values()
            text += f"  {self.scores}"
        row["seconds"] = round(time.monotonic() - self._started, 2)
        self._rows.append(row)
        if self._folder is not None:
            self._folder.write_metrics(self._rows)
        eta = self._progress.eta() if self._progress else "?"
        logger.info(
            "%s %d/%d  %s  %s", self._unit, number, total, text, "" if is_last else f"ETA {eta}"
        )
        if self._progress:
            self._progress.show(str(self.scores or ""))
            if is_last:
                self._progress.__exit__()
        if is_last:
            defer_signals(False)


def scorer(
    test: Labelled,
    triggered: Callable[[], Triggered | None],
    device: torch.device,
    cross: Callable[[], Labelled | None] = lambda: None,
) -> Callable[[nn.Module], Scores]:
    """`evaluate` on test images that stay on the device where they fit.

    Triggered and cross images are asked for at each evaluation: an attack that trains its trigger
    changes them.
    """
    test = replace(test, images=keep_on(device, test.images))
    return lambda model: evaluate(model, test, triggered(), device, cross=cross())


def save_figure(folder: RunFolder, name: str, figure: Figure) -> Path:
    """Writes a PNG; returns its path."""
    return folder.write(name, lambda path: figure.savefig(path, dpi=160))


def log_paths(folder: RunFolder, pictures: Sequence[Path]) -> None:
    """Says where the results are."""
    logger.info("record: %s", folder.path)
    for path in pictures:
        logger.info("picture: %s", path)


def difference_grid(
    clean: torch.Tensor,
    changed: torch.Tensor,
    names: tuple[str, str],
    captions: tuple[list[str], list[str]],
    title: str,
) -> Figure:
    """Clean images, changed images and their amplified difference.

    Args:
        clean, changed: float (N, C, H, W).
        names: of the first two rows.
        captions: texts under the images of the first two rows.
    """
    difference, scale = plot.amplified(changed - clean)
    last = f"difference\nx {scale:.3g}"
    return plot.image_grid(
        {names[0]: clean, names[1]: changed, last: difference},
        {names[0]: captions[0], names[1]: captions[1]},
        title,
    )


def run_facts(
    config: Config, started: float, device: torch.device, precision: str
) -> dict[str, Any]:
    """Recipe, seconds, peak memory and environment for `summary.json`."""
    return {
        "config_sha256": recipe_sha256(parse_yaml(config.dump(), "the configuration")),
        "seconds": round(time.monotonic() - started, 1),
        **peak_memory_mib(device),
        **environment(device, precision),
    }


def recipe_sha256(values: Mapping[str, Any]) -> str:
    """Of a configuration without its seed, and without what says where it runs and writes."""
    own = {
        *FREE_TO_CHANGE,
        "random_seed",
        "result_file",
        "dataset_path",
        "device",
        "eval_every",
        "deterministic",
    }
    recipe = {name: value for name, value in values.items() if name not in own}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
