"""Damaged and hostile files through the real entry points, each in a process of its own.

    python perf/fuzz.py --cases 5000 --seed 0

Good files of every kind that a user may get (our records, results of defenses, BackdoorBench's
records, checkpoints, YAML, pictures, folders of classes, records for a report) are changed at
random, in their structure as well as in their bytes: types, shapes, ranges, names, archives,
pickles, and kinds of files (`hostile.py`). Each file must be read, or refused with a `UserError`
whose message can be printed. This may take 20 seconds of a processor and 200 seconds in all, and
memory of twice the files plus 1 GiB. No file may be written anywhere else. Prints a table; exits
with 1 if a case breaks one of these rules.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack import badnet
from benchmark.grid import read_grid
from benchmark.report import FORMATS
from benchmark.reporting.files import write as write_report
from defense import ft, sau
from interop.backdoorbench import export_record
from models import build_model
from perf import hostile
from utils import plot
from utils.config import Parser, check_least
from utils.data import poison
from utils.data.datasets import load_dataset, random_images
from utils.data.images import data_folder, read_image
from utils.errors import UserError
from utils.files import CONFIG_FILE, ROOT
from utils.metrics import Rate, Scores
from utils.process.device import peak_memory
from utils.process.script import logger, run_script
from utils.records import folders, places, weights
from utils.records.attack import load_attack, save_attack
from utils.records.contents import (
    ATTACK_RESULT,
    CHECKPOINT_FILE,
    DEFENSE_RESULT,
    METRICS_FILE,
    POISON,
    SUMMARY,
)
from utils.records.defense import load_defense, save_defense
from utils.records.hashes import file_hashes
from utils.records.named import recorded_dataset
from utils.tensors import load_plain
from utils.training.loop import Loop
from utils.training.watch import Watch

SECONDS = 20  # of a processor
WAIT = 200  # seconds, also where a case only waits
SPARE = 1 << 30  # bytes of memory that a case may take beside twice the size of its files


# Of those that BackdoorBench has a name for, what needs no download, and the fewest weights.
KNOWN_DATASET, KNOWN_MODEL = "gtsrb", "squeezenet1_0"


def write_traffic_signs(folder: Path) -> None:
    """GTSRB of random pictures, where `--dataset gtsrb` finds it: one per class, 20 for the test.

    Args:
        folder: where downloads are kept.
    """
    rng = np.random.default_rng(0)

    def write(home: Path, table: str, labels: list[int]) -> None:
        home.mkdir(parents=True)
        lines = ["Filename;ClassId"]
        for number, label in enumerate(labels):
            pixels = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / f"{number}.ppm")
            lines.append(f"{number}.ppm;{label}")
        (home / table).write_text("\n".join(lines), encoding="utf-8")

    for label in range(43):
        write(folder / "gtsrb/Train" / f"{label:05}", f"GT-{label:05}.csv", [label])
    write(folder / "gtsrb/Test", "GT-final_test.csv", list(range(20)))


def write_record(folder: Path, dataset: str = "random", model: str = "tiny") -> None:
    """A good record of BadNets at 32 pixels.

    Args:
        folder: to make.
        dataset: one that needs no path.
    """
    data = load_dataset(dataset, None, 32)
    config = badnet.Config.load(dataset)
    trigger = badnet.make_trigger(config, data.image_shape)
    choice = poison.dirty_label(
        data.train.labels, 0.2, "all2one", 0, len(data.classes), torch.Generator().manual_seed(0)
    )
    run = folders.RunFolder(folder)
    run.start(f"dataset: {dataset}\n")
    facts = {
        "attack": "badnet",
        "model_name": model,
        "model_sha256": None,
        "network_size": None,
        "dataset_path": None,
        "attack_target": 0,
        "attack_label_trans": "all2one",
    }
    save_attack(
        run,
        build_model(model, len(data.classes), data.mean, data.std),
        data,
        poison.replace_images(data.train, choice, trigger),
        poison.triggered_test_set(data, trigger, "all2one", 0),
        None,
        facts,
    )
    run.write_metrics([{"epoch": 1, "loss": 1.0, "seconds": 1.0}])
    files = file_hashes(run, ATTACK_RESULT, POISON)
    run.write_summary(
        {
            **facts,
            **{"acc": 0.5, "acc_total": 10, "asr": 0.5, "asr_total": 10, "ra": 0.5},
            "dataset": dataset,
            "model": model,
            "seed": 0,
            "files": files,
        }
    )


def half(model: nn.Module) -> Scores:
    """The score of any model."""
    return Scores(Rate(1, 2))


def unlearn(loop: Loop) -> None:
    """Two rounds of FT."""
    data = random_images(40, 10, 32)
    config = ft.Config.load("random", n_rounds=2, batch_size=16)
    model = build_model("tiny", 10, data.mean, data.std)
    ft.purify(model, data.train.images, data.train.labels, config, loop)


def write_checkpoint(path: Path) -> None:
    """The checkpoint after the first batch."""
    run = folders.RunFolder(path.with_name("interrupted"))
    run.start("lr: 0.1\n")

    def after_batch(_: int) -> None:
        if not path.exists():
            rows = [{"round": 0, "acc": 0.5, "seconds": 0.0}]
            run.write_checkpoint({"loop": loop.snapshot(), "rows": rows, "seconds": 1.5})
            shutil.copy(run.checkpoint, path)

    loop = Loop(after_batch=after_batch)
    unlearn(loop)


Case = Callable[[Path, random.Random], object]


def read_any(path: Path) -> Any:
    """A good file of tensors."""
    return load_plain(path, arrays=True)


def spoil(path: Path, rng: random.Random, damage: Callable[[Path, random.Random], None]) -> None:
    """Changes a file, or replaces it by something else."""
    if rng.random() < 0.08:
        hostile.replace_file(path, rng)
    else:
        damage(path, rng)


def spoil_tensors(path: Path, rng: random.Random) -> None:
    """Changes a file of tensors, or replaces it by something else."""
    spoil(path, rng, lambda path, rng: hostile.damage_tensors(path, rng, read_any))


def vouch(folder: Path, name: str) -> None:
    """Writes the sha256 of a changed file into the summary, as a careful attacker would."""
    if (folder / name).is_file() and (folder / name).stat().st_size < 1 << 30:
        path = folder / SUMMARY
        summary = json.loads(path.read_text())
        summary["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        path.write_text(json.dumps(summary))


def _copy(source: Path, path: Path) -> None:
    shutil.copy(source, path)


def damage_yaml(path: Path, rng: random.Random) -> None:
    """A line of another kind in a YAML file."""
    path.write_bytes(hostile.yaml_text(path.read_text(encoding="utf-8"), rng))


def spoil_run(folder: Path, names: tuple[str, ...], rng: random.Random) -> None:
    """Damages one of some files of a run; mostly its summary then has the new sha256."""
    path = folder / rng.choice(names)
    if path.suffix == ".pt":
        spoil_tensors(path, rng)
        if rng.random() < 0.85:
            vouch(folder, path.name)
    elif path.suffix == ".json":
        spoil(path, rng, hostile.damage_json)
    elif path.suffix == ".csv":
        spoil(path, rng, hostile.damage_table)
    else:
        spoil(path, rng, damage_yaml)


def read_record(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads a record, with its network and its images."""
    shutil.copytree(good / "record", folder / "x")
    names = (ATTACK_RESULT, ATTACK_RESULT, POISON, POISON)
    spoil_run(folder / "x", (*names, SUMMARY, CONFIG_FILE), rng)
    recorded_dataset(folder / "x")
    attack = load_attack(folder / "x")
    attack.build()
    data = attack.load_dataset()
    if attack.triggered is not None:
        attack.poisoned_set(data)
        attack.cross_images(data)


def read_purified(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads the result of a defense."""
    shutil.copytree(good / "record/defense/ft", folder / "x")
    spoil_run(folder / "x", (DEFENSE_RESULT, DEFENSE_RESULT, SUMMARY), rng)
    load_defense(folder / "x")(torch.rand(2, 3, 32, 32))


def read_backdoorbench(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads a record of BackdoorBench."""
    shutil.copytree(good / "theirs", folder / "x")
    chance = rng.random()
    if chance < 0.7:
        spoil_tensors(folder / "x/attack_result.pt", rng)
    elif chance < 0.8:
        others = sorted((folder / "x").glob("*.pickle"))
        spoil_tensors(rng.choice(others), rng)
    else:
        picture = rng.choice(sorted((folder / "x").rglob("*.png")))
        spoil(picture, rng, hostile.damage_picture)
    recorded_dataset(folder / "x")
    attack = load_attack(folder / "x")
    attack.build()
    attack.poisoned_set(attack.load_dataset())


def read_settings(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads the YAML file of a user, or a flag."""
    config, name = rng.choice(((badnet.Config, "attack"), (sau.Config, "defense")))
    shutil.copy(good / f"{name}.yaml", folder / "x.yaml")
    spoil(folder / "x.yaml", rng, damage_yaml)
    flags = ["--yaml_path", str(folder / "x.yaml")]
    if rng.random() < 0.3:
        flags = [f"--dataset={hostile.name(rng)}"]
    config.from_command_line(flags, "", lambda values: values.get("dataset"))


def read_a_grid(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads the YAML file of a grid."""
    shutil.copy(good / "grid.yaml", folder / "x.yaml")
    spoil(folder / "x.yaml", rng, damage_yaml)
    read_grid(folder / "x.yaml")


def read_picture(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads a picture of one of the formats."""
    source = rng.choice(sorted((good / "pictures").iterdir()))
    path = folder / source.name
    shutil.copy(source, path)
    spoil(path, rng, hostile.damage_picture)
    read_image(path, 32)


def write_classes(good: Path, folder: Path, rng: random.Random) -> None:
    """Writes a run whose classes have hostile names: its summary and a figure."""
    names = []
    for _ in range(2):
        text = hostile.name(rng).replace("/", "").replace("\0", "")
        names.append(os.fsdecode(text.encode("utf-8", "replace")[:100] or b"x"))
    for split in ("train", "test"):
        for name in names:
            place = folder / split / name
            if name not in (".", ".."):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(good / "pictures/x.png", place / "0.png")
    data = load_dataset("folder", folder, 8)
    rows = {"images": torch.rand(2, 3, 8, 8)}
    captions = {"images": [data.classes[0], data.classes[-1]]}
    run = folders.RunFolder(folder / "run")
    run.start("lr: 0.1\n")
    figure = plot.image_grid(rows, captions, f"{names[0]} on {names[1]}")
    run.write("x.png", lambda path: figure.savefig(path, dpi=40))
    run.write_summary({"classes": list(data.classes), "files": {}})


def read_weights(good: Path, folder: Path, rng: random.Random) -> None:
    """Reads a checkpoint of a model that was trained elsewhere."""
    source = rng.choice(sorted((good / "checkpoints").iterdir()))
    path = folder / source.name
    shutil.copy(source, path)
    if path.suffix == ".pt":
        spoil_tensors(path, rng)
    else:
        spoil(path, rng, hostile.damage_bytes)
    weights.fill(build_model("tiny", 10), weights.read_state_dict(path), "tiny")


def resume(good: Path, folder: Path, rng: random.Random) -> None:
    """Resumes a run from its checkpoint."""
    run = folders.RunFolder(folder / "x")
    run.start("lr: 0.1\n")
    run.write(CHECKPOINT_FILE, lambda path: _copy(good / CHECKPOINT_FILE, path))
    spoil_tensors(run.checkpoint, rng)
    run = folders.RunFolder(folder / "x")
    run.claim(False, resume=True)
    watch = Watch(run, "round", half, 1, checkpoint=run.start("lr: 0.1\n", resume=True))
    unlearn(watch.start())


def claim(good: Path, folder: Path, rng: random.Random) -> None:
    """Replaces a folder that holds a file of the user's beside those of a run."""
    shutil.copytree(good / "record", folder / "x")
    foreign = folder / "x" / rng.choice(("notes.txt", "defense/notes.txt", "defense/ft/n.txt"))
    foreign.write_text("mine")
    spoil(folder / "x/run.json", rng, hostile.damage_json)
    run = folders.RunFolder(folder / "x")
    try:
        run.claim(True)
        run.start("lr: 0.1\n")
    finally:
        assert foreign.read_text() == "mine", "a user's file is gone"


def report(good: Path, folder: Path, rng: random.Random) -> None:
    """Makes a report of damaged runs."""
    shutil.copytree(good / "record", folder / "records/x")
    runs = [folder / "records/x", folder / "records/x/defense/ft"]
    for run in rng.sample(runs, rng.randint(1, 2)):
        spoil_run(run, (SUMMARY, CONFIG_FILE, METRICS_FILE), rng)
    write_report([folder / "records"], folder / "to", rng.random() < 0.5, FORMATS)


# Each damages a copy of a good file in an empty folder, and reads it.
_READERS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "record": read_record,
    "result of a defense": read_purified,
    "BackdoorBench record": read_backdoorbench,
    "YAML": read_settings,
    "grid": read_a_grid,
    "picture": read_picture,
    "names of classes": write_classes,
    "user's checkpoint": read_weights,
    "checkpoint of a run": resume,
    "folder of a run": claim,
    "report": report,
}


def cases(good: Path) -> dict[str, Case]:
    """The cases of each kind.

    Args:
        good: folder of the good files.
    """
    return {kind: partial(read, good) for kind, read in _READERS.items()}


def write_good(good: Path) -> None:
    """One good file of every kind."""
    write_record(good / "record")
    attack = load_attack(good / "record")
    run = places.defense_folder(good / "record", "ft")
    run.start("defense: ft\n")
    save_defense(run, attack.build(), attack, "ft")
    run.write_metrics([{"round": n, "acc": 0.5, "asr": 0.5, "seconds": 1.0} for n in (0, 1)])
    rates = {"acc": 0.5, "acc_total": 10, "asr": 0.5, "asr_total": 10, "ra": 0.5}
    facts = {"attack": "badnet", "dataset": "random", "model": "tiny", "seed": 0}
    run.write_summary(
        {
            **facts,
            "defense": "ft",
            "before": rates,
            "after": rates,
            "der": 0.5,
            "attack_sha256": attack.sha256,
            "seconds": 1.0,
            "files": file_hashes(run, DEFENSE_RESULT),
        }
    )
    write_traffic_signs(data_folder())
    write_record(good / "known", KNOWN_DATASET, KNOWN_MODEL)
    export_record(good / "known", good / "theirs")
    (good / "attack.yaml").write_text(badnet.Config.load("digits").dump())
    (good / "defense.yaml").write_text(sau.Config.load("digits").dump())
    shutil.copy(ROOT / "benchmark/grids/digits.yaml", good / "grid.yaml")
    (good / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm", "tga", "jp2"):
        Image.fromarray(pixels).save(good / "pictures" / f"x.{suffix}")
    write_checkpoint(good / CHECKPOINT_FILE)
    (good / "checkpoints").mkdir()
    state = build_model("tiny", 10).network.state_dict()
    torch.save(state, good / "checkpoints/bare.pt")
    torch.save({"state_dict": state, "epoch": 3}, good / "checkpoints/wrapped.pt")
    save_file(dict(state), good / "checkpoints/x.safetensors")


# --- one case -----------------------------------------------------------------------------------


def most_memory() -> int:
    """The largest number of bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    kib = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))
    return 1024 * int(kib[1]) if kib else 0


def size_of(place: Path) -> int:
    """Bytes of the files in a folder, on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in place.rglob("*"))


def run_case(case: Case, place: Path, rng: random.Random) -> str:
    """How a case ends: "read", "refused", or several words that say what went wrong."""
    before = most_memory()
    try:
        case(place, rng)
        ended = "read"
    except UserError as error:
        texts = [str(problem) for problem in error.problems]
        ended = "refused"
        if sum(map(len, texts)) > 20_000 or len(texts) > 200:
            ended = f"too long a message: {sum(map(len, texts))} letters"
    except BaseException:
        ended = traceback.format_exc(limit=-4)
    grown, allowed = most_memory() - before, 2 * size_of(place) + SPARE
    if grown > allowed:
        return f"{grown >> 20} MiB of memory, where {allowed >> 20} are allowed; {ended}"
    return ended


def in_a_process(case: Case, place: Path, rng: random.Random) -> str:
    """`run_case` in a fork of this process, which is ended after a time."""
    import resource  # which Windows lacks

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        ended = "the case itself failed"
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        try:
            ended = run_case(case, place, rng)
        finally:
            os.write(writing, ended.encode("utf-8", "backslashreplace")[:60_000])
            os._exit(0)
    os.close(writing)
    until, content = time.monotonic() + WAIT, b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        os.set_blocking(reading, False)
        while time.monotonic() < until:
            piece = pipe.read(1 << 16)
            if piece == b"":
                break
            content += piece or b""
            time.sleep(0.002)
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not content and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGXCPU):
            return f"ended by signal {number}"
        is_over = time.monotonic() >= until
        return f"more than {WAIT} s" if is_over else f"more than {SECONDS} s of a processor"
    return content.decode("utf-8", "backslashreplace")


class Outcome(NamedTuple):
    """How many cases of each kind ended in which way, and what went wrong."""

    table: pd.DataFrame
    problems: list[str]


@contextmanager
def surroundings(root: Path) -> Iterator[None]:
    """Inside, downloads are below `root`, and the messages of a good run are not printed."""
    level, data = logger.level, os.environ.get("SAU_DATA")
    torch.set_num_threads(1)  # a fork of a process with threads of torch would wait for them
    os.environ["SAU_DATA"] = str(root / "data")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        del os.environ["SAU_DATA"]
        os.environ |= {} if data is None else {"SAU_DATA": data}


def run_cases(count: int, seed: int, root: Path) -> Outcome:
    """Runs the cases, each in a process of its own.

    Args:
        count: how many.
        seed: of the damage.
        root: an empty folder.
    """
    good, place, cache = root / "good", root / "place", root / "data"
    problems = []

    def outside() -> set[Path]:
        """All but what a case may write."""
        free = {place, cache}
        return {path for path in root.rglob("*") if not free & {path, *path.parents}}

    with surroundings(root):
        good.mkdir()
        write_good(good)
        kinds = cases(good)
        ended: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        before = outside()
        for number in range(count):
            kind = list(kinds)[number % len(kinds)]
            place.mkdir()
            end = in_a_process(kinds[kind], place, random.Random(f"{seed} {number}"))
            is_fine = end in ("read", "refused")
            ended[kind][end if is_fine else "failed"] += 1
            if not is_fine:
                problems.append(f"case {number} ({kind}): {end}")
                logger.error("%s", problems[-1].splitlines()[0])
            shutil.rmtree(place)
            if number % 500 == 499:
                logger.error("%d cases, %d problems", number + 1, len(problems))
        problems += [f"written outside: {path}" for path in sorted(outside() - before)]
    return Outcome(pd.DataFrame(ended).T.fillna(0).astype(int), problems)


def run_one(number: int, seed: int, root: Path) -> None:
    """Runs a single case in this process, so that its exception is seen."""
    good, place = root / "good", root / "place"
    with surroundings(root):
        good.mkdir()
        place.mkdir()
        write_good(good)
        kinds = cases(good)
        logger.setLevel(logging.INFO)
        kinds[list(kinds)[number % len(kinds)]](place, random.Random(f"{seed} {number}"))


def require_fork() -> None:
    """Raises UserError where a process cannot be forked, as on Windows."""
    if not hasattr(os, "fork"):
        raise UserError("this needs a system that forks processes; use Linux or macOS")


def main() -> None:
    """Parses the flags and prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="damaged files, >= 1")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--only", type=int, help="number of the one case to run here, >= 0")
    flags = parser.parse_args()
    check_least(flags, cases=1, only=0)
    require_fork()
    with tempfile.TemporaryDirectory() as name:
        if flags.only is not None:
            run_one(flags.only, flags.seed, Path(name))
            return
        outcome = run_cases(flags.cases, flags.seed, Path(name))
    for line in outcome.table.to_string().splitlines():
        logger.info("%s", line)
    for problem in outcome.problems:
        for line in problem.splitlines():
            logger.error("%s", line)
    if outcome.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
