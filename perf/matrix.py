"""Kills tiny runs before each of their changes of the disk in turn; makes a table of the results.

    python perf/matrix.py --to matrix.csv
    python perf/matrix.py --kinds export,report --every 5

The runs are an attack, one that replaces a record, a defense, an import, an export and a report.
The changes are files opened to be written, renamed or removed, and folders made or removed. Then
the same command (with --resume for an attack and a defense) must end well and leave the files of an
undisturbed run, and nothing else. Times and logs may differ, because a log has lines of both runs.

Each row is written to `--to` as soon as it is known, and the same command continues after the rows
that are there.
"""

import atexit
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack import badnet  # noqa: F401  so that a fork need not import them
from defense import sau  # noqa: F401
from interop import backdoorbench  # noqa: F401
from models import build_model
from perf import fuzz
from perf.stress import Ended, Table, fill
from utils import plot
from utils.config import Parser
from utils.errors import UserError
from utils.files import ROOT
from utils.plain import parse_yaml
from utils.process.progress import Progress
from utils.process.script import run_script


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
_QUICK = "--checkpoint_every 0 --device cpu --precision fp32"
_ATTACK = f"attack/badnet.py {_RECORDS} --save_folder_name x --epochs 2 {_QUICK}"
_RANDOM = f"{_ATTACK} --dataset random --model tiny --batch_size 100"
SCENES = {
    "attack": Scene(_RANDOM, "--resume"),
    "defense": Scene(
        f"defense/sau.py {_RECORDS} --result_file x --n_rounds 2 --batch_size 50 {_QUICK}",
        "--resume",
        "attack",
    ),
    "replace": Scene(f"{_RANDOM} --overwrite", "", "defense"),
    "export": Scene(
        f"interop/backdoorbench.py export {_RECORDS} --result_file x --to {{place}}/to/record/y",
        "",
        "exportable",
    ),
    "import": Scene(
        f"interop/backdoorbench.py import {{place}}/to/record/y {_RECORDS} --save_folder_name z",
        "",
        "export",
    ),
    "report": Scene(f"benchmark/report.py {_RECORDS} --to {{place}}/report --keep", "", "defense"),
    # Of what BackdoorBench has a name for; it is needed and not killed.
    "exportable": Scene(
        f"{_ATTACK} --dataset {fuzz.KNOWN_DATASET} --model {fuzz.KNOWN_MODEL} --batch_size 20"
    ),
}
KINDS = tuple(kind for kind in SCENES if kind != "exportable")  # that are killed
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
) -> Ended:
    """Runs a scene in a fork of this process.

    Args:
        flags: more of them.
        before_each: as for `watch_changes`; None where nobody watches.
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
            script, *rest = shlex.split(f"{scene.command.format(place=place)} {flags}")
            sys.argv = [script, *rest]
            os.environ["SAU_DATA"] = str(place.parent / "data")
            draw_nothing()
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
    return Ended(os.waitstatus_to_exitcode(status), messages.read_text(errors="replace"))


def kept(root: Path) -> dict[str, Any]:
    """The content of a folder, by path, without times; for a log, only that it is there."""

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

    end = forked(scene, place, "", kill)
    if end.code != -signal.SIGKILL:
        return f"FAILED: was not killed, exit code {end.code}: {end.text[-300:]}"
    what = note.read_text()
    end = forked(scene, place, scene.again, None)
    if end.code != 0:
        return f"FAILED before {what}: exit code {end.code}: {end.text[-300:]}"
    after = kept(place)
    names = [n for n in sorted(after.keys() | whole.keys()) if after.get(n, 0) != whole.get(n, 0)]
    return f"FAILED before {what}: {', '.join(names)} differ" if names else "identical"


def filled(place: Path, source: Path | None) -> None:
    """Makes the place again, as a copy of a folder, or empty."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir() if source is None else shutil.copytree(source, place)


class _Picture:
    """Stands in place of a figure."""

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_bytes(b"a picture")


def draw_nothing() -> None:
    """Makes this process draw no figures from now on, which would take most of its time."""
    names = ("curves", "image_grid", "before_after", "curves_with_bands", "cost", "variants")
    for name in names:
        setattr(plot, name, lambda *_, **__: _Picture())


def matrix(table: Table, kinds: list[str], every: int, root: Path) -> None:
    """Fills the table with scenes that are killed.

    Args:
        kinds: some of `KINDS`.
        every: 1 for each change of the disk, 2 for every other one, and so on.
        root: an empty folder.
    """
    torch.set_num_threads(1)
    place = root / "place"  # one for all, because its path stands in files
    changes: dict[str, list[str]] = {}
    # Here, and not in each fork: what is looked up, and imports that take seconds.
    fuzz.write_traffic_signs(root / "data")
    torch.optim.SGD(build_model(fuzz.KNOWN_MODEL, 2).parameters())

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

            end = forked(SCENES[kind], place, "", note)
            if end.code != 0:
                raise UserError(f"{kind}: exit code {end.code}: {end.text}")
            changes[kind] = listed.read_text().splitlines()
            place.rename(whole)
        return whole

    for kind in kinds:
        whole, scene = kept(undisturbed(kind)), SCENES[kind]
        source = undisturbed(scene.needs) if scene.needs else None
        numbers = range(1, len(changes[kind]) + 1, every)
        with Progress(len(numbers), kind, "kill") as progress:
            for number in numbers:
                what = f"killed before change {number} of {len(changes[kind])}"
                table.add(kind, what, partial(killed_at, number, scene, source, whole, place))
                progress.advance()


def main() -> None:
    """Parses the flags and runs."""
    parser = Parser(__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="which runs, with commas")
    parser.add_argument("--every", type=int, default=1, help="so manyth change")
    parser.add_argument("--to", type=Path, help="CSV of all rows; what it has is not done again")
    flags = parser.parse_args()
    fuzz.require_fork()
    kinds = flags.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds: {kind} is unknown; give some of {','.join(KINDS)}")
    if flags.every < 1:
        raise UserError(f"--every: {flags.every} is less than 1; give 1 for all changes")
    fill(flags.to, lambda table, root: matrix(table, kinds, flags.every, root))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(main)
