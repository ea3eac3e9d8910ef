"""Several processes give what one gives."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import defense
from models import build_model
from utils.errors import UserError
from utils.files import ROOT
from utils.process import distributed

SCENES = (
    "supervised",
    "wanet",
    "bpp",
    "inputaware",
    "sau, train mode",
    "sau, random start",
    "sau, resumed",
    "ft, resumed",
    "scores",
    "preparation",
    "odd norms",
)

# The defenses that share their work, as docs/scaling.md says; others may be refused.
SHARED = ("d3", "fp", "fst", "ft", "ft_sam", "nad", "sau", "sau_far")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script of the checkout, on a port of their own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `processes.py` printed alone and in two processes."""
    script, one, two = "tests/processes.py", *(tmp_path_factory.mktemp(n) for n in ("one", "two"))
    subprocess.run([sys.executable, script, str(one / "found")], cwd=ROOT, check=True)
    done = torchrun(script, str(two / "found"))
    assert done.returncode == 0, done.stderr
    return {path.name[:3]: json.loads((path / "found").read_text()) for path in (one, two)}


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for inner in value for leaf in flat(inner)] if isinstance(value, list) else [value]


def assert_close(one: Any, two: Any) -> None:
    """The same numbers, at least three."""
    one, two = flat(one), flat(two)
    assert len(one) == len(two)
    assert len(one) >= 3
    assert all(
        math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-9) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_two_processes_are_one(found: dict[str, Any], scene: str) -> None:
    """Losses of each step, weights and statistics after training, and counts, in float64."""
    assert_close(found["one"][scene], found["two"][scene])


@pytest.mark.slow
def test_the_scenes_train(found: dict[str, Any]) -> None:
    """Equal would also be what stands still."""
    for name in (
        "supervised",
        "wanet",
        "bpp",
        "inputaware",
        "sau, train mode",
        "sau, random start",
    ):
        steps = [step[0] for step in found["two"][name]["steps"]]
        assert len(set(steps)) == len(steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", defense.names())
def test_a_defense_gives_the_same_in_two_processes_or_is_refused(
    found: dict[str, Any], name: str
) -> None:
    """Losses of each step, weights and statistics, in float64; or a line says what to do."""
    one, two = (found[number][f"defense {name}"] for number in ("one", "two"))
    assert "refused" not in one
    if "refused" in two:
        assert name not in SHARED
        assert "start it without torchrun" in two["refused"]
        assert len(two["refused"].splitlines()) == 1
        return
    assert_close(one, two)
    losses = [step[0] for step in two["steps"]]
    assert len(set(losses)) == len(losses)


@pytest.mark.slow
def test_what_is_cached_is_computed_once(found: dict[str, Any]) -> None:
    assert found["two"]["preparation"]["times"] == 1
    assert found["two"]["preparation"]["alone"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ("careless", "does not train data-parallel; start it without torchrun"),
        ("small batch", "the last batch has 1 of 37 images, fewer than the 2 processes"),
        ("spare weight", "a weight that its output does not depend on"),
        ("own norm", "the BatchNorm layer network.1 is a OwnNorm, so each"),
        ("forgetful norm", "the BatchNorm layer network.1 keeps no running statistics, so each"),
        ("dropout", "this network draws random numbers in train mode, e.g. for dropout, which"),
    ],
)
def test_what_cannot_be_shared_is_refused(found: dict[str, Any], scene: str, message: str) -> None:
    assert message in found["two"][scene]["refused"]
    assert found["one"][scene]["refused"] is None


@pytest.mark.slow
def test_dropout_of_none_draws_nothing_and_is_shared(found: dict[str, Any]) -> None:
    assert found["two"]["dropout of none"]["refused"] is None


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all_with_its_words(found: dict[str, Any]) -> None:
    said = "Diverged: nothing comes of it in process 0"
    assert found["two"]["preparation that fails"] == {"refused": said, "others": [said]}


class Drawing(nn.Module):
    """Draws one number of Python's, NumPy's or torch's generator in each call in train mode."""

    def __init__(self, draw: Callable[[], object]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.draw()
        return images


DRAWS = {
    "torch": lambda: torch.rand(1),
    "python": random.random,
    "numpy": np.random.rand,
    "a normal number of numpy": np.random.randn,
}
IMAGES = torch.zeros(2, 3, 8, 8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("draw", DRAWS)
def test_a_network_that_draws_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, draw: str
) -> None:
    model = Drawing(DRAWS[draw])
    distributed.try_sharing(model, IMAGES, CPU)  # one process draws what it likes
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    with pytest.raises(UserError, match=r"draws random numbers in train mode, .* without torchrun"):
        distributed.try_sharing(model, IMAGES, CPU)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.5])
def test_dropout_is_refused_where_it_draws(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    with pytest.raises(UserError, match="draws random") if share else nullcontext():
        distributed.try_sharing(nn.Dropout(share), IMAGES, CPU)


def test_a_batchnorm_that_cannot_be_shared_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    distributed.try_sharing(model, IMAGES, CPU)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    with pytest.raises(UserError, match="BatchNorm layer 0 keeps no running statistics"):
        distributed.try_sharing(model, IMAGES, CPU)


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((name, False) for name in ("preactresnet18", "tiny", "resnet18", "vit_b_16")),
        *((name, True) for name in ("squeezenet1_1", "efficientnet_b0")),
    ],
)
def test_which_networks_several_processes_can_train(
    monkeypatch: pytest.MonkeyPatch, name: str, draws: bool
) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    model = build_model(name, 4, image_size=32)
    with pytest.raises(UserError, match="draws random") if draws else nullcontext():
        distributed.try_sharing(model, torch.zeros(2, 3, 32, 32), CPU)


def test_parts_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 things of 3 processes: 2, 2 and 3 of them."""
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        parts.append(list(range(7))[distributed.part(7)])
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]


def test_processes_agree_on_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that any process got, and the clock of the first one; alone, both are its own."""
    assert distributed.agreed(15, False) == (15, False)
    assert distributed.agreed(0, True) == (0, True)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    sent = []

    def reduce(values: torch.Tensor, how: Any) -> None:
        sent.append(values.tolist())
        values.copy_(torch.maximum(values, torch.tensor([2, 0])))

    monkeypatch.setattr(distributed.dist, "all_reduce", reduce)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.agreed(0, True) == (2, False)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    assert distributed.agreed(15, True) == (15, True)
    assert sent == [[0, 0], [15, 1]]


ONE_IS_KILLED = """
import os, signal
import torch
from utils.process import distributed
from utils.process.script import run_script

def main():
    print(distributed.total(torch.ones(1)).item())
    if not distributed.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.total(torch.ones(1))

run_script(main)
"""


@pytest.mark.slow
def test_a_process_that_has_lost_another_one_says_so_in_a_line() -> None:
    """Without torchrun, which ends it as well, so that it often says nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", ONE_IS_KILLED],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    second.communicate(timeout=120)
    printed, said = first.communicate(timeout=120)
    assert (first.returncode, printed) == (2, "2.0\n")
    assert said.startswith("error: another process of this run has ended")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_scripts_under_torchrun(tmp_path: Path) -> None:
    """An attack and SAU in two processes; one of them writes and speaks."""
    common = ("--record_path", str(tmp_path), "--random_seed", "3")
    network = ("--model", "preactresnet18_half", "--image_size", "8")
    flags = ("--save_folder_name", "two", *network, "--epochs", "1", *common)
    attack = torchrun("attack/badnet.py", *flags)
    assert attack.returncode == 0, attack.stderr
    assert attack.stderr.count("epoch 1/1") == 1
    flags = ("--result_file", "two", "--n_rounds", "1", "--ratio", "0.03", *common)
    defense = torchrun("defense/sau.py", *flags)
    assert defense.returncode == 0, defense.stderr
    assert defense.stderr.count("round 1/1") == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["acc_total"] == 360
    again = torchrun("defense/sau.py", *flags)
    assert again.returncode != 0
    assert again.stderr.count("exists; give --overwrite") == 1


@pytest.mark.slow
def test_an_attack_refuses_dropout_before_it_makes_a_record(tmp_path: Path) -> None:
    network = ("--model", "squeezenet1_1", "--image_size", "32", "--dataset", "random")
    flags = ("--save_folder_name", "drawn", "--record_path", str(tmp_path), *network)
    attack = torchrun("attack/badnet.py", *flags, "--epochs", "1")
    assert attack.returncode != 0
    assert attack.stderr.count("error: this network draws random numbers in train mode") == 1
    assert not any(tmp_path.glob("drawn/*"))
