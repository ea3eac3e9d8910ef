"""Where a training stands whose result goes to the cache."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.process.script import logger
from utils.records.checkpoint import CHECKPOINT
from utils.records.contents import METRICS_FILE
from utils.records.folders import RunFolder
from utils.tensors import load_tensors


class Partial:
    """One file with the latest checkpoint; it is removed when the result is on the disk.

    Two runs that make the same write the same, and a file is replaced as a whole, so that they do
    not disturb each other.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = RunFolder(path.parent)

    def read(self) -> dict[str, Any] | None:
        """What `write_checkpoint` was given; None if it was given nothing that can be read."""
        if not self.path.exists():
            return None
        try:
            content: dict[str, Any] = {**CHECKPOINT.validate_python(load_tensors(self.path))}
        except (OSError, ValueError):
            logger.warning("warning: %s: cannot be read; that part starts again", self.path)
            return None
        logger.info("goes on from %s", self.path)
        return content

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        self._folder.write_tensors(self.path.name, content)

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], name: str = METRICS_FILE) -> None:
        """Nothing: the rows of what is prepared are in the log alone."""

    def remove(self) -> None:
        """Removes the file; if the system refuses that, it stays, and nothing reads it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
