"""What an attack may use, in addition to its configuration, to prepare its trigger."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.data.images import data_folder, no_cache
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import prepare_folder
from utils.metrics import Scores
from utils.process import distributed
from utils.process.device import run_conditions
from utils.process.script import logger
from utils.records import folders
from utils.records.checkpoint import digest
from utils.records.lock import Lock
from utils.records.partial import Partial
from utils.tensors import explained, load_tensors
from utils.training.findings import Findings
from utils.training.loop import NotOfThisRun
from utils.training.watch import Watch


@dataclass(frozen=True)
class Setting:
    """What an attack may use, in addition to its configuration, to prepare its trigger.

    Attributes:
        checkpoint_every: seconds between two checkpoints of what is trained.
        findings: what the attack found while it prepared itself. Its facts stand in `summary.json`
            under `preparation`.
    """

    data: Dataset
    device: torch.device
    precision: str
    checkpoint_every: float = math.inf
    findings: Findings = field(default_factory=Findings)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain data that the attack wants in the summary."""
        return self.findings.facts

    @property
    def warnings(self) -> list[str]:
        """Lines for the summary; see `warn`."""
        return self.findings.warnings

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """All of the dataset that a tensor may depend on, as plain data: every image counts.

        The fingerprint that records keep is of a sample of the images. It would give a changed
        dataset what was made of another one. This is computed once, at the first use.
        """
        return {
            "sha256": digest(self.data.tensors()),
            "classes": self.data.classes,
            "mean": self.data.mean,
            "std": self.data.std,
        }

    def warn(self, text: str) -> None:
        """Logs a warning now, and keeps it for the summary."""
        self.findings.warn(text)

    def cached(
        self,
        kind: str,
        key: Mapping[str, Any],
        compute: Callable[[], dict[str, torch.Tensor]],
        version: int = 1,
    ) -> dict[str, torch.Tensor]:
        """Tensors that take long to make: computed once, then read from `data/cache/`.

        If another process makes the same, this one waits for it.

        Args:
            kind: what they are; part of the file's name.
            key: all that they depend on, except the dataset, the kind of device, and the code.
            version: must be raised with every change of the code that changes the result.

        Raises:
            UserError: if the cache cannot be written, which is tested before all computation; or if
                the cached file is not a file of tensors.
        """
        name = f"{self._name(kind, key, version)}.pt"
        cache = folders.RunFolder(_cache())
        with distributed.main_alone() as is_mine:
            if is_mine and (cache.path / name).exists():
                logger.info("%s: read from %s", kind, cache.path / name)
            elif is_mine:
                try:
                    prepare_folder(cache.path)
                except OSError as error:
                    raise no_cache(cache.path, error) from None
                lock = Lock(cache.path / name)
                lock.wait(kind)
                try:
                    if not (cache.path / name).exists():
                        cache.write_tensors(name, compute())
                finally:
                    lock.release()
        with explained(cache.path / name, "a file of the cache; remove it"):
            return load_tensors(cache.path / name)

    def trained(
        self,
        kind: str,
        key: Mapping[str, Any],
        train: Callable[[Watch], dict[str, torch.Tensor]],
        score: Callable[[nn.Module], Scores] | None = None,
        version: int = 1,
    ) -> dict[str, torch.Tensor]:
        """As `cached`, for what a training makes, which goes on where it was interrupted.

        It goes on where the same device, precision, versions, and number of threads make the same
        numbers, and starts again elsewhere.

        Args:
            train: given what watches the training; it ends with `finish`, or with `end`.
            score: for `finish`.
        """

        where = run_conditions(self.device, self.precision)
        for name in ("processes", "commit"):  # one process trains, and `version` is for the code
            where.pop(name, None)
        partial = Partial(_cache() / f"{self._name(kind, {**key, 'where': where}, version)}.part")

        def compute() -> dict[str, torch.Tensor]:
            watch = Watch(
                partial,
                "epoch",
                score,
                eval_every=None,
                checkpoint_every=self.checkpoint_every,
                checkpoint=partial.read(),
                advice="the same command",
            )
            try:
                return train(watch)
            except NotOfThisRun as error:
                raise UserError(
                    f"{partial.path}: is no checkpoint of this training ({error.reason}); remove it"
                ) from None

        content = self.cached(kind, key, compute, version)
        if distributed.is_main():
            partial.remove()  # only now, because the result is on the disk
        return content

    def _name(self, kind: str, key: Mapping[str, Any], version: int) -> str:
        """A name that is another one where something is another that a tensor depends on."""
        about = {"version": version, "data": self.dataset, "device": self.device.type}
        depends = {**key, **about}
        text = json.dumps(depends, sort_keys=True)
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _cache() -> Path:
    return data_folder() / "cache"
