"""Generators, modes, devices, exit codes and logs."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import nn

from models.modes import evaluating, frozen
from utils.errors import UserError, first_line
from utils.files import ROOT
from utils.process.device import (
    Precision,
    environment,
    images_at_once,
    peak_memory_mib,
    pick_device,
    pick_precision,
    rounded_up,
)
from utils.process.progress import Progress
from utils.process.script import defer_signals, file_log, logger, run_script, stop_signal
from utils.process.seeds import generator, seed_everything

CPU = torch.device("cpu")


# --- seeds --------------------------------------------------------------------------------------


def draws(source: torch.Generator) -> list[int]:
    return torch.randint(1 << 30, (4,), generator=source).tolist()


def test_a_generator_is_set_by_its_seed_and_purpose() -> None:
    """Two lists of four numbers below 2^30 agree by chance once in 2^120."""
    assert draws(generator(0, "order")) == draws(generator(0, "order"))
    assert draws(generator(0, "order")) != draws(generator(1, "order"))
    assert draws(generator(0, "order")) != draws(generator(0, "crops"))


def test_seed_and_purpose_do_not_run_together() -> None:
    """1 with "1x" and 11 with "x" are different sources."""
    assert draws(generator(1, "1x")) != draws(generator(11, "x"))


def test_a_generator_leaves_the_global_one_and_its_siblings_alone() -> None:
    before = torch.get_rng_state()
    first, second = generator(0, "a"), generator(0, "b")
    expected = draws(generator(0, "b"))
    draws(first)
    assert draws(second) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_sets_every_global_generator() -> None:
    def some() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()

    seed_everything(3)
    first = some()
    seed_everything(4)
    other = some()
    seed_everything(3)
    assert some() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


# --- modes --------------------------------------------------------------------------------------


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    """A frozen BatchNorm inside a model in train mode stays frozen after."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    other = nn.Sequential(nn.Dropout()).train()
    with evaluating(model, other):
        assert not any(module.training for module in (*model.modules(), *other.modules()))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [module.training for module in other.modules()] == [True, True]


def test_evaluating_restores_after_an_error() -> None:
    model = nn.Dropout().train()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert model.training


def test_evaluating_leaves_a_model_in_eval_mode_there() -> None:
    model = nn.Sequential(nn.Dropout()).eval()
    with evaluating(model):
        pass
    assert not any(module.training for module in model.modules())


def test_frozen_weights_need_no_gradient_and_get_their_own_state_back() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    images = torch.ones(1, 2, requires_grad=True)
    with frozen(model):
        model(images).sum().backward()
    assert images.grad is not None
    assert model.weight.grad is None
    assert [weight.requires_grad for weight in model.parameters()] == [True, False]


# --- device and precision -----------------------------------------------------------------------


def test_images_at_once_are_few_on_a_cpu_and_fewer_the_larger_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert images_at_once(torch.device("cpu"), 32) == 32
    assert [images_at_once(gpu, side) for side in (32, 64, 224, 4000)] == [1024, 1024, 167, 1]


def test_counts_are_rounded_up_on_a_gpu() -> None:
    assert [rounded_up(torch.device("cuda"), count) for count in (1, 128, 129)] == [128, 128, 256]
    assert rounded_up(torch.device("cpu"), 129) == 129


def test_a_device_by_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "hpu", "privateuseone"])
def test_a_device_that_is_not_there_or_cannot_compute_is_refused(name: str) -> None:
    """torch knows the last three, but they hold no numbers or need a module of their own."""
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert str(caught.value).startswith(f"--device: {name} is not usable here (")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
@pytest.mark.parametrize("name", ["xla", "mps", "vulkan", "mkldnn"])
def test_a_device_that_torch_lacks_is_told_in_our_words(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            pick_device(name)
    reason = str(caught.value)
    assert "Facebook" not in reason
    assert name == "mkldnn" or "(this torch is made without it); give auto, cpu" in reason


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_asked_for_is_taken(name: Precision) -> None:
    assert pick_precision(name, CPU) == name


def test_automatic_precision_is_one_of_the_two() -> None:
    assert pick_precision("auto", CPU) in ("fp32", "bf16")


def test_facts_of_a_run_are_plain_data() -> None:
    facts = environment(CPU, "fp32") | peak_memory_mib(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["device"], facts["precision"]) == ("cpu", "fp32")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or (
        facts["versions"]["torch"] == torch.__version__
    )
    assert facts["peak_memory_mib"] > 1  # an interpreter with torch takes more than 1 MiB


# --- scripts ------------------------------------------------------------------------------------


@pytest.fixture
def bare_logger() -> None:
    """The program's logger as a fresh process has it."""
    logger.handlers[:] = []


def exit_code(error: BaseException) -> int | str | None:
    def main() -> NoReturn:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def test_a_users_error_is_printed_line_by_line_and_exits_with_2(
    bare_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(UserError("--lr: too large", "--wd: too small")) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: --lr: too large\nerror: --wd: too small\n"
    assert printed.out == ""


def test_an_interrupt_exits_with_130(bare_logger: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exit_keeps_its_code(bare_logger: None) -> None:
    """As `--help` exits with 0."""
    assert exit_code(SystemExit(0)) == 0


def test_a_defect_keeps_its_traceback(bare_logger: None) -> None:
    def main() -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        run_script(main)


def test_a_working_folder_that_is_gone_gets_one_line(
    bare_logger: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever a relative path is made a whole one."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: print(Path("x").resolve()))
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: the folder that this command was given in is gone; change to one that is there, "
        "and give it again\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):  # a defect
        run_script(lambda: print(Path("x").read_bytes()))


def test_without_a_folder_for_temporary_files_nothing_is_begun(
    bare_logger: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch would ask for it at the first step."""

    def refused() -> NoReturn:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", refused)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: print("begun"))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: TMPDIR: No usable temporary directory found in ['/tmp']; set it to a folder that "
        "can be written\n"
    )


def test_a_script_that_ends_well_returns(
    bare_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(lambda: logger.info("done"))
    assert capsys.readouterr().err == "done\n"


def test_two_scripts_in_one_process_print_each_line_once(
    bare_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(lambda: None)
    run_script(lambda: logger.info("done"))
    assert capsys.readouterr().err == "done\n"


def test_a_log_file_holds_the_lines_of_its_time(bare_logger: None, tmp_path: Path) -> None:
    logger.setLevel(logging.INFO)
    path = tmp_path / "log.txt"
    path.write_text("of an earlier run\n")
    logger.info("before")
    with file_log() as open_file:
        logger.info("before its folder is there")
        open_file(path)
        logger.info("inside, 猫")
        assert "inside" in path.read_text(encoding="utf-8")  # at once, for whoever watches
        logger.warning("careful")
    logger.info("after")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO before its folder is there",
        "INFO inside, 猫",
        "WARNING careful",
    ]
    assert logger.handlers == []


def test_a_log_file_is_closed_after_an_error(bare_logger: None, tmp_path: Path) -> None:
    def fail() -> NoReturn:
        with file_log() as open_file:
            open_file(tmp_path / "log.txt")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert logger.handlers == []


# --- progress -----------------------------------------------------------------------------------


def test_progress_says_a_line_a_minute_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step each 25 s: after 75 s, and not again before 135 s."""
    caplog.set_level(logging.INFO, logger="sau")
    now = [0.0]
    monkeypatch.setattr("utils.process.progress.time.monotonic", lambda: now[0])
    progress = Progress(10, "making images hard", "image")
    progress.show("ACC 50 %")
    for _ in range(5):
        now[0] += 25
        progress.advance()
    assert caplog.messages == ["making images hard: image 3 of 10  ACC 50 %  ETA 0:02:55"]


def test_progress_is_silent_off_a_terminal_and_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(10, "training") as progress:
        progress.advance()
        progress.advance(3)
        progress.show("ACC 50 %")
        assert (progress.done, progress.total) == (4, 10)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_time_left_follows_the_rate_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 s for a fifth of the steps leave 4,000 s: 1 h, 6 min, 40 s. Nothing is left at last."""
    now = [100.0]
    monkeypatch.setattr("utils.process.progress.time.monotonic", lambda: now[0])
    progress = Progress(10, "training")
    progress.advance(2)
    now[0] = 1100.0
    assert progress.eta() == "1:06:40"
    now[0] = 5100.0
    progress.advance(8)
    assert progress.eta() == "0:00:00"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_first_signal_waits_for_the_step_and_a_second_one_does_not(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler and a launcher that each send one, half a second apart, ask once."""
    seen = []
    now = [100.0]
    monkeypatch.setattr("utils.process.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("signal.getsignal", lambda _: signal.SIG_DFL)  # tests may be under nohup

    def main() -> None:
        defer_signals(True)
        for now[0] in (100.0, 100.5, 101.1):
            os.kill(os.getpid(), number)
            seen.append(stop_signal())  # still here: the step goes on
        seen.append("never")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == code
    assert seen == [number, number]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_signal_waits_for_the_step_also_if_the_log_cannot_be_written(
    bare_logger: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step then ends with a checkpoint, which may be on another disk."""
    seen = []

    def main() -> None:
        with file_log() as open_file:
            open_file(tmp_path / "log.txt")
            logger.handlers[-1].target.stream.close()  # type: ignore[attr-defined]
            logger.handlers[-1].target.stream = open("/dev/full", "w")  # noqa: SIM115
            defer_signals(True)
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(stop_signal())

    run_script(main)
    assert seen == [signal.SIGTERM]
    assert capsys.readouterr().err == "stopping after this step; once more to stop at once\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("apart", "is_asked", "code"),
    [(False, True, 130), (True, True, -signal.SIGINT), (False, False, -signal.SIGINT)],
    ids=["at once", "later", "after the work"],
)
def test_a_signal_after_the_end_is_no_traceback(apart: bool, is_asked: bool, code: int) -> None:
    """`timeout -s INT` sends two; at the end libraries like tqdm still clean up."""
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    text = (
        "import atexit, os, signal\n"
        "from utils.process import script\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
        f"script.SAME_REQUEST = {0.0 if apart else 60.0}\n"
        f"atexit.register(lambda: {kill})\n"
        f"script.run_script(lambda: {kill if is_asked else None})\n"
    )
    call = [sys.executable, "-c", text]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ("interrupted\n" if is_asked else "")
    assert done.returncode == code


def test_two_signals_at_once_do_not_cut_off_what_ends_the_work() -> None:
    ended = []

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            ended.append("in order")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 130
    assert ended == ["in order"]


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen = []

    def main() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        seen.append("went on")

    try:
        run_script(main)
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert seen == ["went on"]


def test_the_first_line_of_an_exception() -> None:
    """Whatever its text; its type where there is none."""
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    """As `--help | head -1`."""
    text = (
        "import sys\n"
        "from utils.process.script import run_script\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print('a line')\n"
        "run_script(main)\n"
    )
    call = [sys.executable, "-c", text]
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == b""


SCRIPT = """
import logging, os, sys
from utils.process.progress import Progress
from utils.process.script import logger, run_script

def main():
    logger.info("said")
    with Progress(1, "a step") as progress:
        progress.advance()
    print(os.open(os.devnull, os.O_RDONLY) > 2, os.environ.get("MPLBACKEND"))
    from utils import plot
    print("printed", file=open("out.txt", "w"))

run_script(main)
"""


def started(folder: Path, redirections: str = "", **variables: str) -> subprocess.CompletedProcess:
    """A script that a shell starts in a folder."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        f"{sys.executable} script.py {redirections}",
        shell=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_cost_nothing(tmp_path: Path, closed: str) -> None:
    """No file of ours gets the number of a closed stream, into which libraries may write."""
    done = started(tmp_path, closed)
    assert done.returncode == 0
    assert (tmp_path / "out.txt").read_text() == "printed\n"
    if ">&-" not in closed.split():
        assert done.stdout.startswith("True")


def test_a_notebook_s_backend_is_no_matter_of_ours(tmp_path: Path) -> None:
    """An interpreter of its own need not have it; matplotlib would refuse to be loaded."""
    done = started(tmp_path, MPLBACKEND="module://matplotlib_inline.no_such_backend")
    assert (done.returncode, done.stderr) == (0, "said\n")
    assert done.stdout == "True None\n"


@pytest.mark.parametrize("rank", ["1", "abc"])
def test_a_rank_without_a_launcher_silences_nothing(tmp_path: Path, rank: str) -> None:
    assert started(tmp_path, RANK=rank).stderr == "said\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_PORT": "x"},
        {"MASTER_PORT": ""},
        {"MASTER_PORT": "29511", "WORLD_SIZE": "none"},
    ],
)
def test_a_launcher_s_variables_that_lead_nowhere_are_told(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"} | variables
    done = started(tmp_path, **given)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the processes cannot meet" in line
    assert line.endswith("start them with torchrun, or unset these variables")
