"""What surrounds a run: seeds, device, precision, logging, progress, exit codes."""

import contextlib
import hashlib
import io
import logging
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models import userfile
from utils import distributed
from utils.errors import NothingToDo, UserError, one_line, shown
from utils.files import REFUSALS, not_written

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
Precision = Literal["auto", "fp32", "bf16"]

SAME_REQUEST = 1.0  # seconds
SAY_EVERY = 60.0  # seconds

logger = logging.getLogger("sau")


class Line(logging.Formatter):
    """One line for each record, whatever the texts hold that it tells; see `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function and turns its end into an exit code.

    A `UserError` is printed, one line a problem, and exits with 2, and so is what the system
    refuses (no access, no space), what torch cannot do on `mps`, and whatever the user's own
    network raises; Ctrl-C exits with 130, SIGTERM with 143, a closed terminal with 129, Ctrl-Break
    (Windows) with 149. Of several processes the first one speaks for all; another one only of what
    it alone has met.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is not a terminal's, nor a file's
            stream.reconfigure(errors="backslashreplace")  # where LANG has not all letters
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(Line("%(message)s"))
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        logger.setLevel(logging.ERROR)
    try:
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
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        what = "a file" if error.filename is None else error.filename
        advice = "make space, make it accessible, or give another path"
        logger.error("error: %s: %s; %s", what, error.strerror, advice)
        raise SystemExit(2) from None
    except (RuntimeError, TypeError) as error:
        if str(error).startswith("Symlink loop"):  # of pathlib before Python 3.13
            logger.error("error: %s; give another path", error)
        elif re.search(r"\bMPS\b", str(error)):
            logger.error(
                "error: --device: mps lacks what this run needs (%s); give cpu, or set "
                "PYTORCH_ENABLE_MPS_FALLBACK=1 for what it can leave to the CPU",
                shown(one_line(error), 200),
            )
        else:
            raise
        raise SystemExit(2) from None
    except NothingToDo as done:
        logger.info("%s", done)
    except Stopped as stopped:
        logger.error("%s", stopped)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        logger.error("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has gone, e.g. `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    finally:
        logger.removeHandler(console)


class Stopped(KeyboardInterrupt):
    """The user, or the system, has asked this process to end."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class _Stop:
    """Whether work that can be resumed is being done, and which signal has come meanwhile."""

    is_deferred = False
    signal: int | None = None
    since = 0.0


def defer_signals(deferred: bool) -> None:
    """Between True and False, a signal to end waits for `stop_signal` to be asked."""
    _Stop.is_deferred = deferred


def stop_signal() -> int | None:
    """The signal that waits, if any."""
    return _Stop.signal


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """A first signal to end waits where work can be resumed; another one ends it at once.

    These are SIGINT, SIGTERM and, where the system has them, SIGHUP and SIGBREAK.

    What comes within a second of the first is still the first: schedulers and launchers signal all
    processes of a job, and each of these passes it on to its children.
    """

    def handle(number: int, _: Any) -> None:
        if _Stop.signal is not None and time.monotonic() - _Stop.since < SAME_REQUEST:
            return
        if not _Stop.is_deferred or _Stop.signal is not None:
            raise Stopped(number, "interrupted" if number == signal.SIGINT else "terminated")
        _Stop.signal, _Stop.since = number, time.monotonic()
        logger.warning("stopping after this step; once more to stop at once")

    _Stop.is_deferred, _Stop.signal = False, None
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


@contextlib.contextmanager
def file_log() -> Iterator[Callable[..., None]]:
    """Keeps the log's lines; the function that it gives opens the file that gets them all.

    So that a log also tells what came before its folder was made. Each line has its own time. With
    `append` a resumed run's lines come after those of the run before.
    """
    kept = MemoryHandler(capacity=1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
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
    """Ends the run with one line where logging itself would print a traceback for every line."""

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


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """With `wanted`, a GPU gives the same bits for the same seed inside; all is put back after.

    cuDNN and cuBLAS use deterministic algorithms alone, which may be slower. A CPU does so anyway.

    Raises:
        UserError: if the network has an operation that torch can only do in another way.
    """
    if not wanted:
        yield
        return
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = (cudnn.deterministic, cudnn.benchmark, os.environ.get(variable))
    was_strict = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    if before[2] not in (":4096:8", ":16:8"):
        os.environ[variable] = ":4096:8"  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise UserError(
            f"--deterministic: {found[1]} cannot be so on this device; leave the flag out, or give "
            "another --model"
        ) from None
    finally:
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.use_deterministic_algorithms(was_strict, warn_only=only_warned)
        os.environ.pop(variable, None)
        if before[2] is not None:
            os.environ[variable] = before[2]


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator, so that what one purpose draws never shifts what another one draws.

    Args:
        seed: the run's seed.
        purpose: any text, e.g. "poisoned indices".
        device: where it draws.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    made = torch.Generator(device)
    made.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return made


class Draws:
    """An object whose state is that of the generators among its attributes."""

    def state_dict(self) -> dict[str, Any]:
        """The generators' states by the names of the attributes."""
        return {name: rng.get_state() for name, rng in self._generators().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: if it is of other generators.
        """
        if state.keys() != self._generators().keys():
            raise ValueError("the generators have other names")
        for name, rng in self._generators().items():
            rng.set_state(state[name])

    def _generators(self) -> dict[str, torch.Generator]:
        values = vars(self).items()
        return {name: value for name, value in values if isinstance(value, torch.Generator)}


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, as plain data and tensors.

    `utils.training.state.restore_random` puts them back.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module gets its own mode back after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight needs a gradient inside; each gets its own `requires_grad` back after."""
    weights = [w for model in models for w in model.parameters() if w.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def pick_device(name: str) -> torch.device:
    """The device of a `--device` value; `auto` is an NVIDIA or AMD GPU where there is one.

    Every other device of torch, `mps` among them, is tried if it is named.

    Raises:
        UserError: for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.processes() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = shown(one_line(error), 200)
        raise UserError(
            f"--device: {name} is not usable here ({reason}); give auto, cpu or cuda, or mps"
        ) from None
    return device


def images_at_once(device: torch.device, side: int) -> int:
    """Images a pass where the result does not depend on it: few stay in the caches of a CPU.

    Args:
        device: where they are computed on.
        side: of the images, in pixels; of large ones a GPU's memory holds fewer.
    """
    return 32 if device.type == "cpu" else max(1, min(1024, (1 << 23) // side**2))


def rounded_up(device: torch.device, count: int) -> int:
    """How many images to compute on where `count` are needed: on a GPU a multiple of 128.

    So that few shapes occur, for each of which it chooses its kernels and records its passes.
    """
    return count if device.type == "cpu" else -(-count // 128) * 128


def pick_precision(name: Precision, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    checks = (
        getattr(torch.cpu, check, None)
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return "bf16" if any(check() for check in checks if check) else "fp32"


def run_conditions(device: torch.device, precision: str) -> dict[str, str | int]:
    """What may change the last digits of a run's numbers, the number of threads aside."""
    return {"device": device.type, "precision": precision, "processes": distributed.processes()}


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Device, precision, threads, versions and commit, as plain data for `summary.json`."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {package: metadata.version(package) for package in ("torch", "torchvision", "numpy")}
    return {
        "device": str(device),
        "device_name": name,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _git_commit(),
    }


def peak_memory() -> int:
    """Bytes that this process has had in memory at most.

    Raises:
        ImportError: if this system has neither `resource` nor psutil.
    """
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    import psutil  # here, because it needs `resource` itself where that is usual

    now = psutil.Process().memory_info()
    return getattr(now, "peak_wset", now.rss)  # Windows has the peak, too


def usable_cores() -> int:
    """How many of the processor's cores this process may use, >= 1."""
    ask = getattr(os, "sched_getaffinity", None)  # Linux
    return len(ask(0)) if ask else os.cpu_count() or 1


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Largest resident memory of this process, if it is known, and of torch on the GPU, in MiB."""
    peak = {}
    with contextlib.suppress(ImportError):
        peak["peak_memory_mib"] = round(peak_memory() / 2**20, 1)
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak


class Progress:
    """A bar with an ETA on a terminal; elsewhere a line a minute, beside what its owner logs.

    Args:
        total: number of steps.
        description: what is being done.
        unit: what a step is.
        initial: steps that were done earlier.
        says: whether it logs; else its owner alone does.
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


def _git_commit() -> str | None:
    """The commit of this checkout, with '+' if tracked files differ; None outside git."""
    try:
        call = [
            "git",
            "-C",
            str(ROOT),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty=+",
            "--exclude=*",
        ]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
