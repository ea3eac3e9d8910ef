"""Memory of whole runs; prints one JSON line per run.

    python perf/memory.py cifar       # CIFAR-10's size: 60,000 images, PreAct-ResNet18
    python perf/memory.py large       # a folder whose pixels take 4 GiB
    python perf/memory.py flat        # 300 epochs, and 300 rounds of SAU, on a small set

`cifar` gives the peak of a BadNets attack on random images: poisoning, training, evaluation and
the record's tensors, in this process. Its epoch is cut to 20 batches, as all batches take the same
memory. `large` runs the script on pictures of random colours, with a network that only averages
colours, so that the whole epoch can be run: every image is read from the mapped file.

`flat` runs the scripts of BadNets and then of SAU on the dataset `random` with the network `tiny`,
with an evaluation in each round and a checkpoint each second. Resident memory after 300 rounds must
be within 3 % of that after 30 rounds; if not, the exit code is 1.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack import badnet
from attack.poisoning import PoisonedPlan, dirty_label
from attack.recipe import new_model, supervised, train_by_recipe
from attack.setting import Setting
from models import prepare
from utils.config import Parser
from utils.data import poison
from utils.data.datasets import random_images
from utils.errors import UserError
from utils.files import ROOT, not_written
from utils.process.device import peak_memory_mib, pick_device, pick_precision
from utils.process.script import run_script
from utils.process.seeds import generator, seed_everything
from utils.records.attack import save_attack
from utils.records.contents import SUMMARY
from utils.records.folders import RunFolder
from utils.training.loop import Loop
from utils.training.watch import scorer

BATCHES = 20
SIDE = 224
LEAST_GIB, MOST_GIB = 0.03, 1024  # less would be no whole batch
ROUNDS, SETTLED, GROWTH = 300, 30, 0.03
WATCHED = (SETTLED, 100, 200, ROUNDS - 1)  # the last one ends with pictures


def colours(num_classes: int, image_size: int) -> nn.Module:
    """A linear layer on the mean colours of 8 x 8 fields; for `--model perf/memory.py:colours`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


# --- growth -------------------------------------------------------------------------------------


def long_run(kind: str, script: str, root: Path, *flags: str) -> dict[str, Any]:
    """Resident memory of a script after some of its rounds.

    Args:
        kind: "epoch" or "round", as its messages call one.
        root: folder of records.
    """
    import psutil  # here, see utils.process.device.peak_memory

    common = ("--record_path", str(root), "--checkpoint_every", "1", "--eval_every", "1")
    after: dict[int, float] = {}
    with subprocess.Popen(
        [sys.executable, script, *common, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            number = re.match(rf"{kind} (\d+)/", line)
            if number and int(number[1]) in WATCHED:
                resident = psutil.Process(process.pid).memory_info().rss
                after[int(number[1])] = round(resident / 2**20, 1)
    if process.returncode:
        raise SystemExit(f"{script}: exit code {process.returncode}")
    growth = after[WATCHED[-1]] / after[SETTLED] - 1
    return {"kind": f"{kind}s", "resident_mib": after, "growth": round(growth, 4)}


def is_flat() -> bool:
    """Whether the memory of both long runs has not grown; prints them."""
    tiny = ("--dataset", "random", "--model", "tiny", "--image_size", "8")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        attack = (*tiny, "--save_folder_name", "x", "--epochs", str(ROUNDS))
        defense = ("--result_file", "x", "--n_rounds", str(ROUNDS))
        runs = [
            long_run("epoch", "attack/badnet.py", root, *attack),
            long_run("round", "defense/sau.py", root, *defense),
        ]
    for run in runs:
        print(json.dumps(run), flush=True)
    return all(abs(run["growth"]) <= GROWTH for run in runs)


# --- peaks --------------------------------------------------------------------------------------


class ShortLoop(Loop):
    """A loop whose rounds have only the first batches."""

    def batches(self, *arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        return itertools.islice(super().batches(*arguments, **options), BATCHES)


def cifar_sized(device_name: str) -> dict[str, Any]:
    """Peak memory of an attack on as many images as CIFAR-10 has, its epoch cut short."""
    device = pick_device(device_name)
    setting = Setting(random_images(50_000, 10_000, 32), device, pick_precision("auto", device))
    data = setting.data
    config = badnet.Config.load("cifar10", epochs=1)
    seed_everything(config.random_seed)
    drawn = generator(config.random_seed, "poisoned indices")
    choice = dirty_label(config, data.train.labels, len(data.classes), drawn)
    trigger = badnet.make_trigger(config, data.image_shape)
    plan = PoisonedPlan(
        poison.replace_images(data.train, choice, trigger),
        supervised(config, setting),
        poison.triggered_test_set(data, trigger, config.attack_label_trans, config.attack_target),
    )
    model = prepare(new_model(config, data), device, setting.precision)
    train_by_recipe(config, model, plan, ShortLoop())
    scorer(data.test, plan.triggered, device)(model)
    facts = {
        "attack": "badnet",
        "model_name": config.model,
        "model_sha256": None,
        "network_size": None,
        "dataset_path": None,
        "attack_target": config.attack_target,
        "attack_label_trans": config.attack_label_trans,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "x")
        folder.start(config.dump())
        save_attack(folder, model, data, plan.exported(), plan.triggered(), None, facts)
    size = {"train_images": len(data.train), "model": config.model}
    return {"kind": "cifar", **peak_memory_mib(device), **size}


def write_pictures(folder: Path, count: int) -> None:
    """Small pictures in ten classes, 300 of them for testing; the loader enlarges them.

    Raises:
        UserError: if they cannot be written.
    """

    def write(number: int) -> None:
        split = "test" if number % 100 < 10 and number < 3000 else "train"
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / str(number % 10) / f"{number}.bmp")

    try:
        for split, label in itertools.product(("train", "test"), range(10)):
            (folder / split / str(label)).mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(count)))
    except OSError as error:  # of a full disk, it names no file
        raise not_written(folder, error) from None


def large(gib: float, device_name: str) -> dict[str, Any]:
    """Peak memory of an attack's script on a folder of pictures.

    Args:
        gib: GiB of their pixels.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_pictures(root / "pictures", round(gib * 2**30 / (3 * SIDE * SIDE)))
        flags = ["--dataset", "folder", "--dataset_path", root / "pictures", "--image_size", SIDE]
        flags += ["--model", "perf/memory.py:colours", "--device", device_name, "--epochs", 1]
        flags += ["--record_path", root, "--save_folder_name", "x"]
        call = [sys.executable, "attack/badnet.py", *map(str, flags)]
        done = subprocess.run(call, cwd=ROOT, env=os.environ | {"SAU_DATA": name})
        if done.returncode:
            raise SystemExit(f"attack/badnet.py: exit code {done.returncode}")
        summary = json.loads((root / "x" / SUMMARY).read_text(encoding="utf-8"))
    names = ("peak_memory_mib", "peak_gpu_memory_mib", "seconds", "train_images", "model")
    return {"kind": "large", **{name: summary[name] for name in names if name in summary}}


def main() -> None:
    """Measures one kind."""
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=("cifar", "large", "flat"))
    pixels = f"pixels of `large`, {LEAST_GIB} to {MOST_GIB}"
    parser.add_argument("--gib", type=float, default=4.0, help=pixels)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    if not LEAST_GIB <= flags.gib <= MOST_GIB:
        raise UserError(
            f"--gib: {flags.gib:g} is not allowed; give a number from {LEAST_GIB} to {MOST_GIB}"
        )
    if flags.kind == "flat":
        raise SystemExit(0 if is_flat() else 1)
    peak = cifar_sized(flags.device) if flags.kind == "cifar" else large(flags.gib, flags.device)
    print(json.dumps(peak))


if __name__ == "__main__":
    run_script(main)
