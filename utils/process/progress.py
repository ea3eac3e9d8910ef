"""Progress on a terminal and in a log."""

import sys
import time

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.errors import shown
from utils.process import distributed
from utils.process.script import logger

SAY_EVERY = 60.0  # seconds


class Progress:
    """A bar with an ETA on a terminal; elsewhere one line per minute, beside its owner's log.

    Args:
        total: number of steps.
        description: what is being done.
        unit: what a step is.
        initial: steps that were done earlier.
        says: whether it logs; if not, only its owner does.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str = "batch",
        initial: int = 0,
        says: bool = True,
    ) -> None:
        self.total = total
        self.done = self._initial = initial
        self._start = self._said = time.monotonic()
        description = shown(description, 100)
        self._description, self._unit, self._text, self._says = description, unit, "", says
        self._redirect = logging_redirect_tqdm(loggers=[logger])
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            disable=not sys.stderr.isatty() or not distributed.is_main(),
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> "Progress":
        if not self._bar.disable:
            self._redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._redirect.__exit__(None, None, None)
        self._bar.close()

    def advance(self, steps: int = 1) -> None:
        """Counts finished steps."""
        self.done += steps
        self._bar.update(steps)
        if self._says and self._bar.disable and time.monotonic() - self._said >= SAY_EVERY:
            self._said = time.monotonic()
            logger.info(
                "%s: %s %d of %d  %s  ETA %s",
                *(self._description, self._unit, self.done, self.total, self._text, self.eta()),
            )

    def show(self, text: str) -> None:
        """Shows live values behind the bar."""
        self._text = shown(text, 100)
        self._bar.set_postfix_str(self._text)

    def eta(self) -> str:
        """Time left at the rate so far, as h:mm:ss."""
        elapsed = time.monotonic() - self._start
        return clock(elapsed * (self.total - self.done) / max(self.done - self._initial, 1))


def clock(seconds: float) -> str:
    """A time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
