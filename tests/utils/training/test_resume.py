"""An interrupted run that goes on ends as one that was not interrupted, bit for bit."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from attack import bpp, inputaware, wanet
from attack.setting import Setting
from tests import processes
from utils.errors import UserError
from utils.files import ROOT
from utils.process.seeds import generator
from utils.records.folders import RunFolder
from utils.tensors import load_tensors
from utils.training.loop import Loop
from utils.training.sgd import Schedule, Supervised
from utils.training.watch import Watch


class Interrupted(Exception):
    """The run was cut off."""


def supervised(loop: Loop, schedule: Schedule) -> torch.nn.Module:
    data, model = processes.random_data(), processes.network(processes.random_data())
    step = Supervised(2, True, generator(0, "augmentation"))
    processes.train(model, data, step, loop, 12, epochs=3, schedule=schedule)
    return model


class Centred(nn.Sequential):
    """Takes away the mean of earlier logits, which it has in a buffer outside its state dict."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        self.mean.lerp_(logits.detach().mean(0), 0.5)
        return logits - self.mean


def with_a_buffer(loop: Loop) -> nn.Module:
    data = processes.random_data()
    model = processes.network(data)
    model.network = Centred(model.network)
    processes.train(model, data, Supervised(2, True, generator(0, "augmentation")), loop, 12, 3)
    return model


def controlled(module: Any, control: Any) -> Callable[[Loop], torch.nn.Module]:
    def run(loop: Loop) -> torch.nn.Module:
        data = processes.random_data()
        config = module.Config.load("digits", batch_size=12, pratio=0.25)
        setting = Setting(data, torch.device("cpu"), "fp32")
        model = processes.network(data)
        step = control(config, setting)
        processes.train(model, data, step, loop, 12, epochs=3, drop_last=False, whole=True)
        if hasattr(step, "pattern"):
            model.add_module("pattern", step.pattern)
        return model

    return run


RUNS: dict[str, Callable[[Loop], torch.nn.Module]] = {
    "supervised": lambda loop: supervised(loop, "one_cycle"),
    "plateau": lambda loop: supervised(loop, "reduce_on_plateau"),
    "a buffer outside the state dict": with_a_buffer,
    "wanet": controlled(wanet, wanet.WaNet),
    "bpp": controlled(bpp, bpp.Bpp),
    "inputaware": controlled(inputaware, inputaware.InputAware),
}


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("name", RUNS)
def test_every_method_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, name: str, cut: int
) -> None:
    """Cut off after the first batch, and around the end of the first round (3 or 4 batches)."""
    losses: list[dict[str, float]] = []
    whole = RUNS[name](Loop(lambda number, total, found, state: losses.append(found)))

    batches = 0
    again: list[dict[str, float]] = []
    loop = Loop(lambda number, total, found, state: again.append(found))

    def cut_off(_: int) -> None:
        nonlocal batches
        batches += 1
        if batches == cut:
            torch.save(loop.snapshot(), tmp_path / "snapshot.pt")
            raise Interrupted

    loop._after_batch = cut_off
    with pytest.raises(Interrupted):
        RUNS[name](loop)
    torch.rand(7)  # what happened meanwhile
    snapshot = load_tensors(tmp_path / "snapshot.pt")
    resumed = RUNS[name](
        Loop(lambda number, total, found, state: again.append(found), resume=snapshot)
    )

    assert losses == again
    found, wanted = resumed.state_dict(), whole.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_snapshot_of_another_run_is_refused() -> None:
    loop = Loop()
    supervised(loop, "cosine")
    snapshot = loop.snapshot()
    del snapshot["objects"]["model"]["network.0.weight"]
    with pytest.raises(UserError, match="--resume: the checkpoint is not of this run"):
        supervised(Loop(resume=snapshot), "cosine")


# --- scripts ------------------------------------------------------------------------------------


def command(script: str, root: Path, *flags: str) -> list[str]:
    return [sys.executable, script, "--record_path", str(root), *flags]


ATTACK = (
    *("--save_folder_name", "x", "--model", "preactresnet18_half", "--image_size", "8"),
    *("--epochs", "2", "--batch_size", "128"),
)
DEFENSE = ("--result_file", "x", "--n_rounds", "3", "--ratio", "0.05", "--batch_size", "24")


def result(folder: Path) -> tuple[str, str]:
    """sha256 of the weights, and metrics.csv without its times."""
    path = next(folder.glob("*_result.pt"))
    digest = hashlib.sha256()
    for name, value in load_tensors(path)["model"].items():
        digest.update(name.encode() + value.numpy().tobytes())
    metrics = pd.read_csv(folder / "metrics.csv").drop(columns="seconds")
    return digest.hexdigest(), metrics.to_csv()


def stopped(call: list[str], folder: Path, number: int) -> subprocess.CompletedProcess[str]:
    """The script, sent a signal after its first checkpoint."""
    call = [*call, "--checkpoint_every", "0"]
    with subprocess.Popen(
        call, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(call, process.returncode, "", stderr)


def run(call: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_scripts_stop_and_go_on(tmp_path: Path) -> None:
    """SIGTERM an attack, SIGKILL a defense; both end as if nothing had happened."""
    for root in ("whole", "cut"):
        (tmp_path / root).mkdir()
    attack = command("attack/badnet.py", tmp_path / "whole", *ATTACK)
    assert run(attack).returncode == 0
    attack = command("attack/badnet.py", tmp_path / "cut", *ATTACK)
    folder = tmp_path / "cut" / "x"
    done = stopped(attack, folder, signal.SIGTERM)
    assert done.returncode == 143
    assert re.search(r"stopped in epoch 1 after batch \d+ of 11; go on with --resume", done.stderr)

    refused = run(attack)
    assert refused.returncode == 2
    assert "is an interrupted run; give --resume" in refused.stderr
    other = run([*attack, "--resume", "--lr", "0.5"])
    assert other.returncode == 2
    assert "was run with --lr 0.01; give the same" in other.stderr
    assert run([*attack, "--resume"]).returncode == 0
    assert not (folder / "checkpoint.pt").exists()
    assert result(folder) == result(tmp_path / "whole" / "x")
    finished = run([*attack, "--resume"])
    assert finished.returncode == 0  # as when it was killed after its last file
    assert "is finished; nothing is left to do" in finished.stderr

    assert run(command("defense/sau.py", tmp_path / "whole", *DEFENSE)).returncode == 0
    defense = command("defense/sau.py", tmp_path / "cut", *DEFENSE)
    folder = folder / "defense" / "sau"
    assert stopped(defense, folder, signal.SIGKILL).returncode == -signal.SIGKILL
    (folder / ".checkpoint.0123abcd.tmp.pt").write_bytes(b"half")
    assert run([*defense, "--resume"]).returncode == 0
    assert result(folder) == result(tmp_path / "whole" / "x" / "defense" / "sau")
    assert list(folder.glob(".*")) == []


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    """A second process is refused while the first lives, and not when it was killed."""
    hold = (
        "import sys, time, pathlib; from utils.records.folders import RunFolder;"
        "RunFolder(pathlib.Path(sys.argv[1])).claim(False);"
        "print('held', flush=True); time.sleep(60)"
    )
    call = [sys.executable, "-c", hold, str(tmp_path / "x")]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing it"):
            RunFolder(tmp_path / "x").claim(False)
        first.kill()
        first.wait()
    RunFolder(tmp_path / "x").claim(False)


def test_a_damaged_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    folder.start("lr: 0.1\n")
    (folder.path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"checkpoint\.pt: is not a checkpoint"):
        folder.start("lr: 0.1\nresume: true\n", resume=True)
    assert (folder.path / "config.yaml").exists()


def test_a_run_does_not_go_on_with_another_network(tmp_path: Path) -> None:
    """The user's file was changed in between: its name and all flags are the same."""
    config = "model: my_net.py:build\n"
    folder = RunFolder(tmp_path / "x")
    folder.start(config, model_sha256="0123")
    folder.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    expected = {"loop": {}, "rows": [], "seconds": 1.0}
    assert RunFolder(folder.path).start(config, resume=True, model_sha256="0123") == expected
    folder.write("checkpoint.pt", lambda path: torch.save(expected, path))  # as earlier versions
    assert RunFolder(folder.path).start(config, resume=True, model_sha256="89ab") == expected
    folder.write_checkpoint(expected)
    with pytest.raises(UserError, match=r"--resume: .*x was run with another content of my_net.py"):
        RunFolder(folder.path).start(config, resume=True, model_sha256="4567")


def test_a_watch_goes_on_with_its_rows(tmp_path: Path) -> None:
    """Rows and seconds of the run before are kept."""
    rows = [{"epoch": 1, "loss": 2.0, "seconds": 5.0}]
    checkpoint = {"rows": rows, "seconds": 7.5, "loop": {}}
    watch = Watch(None, "epoch", lambda model: None, 1, checkpoint=checkpoint)  # type: ignore[arg-type,return-value]
    assert watch.earlier == 7.5
    assert watch.metrics == [{"epoch": 1, "loss": 2.0, "seconds": 5.0}]
