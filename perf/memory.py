"""Memory of whole runs; prints one JSON line a run.

    python perf/memory.py cifar       # CIFAR-10's size: 60,000 images, PreAct-ResNet18
    python perf/memory.py large       # a folder whose pixels take 4 GiB
    python perf/memory.py flat        # 300 epochs, and 300 rounds of SAU, on a small set

`cifar` and `large` give the peak of a BadNets attack that runs in this process.

Pictures are made of random colours. For `cifar` the epoch is cut to 20 batches, as all batches take
the same memory; poisoning, evaluation and files are those of the full run. For `large` the network
only averages colours, so that the whole epoch can be run: every image is read from the mapped file.

`flat` runs BadNets and then SAU, each in a process of its own, with a tiny network, an evaluation
each round and a checkpoint each second. Resident memory after 300 rounds has to be within 3 % of
that after 30; else the exit code is 1.
"""

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from attack import badnet
from attack.poisoning import run
from defense import base, sau
from utils.data import datasets, images
from utils.data.labelled import Dataset, Labelled
from utils.training.loop import Loop
from utils.training.watch import Watch

BATCHES = 20
SIDE = 224
ROUNDS, SETTLED, GROWTH = 300, 30, 0.03


def colours(num_classes: int) -> nn.Module:
    """A linear layer on the mean colours of 8 x 8 fields."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


def random_set(name: str, side: int, train: int, test: int) -> Callable[..., Dataset]:
    """A loader of random images in the place of a dataset's."""

    def load(path: Path | None, image_size: int) -> Dataset:
        source = torch.Generator().manual_seed(0)
        splits = [
            Labelled(
                torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=source),
                torch.arange(count) % 10,
            )
            for count in (train, test)
        ]
        names = tuple(str(label) for label in range(10))
        return Dataset(name, splits[0], splits[1], names, (0.5,) * 3, (0.25,) * 3)

    return load


def small(num_classes: int) -> nn.Module:
    """A network of a few hundred weights with a BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def resident_mib() -> float:
    """Resident memory of this process now."""
    gc.collect()
    import psutil  # here, see utils.process.device.peak_memory

    return psutil.Process().memory_info().rss / 2**20


def long_run(kind: str, root: Path) -> dict[str, Any]:
    """Resident memory of 300 `epochs` of the attack, or `rounds` of SAU against its record."""
    after: dict[int, float] = {}
    watched: Callable[..., None] = Watch._after_round

    def look(watch: Watch, number: int, *rest: Mapping[str, Any]) -> None:
        watched(watch, number, *rest)
        if number in (SETTLED, 100, 200, ROUNDS):
            after[number] = round(resident_mib(), 1)

    common = ["--record_path", str(root), "--model", "small", "--checkpoint_every", "1"]
    if kind == "epochs":
        flags = ["--save_folder_name", "memory", "--epochs", str(ROUNDS), "--image_size", "8"]
        argv = [badnet.__file__, *common, *flags, "--batch_size", "100"]
    else:
        flags = ["--result_file", "memory", "--n_rounds", str(ROUNDS), "--ratio", "0.5"]
        argv = [sau.__file__, *common, *flags, "--batch_size", "75"]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(models.CONSTRUCTORS, {"small": small}),
        mock.patch.dict(datasets._LOADERS, {"digits": random_set("digits", 8, 300, 100)}),
        mock.patch.object(Watch, "_after_round", look),
    ):
        if kind == "epochs":
            run(badnet.Config, badnet.make_trigger)
        else:
            base.run(sau.Config, sau.purify)
    growth = after[ROUNDS] / after[SETTLED] - 1
    return {"kind": kind, "resident_mib": after, "growth": round(growth, 4)}


def flat() -> bool:
    """Both long runs, each in a process of its own; whether neither has grown."""
    is_flat = True
    with tempfile.TemporaryDirectory() as root:
        for kind in ("epochs", "rounds"):
            call = [sys.executable, __file__, kind, "--root", root]
            run = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            print(run.stdout, end="", flush=True)
            is_flat &= abs(json.loads(run.stdout)["growth"]) <= GROWTH
    return is_flat


def first_batches(loop: Loop, *arguments: Any) -> Iterator[torch.Tensor]:
    """The first ones of an epoch."""
    return itertools.islice(ALL_BATCHES(loop, *arguments), BATCHES)


ALL_BATCHES = Loop.batches


def write_pictures(folder: Path, count: int) -> None:
    """Small pictures in ten classes, 300 of them for testing; the loader enlarges them."""

    def write(number: int) -> None:
        split = "test" if number % 100 < 10 and number < 3000 else "train"
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / str(number % 10) / f"{number}.bmp")

    for split, label in itertools.product(("train", "test"), range(10)):
        (folder / split / str(label)).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))


def attack(root: Path, *flags: str) -> dict[str, Any]:
    """The summary of one epoch of BadNets."""
    common = ["--record_path", str(root), "--save_folder_name", "memory", "--epochs", "1"]
    with mock.patch.object(sys, "argv", [badnet.__file__, *common, *flags]):
        run(badnet.Config, badnet.make_trigger)
    return json.loads((root / "memory" / "summary.json").read_text(encoding="utf-8"))


def measure(kind: str, gib: float, device: str) -> dict[str, Any]:
    """Peak memory in MiB, with what was trained on."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if kind == "cifar":
            with (
                mock.patch.dict(
                    datasets._LOADERS, {"cifar10": random_set("cifar10", 32, 50_000, 10_000)}
                ),
                mock.patch.object(Loop, "batches", first_batches),
            ):
                found = attack(root, "--dataset", "cifar10", "--device", device)
        else:
            count = round(gib * 2**30 / (3 * SIDE * SIDE))
            write_pictures(root / "pictures", count)
            flags = ["--dataset", "folder", "--dataset_path", str(root / "pictures")]
            flags += ["--image_size", str(SIDE), "--model", "colours", "--device", device]
            with (
                mock.patch.dict(models.CONSTRUCTORS, {"colours": colours}),
                mock.patch.object(images, "data_folder", return_value=root),
            ):
                found = attack(root, *flags)
    names = ("peak_memory_mib", "peak_gpu_memory_mib", "seconds", "train_images", "model")
    return {"kind": kind} | {name: found[name] for name in names if name in found}


def main() -> None:
    """Measures one kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("cifar", "large", "flat", "epochs", "rounds"))
    parser.add_argument("--root", type=Path, help="records, for a part of `flat`: epochs, rounds")
    parser.add_argument("--gib", type=float, default=4.0, help="pixels of `large`")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    if flags.kind == "flat":
        raise SystemExit(0 if flat() else 1)
    if flags.kind in ("epochs", "rounds"):
        print(json.dumps(long_run(flags.kind, flags.root)))
    else:
        print(json.dumps(measure(flags.kind, flags.gib, flags.device)))


if __name__ == "__main__":
    main()
