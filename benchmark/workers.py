"""A process for each cell of a grid, which starts within a second.

Loading torch and the project takes longer than a short cell. On Linux, one process does it once for
all: Python's fork server, from which every cell is forked. The server computes nothing and has a
single thread, so each fork begins as a fresh interpreter would. On other systems, where libraries
do not survive a fork, every cell is a fresh interpreter.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import analysis
import attack
import defense
from utils.errors import UserError
from utils.files import ROOT, has_working_folder

CAN_FORK = sys.platform == "linux"
# What asks a script to end. Windows has SIGTERM only as a name: it would end it at once.
STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
_TO_END = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
# By it submitit learns that a job's time is nearly up. It reaches every process of a job, and would
# end those that do not expect it.
_NOTICE = [s for s in signal.Signals if s.name == "SIGUSR2"]
_READY_WITHIN = 60  # seconds after which a fork that says nothing is left to itself
PRELOADED = [
    *(f"attack.{name}" for name in [*attack.names(), "prototype"]),
    *(f"defense.{name}" for name in defense.names()),
    *(f"analysis.{name}" for name in analysis.names()),
    *("benchmark.workers", "utils.plot", "torchvision"),
    *("sklearn.datasets", "sklearn.model_selection"),
]


def ending_of(code: int) -> str:
    """How a process has ended, by its exit code, which is negative if a signal ended it."""
    if code >= 0:
        return f"exit code {code}"
    memory = ", perhaps out of memory" if -code == getattr(signal, "SIGKILL", 9) else ""
    return f"killed by signal {-code}{memory}"


class Worker(Protocol):
    """A process that runs a cell."""

    def poll(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""

    def stop(self) -> None:
        """Asks it to save a checkpoint and to end."""

    def wait(self) -> int:
        """Waits for its end; gives the exit code."""


class Workers:
    """Starts cells.

    Args:
        threads: of each cell, >= 1.
        is_warm: whether they are forked from one process; where that is not possible, none is.

    Attributes:
        started: every cell that was started, also one during whose start a signal came.
    """

    def __init__(self, threads: int, is_warm: bool = True) -> None:
        self._is_warm = is_warm and CAN_FORK
        self._threads = {"OMP_NUM_THREADS": str(threads)}
        self.started: list[Worker] = []
        self._has_loaded = False

    def start(
        self, script: Path, arguments: Sequence[str], log: Path | None, **variables: str
    ) -> Worker:
        """Starts a script in a session of its own, so that Ctrl-C reaches it only from here.

        Args:
            arguments: of the script.
            log: the file to which its messages are added; None for where this process writes.
            variables: of its environment, beside those of this process.
        """
        environment = {**os.environ, **self._threads, **variables}
        if not self._is_warm:
            with _deferred(_TO_END):
                self.started.append(_Fresh(script, arguments, log, environment))
            return self.started[-1]
        ignores_hang_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup sets it
        context = multiprocessing.get_context("forkserver")
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(script, arguments, log, environment, ignores_hang_up, writer)
        )
        try:
            self.load()
            with _deferred(_TO_END):
                _begin(process)
                self.started.append(_Forked(process))
                writer.close()
                with contextlib.suppress(EOFError):  # it has ended already
                    if reader.poll(_READY_WITHIN):
                        reader.recv_bytes()
        except (EOFError, ConnectionError):
            raise UserError(
                "no cell could be started, since the process that they are forked from has ended "
                "(its last words are above); give the command again"
            ) from None
        finally:
            reader.close()
            writer.close()
        return self.started[-1]

    def load(self) -> None:
        """Waits until the process that cells are forked from is there, which takes seconds."""
        if not self._is_warm:
            return
        self._ensure_server()
        if not self._has_loaded:
            first = multiprocessing.get_context("forkserver").Process(target=os.getpid)
            _begin(first)
            first.join()
            self._has_loaded = True

    def _ensure_server(self) -> None:
        """Starts the server, with one thread; it ignores signals that are for this process."""
        forkserver.set_forkserver_preload(PRELOADED)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**self._threads, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            # The folder it starts in is the first of its path, before Python's own.
            with _at_root(), _ignored([*_TO_END, *_NOTICE]):
                forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


class _Forked:
    """A fork of the server."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        # This process would wait for it at its own end, also where the user wants that at once.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode or 0


class _Fresh:
    """A fresh interpreter."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        log: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ignored(_NOTICE))
            output = None if log is None else stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, script, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # so on Windows
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.send_signal(STOP)

    def wait(self) -> int:
        return self._process.wait()


def _run(
    script: Path,
    arguments: Sequence[str],
    log: Path | None,
    environment: Mapping[str, str],
    ignores_hang_up: bool,
    ready: Connection,
) -> None:
    """What a fork does: it becomes the process that the user's command would be.

    Args:
        ignores_hang_up: whether it goes on if the terminal is closed.
        ready: gets a byte as soon as this process reacts to signals. Before, it ignores them, as
            the server does, whose fork it is.
    """
    os.setsid()
    for number in _TO_END:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ignores_hang_up:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ready.send_bytes(b"1")
    ready.close()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
        os.dup2(1, 2)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    atexit._clear()  # what the server does at its end
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not


@contextlib.contextmanager
def _at_root() -> Iterator[None]:
    """Inside, the working folder is the checkout; afterwards the one before, even if it is gone."""
    here = os.open(".", os.O_PATH)
    try:
        os.chdir(ROOT)
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def _begin(process: BaseProcess) -> None:
    """Starts a process in the working folder, or in the checkout if that is gone."""
    with contextlib.nullcontext() if has_working_folder() else _at_root():
        process.start()


@contextlib.contextmanager
def _deferred(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals that come inside act at its end; those that this process ignores stay ignored."""
    came: list[int] = []
    waiting = [each for each in signals if signal.getsignal(each) is not signal.SIG_IGN]
    try:
        with _handled(waiting, lambda number, _: came.append(number)):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


def _ignored(signals: Sequence[signal.Signals]) -> contextlib.AbstractContextManager[None]:
    """Processes that are started inside ignore these signals, and this one does so meanwhile."""
    return _handled(signals, signal.SIG_IGN)


@contextlib.contextmanager
def _handled(
    signals: Sequence[signal.Signals], handler: signal.Handlers | Callable[[int, Any], object]
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
