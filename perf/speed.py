"""Speed of SAU and of attack training beside that of plain implementations, in one run.

    python attack/badnet.py --image_size 32 --save_folder_name badnet_32
    python perf/speed.py --result_file badnet_32 --to record/speed

Repeats are interleaved, so that a busy machine slows both sides. Medians and their ratios count,
not single seconds. Writes `speed.csv` and `speed.png` and prints the table.

round    rounds of SAU on a model that has a backdoor: the plain one (`perf/literal.py`), ours in
         fp32 and at the default precision; and the evaluation after a round
epoch    an epoch of attack training: PIL images, DataLoader and PNG files, and ours; and the
         evaluation after an epoch
share    where the time of our epoch and of our round goes, and the ratio to the floor: the
         operations of the usual convolutions, at the matrix rate measured in the same run
growth   seconds of a round against clean images, steps, classes and image size; one batch has half
         of `--images`

`round+` and `epoch+` are the evaluations after them.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense import sau
from models import Classifier, build_model, prepare
from perf import literal
from utils import plot
from utils.config import Parser, check_least
from utils.data.batches import as_float, augment
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import PoisonedSet
from utils.errors import UserError
from utils.process.device import environment, pick_device, pick_precision
from utils.process.script import logger, run_script
from utils.process.seeds import generator
from utils.records import folders, places
from utils.records.attack import load_attack
from utils.training import ending
from utils.training.evaluate import evaluate
from utils.training.loop import Loop
from utils.training.sgd import Supervised, train_classifier


@dataclass(frozen=True)
class Row:
    """One line of the table; `ratio` is to the first line of its part, > 1 is faster."""

    part: str
    what: str
    seconds: float
    ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """The model, images and device that every part measures on."""

    model: Classifier
    data: Dataset
    triggered: Triggered
    poisoned: PoisonedSet
    clean: Labelled
    config: sau.Config
    device: torch.device
    precision: str
    repeats: int


class Counting(nn.Module):
    """A network that counts its passes; its copies count together.

    Args:
        units: its only entry grows by 1 for the forward pass of an image, by 1 for a backward pass
            to the image, and by 1 for one to the weights.
    """

    def __init__(self, network: nn.Module, units: list[int]) -> None:
        super().__init__()
        self.network = network
        self.units = units

    def __deepcopy__(self, memo: dict) -> "Counting":
        return Counting(copy.deepcopy(self.network, memo), self.units)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        learns = next(self.network.parameters()).requires_grad
        backward = 2 if learns else int(images.requires_grad)
        self.units[0] += len(images) * (1 + (backward if torch.is_grad_enabled() else 0))
        return self.network(images)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, including the device's own work."""
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    """Waits for a GPU, which works while this process goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], Callable[[], object]]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each variant; they take turns, and the first turn does not count.

    Args:
        variants: each makes, untimed, the call that is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, prepared in variants.items():
            took = timed(prepared(), device)
            if turn:
                seconds[name].append(took)
            logger.info("%d/%d  %-40s %8.2f s", turn, repeats, name, took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rows_of(part: str, seconds: Mapping[str, float], notes: Mapping[str, str]) -> list[Row]:
    """One row per variant, with the ratio to the first."""
    first = next(iter(seconds.values()))
    return [Row(part, name, s, first / s, notes.get(name, "")) for name, s in seconds.items()]


def at_precision(model: Classifier, precision: str, device: torch.device) -> Classifier:
    """A copy that computes at a precision."""
    return prepare(copy.deepcopy(model), device, precision)


def ours_at(bench: Bench, make: Callable[[str], Callable[[], Callable]]) -> dict[str, Callable]:
    """Our variants: in fp32, and at the default precision if that is another one."""
    return {f"ours, {name}": make(name) for name in dict.fromkeys(("fp32", bench.precision))}


def our_scoring(bench: Bench) -> dict[str, Callable]:
    """Our evaluation: one pass over the clean and one over the triggered test images."""

    def make(precision: str) -> Callable[[], Callable[[], object]]:
        model = at_precision(bench.model, precision, bench.device)
        return lambda: lambda: evaluate(model, bench.data.test, bench.triggered, bench.device)

    return ours_at(bench, make)


def measure_round(bench: Bench) -> list[Row]:
    """Some rounds of SAU: in the first one the model is its reference, later ones differ."""
    images, labels = as_float(bench.clean.images, bench.device), bench.clean.labels
    rounds = 3
    config = replace(bench.config, n_rounds=rounds)

    def plain() -> Callable[[], object]:
        model = literal.plain_network(bench.model).eval()
        reference = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, amsgrad=True)
        y = labels.to(bench.device)

        def call() -> None:
            for _ in range(rounds):
                literal.round_of_sau(model, reference, optimizer, images, y, config)

        return call

    def ours(precision: str) -> Callable[[], Callable[[], object]]:
        model = at_precision(bench.model, precision, bench.device)
        return lambda: lambda: sau.purify(model, bench.clean.images, labels, config)

    def three_passes() -> Callable[[], object]:
        model = literal.plain_network(bench.model)
        return lambda: literal.three_passes(model, bench.data, bench.triggered)

    seconds = interleaved(
        {"literal, fp32": plain, **ours_at(bench, ours)}, bench.repeats, bench.device
    )
    x, y = images[: config.batch_size], labels[: config.batch_size].to(bench.device)
    purified = sau.purify(bench.model, bench.clean.images, labels, config)
    reference = bench.model.eval()
    ours_delta = sau.shared_perturbation(purified, reference, x, y, config)
    networks = literal.plain_network(purified), literal.plain_network(reference)
    literal_delta = literal.perturbation(*networks, x, y, config)
    same = 100 * float((ours_delta == literal_delta).float().mean())
    rows = rows_of(
        "round",
        {name: s / rounds for name, s in seconds.items()},
        {"ours, fp32": f"{same:.3f} % of delta's values identical"},
    )
    evaluations = {"three passes, fp32": three_passes, **our_scoring(bench)}
    return rows + rows_of("round+", interleaved(evaluations, bench.repeats, bench.device), {})


def our_epoch(
    model: Classifier, data: PoisonedSet, batch_size: int, device: torch.device
) -> Callable[[], object]:
    """The call that trains a model for one epoch, as attacks do."""
    step = Supervised(4, True, generator(0, "augmentation", device))
    return lambda: train_classifier(
        model,
        data,
        step,
        epochs=1,
        batch_size=batch_size,
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        order=generator(0, "order"),
        loop=Loop(),
    )


def measure_epoch(bench: Bench, count: int, batch_size: int) -> list[Row]:
    """An epoch on the first `count` training images, and the evaluation after it."""
    data = bench.data
    first = bench.poisoned.index < count
    part = PoisonedSet(
        Labelled(data.train.images[:count], data.train.labels[:count]),
        *(getattr(bench.poisoned, name)[first] for name in ("index", "images", "labels", "kinds")),
    )

    def fresh(precision: str) -> Classifier:
        torch.manual_seed(0)
        model = build_model("preactresnet18", len(data.classes), data.mean, data.std)
        return prepare(model, bench.device, precision)

    def ours(precision: str) -> Callable[[], Callable[[], object]]:
        return lambda: our_epoch(fresh(precision), part, batch_size, bench.device)

    with tempfile.TemporaryDirectory() as folder:
        plain_epoch = literal.PlainEpoch(
            data, bench.poisoned, bench.triggered, Path(folder), batch_size, count
        )
        trained = literal.plain_network(bench.model.network)

        def plain() -> Callable[[], object]:
            network = literal.plain_network(fresh("fp32").network)
            optimizer = torch.optim.SGD(
                network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
            )
            return lambda: plain_epoch.train(network, optimizer)

        seconds = interleaved(
            {"plain recipe, fp32": plain, **ours_at(bench, ours)}, bench.repeats, bench.device
        )
        evaluations = {
            "plain recipe, fp32": lambda: lambda: plain_epoch.evaluate(trained),
            **our_scoring(bench),
        }
        scoring = interleaved(evaluations, bench.repeats, bench.device)
    images = count // batch_size * batch_size
    rate = {name: f"{images / s:.0f} images/s" for name, s in seconds.items()}
    return rows_of("epoch", seconds, rate) + rows_of("epoch+", scoring, {})


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product at a precision, the best of ten."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def forward_operations(model: Classifier, shape: tuple[int, int, int]) -> int:
    """Operations of one image's forward pass, two for each multiplication with its addition."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.rand(1, *shape, device=next(model.parameters()).device))
    return counter.get_total_flops()


def measure_share(bench: Bench, batch_size: int) -> list[Row]:
    """Where an epoch's time goes, and how far a step and a round are from the floor."""
    rate = matrix_rate(bench.device, bench.precision)
    one = forward_operations(
        at_precision(bench.model, bench.precision, bench.device), bench.data.image_shape
    )
    return [
        *share_of_steps(bench, batch_size, one / rate),
        *share_of_round(bench, one / rate),
        Row("share", "matrix product", one / rate, note=f"{rate / 1e9:.0f} GFLOP/s"),
    ]


def share_of_steps(bench: Bench, batch_size: int, unit: float) -> list[Row]:
    """Seconds of each part of some training steps, and of the floor.

    Args:
        unit: seconds of the operations of one image's forward pass, at the matrix rate.
    """
    device = bench.device
    model = at_precision(bench.model, bench.precision, device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    rng = generator(0, "augmentation", device)
    seconds = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        _synchronize(device)
        started = time.perf_counter()
        yield
        _synchronize(device)
        seconds[name] += time.perf_counter() - started

    order = torch.randperm(len(bench.data.train))
    steps = 6
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            seconds = dict.fromkeys(seconds, 0.0)
        with measured("data"):
            index = order.roll(step * batch_size)[:batch_size]
            images = augment(bench.data.train.images[index].to(device), 4, True, rng)
            x, y = as_float(images), bench.data.train.labels[index].to(device)
        with measured("forward"):
            loss = F.cross_entropy(model(x), y)
        with measured("backward"):
            optimizer.zero_grad()
            loss.backward()
        with measured("optimizer"):
            optimizer.step()
    total, floor = sum(seconds.values()), 3 * unit * batch_size * steps
    return [
        *(
            Row("share", f"epoch: {name}", s, note=f"{100 * s / total:.1f} %")
            for name, s in seconds.items()
        ),
        Row("share", "epoch: floor", floor, note=f"{total / floor:.2f} times the floor"),
    ]


def share_of_round(bench: Bench, unit: float) -> list[Row]:
    """Seconds of a round of SAU, and of the floor of the passes that it makes.

    Args:
        unit: seconds of the operations of one image's forward pass, at the matrix rate.
    """
    counter = [0]
    counted = Counting(at_precision(bench.model, bench.precision, bench.device), counter)
    config = replace(bench.config, n_rounds=3)
    took = timed(
        lambda: sau.purify(counted, bench.clean.images, bench.clean.labels, config), bench.device
    )
    took, units = took / config.n_rounds, counter[0] / config.n_rounds
    floor = units * unit
    return [
        Row("share", "round of SAU", took, note=f"{units / len(bench.clean):.1f} units an image"),
        Row("share", "round of SAU: floor", floor, note=f"{took / floor:.2f} times the floor"),
    ]


def measure_growth(bench: Bench) -> list[Row]:
    """Seconds of a round, without evaluation, as one thing grows at a time.

    On a GPU, a start and its first round are subtracted from six rounds: graphs are recorded then.
    """
    shape, classes, few = bench.data.image_shape, len(bench.data.classes), len(bench.clean) // 2
    later = 5 if bench.device.type == "cuda" else 0

    def seconds(images: int, steps: int, classes: int, size: int) -> float:
        torch.manual_seed(0)
        model = build_model("preactresnet18", classes, bench.data.mean, bench.data.std)
        model = prepare(model, bench.device, bench.precision)
        source = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (images, 3, size, size), generator=source).to(torch.uint8)
        labels = torch.randint(0, classes, (images,), generator=source)
        # A bound of 0 leaves every image unshared, so that each step works on all of them.
        config = replace(bench.config, adv_steps=steps, trigger_norm=0.0, batch_size=few)

        def took(rounds: int) -> float:
            config_now = replace(config, n_rounds=rounds)
            call = lambda: sau.purify(model, pixels, labels, config_now)  # noqa: E731
            return statistics.median(timed(call, bench.device) for _ in range(bench.repeats))

        took(1)
        return (took(1 + later) - took(1)) / later if later else took(1)

    plans: dict[str, list[tuple[int, int, int, int]]] = {
        "clean images": [(n, 2, classes, shape[1]) for n in (few, 2 * few, 4 * few)],
        "steps": [(few, n, classes, shape[1]) for n in (1, 3, 5)],
        "classes": [(few, 2, n, shape[1]) for n in (10, 100, 1000)],
        "image side": [(few, 2, classes, n) for n in (16, 32, 64)],
    }
    rows = []
    for name, plan in plans.items():
        axis = next(i for i in range(4) if len({line[i] for line in plan}) > 1)
        for line in plan:
            took = seconds(*line)
            logger.info("%s %d: %.2f s", name, line[axis], took)
            rows.append(Row("growth", f"{name} {line[axis]}", took))
    return rows


def load(folder: Path, images: int, batch_size: int, device: torch.device, repeats: int) -> Bench:
    """The bench of an attack's record.

    Raises:
        UserError: if the record has no triggered images.
    """
    attack = load_attack(folder)
    if attack.triggered is None:
        raise UserError(f"{folder}: is a clean model; give the record of an attack")
    data = attack.load_dataset()
    chosen = torch.randperm(len(data.train), generator=generator(0, "speed"))[:images]
    config = sau.Config.load(attack.dataset, n_rounds=1, batch_size=batch_size)
    return Bench(
        model=prepare(attack.build(), device, "fp32"),
        data=data,
        triggered=attack.triggered,
        poisoned=attack.poisoned_set(data),
        clean=data.train.at(chosen),
        config=config,
        device=device,
        precision=pick_precision("auto", device),
        repeats=repeats,
    )


def main() -> None:
    """Parses the flags, measures, and writes table and chart."""
    parser = Parser(__doc__)
    parts = ("round", "epoch", "share", "growth")
    parser.add_argument(
        "--result_file", required=True, help="record of a BadNets attack at 32 pixels"
    )
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count, >= 1")
    parser.add_argument("--images", type=int, default=128, help="clean images of a round of SAU")
    parser.add_argument("--epoch_images", type=int, default=1024, help="images of an epoch")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    check_least(flags, repeats=1, images=1, epoch_images=1, batch_size=1)
    places.made_folder(flags.to)
    device = pick_device(flags.device)
    folder = places.find_record(flags.result_file, flags.record_path)
    bench = load(folder, flags.images, flags.batch_size, device, flags.repeats)
    measures: dict[str, Callable[[], list[Row]]] = {
        "round": lambda: measure_round(bench),
        "epoch": lambda: measure_epoch(bench, flags.epoch_images, flags.batch_size),
        "share": lambda: measure_share(bench, flags.batch_size),
        "growth": lambda: measure_growth(bench),
    }
    rows: list[Row] = []
    for part in flags.parts:  # written after each: what is measured is not lost
        rows += measures[part]()
        write(rows, flags.to, environment(device, bench.precision))


def write(rows: list[Row], to: Path, machine: Mapping[str, object]) -> None:
    """`speed.csv`, `speed.png` and the table on the log."""
    folder = folders.RunFolder(to)
    versions = " ".join(f"{key} {value}" for key, value in dict(machine["versions"]).items())  # type: ignore[call-overload]
    title = f"{machine['device_name']}, {machine['threads']} threads, {versions}"
    table = pd.DataFrame([asdict(row) for row in rows]).assign(machine=title)
    folder.write("speed.csv", lambda path: table.to_csv(path, index=False))
    ratios = {f"{row.part}: {row.what}": row.ratio for row in rows if row.ratio is not None}
    if ratios:
        figure = plot.bars(ratios, "times as fast as the first of its part", title)
        ending.save_figure(folder, "speed.png", figure)
    logger.info("%s", title)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        logger.info("%-7s %-34s %9.3f s %9s  %s", row.part, row.what, row.seconds, ratio, row.note)


if __name__ == "__main__":
    run_script(main)
