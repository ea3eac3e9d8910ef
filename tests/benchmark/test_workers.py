"""Processes of cells: forked from one that has loaded everything, and yet as a user's own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from benchmark import workers
from benchmark.workers import Worker, Workers
from utils.errors import UserError
from utils.files import ROOT

PRELOADED = list(workers.PRELOADED)
pytestmark = pytest.mark.skipif(not workers.CAN_FORK, reason="this system has no safe fork")

# Tells what it sees of its process, then ends as its argument says.
SCRIPT = """
import atexit, json, os, signal, sys, time
atexit.register(print, "at exit")
print(json.dumps({
    "name": __name__, "argv": sys.argv, "environment": dict(os.environ), "stdin": sys.stdin.read(),
    "session": os.getsid(0) == os.getpid(), "is_warm": "benchmark.workers" in sys.modules,
    "hang_up": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
    "interrupt": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
    "terminate": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "notice": signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN,
}), flush=True)
end = sys.argv[1]
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "waits":
    time.sleep(60)
print("a message", file=sys.stderr)
sys.exit(int(end))
"""


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PRELOADED", ["benchmark.workers"])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def begun(log: Path) -> dict[str, Any]:
    """What the script says first."""
    end = time.monotonic() + 60
    while not (log.exists() and "\n" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return dict(json.loads(log.read_text().splitlines()[0]))


def ended(worker: Worker) -> int:
    code = worker.wait()
    assert worker.poll() == code
    return code


@pytest.mark.parametrize("is_warm", [True, False], ids=["forked", "fresh"])
def test_a_worker_is_a_process_as_a_user_starts_it(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    monkeypatch.setenv("MINE", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    log = tmp_path / "log.txt"
    log.write_text("")
    worker = Workers(3, is_warm).start(script, ["7", "x y"], log, CUDA_VISIBLE_DEVICES="5")
    assert ended(worker) == 7
    first, *rest = log.read_text().splitlines()
    told = json.loads(first)
    assert told["name"] == "__main__"
    assert told["argv"] == [str(script), "7", "x y"]
    assert told["environment"] == {
        **os.environ,
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "5",
    }
    assert told["stdin"] == ""
    assert told["is_warm"] is is_warm
    # These tests may run by nohup, or in the background, where a shell ignores Ctrl-C.
    hears = is_warm or signal.getsignal(signal.SIGINT) == signal.default_int_handler
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert (told["session"], told["interrupt"], told["terminate"]) == (True, hears, True)
    assert (told["hang_up"], told["notice"]) == (is_ignored, True)
    assert rest == ["a message", "at exit"]


@pytest.mark.parametrize("is_warm", [True, False], ids=["forked", "fresh"])
def test_modules_of_the_working_directory_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    """A file called `random.py` lies there; a script has its own folder in its path instead."""
    (tmp_path / "there").mkdir()
    for name in ("random", "tempfile", "attack", "statistics"):
        (tmp_path / f"there/{name}.py").write_text("raise ValueError('of the working directory')\n")
    (tmp_path / "beside.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, random, tempfile, statistics, sys, beside\nprint(os.getcwd(), '' in sys.path)\n"
    )
    monkeypatch.chdir(tmp_path / "there")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    worker = Workers(1, is_warm).start(script, [], tmp_path / "log.txt")
    assert ended(worker) == 0
    assert (tmp_path / "log.txt").read_text() == f"{tmp_path / 'there'} False\n"
    assert Path.cwd() == tmp_path / "there"


def test_a_server_that_has_ended_is_told(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended_early(*_: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(forkserver, "connect_to_new_process", ended_early)
    with pytest.raises(UserError, match="no cell could be started"):
        Workers(1).start(script, ["0"], tmp_path / "log.txt")


@pytest.mark.parametrize("is_warm", [True, False], ids=["forked", "fresh"])
def test_a_closed_terminal_ends_no_worker_of_nohup(
    script: Path, tmp_path: Path, is_warm: bool
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        worker = Workers(1, is_warm).start(script, ["0"], tmp_path / "log.txt")
        assert ended(worker) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert begun(tmp_path / "log.txt")["hang_up"]


@pytest.mark.parametrize("is_warm", [True, False], ids=["forked", "fresh"])
def test_a_worker_that_crashes_or_is_stopped_says_so(
    script: Path, tmp_path: Path, is_warm: bool
) -> None:
    start = Workers(1, is_warm).start
    assert ended(start(script, ["killed"], tmp_path / "log1.txt")) == -signal.SIGKILL
    waiting = start(script, ["waits"], tmp_path / "log2.txt")
    begun(tmp_path / "log2.txt")
    assert waiting.poll() is None
    waiting.stop()
    assert ended(waiting) == -signal.SIGTERM
    waiting.stop()  # once more is allowed
    assert ended(start(script, ["0"], tmp_path / "log3.txt")) == 0


@pytest.mark.parametrize("is_cold", [True, False])
def test_a_stop_right_after_the_start_is_heard(script: Path, tmp_path: Path, is_cold: bool) -> None:
    """A fork inherits the server's deafness, and would lose what comes before it hears."""
    if is_cold:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    many = Workers(1)
    for number in range(5):
        worker = many.start(script, ["waits"], tmp_path / f"log{number}.txt")
        worker.stop()
        assert ended(worker) == -signal.SIGTERM
    assert len(many.started) == 5


@pytest.mark.parametrize("is_warm", [True, False], ids=["forked", "fresh"])
def test_a_signal_in_the_middle_of_a_start_comes_after_it(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    """So that whoever hears it knows of the new worker, and can stop it."""
    kind = {True: "_Forked", False: "_Fresh"}[is_warm]
    whole = getattr(workers, kind)

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return whole(*given)

    monkeypatch.setattr(workers, kind, interrupted)
    many = Workers(1, is_warm)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            many.start(script, ["waits"], tmp_path / "log.txt")
    finally:
        signal.signal(signal.SIGINT, before)
    (worker,) = many.started
    begun(tmp_path / "log.txt")
    worker.stop()
    assert ended(worker) == -signal.SIGTERM


def test_nobody_waits_for_a_worker_at_the_end(tmp_path: Path) -> None:
    """Else a second Ctrl-C would say that all is over, and the terminal would hang."""
    (tmp_path / "sleeps.py").write_text("import time\nprint('.', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "main.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom benchmark import workers\n"
        "workers.PRELOADED = ['benchmark.workers']\n"
        "if __name__ == '__main__':\n"
        "    here = Path(__file__).parent\n"
        "    workers.Workers(1).start(here / 'sleeps.py', [], here / 'log.txt')\n"
        "    print(workers.multiprocessing.active_children())\n"
    )
    call = [sys.executable, tmp_path / "main.py"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "out.txt").open("w") as out:
        main = subprocess.Popen(call, stdout=out, stderr=out, env=variables)
        assert main.wait(timeout=50) == 0
    assert (tmp_path / "out.txt").read_text() == "[]\n"


def test_signals_to_all_processes_of_a_terminal_leave_the_server_alone(
    script: Path, tmp_path: Path
) -> None:
    """Ctrl-C, a closed terminal and SLURM signal all; the cell is asked by us alone."""
    worker = Workers(1).start(script, ["waits"], tmp_path / "log.txt")
    begun(tmp_path / "log.txt")
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        os.kill(server, number)
    time.sleep(0.2)
    assert worker.poll() is None
    worker.stop()
    assert ended(worker) == -signal.SIGTERM
    assert forkserver._forkserver._forkserver_pid == server  # type: ignore[attr-defined]


def test_this_process_keeps_its_signals_and_variables(script: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    signals = [signal.getsignal(number) for number in numbers]
    variables = dict(os.environ)
    for is_warm in (True, False):
        assert ended(Workers(2, is_warm).start(script, ["0"], tmp_path / "log.txt")) == 0
        assert [signal.getsignal(number) for number in numbers] == signals
        assert dict(os.environ) == variables


def test_a_working_folder_that_is_gone_is_no_matter(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All paths that a grid names may be absolute ones."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    before = os.stat(".").st_ino
    gone.rmdir()
    for is_warm in (True, False):
        assert ended(Workers(2, is_warm).start(script, ["0"], tmp_path / "log.txt")) == 0
        assert os.stat(".").st_ino == before


# As run.py starts its first cell: with all that is loaded before.
SERVER = """
import sys
from multiprocessing import forkserver
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmark.workers import Workers
for script, *arguments in eval(sys.argv[2]):
    worker = Workers(2).start(Path(sys.argv[1]) / script, arguments, None)
    assert worker.wait() == 0
server = forkserver._forkserver._forkserver_pid
print(Path(f"/proc/{server}/status").read_text())
"""


@pytest.mark.slow
def test_forks_compute_the_same_bits_and_the_server_has_one_thread(tmp_path: Path) -> None:
    """An attack and a defense, forked and started by hand, with two threads."""

    def commands(name: str) -> list[list[str]]:
        return [
            [
                *("attack/lf.py", "--dataset", "random", "--model", "tiny", "--epochs", "2"),
                *("--save_folder_name", name, "--record_path", str(tmp_path)),
            ],
            [
                *("defense/sau.py", "--result_file", name, "--record_path", str(tmp_path)),
                *("--n_rounds", "2"),
            ],
        ]

    for command in commands("fresh"):
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    call = [sys.executable, "-c", SERVER, str(ROOT), repr(commands("forked"))]
    answer = subprocess.run(call, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "Threads:\t1\n" in answer.stdout
    for result in (".", "defense/sau"):
        facts = [
            json.loads((tmp_path / name / result / "summary.json").read_text())
            for name in ("fresh", "forked")
        ]
        for name in ("files", "config_sha256", "threads", "inputs"):
            assert facts[0][name] == facts[1][name], name


@pytest.mark.parametrize("name", PRELOADED)
def test_what_is_loaded_before_is_there(name: str) -> None:
    """A name that is not there would be passed over in silence."""
    assert importlib.util.find_spec(name)
