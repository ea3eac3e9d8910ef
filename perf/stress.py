"""Kills runs at random moments and takes their disk away; what they do then is a table.

    python perf/stress.py --kills 30 --to stress.csv

An attack and a defense on a small set are each run once undisturbed. Then

- `--kills` times, they are killed with SIGKILL after a random time and resumed until they are done:
  weights and metrics (without times) have to be the same, by sha256, and no temporary file is left;
- their disk is full (files of a largest size; a small file system where the user may mount one),
  read-only, or their folder removed: one line, exit code 2, no temporary file, and the files that
  stood there unchanged.

At last it is measured what a checkpoint costs. Each row is written to `--to` as soon as it is
known, and the same command goes on after the rows that are there.

    python perf/stress.py --matrix --kinds export,report --every 5

With `--matrix` an attack, one that replaces a record, a defense, an import, an export and a report,
all of them tiny, are killed before each of their changes of the disk in turn: files opened to be
written, renamed or removed, folders made or removed. The same command, for an attack and a defense
with --resume, has to end well and leave the files of an undisturbed run, and nothing else. Times
and logs may differ, because a log tells of both runs.
"""

import atexit
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from attack import badnet
from defense import sau  # noqa: F401
from interop import backdoorbench  # noqa: F401
from models import build_model
from perf import fuzz
from utils import plot
from utils.config import Parser, parse_yaml
from utils.data import datasets, images
from utils.errors import UserError
from utils.files import ROOT, replaced
from utils.process.progress import Progress
from utils.process.script import run_script
from utils.records.folders import RunFolder
from utils.tensors import load_tensors
from utils.training.loop import Loop

COMMANDS = {
    "attack": ("attack/badnet.py", "--save_folder_name", "x", "--image_size", "8", "--epochs", "2"),
    "defense": ("defense/sau.py", "--result_file", "x", "--n_rounds", "6", "--ratio", "0.05"),
}
COMMON = ("--checkpoint_every", "1")
LARGEST = (200, 100_000, 10_000_000)  # bytes of a file
FREE = (4_096, 200_000, 20_000_000)  # bytes of a file system beside what stands in it
SHARE = 0.02  # of the time that checkpoints may take


def start(kind: str, root: Path, *flags: str, largest: int | None = None) -> subprocess.Popen[str]:
    """A script as a user starts it.

    Args:
        root: folder of records.
        largest: bytes that a file may have.
    """

    import resource  # which Windows lacks

    def limit() -> None:
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    call = [sys.executable, *COMMANDS[kind], "--record_path", str(root), *COMMON, *flags]
    return subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def folder_of(kind: str, root: Path) -> Path:
    return root / "x" if kind == "attack" else root / "x" / "defense" / "sau"


def fingerprint(folder: Path) -> str:
    """sha256 of the weights, and of metrics.csv without its times."""
    digest = hashlib.sha256()
    for name, value in load_tensors(next(folder.glob("*_result.pt")))["model"].items():
        digest.update(name.encode() + value.numpy().tobytes())
    digest.update(pd.read_csv(folder / "metrics.csv").drop(columns="seconds").to_csv().encode())
    return digest.hexdigest()


def finish(kind: str, root: Path, *flags: str) -> tuple[int, str]:
    """Exit code and messages of an undisturbed run."""
    with start(kind, root, *flags) as process:
        _, text = process.communicate()
    return process.returncode, text


def strays(root: Path) -> list[str]:
    """What a run should not leave: temporary files, locks, checkpoints."""
    return sorted(path.name for name in (".*", "checkpoint*") for path in root.rglob(name))


def prepared(kind: str, whole: Path, root: Path) -> Path:
    """A folder of records for a run: for a defense it holds the attack's, for an attack a file."""
    root.mkdir(exist_ok=True)
    (root / "notes.txt").write_text("of the user", encoding="utf-8")
    if kind == "defense":
        shutil.copytree(whole / "x", root / "x", ignore=shutil.ignore_patterns("defense"))
    return root


# --- kills --------------------------------------------------------------------------------------


def kill_and_resume(kind: str, root: Path, seconds: float, rng: random.Random) -> tuple[int, str]:
    """Kills a run after a random time, now and then its continuation too, and lets it end.

    Returns:
        How often it was killed, and what went wrong.
    """
    kills = 0
    while True:
        with start(kind, root, *(("--resume",) if kills else ())) as process:
            try:
                timeout = rng.uniform(0, seconds) if kills < 2 else None
                _, text = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
        return kills, "" if process.returncode == 0 else f"exit code {process.returncode}: {text}"


def killed(kind: str, whole: Path, root: Path, seconds: float, rng: random.Random) -> str:
    """How a run that is killed at least once, and resumed, ends."""
    kills = 0
    while not kills:  # else it ended before its time had come
        shutil.rmtree(root, ignore_errors=True)
        kills, problem = kill_and_resume(kind, prepared(kind, whole, root), seconds, rng)
        if problem:
            break
    folder = folder_of(kind, root)
    if not problem and fingerprint(folder) != fingerprint(folder_of(kind, whole)):
        problem = "another result"
    if not problem and strays(root):
        problem = f"left {strays(root)}"
    return f"FAILED after {kills} kills: {problem}" if problem else f"identical after {kills} kills"


# --- disks --------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, str]:
    """sha256 by path of what stands in a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes at a folder.

    Raises:
        subprocess.CalledProcessError: if the user may not mount one.
    """
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(call, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def told(kind: str, root: Path, before: dict[str, str], process: subprocess.Popen[str]) -> str:
    """How a run ends whose disk refuses."""
    with process:
        _, text = process.communicate()
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    problems = []
    if process.returncode != 2:
        problems.append(f"exit code {process.returncode}")
    if len(errors) != 1 or "Traceback" in text:
        problems.append(text[-300:])
    problems += [f"left {name}" for name in strays(root) if ".tmp" in name]
    after = contents(root)
    problems += [f"{name} differs" for name, digest in before.items() if after.get(name) != digest]
    return f"FAILED: {'; '.join(problems)}" if problems else "one line, exit code 2"


def large_files(kind: str, whole: Path, root: Path, largest: int) -> str:
    """A run whose files may not grow beyond a size."""
    before = contents(prepared(kind, whole, root))
    return told(kind, root, before, start(kind, root, largest=largest))


def full(kind: str, whole: Path, root: Path, free: int) -> str:
    """A run on a file system that has a few bytes left."""
    need = sum(path.stat().st_size + 8192 for path in (whole / "x").rglob("*"))
    try:
        with small_disk(root, (need if kind == "defense" else 8192) + free):
            before = contents(prepared(kind, whole, root))
            return told(kind, root, before, start(kind, root))
    except subprocess.CalledProcessError:
        return "not tried: no file system can be mounted here"


def read_only(kind: str, whole: Path, root: Path) -> str:
    """A run on a file system that is read-only."""
    try:
        with small_disk(root, 1 << 30):
            before = contents(prepared(kind, whole, root))
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            return told(kind, root, before, start(kind, root))
    except subprocess.CalledProcessError:
        return "not tried: no file system can be mounted here"


def removed(kind: str, whole: Path, root: Path) -> str:
    """A run whose folder is removed after its first checkpoint."""
    before = contents(prepared(kind, whole, root))
    process = start(kind, root)
    folder = folder_of(kind, root)
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return told(kind, root, before, process)


# --- the matrix ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A tiny run in a folder, in which it finds what the scenes before it have made.

    Attributes:
        command: script and flags; `{place}` is the folder.
        again: flags of the same command once it was killed.
        needs: the scene that the place comes from; none for an empty one.
    """

    command: str
    again: str = ""
    needs: str = ""


_RECORDS = "--record_path {place}/record"
_ATTACK = (
    f"attack/badnet.py {_RECORDS} --save_folder_name x --dataset cifar10 --image_size 32 "
    "--epochs 2 --batch_size 20 --checkpoint_every 0 --device cpu --precision fp32"
)
SCENES = {
    "attack": Scene(_ATTACK, "--resume"),
    "defense": Scene(
        f"defense/sau.py {_RECORDS} --result_file x --n_rounds 2 --ratio 0.5 --batch_size 10 "
        "--checkpoint_every 0 --device cpu --precision fp32",
        "--resume",
        "attack",
    ),
    "replace": Scene(f"{_ATTACK} --overwrite", "", "defense"),
    "export": Scene(
        f"interop/backdoorbench.py export {_RECORDS} --result_file x --to {{place}}/to/record/y",
        "",
        "defense",
    ),
    "import": Scene(
        f"interop/backdoorbench.py import {{place}}/to/record/y {_RECORDS} --save_folder_name z",
        "",
        "export",
    ),
    "report": Scene(f"benchmark/report.py {_RECORDS} --to {{place}}/report --keep", "", "defense"),
}
# Python's events, and which argument is the open folder that the path is in.
_EVENTS = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 2, "os.truncate": None}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What differs between two runs that give the same.
_OF_RUNS = ("seconds", "purify_seconds", "peak_memory_mib", "peak_gpu_memory_mib", "resume")


def watch_changes(place: Path, before_each: Callable[[int, str], None]) -> None:
    """Calls a function before each change of the disk under a folder, from now on.

    Args:
        before_each: gets the number of the change, from 1, and what it is.
    """
    count, lock, top = 0, threading.Lock(), f"{place.resolve()}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITING:
                return
            handle = -1
        elif event in _EVENTS:
            path, position = arguments[0], _EVENTS[event]
            handle = -1 if position is None else arguments[position]
        else:
            return
        home = os.getcwd() if handle == -1 else os.readlink(f"/proc/self/fd/{handle}")
        where = os.path.join(home, os.fsdecode(path))
        if where.startswith(top):
            with lock:
                count += 1
                before_each(count, f"{event} {re.sub('[0-9a-f]{8}', '*', where[len(top) :])}")

    sys.addaudithook(hook)


def forked(
    scene: Scene, place: Path, flags: str, before_each: Callable[[int, str], None] | None
) -> tuple[int, str]:
    """Runs a scene in a fork of this process.

    Args:
        before_each: as for `watch_changes`.

    Returns:
        Exit code, negative for a signal, and messages.
    """
    messages = place.parent / "messages"
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        atexit._clear()  # what this process does at its end is not for the fork to do
        os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
        code = 1
        try:
            script, *rest = scene.command.format(place=place).split() + flags.split()
            sys.argv = [script, *rest]
            if before_each:
                watch_changes(place, before_each)
            signal.alarm(120)
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            atexit._run_exitfuncs()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), messages.read_text(errors="replace")


def kept(root: Path) -> dict[str, Any]:
    """What stands in a folder, by path, without times; of a log, that it is there."""

    def content(path: Path) -> Any:
        if path.is_dir():
            return None
        if path.name == "log.txt":
            return ""
        if path.suffix == ".json":
            values = json.loads(path.read_text())
        elif path.suffix == ".yaml":
            values = parse_yaml(path.read_text(), path.name)
        elif path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str)
            return table.drop(columns=[name for name in _OF_RUNS if name in table]).to_csv()
        else:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return {name: value for name, value in values.items() if name not in _OF_RUNS}

    return {str(path.relative_to(root)): content(path) for path in sorted(root.rglob("*"))}


def killed_at(
    number: int, scene: Scene, source: Path | None, whole: dict[str, Any], place: Path
) -> str:
    """Kills a scene before a change, runs it again, and compares.

    Args:
        source: what the place holds before; None for nothing.
        whole: what it holds after an undisturbed run, by `kept`.
    """
    filled(place, source)
    note = place.parent / "note"

    def kill(count: int, what: str) -> None:
        if count == number:
            with contextlib.suppress(OSError):
                note.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    code, text = forked(scene, place, "", kill)
    if code != -signal.SIGKILL:
        return f"FAILED: was not killed, exit code {code}: {text[-300:]}"
    what = note.read_text()
    code, text = forked(scene, place, scene.again, None)
    if code != 0:
        return f"FAILED before {what}: exit code {code}: {text[-300:]}"
    found = kept(place)
    names = [n for n in sorted(found.keys() | whole.keys()) if found.get(n, 0) != whole.get(n, 0)]
    return f"FAILED before {what}: {', '.join(names)} differ" if names else "identical"


def filled(place: Path, source: Path | None) -> None:
    """Makes the place anew, as a copy of a folder, or empty."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir() if source is None else shutil.copytree(source, place)


class _Picture:
    """In the place of a figure, which would take most of the time."""

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_bytes(b"a picture")


@contextlib.contextmanager
def tiny(root: Path) -> Iterator[None]:
    """Inside, CIFAR-10 is forty random images, the usual network has few weights, pictures none."""
    loader = lambda path, image_size: fuzz.make_data()  # noqa: E731
    figures = ("curves", "image_grid", "before_after", "curves_with_bands", "cost", "variants")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports what takes seconds
    patches: list[Any] = [
        mock.patch.dict(models.CONSTRUCTORS, {"preactresnet18": fuzz.small}),
        mock.patch.dict(datasets._LOADERS, {"cifar10": loader}),
        mock.patch.object(images, "ROOT", root),
        *(mock.patch.object(plot, name, return_value=_Picture()) for name in figures),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def matrix(table: "Table", kinds: list[str], every: int, root: Path) -> None:
    """Fills the table with scenes that are killed.

    Args:
        kinds: names of `SCENES`.
        every: 1 for each change of the disk, 2 for every other one, and so on.
    """
    torch.set_num_threads(1)
    place = root / "place"  # one for all, because its path stands in files
    changes: dict[str, list[str]] = {}

    def undisturbed(kind: str) -> Path:
        """A copy of the place after the scene has run."""
        whole, listed = root / f"whole_{kind}", root / "changes"
        if kind not in changes:
            needs = SCENES[kind].needs
            filled(place, undisturbed(needs) if needs else None)
            listed.write_text("")

            def note(number: int, what: str) -> None:
                with listed.open("a") as file:
                    file.write(f"{what}\n")

            code, text = forked(SCENES[kind], place, "", note)
            if code != 0:
                raise UserError(f"{kind}: exit code {code}: {text}")
            changes[kind] = listed.read_text().splitlines()
            place.rename(whole)
        return whole

    with tiny(root):
        for kind in kinds:
            whole, scene = kept(undisturbed(kind)), SCENES[kind]
            source = undisturbed(scene.needs) if scene.needs else None
            numbers = range(1, len(changes[kind]) + 1, every)
            with Progress(len(numbers), kind, "kill") as progress:
                for number in numbers:
                    what = f"killed before change {number} of {len(changes[kind])}"
                    rest = (number, scene, source, whole, place)
                    table.add(kind, what, partial(killed_at, *rest))
                    progress.advance()


# --- checkpoints --------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "attack": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "defense": lambda weights: torch.optim.Adam(weights, lr=1e-4),  # of SAU
}


def checkpoint_cost(kind: str, _: Path, root: Path) -> str:
    """What a checkpoint of PreAct-ResNet18 takes, as a share of the time."""
    every = badnet.Config.load().checkpoint_every
    model = build_model("preactresnet18", 10)
    optimizer = OPTIMIZERS[kind](model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    folder, loop, seconds = RunFolder(root), Loop(), []
    folder.start("")
    for _round in loop.rounds(1, model=model, optimizer=optimizer):
        for _repeat in range(7):
            started = time.monotonic()
            folder.write_checkpoint({"loop": loop.snapshot(), "rows": [], "seconds": 0.0})
            seconds.append(time.monotonic() - started)
    mib = (root / "checkpoint.pt").stat().st_size / 2**20
    usual = statistics.median(seconds)
    return (
        f"{'' if usual < SHARE * every else 'FAILED: '}{100 * usual / every:.2f} %: {mib:.0f} MiB "
        f"in {usual:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), every {every:g} s"
    )


# --- table --------------------------------------------------------------------------------------


class Table:
    """Rows that are in a file as soon as they are known.

    Args:
        path: a CSV, of which the rows are kept; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, run: str, what: str, find: Callable[[], str]) -> None:
        """A row, which is found out unless it is known."""
        if any((row["run"], row["what"]) == (run, what) for row in self.rows):
            return
        self.rows.append({"run": run, "what": what, "result": find()})
        if self._path is not None:
            with replaced(self._path) as partial:
                pd.DataFrame(self.rows).to_csv(partial, index=False)

    def summary(self) -> str:
        """Rows that differ in their number alone are counted."""
        frame = pd.DataFrame(self.rows, columns=["run", "what", "result"])
        frame["what"] = frame["what"].str.replace(
            r"^killed (before change )?\d+ .*", "killed", regex=True
        )
        frame["result"] = frame["result"].str.replace(r" after \d kills$", "", regex=True)
        counts = frame.groupby(["run", "what", "result"], sort=False).size()
        return counts.rename("runs").reset_index().to_string(index=False)


def stress(table: Table, kills: int, seed: int, root: Path) -> None:
    """Fills the table."""
    whole = root / "whole"
    with Progress(2 * (kills + 3 + len(LARGEST) + len(FREE)), "runs", "run") as progress:
        for kind in COMMANDS:
            started = time.monotonic()
            code, text = finish(kind, whole)
            assert code == 0, text
            seconds = time.monotonic() - started

            def run(what: str, find: Callable[..., str], *rest: Any, kind: str = kind) -> None:
                place = root / "place"
                table.add(kind, what, lambda: find(kind, whole, place, *rest))
                shutil.rmtree(place, ignore_errors=True)
                progress.advance()

            for number in range(kills):
                rng = random.Random(f"{seed} {kind} {number}")
                run(f"killed {number} of seed {seed}", killed, seconds, rng)
            for largest in LARGEST:
                run(f"files of at most {largest:,} bytes", large_files, largest)
            for free in FREE:
                run(f"a file system with {free:,} bytes left", full, free)
            run("a read-only file system", read_only)
            run("its folder removed in mid-run", removed)
            run("what checkpoints take of the time", checkpoint_cost)


def main() -> None:
    """Parses the flags, runs, and prints the table, also of a part."""
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="killed runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--to", type=Path, help="CSV of all rows; what it has is not done again")
    parser.add_argument("--matrix", action="store_true", help="kills at each change, and no more")
    parser.add_argument("--kinds", default=",".join(SCENES), help="of the matrix, with commas")
    parser.add_argument("--every", type=int, default=1, help="so manyth change of the matrix")
    flags = parser.parse_args()
    fuzz.require_fork()
    kinds = flags.kinds.split(",")
    for kind in kinds:
        if kind not in SCENES:
            raise UserError(f"--kinds: {kind} is unknown; give some of {','.join(SCENES)}")
    if flags.every < 1:
        raise UserError(f"--every: {flags.every} is less than 1; give 1 for all changes")
    table = Table(flags.to)
    try:
        with tempfile.TemporaryDirectory() as root:
            if flags.matrix:
                matrix(table, kinds, flags.every, Path(root))
            else:
                stress(table, flags.kills, flags.seed, Path(root))
    finally:
        print(table.summary())
    if any("FAILED" in row["result"] for row in table.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(main)
