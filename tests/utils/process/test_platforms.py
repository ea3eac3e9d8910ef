"""The program on systems that are not Linux: what they lack is neither imported nor needed.

Nothing here has run on such a system; `tests/elsewhere.py` takes away what they lack, and keeps
Windows' rules for files that are open.
"""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import yaml

from tests.test_layers import modules_under
from utils import files, locks
from utils.errors import UserError
from utils.files import ROOT
from utils.process.device import peak_memory_mib, pick_device, pick_precision, usable_cores
from utils.process.script import run_script
from utils.records.folders import RunFolder
from utils.records.places import attack_folder

ELSEWHERE = [sys.executable, str(ROOT / "tests" / "elsewhere.py")]
needs_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="simulates on Linux")


def elsewhere(folder: Path, *arguments: str) -> str:
    """What `elsewhere.py` prints; its exit code has to be 0."""
    done = subprocess.run([*ELSEWHERE, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "against the rules" not in done.stderr
    return done.stdout + done.stderr


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


# --- what is absent -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_module_is_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    modules = modules_under(ROOT)
    assert {"utils.locks", "perf.stress", "perf.matrix", "perf.fuzz", "perf.memory"} <= set(modules)
    elsewhere(tmp_path, "import", *modules)


@pytest.mark.slow
def test_scripts_say_how_they_are_used_without_what_windows_lacks(tmp_path: Path) -> None:
    scripts = ("attack/badnet.py", "defense/sau.py", "benchmark/run.py", "perf/stress.py")
    printed = elsewhere(tmp_path, "help", *scripts)
    for flag in ("--pratio", "--n_rounds", "--executor", "--kills"):
        assert f"  {flag}" in printed
    assert "Warning" not in printed


@pytest.mark.slow
@needs_linux
def test_an_attack_and_a_defense_run_by_the_rules_of_windows(tmp_path: Path) -> None:
    """Also over what stands there, and with a checkpoint after each epoch, read and replaced."""
    common = "--record_path . --device cpu --precision fp32 --checkpoint_every 0"
    attack = f"attack/badnet.py {common} --save_folder_name x --epochs 2 --overwrite"
    attack += " --dataset random --model tiny"
    elsewhere(tmp_path, "run", attack, f"defense/ft.py {common} --result_file x --n_rounds 2")
    assert {"attack_result.pt", "defense_result.pt"} <= names_in(tmp_path)
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]
    elsewhere(tmp_path, "run", attack)
    assert "attack_result.pt" in names_in(tmp_path)
    assert "defense_result.pt" not in names_in(tmp_path)


# --- locks --------------------------------------------------------------------------------------


@pytest.fixture(params=["fcntl", "filelock", "windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to lock; filelock's is the one of Windows."""
    if request.param != "fcntl":
        monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "WINDOWS", request.param == "windows")
    return request.param


def test_one_has_a_lock_until_it_is_closed(system: str, tmp_path: Path) -> None:
    first, second = (locks.open_no_link(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert locks.lock(first)
    assert not locks.lock(second)
    assert not locks.lock(second, shared=True)
    os.close(first)
    assert locks.lock(second)
    os.close(second)


def test_a_look_hinders_no_other_look_where_the_system_knows_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second = (locks.open_no_link(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert locks.lock(first, shared=True)
    assert locks.lock(second, shared=True)
    for handle in (first, second):
        os.close(handle)


@pytest.mark.parametrize(("number", "is_locked"), [(errno.ENOSYS, True), (errno.ENOLCK, False)])
def test_a_system_without_locks_is_no_file_system_without_locks(
    number: int, is_locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr("filelock.lock_descriptor", refuse)
    run = RunFolder(tmp_path / "x")
    if is_locked:
        run.lock()
        run.release()
    else:
        with pytest.raises(UserError, match=r"x: cannot be written \("):
            run.lock()
    assert names_in(tmp_path) <= {".x.lock"}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of `x`, on a system that lacks what Windows lacks."""
    call = [*ELSEWHERE, "hold", str(tmp_path / "x")]
    pipe = subprocess.PIPE
    with subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes lock as Windows does."""
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "WINDOWS", True)
    run = RunFolder(tmp_path / "x")
    assert run.is_taken
    with pytest.raises(UserError, match="another process is writing it"):
        run.claim(overwrite=False)
    holder.kill()
    holder.wait()
    assert (tmp_path / ".x.lock").exists()
    assert not run.is_taken
    assert run.lock()
    assert not run.is_taken
    run.release()
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("has_flag", [True, False])
def test_no_link_is_followed(
    has_flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_flag:
        monkeypatch.setattr(locks, "_NO_LINK", 0)
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.close(locks.open_no_link(tmp_path / "file", os.O_RDONLY))
    with pytest.raises(OSError, match="symbolic links") as caught:
        locks.open_no_link(tmp_path / "link", os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize(
    ("is_windows", "refusals", "is_done"), [(True, 3, True), (True, 99, False), (False, 1, False)]
)
def test_windows_is_asked_again_while_somebody_reads(
    is_windows: bool, refusals: int, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WINDOWS", is_windows)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    left = iter(range(refusals))

    def change() -> None:
        if next(left, None) is not None:
            raise PermissionError(errno.EACCES, "somebody has it open")

    if is_done:
        locks.patiently(change)
    else:
        with pytest.raises(PermissionError):
            locks.patiently(change)


def test_files_are_written_and_cleaned_in_each_way(system: str, tmp_path: Path) -> None:
    with files.replaced(tmp_path / "x.txt") as partial:
        partial.write_text("new", encoding="utf-8")
    assert names_in(tmp_path) == {"x.txt"}
    with files.temporary_folder(tmp_path, "y") as folder:
        (folder / "inside").write_text("", encoding="utf-8")
    assert names_in(tmp_path) == {"x.txt"}
    (tmp_path / ".y.0123abcd.tmp" / "inside").mkdir(parents=True)
    (tmp_path / ".y.89abcdef.tmp.open").touch()
    (tmp_path / ".x.0123abcd.tmp.txt").touch()
    files.remove_strays(tmp_path)
    assert names_in(tmp_path) == {"x.txt"}


@pytest.mark.parametrize("name", ["con", "NUL", "lpt1", "x."])
def test_names_of_devices_are_refused_on_windows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attack_folder(name, tmp_path).path.name == name
    monkeypatch.setattr(locks, "WINDOWS", True)
    assert attack_folder(f"{name}x", tmp_path).path.name == f"{name}x"
    with pytest.raises(UserError, match="is no name on Windows"):
        attack_folder(name, tmp_path)


# --- signals, processors and devices --------------------------------------------------------------


@needs_linux
def test_the_signal_of_windows_ends_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert end.value.code == 128 + signal.SIGUSR1


def test_cores_are_counted_without_what_linux_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def test_memory_is_measured_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:

    usual = peak_memory_mib(torch.device("cpu"))["peak_memory_mib"]
    monkeypatch.setattr("utils.process.device.resource", None)
    found = peak_memory_mib(torch.device("cpu"))["peak_memory_mib"]
    assert usual / 4 < found <= usual * 1.01
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert peak_memory_mib(torch.device("cpu")) == {}


def test_mps_is_tried_by_name() -> None:
    if torch.backends.mps.is_available():
        assert pick_device("mps").type == "mps"
        return
    with pytest.raises(UserError, match=r"--device: mps is not usable here \(.*or mps$"):
        pick_device("mps")


def test_mps_computes_in_float32_unless_told_otherwise() -> None:
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    assert pick_precision("bf16", torch.device("mps")) == "bf16"


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("The operator 'aten::x' is not implemented for the MPS device.\nMore"),
        TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none"),
    ],
)
def test_what_mps_lacks_is_told_in_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_with(error) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --device: mps lacks what this run needs (")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 50),
        lambda: np.empty(1 << 50),
        lambda: bytearray(1 << 60),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")),
        lambda: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_too_little_memory_is_told_in_one_line(
    allocate: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(allocate)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: there is not enough memory (")
    assert told.count("\n") == 1


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [RuntimeError("CAMPS"), TypeError("a defect")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        ended_with(error)


def ended_with(error: Exception) -> int | str | None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code


# --- CI -----------------------------------------------------------------------------------------


def test_each_system_has_its_job() -> None:
    """The tests that the two others run exist."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["check"]["runs-on"] == "ubuntu-latest"
    other = jobs["untried"]
    assert other["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]
    assert other["continue-on-error"] is True
    named = [word for step in other["steps"] for word in step.get("run", "").split()]
    tests = [word for word in named if word.startswith("tests/")]
    assert "tests/utils/process/test_platforms.py" in tests
    assert [name for name in tests if not (ROOT / name).exists()] == []
