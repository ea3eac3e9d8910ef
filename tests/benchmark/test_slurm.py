"""A grid on a real SLURM of one machine; skipped where slurm-wlm and munge are not installed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from benchmark import run, slurm
from benchmark.cells import Cell
from benchmark.checks import cells_of
from benchmark.grid import Slurm, read_grid
from benchmark.slurm import Queue
from utils.errors import UserError
from utils.files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
needs_slurm = pytest.mark.skipif(
    shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0,
    reason="needs root, slurm-wlm and munge: no SLURM is installed here",
)
GRID = """
datasets:
  folder: {{dataset_path: {images}, image_size: 16, batch_size: 12, pratio: 0.25, epochs: 20}}
models: [preactresnet18]
attacks: {{badnet: , blended: {{epochs: 1, lr: 1e30}}}}
defenses: [ft]
attack_flags: {{precision: fp32}}
defense_flags: {{ratio: 0.5, batch_size: 9, n_rounds: 1, precision: fp32}}
seeds: [0]
slurm:
  {{timeout_min: 20, cpus_per_task: 1, array: {array}, partition: main, directives: {{nice: 1}}}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cluster")
    script = ROOT / "benchmark/slurm_cluster.sh"
    subprocess.run([script, "start", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run(["scancel", "--user", "root"], check=False)
        subprocess.run([script, "stop", folder], check=True)


def wait_until(happened, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, squeue("%i %T %r %S")
        time.sleep(0.3)


def squeue(columns: str) -> str:
    call = ["squeue", "--noheader", "--array", "--format", columns]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have SLURM, whose programs nobody calls."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.usefixtures("login_node")
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": 1}'])
def test_a_damaged_list_of_jobs_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / ".grid").mkdir()
    (tmp_path / ".grid/jobs.json").write_text(content)
    with pytest.raises(UserError, match=r"jobs\.json: is damaged; remove it"):
        Queue(tmp_path, Slurm()).has_lost(Cell("a", "attack/badnet.py", {}, tmp_path / "a"))


@pytest.mark.usefixtures("login_node")
def test_lost_cells_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared file system may be late once, and not for each of 300 cells."""
    now = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    (tmp_path / ".grid").mkdir()
    names = [str(number) for number in range(50)]
    (tmp_path / ".grid/jobs.json").write_text(json.dumps(dict.fromkeys(names, "7")))
    queue = Queue(tmp_path, Slurm())
    cells = [Cell(name, "attack/badnet.py", {}, tmp_path / name) for name in names]
    assert all(queue.has_lost(cell) for cell in cells)
    assert now[0] <= 2 * slurm._POLL


@pytest.mark.usefixtures("login_node")
def test_a_queue_that_does_not_answer_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(tmp_path, Slurm())
    said = "squeue: error: resolve_ctls\nsqueue: error: no config\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError) as caught:
        queue.states()
    said = "squeue: error: resolve_ctls squeue: error: no config"
    assert str(caught.value) == f"squeue: {said}; ask again when SLURM answers"


@needs_slurm
def test_a_grid_outlives_its_submitter_and_a_preemption(
    cluster: None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted and left alone; the attack is put back into the queue in mid-run, and goes on; its
    defense waits for it; the defense of the attack that fails is never run."""
    path = workplace / "grid.yaml"
    path.write_text(GRID.format(images=workplace / "images", array="true"))
    root = workplace / "record-array"
    call = [sys.executable, ROOT / "benchmark/run.py", path, "--record_path", root]
    call += ["--executor", "slurm"]
    subprocess.run([*call, "--detach"], check=True)
    cells = cells_of(read_grid(path), root)
    badnet = cells[0]
    metrics = badnet.folder / "metrics.csv"
    wait_until(lambda: metrics.exists() and len(pd.read_csv(metrics)) >= 2)
    queue = slurm.Queue(root, Slurm())
    job = queue._ids[badnet.name]
    assert queue.states()[badnet.name] == "running"
    assert queue.states()[f"{badnet.name}/ft"] == "queued"
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: queue.states().get(badnet.name) == "queued")
    wait_until((badnet.folder / "checkpoint.pt").exists)  # the queue may know it before the disk
    assert not badnet.is_done  # 20 epochs, so that none of this comes too late
    # SLURM lets a requeued job wait for two minutes from when all of it has ended.
    wait_until(lambda: f"{job} CG" not in squeue("%i %t"))
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)

    monkeypatch.setattr(slurm, "_POLL", 0.5)
    states: dict[str, str] = {}
    queue.run(cells, lambda cell, state, note="": states.__setitem__(cell.name, state), False)
    assert list(states.values()) == ["done", "done", "failed", "skipped"]
    assert list(run.states_of(cells, root, queue).values()) == list(states.values())
    assert queue._ids[badnet.name] == job  # the second call has submitted nothing
    assert pd.read_csv(metrics)["epoch"].tolist() == list(range(1, 21))
    log = Path(queue.log_of(badnet)).read_text()
    assert "stopped in epoch" in log
    assert log.count("epoch 1/20") == 1  # the second turn went on
    assert "not finite" in Path(queue.log_of(cells[2])).read_text()


@needs_slurm
def test_single_jobs_wait_for_what_they_read_too(
    cluster: None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workplace / "single.yaml"
    text = GRID.format(images=workplace / "images", array="false").replace(
        "epochs: 20", "epochs: 1"
    )
    text = text.replace("badnet: , blended: {epochs: 1, lr: 1e30}", "badnet: ")
    path.write_text(text + "analyses: [weights]\n")
    root = workplace / "record-single"
    cells = cells_of(read_grid(path), root)
    monkeypatch.setattr(slurm, "_POLL", 0.5)
    states = []
    queue = slurm.Queue(root, read_grid(path).slurm)
    queue.run(cells, lambda cell, state, note="": states.append((cell.name, state)), False)
    assert cells[-1].script == "analysis/weights.py"
    assert [s for s in states if s[1] == "done"] == [(cell.name, "done") for cell in cells]


@needs_slurm
def test_a_job_takes_several_cells(
    cluster: None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of six cells are one job; the others wait for it, and what two need has failed."""
    path = workplace / "chunks.yaml"
    text = GRID.format(images=workplace / "images", array="false").replace(
        "epochs: 20", "epochs: 1"
    )
    path.write_text(text.replace("array: false", "cells_per_job: 3") + "analyses: [weights]\n")
    root = workplace / "record-chunks"
    cells = cells_of(read_grid(path), root)
    monkeypatch.setattr(slurm, "_POLL", 0.5)
    states: dict[str, str] = {}
    queue = slurm.Queue(root, read_grid(path).slurm)
    queue.run(cells, lambda cell, state, note="": states.__setitem__(cell.name, state), False)
    ended = [states[cell.name] for cell in cells]
    assert ended == ["done", "done", "failed", "skipped", "done", "skipped"]
    jobs = [queue._ids[cell.name] for cell in cells]
    assert jobs == 3 * jobs[:1] + 3 * jobs[3:4]
    assert jobs[0] != jobs[3]
    log = Path(queue.log_of(cells[2])).read_text()
    assert f"{cells[2].name}: exit code 2" in log
    assert "skipped, its attack failed" in Path(queue.log_of(cells[3])).read_text()


@needs_slurm
def test_what_slurm_refuses_is_said_in_a_line(cluster: None, workplace: Path) -> None:
    text = GRID.format(images=workplace / "images", array="false")
    (workplace / "bad.yaml").write_text(text.replace("partition: main", "partition: nowhere"))
    call = [
        sys.executable,
        ROOT / "benchmark/run.py",
        workplace / "bad.yaml",
        "--executor",
        "slurm",
    ]
    call += ["--record_path", workplace / "refused"]
    answer = subprocess.run(call, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "sbatch refuses" in answer.stderr
    assert "nowhere" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_without_slurm_the_executor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch; give local"):
        slurm.Queue(tmp_path, Slurm())
