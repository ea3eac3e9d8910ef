"""How a script runs: exit codes, signals, logs."""

import atexit
import contextlib
import errno
import io
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from models import userfile
from utils.errors import NothingToDo, UserError, is_lack_of_memory, one_line, shown
from utils.files import REFUSALS, has_working_folder, not_written
from utils.process import distributed

SAME_REQUEST = 1.0  # seconds


logger = logging.getLogger("sau")
# Of what a signal interrupts: for the terminal alone, because writing a file may fail there.
_of_signals = logger.getChild("signals")


class Line(logging.Formatter):
    """One line for each record, also if a text in it has line breaks; see `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _open_closed() -> None:
    """Opens the standard streams that were closed; else a file of ours would take their place."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function and turns its end into an exit code.

    A `UserError` is printed, one line per problem, and exits with 2. The same holds for errors of
    the system (no access, no space, no memory), for things that torch cannot do on `mps`, and for
    all that the user's own network raises. Ctrl-C exits with 130, SIGTERM with 143, a closed
    terminal with 129, Ctrl-Break (Windows) with 149. If there are several processes, the first one
    prints for all; another one prints only errors that it alone has met.
    """
    _open_closed()
    # Figures are drawn into files. A notebook names a backend that this interpreter may lack, and
    # matplotlib would refuse to be loaded.
    os.environ.pop("MPLBACKEND", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is not a terminal's, nor a file's
            stream.reconfigure(errors="backslashreplace")  # where LANG has not all letters
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(Line("%(message)s"))
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    is_first = not distributed.is_launched() or os.environ["RANK"] == "0"
    if not is_first:
        logger.setLevel(logging.ERROR)
    try:
        _require_temporary_folder()
        with _signals(), distributed.joined(), userfile.blamed(but_for=Stopped):
            main()
    except UserError as error:
        if not is_first:
            # torchrun ends this process if the first one has failed as well, which may take a while
            # on a busy machine; only what this one alone has met is then still to be said.
            time.sleep(30)
        for problem in error.problems:
            logger.error("error: %s", problem)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of our output has gone, e.g. `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, MemoryError, RuntimeError, TypeError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        logger.error("error: %s", refusal)
        raise SystemExit(2) from None
    except NothingToDo as done:
        logger.info("%s", done)
    except Stopped as stopped:
        logger.error("%s", stopped)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        logger.error("interrupted")
        raise SystemExit(130) from None
    finally:
        logger.removeHandler(console)


def _refusal(error: Exception) -> str | None:
    """What is wrong, and what to do, if the system or torch refuses; None if it is a defect."""
    if isinstance(error, OSError) and error.errno == errno.ENOENT and not has_working_folder():
        return (
            "the folder that this command was given in is gone; change to one that is there, and "
            "give it again"
        )
    if is_lack_of_memory(error):
        return (
            f"there is not enough memory ({shown(one_line(error), 200) or 'no more was said'}); "
            "give smaller batches, images or networks, or another --device"
        )
    if isinstance(error, OSError):
        if error.errno not in REFUSALS:
            return None
        what = "a file" if error.filename is None else error.filename
        return f"{what}: {error.strerror}; make space, make it accessible, or give another path"
    if str(error).startswith("Symlink loop"):  # of pathlib before Python 3.13
        return f"{error}; give another path"
    if re.search(r"\bMPS\b", str(error)):
        return (
            f"--device: mps lacks what this run needs ({shown(one_line(error), 200)}); give cpu, "
            "or set PYTORCH_ENABLE_MPS_FALLBACK=1 for what it can leave to the CPU"
        )
    return None


def _require_temporary_folder() -> None:
    """Checks that there is a folder for temporary files, which torch needs in the middle of work.

    Raises:
        UserError: if there is none.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(
            f"TMPDIR: {error.strerror}; set it to a folder that can be written"
        ) from None


class Stopped(KeyboardInterrupt):
    """The user, or the system, has asked this process to end."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class _Stop:
    """Whether work that can be resumed is being done, and which signal has come in the meantime."""

    is_deferred = False
    signal: int | None = None
    since = -math.inf


def defer_signals(deferred: bool) -> None:
    """After True and until False, a signal to end waits until `stop_signal` is called."""
    _Stop.is_deferred = deferred


def stop_signal() -> int | None:
    """The signal that waits, if any."""
    return _Stop.signal


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first signal to end waits if the work can be resumed; the next one ends it at once.

    These are SIGINT, SIGTERM and, where the system has them, SIGHUP and SIGBREAK. Once the work is
    over, they do what they did before, and at the end of the process see `_be_quiet`.

    All signals within a second count as the first one: schedulers and launchers signal all
    processes of a job, and each of these passes the signal on to its children.
    """

    def handle(number: int, _: Any) -> None:
        if _is_same_request():
            return
        _Stop.since = time.monotonic()
        if not _Stop.is_deferred or _Stop.signal is not None:
            raise Stopped(number, "interrupted" if number == signal.SIGINT else "terminated")
        _Stop.signal = number
        _of_signals.warning("stopping after this step; once more to stop at once")

    _Stop.is_deferred, _Stop.signal, _Stop.since = False, None, -math.inf
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # the terminal is closed; not on Windows
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(hang_up)
    if hasattr(signal, "SIGBREAK"):  # Windows, which has no other signal from process to process
        numbers.append(signal.SIGBREAK)
    before = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        atexit.unregister(_be_quiet)
        atexit.register(_be_quiet)  # before what is registered already, as by tqdm


def _be_quiet() -> None:
    """At the end of the process, a signal ends it without the traceback of what cleans up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end_quietly)


def _is_same_request() -> bool:
    """Whether a signal that comes now counts as the one before."""
    return time.monotonic() - _Stop.since < SAME_REQUEST


def _end_quietly(number: int, _: Any) -> None:
    """What a signal does when libraries clean up at the end of the process."""
    if not _is_same_request():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@contextlib.contextmanager
def file_log() -> Iterator[Callable[..., None]]:
    """Keeps the log's lines; the function that it gives opens the file that gets all of them.

    What is said while a signal is handled is not among them.

    So the log also has the lines from before its folder was made. Each line has its own time. With
    `append`, a resumed run's lines come after those of the run before.
    """
    kept = MemoryHandler(capacity=1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    kept.addFilter(lambda record: record.name != _of_signals.name)
    files: list[logging.FileHandler] = []

    def open_file(path: Path, append: bool = False) -> None:
        if not distributed.is_main():
            return
        try:
            files.append(_LogFile(path, mode="a" if append else "w", encoding="utf-8"))
        except OSError as error:
            raise not_written(path, error) from None
        files[0].setFormatter(Line("%(asctime)s %(levelname)s %(message)s"))
        kept.setTarget(files[0])
        kept.flushLevel = logging.NOTSET  # from now on each line is passed on at once
        kept.flush()

    logger.addHandler(kept)
    try:
        yield open_file
    finally:
        logger.removeHandler(kept)
        for handler in (kept, *files):
            handler.close()


class _LogFile(logging.FileHandler):
    """If the log cannot be written, ends the run with one line, not with a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            if stream is not None:
                stream.close()
        self.mode = "a"
        raise not_written(Path(self.baseFilename), error) from None
