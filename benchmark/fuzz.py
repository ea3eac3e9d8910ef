"""Damaged and hostile files through the real entry points, in this process.

    python benchmark/fuzz.py --cases 2000 --seed 0

Good files of every kind that a user may be given (our records, BackdoorBench's, YAML, pictures,
checkpoints) are damaged at random: flipped bits, cut ends, repeated or swapped pieces, hostile
numbers and shapes. Each has to be read, or refused with a `UserError`, within ten seconds, without
a file written anywhere else and without a gigabyte of memory. Prints a table; exits with 1 if not.
"""

import hashlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from attack import badnet
from defense import ft, sau
from interop.backdoorbench import export_record
from models import build_model
from utils import datasets, folders, pipeline, poison, record, weights
from utils.config import Parser
from utils.data import Dataset, Labelled
from utils.errors import UserError
from utils.images import read_image
from utils.metrics import Rate, Scores
from utils.runtime import defer_signals, logger, run_script
from utils.tensors import load_plain
from utils.train import Loop

SECONDS = 10
GROWTH_MIB = 1024


class Hang(BaseException):
    """A case took too long."""


def small(num_classes: int) -> nn.Module:
    """A network of a few thousand weights."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(900, num_classes)
    )


def make_data() -> Dataset:
    """Random images under CIFAR-10's name, which BackdoorBench knows."""
    source = torch.Generator().manual_seed(0)
    train, test = [
        Labelled(
            torch.randint(0, 200, (count, 3, 32, 32), dtype=torch.uint8, generator=source),
            torch.arange(count) % 10,
        )
        for count in (40, 30)
    ]
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    return Dataset("cifar10", train, test, tuple(map(str, range(10))), mean, std)


def write_record(folder: Path, data: Dataset) -> None:
    """A good record of BadNets."""
    config = badnet.Config.load("digits")
    trigger = badnet.make_trigger(config, data.image_shape)
    choice = poison.dirty_label(
        data.train.labels, 0.2, "all2one", 0, 10, torch.Generator().manual_seed(0)
    )
    run = folders.RunFolder(folder)
    run.start("dataset: cifar10\n")
    facts = {
        "attack": "badnet",
        "model_name": "preactresnet18",
        "model_sha256": None,
        "network_size": None,
        "dataset_path": None,
        "attack_target": 0,
        "attack_label_trans": "all2one",
    }
    record.save_attack(
        run,
        build_model("preactresnet18", 10, data.mean, data.std),
        data,
        poison.replace_images(data.train, choice, trigger),
        poison.triggered_test_set(data, trigger, "all2one", 0),
        None,
        facts,
    )
    run.write_metrics([{"epoch": 1, "loss": 1.0, "seconds": 1.0}])
    files = record.file_hashes(run, "attack_result.pt", "poison.pt")
    run.write_summary({**facts, "dataset": "cifar10", "files": files})


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage."""
    for _ in range(rng.randint(1, 3)):
        if not content:
            return content
        place, size = rng.randrange(len(content)), rng.randint(1, 64)
        piece = content[place : place + size]
        content = rng.choice(
            (
                content[:place],
                content[:place]
                + bytes([content[place] ^ 1 << rng.randrange(8)])
                + content[place + 1 :],
                content[:place] + rng.randbytes(len(piece)) + content[place + len(piece) :],
                content[:place] + piece * rng.randint(2, 50) + content[place:],
                content[place:] + content[:place],
                content[:place] + content[place + size :],
                content[:place]
                + rng.choice((b"\xff" * 8, b"\0" * 8, b"9" * 9))
                + content[place + 8 :],
            )
        )
    return content


def hostile(value: Any, rng: random.Random) -> Any:
    """Plain data and tensors with one or two values of another kind, size or range."""
    strange: list[Any] = [None, -1, 10**18, 0, 1e308, float("nan"), "", "../../x", "x.py:f", [], {}]
    strange += [torch.zeros(0), torch.zeros(1).expand(10**12), torch.full((3,), float("nan"))]
    strange += [
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.tensor(-(2**62)),
        True,
        (1, 2),
        b"x",
    ]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return value | {key: hostile(value[key], rng)}
    if isinstance(value, torch.Tensor) and value.numel() and rng.random() < 0.6:
        return rng.choice(
            (
                value[:-1] if value.dim() else value[None],
                value.double(),
                value.flatten(),
                torch.cat([value.flatten(), value.flatten()]),
                value.clone().fill_(250) if value.dtype == torch.uint8 else value - 1000,
            )
        )
    return rng.choice(strange)


def damage_tensors(path: Path, rng: random.Random) -> None:
    """A file of `torch.save`: its bytes, or what it says."""
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    content = load_plain(path, arrays=True)
    buffer = io.BytesIO()
    torch.save(hostile(content, rng), buffer)
    path.write_bytes(buffer.getvalue())


def half(model: nn.Module) -> Scores:
    """The score of any model."""
    return Scores(Rate(1, 2))


def unlearn(loop: Loop) -> None:
    """Two rounds of FT."""
    data = make_data()
    config = ft.Config.load("digits", n_rounds=2, batch_size=16)
    model = build_model("preactresnet18", 10, data.mean, data.std)
    ft.purify(model, data.train.images, data.train.labels, config, loop)


def write_checkpoint(path: Path) -> None:
    """The checkpoint after the first batch."""

    def after_batch(_: int) -> None:
        if not path.exists():
            torch.save({"loop": loop.snapshot(), "rows": [], "seconds": 1.5}, path)

    loop = Loop(after_batch=after_batch)

    unlearn(loop)


Case = Callable[[Path, random.Random], object]


def cases(good: Path) -> dict[str, Case]:
    """For each kind: damages a copy of a good file in an empty folder, and reads it."""

    def own_record(folder: Path, rng: random.Random) -> None:
        shutil.copytree(good / "record", folder / "x")
        name = rng.choice(("attack_result.pt", "poison.pt", "summary.json", "config.yaml"))
        path = folder / "x" / name
        if path.suffix == ".pt":
            damage_tensors(path, rng)
            if rng.random() < 0.8:  # a careful attacker keeps the hashes right
                summary = json.loads((folder / "x/summary.json").read_text())
                summary["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
                (folder / "x/summary.json").write_text(json.dumps(summary))
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        record.recorded_dataset(folder / "x")
        found = record.load_attack(folder / "x")
        found.build()
        found.load_dataset()

    def backdoorbench(folder: Path, rng: random.Random) -> None:
        shutil.copytree(good / "theirs", folder / "x")
        if rng.random() < 0.7:
            damage_tensors(folder / "x/attack_result.pt", rng)
        else:
            picture = rng.choice(sorted((folder / "x").rglob("*.png")))
            picture.write_bytes(damaged(picture.read_bytes(), rng))
        record.recorded_dataset(folder / "x")
        found = record.load_attack(folder / "x")
        found.build()
        found.poisoned_set(found.load_dataset())

    def settings(folder: Path, rng: random.Random) -> None:
        config, name = rng.choice(((badnet.Config, "attack"), (sau.Config, "defense")))
        (folder / "x.yaml").write_bytes(damaged((good / f"{name}.yaml").read_bytes(), rng))
        config.from_command_line(["--yaml_path", str(folder / "x.yaml")], "", lambda values: None)

    def picture(folder: Path, rng: random.Random) -> None:
        source = rng.choice(sorted((good / "pictures").iterdir()))
        path = folder / source.name
        path.write_bytes(damaged(source.read_bytes(), rng))
        read_image(path, 32)

    def checkpoint(folder: Path, rng: random.Random) -> None:
        source = rng.choice(sorted((good / "checkpoints").iterdir()))
        path = folder / source.name
        shutil.copy(source, path)
        if path.suffix == ".pt":
            damage_tensors(path, rng)
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        model = build_model("preactresnet18", 10)
        weights.fill(model, weights.read_state_dict(path), "preactresnet18")

    def interrupted(folder: Path, rng: random.Random) -> None:
        run = folders.RunFolder(folder / "x")
        run.start("lr: 0.1\n")
        shutil.copy(good / "checkpoint.pt", folder / "x/checkpoint.pt")
        damage_tensors(folder / "x/checkpoint.pt", rng)
        watch = pipeline.Watch(
            run, "epoch", half, 1, checkpoint=run.start("lr: 0.1\n", resume=True)
        )
        unlearn(watch.start())

    return {
        "record": own_record,
        "BackdoorBench record": backdoorbench,
        "YAML": settings,
        "picture": picture,
        "user's checkpoint": checkpoint,
        "checkpoint of a run": interrupted,
    }


def write_good(good: Path, data: Dataset) -> None:
    """One good file of every kind."""
    write_record(good / "record", data)
    export_record(good / "record", good / "theirs")
    (good / "attack.yaml").write_text(badnet.Config.load("digits").dump())
    (good / "defense.yaml").write_text(sau.Config.load("digits").dump())
    (good / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm"):
        Image.fromarray(pixels).save(good / "pictures" / f"x.{suffix}")
    write_checkpoint(good / "checkpoint.pt")
    (good / "checkpoints").mkdir()
    state = build_model("preactresnet18", 10).network.state_dict()
    torch.save(state, good / "checkpoints/bare.pt")
    torch.save({"state_dict": state, "epoch": 3}, good / "checkpoints/wrapped.pt")
    save_file(dict(state), good / "checkpoints/x.safetensors")


def run_cases(count: int, seed: int, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Runs the cases.

    Returns:
        How each kind ended, and what should not have happened.
    """

    def alarm(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    good, place = root / "good", root / "place"
    good.mkdir()
    write_good(good, make_data())
    kinds = cases(good)
    ended: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    problems = []
    before = {path for path in root.rglob("*") if place not in path.parents}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    level = logger.level
    logger.setLevel(logging.ERROR)  # what a good run says is of no interest
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        place.mkdir()
        signal.alarm(SECONDS)
        try:
            kinds[kind](place, random.Random(f"{seed} {number}"))
            ended[kind]["read"] += 1
        except UserError as error:
            many = len(str(error)) > 3000
            ended[kind]["too long a message" if many else "refused"] += 1
        except Hang:
            ended[kind]["hang"] += 1
            problems.append(f"case {number} ({kind}): more than {SECONDS} s")
        except Exception:
            ended[kind]["traceback"] += 1
            problems.append(f"case {number} ({kind}): {traceback.format_exc(limit=-3)}")
        finally:
            signal.alarm(0)
            defer_signals(False)
            shutil.rmtree(place)
    logger.setLevel(level)
    after = {path for path in root.rglob("*") if place not in path.parents}
    problems += [f"written outside: {path}" for path in sorted(after - before)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    logger.info("memory grew by %.0f MiB", grown)
    if grown > GROWTH_MIB:
        problems.append(f"memory grew by {grown:.0f} MiB")
    return pd.DataFrame(ended).T.fillna(0).astype(int), problems


def main() -> None:
    """Parses the flags and prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    flags = parser.parse_args()
    loader = lambda path, image_size: make_data()  # noqa: E731
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.dict(models.CONSTRUCTORS, {"preactresnet18": small}),
        mock.patch.dict(datasets._LOADERS, {"cifar10": loader}),
    ):
        table, problems = run_cases(flags.cases, flags.seed, Path(name))
    logger.info("%s", table.to_string())
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
