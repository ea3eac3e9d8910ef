"""Peak memory of a whole BadNets attack, which runs in this process; prints one JSON line.

    python benchmark/memory.py cifar       # CIFAR-10's size: 60,000 images, PreAct-ResNet18
    python benchmark/memory.py large       # a folder whose pixels take 4 GiB

Pictures are made of random colours. For `cifar` the epoch is cut to 20 batches, as all batches take
the same memory; poisoning, evaluation and files are those of the full run. For `large` the network
only averages colours, so that the whole epoch can be run: every image is read from the mapped file.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
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
from attack import badnet, prototype
from utils import datasets, images
from utils.data import Dataset, Labelled
from utils.train import Loop

BATCHES = 20
SIDE = 224


def colours(num_classes: int) -> nn.Module:
    """A linear layer on the mean colours of 8 x 8 fields."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


def random_cifar(path: Path | None, image_size: int) -> Dataset:
    """Random images in CIFAR-10's numbers and sizes."""
    source = torch.Generator().manual_seed(0)
    train, test = (
        Labelled(
            torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=source),
            torch.arange(count) % 10,
        )
        for count in (50_000, 10_000)
    )
    names = tuple(str(label) for label in range(10))
    return Dataset("cifar10", train, test, names, (0.5,) * 3, (0.25,) * 3)


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
        prototype.run(badnet.Config, badnet.make_trigger)
    return json.loads((root / "memory" / "summary.json").read_text(encoding="utf-8"))


def measure(kind: str, gib: float, device: str) -> dict[str, Any]:
    """Peak memory in MiB, with what was trained on."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if kind == "cifar":
            with (
                mock.patch.dict(datasets._LOADERS, {"cifar10": random_cifar}),
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
    parser.add_argument("kind", choices=("cifar", "large"))
    parser.add_argument("--gib", type=float, default=4.0, help="pixels of `large`")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    print(json.dumps(measure(flags.kind, flags.gib, flags.device)))


if __name__ == "__main__":
    main()
