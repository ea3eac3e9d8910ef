"""What an attack may use, in addition to its configuration, to prepare its trigger."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.data.images import data_folder, no_cache
from utils.data.labelled import Dataset
from utils.files import prepare_folder
from utils.process import distributed
from utils.process.script import logger
from utils.records import folders
from utils.tensors import explained, load_tensors
from utils.training.findings import Findings


@dataclass(frozen=True)
class Setting:
    """What an attack may use, in addition to its configuration, to prepare its trigger.

    Attributes:
        findings: what the attack found while it prepared itself. Its facts stand in `summary.json`
            under `preparation`.
    """

    data: Dataset
    device: torch.device
    precision: str
    findings: Findings = field(default_factory=Findings)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain data that the attack wants in the summary."""
        return self.findings.facts

    @property
    def warnings(self) -> list[str]:
        """Lines for the summary; see `warn`."""
        return self.findings.warnings

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

        Args:
            kind: what they are; part of the file's name.
            key: all that they depend on, except the dataset and the code.
            version: must be raised with every change of the code that changes the result.

        Raises:
            UserError: if the cache cannot be written, which is tested before all computation; or if
                the cached file is not a file of tensors.
        """
        depends = {**key, "version": version, "data": self.data.fingerprint()}
        text = json.dumps(depends, sort_keys=True)
        cache = folders.RunFolder(data_folder() / "cache")
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"
        with distributed.main_alone() as is_mine:
            if is_mine and (cache.path / name).exists():
                logger.info("%s: read from %s", kind, cache.path / name)
            elif is_mine:
                try:
                    prepare_folder(cache.path)
                except OSError as error:
                    raise no_cache(cache.path, error) from None
                cache.write_tensors(name, compute())
        with explained(cache.path / name, "a file of the cache; remove it"):
            return load_tensors(cache.path / name)
