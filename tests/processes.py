"""What `test_distributed.py` runs once alone and once in two processes; prints what came out.

python tests/processes.py FILE
python -m torch.distributed.run --nproc_per_node 2 tests/processes.py FILE
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import defense
import utils.data.images
from attack import bpp, inputaware, wanet
from attack.setting import Setting
from models import Classifier, prepare
from tests.every_defense import module, shortened
from utils.data import poison
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.errors import Diverged, UserError
from utils.process import distributed
from utils.process.seeds import generator
from utils.training.evaluate import evaluate
from utils.training.loop import Loop
from utils.training.sgd import Schedule, Supervised, train_classifier


class Recorder(Loop):
    """A loop that remembers the losses of each step, as those of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[float]] = []

    def log(self, count: int, **losses: torch.Tensor) -> None:
        super().log(count, **losses)
        values = torch.stack([loss.detach().double() * count for loss in losses.values()])
        *sums, images = distributed.total(torch.cat([values, torch.tensor([count]).double()]))
        self.steps.append([float(value / images) for value in sums])


def random_data() -> Dataset:
    """37 training and 21 test images of four classes, 16 pixels; neither can be halved."""
    source = torch.Generator().manual_seed(5)
    train, test = (
        Labelled(
            torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=source),
            torch.arange(count) % 4,
        )
        for count in (37, 21)
    )
    return Dataset("random", train, test, ("a", "b", "c", "d"), (0.5, 0.4, 0.6), (0.2, 0.3, 0.25))


class Small(nn.Sequential):
    """Two convolutions with BatchNorm; in float64, so that equal is equal to 1e-9."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, num_classes),
        )


def network(data: Dataset) -> Classifier:
    torch.manual_seed(3)
    model = Classifier(Small(4), data.mean, data.std).double()
    return prepare(model, torch.device("cpu"), "fp32")


def weights(model: nn.Module) -> list[float]:
    """A number for each weight and each statistic of BatchNorm."""
    return [float(value.double().norm()) for value in model.state_dict().values()]


def supervised(data: Dataset) -> dict[str, Any]:
    loop, model = Recorder(), network(data)
    step = Supervised(2, True, generator(0, "augmentation"))
    train(model, data, step, loop, 12, drop_last=True)
    return {"steps": loop.steps, "weights": weights(model)}


def train(
    model: nn.Module,
    data: Dataset,
    step: Any,
    loop: Loop,
    batch_size: int,
    epochs: int = 2,
    schedule: Schedule = "cosine",
    **how: bool,
) -> None:
    train_classifier(
        model,
        poison.unpoisoned(data.train),
        step,
        epochs=epochs,
        batch_size=batch_size,
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        schedule=schedule,
        order=generator(0, "order"),
        loop=loop,
        **how,
    )


def controlled(module: Any, control: Any, **changes: Any) -> Callable[[Dataset], dict[str, Any]]:
    """An attack that controls training; its last batch is not full."""

    def run(data: Dataset) -> dict[str, Any]:
        config = module.Config.load("digits", batch_size=16, pratio=0.25, **changes)
        setting = Setting(data, torch.device("cpu"), "fp32")
        step = control(config, setting)
        loop, model = Recorder(), network(data)
        train(model, data, step, loop, 16, drop_last=False, whole=True)
        own = [] if not hasattr(step, "pattern") else weights(step.pattern)
        return {"steps": loop.steps, "weights": weights(model), "own": own}

    return run


def defended(name: str, **changes: Any) -> Callable[[Dataset], dict[str, Any]]:
    """A defense on all training images; the last batch has 5, which two share unevenly."""

    def run(data: Dataset) -> dict[str, Any]:
        model, loop = network(data), Recorder()
        config = shortened(name, model, **changes)
        images, labels = data.train.images, data.train.labels
        try:
            model = module(name).purify(model, images, labels, config, loop)
        except UserError as error:
            return {"refused": str(error)}
        return {"steps": loop.steps, "weights": weights(model)}

    return run


class Cut(Exception):
    """A run ends here."""


def resumed(name: str, **changes: Any) -> Callable[[Dataset], dict[str, Any]]:
    """A defense that is cut off after its third batch, and goes on after the second one.

    All processes go on from the snapshot of the first one, as from a file.
    """

    def run(data: Dataset) -> dict[str, Any]:
        images, labels = data.train.images, data.train.labels
        kept: list[Any] = []
        rounds: list[dict[str, float]] = []

        def cut(batches: int) -> None:
            kept.append(copy.deepcopy(loop.snapshot()))
            if len(kept) == 3:
                raise Cut

        model = network(data)
        config = shortened(name, model, **changes)
        loop = Loop(after_batch=cut)
        with contextlib.suppress(Cut):
            module(name).purify(model, images, labels, config, loop)
        loop = Loop(
            lambda number, total, losses, state: rounds.append(dict(losses)),
            resume=distributed.from_main(kept[1]),
        )
        purified = module(name).purify(network(data), images, labels, config, loop)
        whole = module(name).purify(network(data), images, labels, config)
        assert weights(purified) == weights(whole)
        return {"rounds": rounds, "facts": loop.findings.facts, "weights": weights(purified)}

    return run


def scores(data: Dataset) -> dict[str, Any]:
    index = torch.arange(7)
    test = data.test.at(index)
    triggered = Triggered(test.images, torch.zeros(7, dtype=torch.int64), test.labels, index)
    model = network(data).eval()
    found = evaluate(model, data.test, triggered, torch.device("cpu"), cross=data.test)
    one = evaluate(model, data.test.at(index[:1]), None, torch.device("cpu"))
    return {"counts": found.counts(), "one": one.counts()}


def careless(data: Dataset) -> dict[str, Any]:
    """A method that forgets the other processes is found out."""
    loop, model = Loop(), network(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for _ in loop.rounds(1, model=model):
            for index in loop.batches(37, 37, generator(0, "order")):
                batch = data.train.at(index)
                loss = F.cross_entropy(model(batch.images / 255), batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    except UserError as error:
        return {"refused": str(error)}
    return {"refused": None}


class OddNorms(Small):
    """BatchNorm of vectors, without weights, with the mean of all batches, and with none of it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self[1] = nn.BatchNorm2d(8, affine=False)
        self[4] = nn.BatchNorm2d(8, momentum=None)
        self.append(nn.BatchNorm1d(num_classes, momentum=0.0))


def odd_norms(data: Dataset) -> dict[str, Any]:
    torch.manual_seed(3)
    model, loop = Classifier(OddNorms(4), data.mean, data.std).double(), Recorder()
    train(model, data, Supervised(2, True, generator(0, "augmentation")), loop, 12)
    return {"steps": loop.steps, "weights": weights(model)}


class OwnNorm(nn.BatchNorm2d):
    """A user's own kind."""


def refused(change: Callable[[nn.Module], object]) -> Callable[[Dataset], dict[str, Any]]:
    """What is said of the training of a changed network."""

    def run(data: Dataset) -> dict[str, Any]:
        model = network(data)
        change(model.network)
        try:
            train(model, data, Supervised(2, True, generator(0, "augmentation")), Loop(), 12)
        except UserError as error:
            return {"refused": str(error)}
        return {"refused": None}

    return run


def spare_weight(model: nn.Module) -> None:
    model.register_parameter("spare", nn.Parameter(torch.zeros(1, dtype=torch.float64)))


def own_norm(model: nn.Module) -> None:
    model[1] = OwnNorm(8).double()


def forgetful_norm(model: nn.Module) -> None:
    model[1] = nn.BatchNorm2d(8, track_running_stats=False).double()


def dropout(share: float) -> Callable[[nn.Module], object]:
    return lambda model: model.insert(6, nn.Dropout(share))


def small_batch(data: Dataset) -> dict[str, Any]:
    """A batch of one image cannot be shared."""
    loop = Loop()
    loop.parallel(network(data))
    try:
        list(loop.batches(37, 1, generator(0, "order")))
    except UserError as error:
        return {"refused": str(error)}
    return {"refused": None}


def preparation_that_fails(data: Dataset) -> dict[str, Any]:
    """What the first process refuses while the others wait for it; the error keeps its kind."""

    def compute() -> dict[str, torch.Tensor]:
        raise Diverged(f"nothing comes of it in process {distributed.rank()}")

    with mock.patch.object(utils.data.images, "ROOT", Path(sys.argv[1]).parent):
        setting = Setting(data, torch.device("cpu"), "fp32")
        try:
            setting.cached("nothing", {}, compute)
            refused = None
        except UserError as error:
            refused = f"{type(error).__name__}: {error}"
    everybody: list[str | None] = [None] * distributed.processes()
    if distributed.processes() > 1:
        torch.distributed.all_gather_object(everybody, refused)
    return {"refused": refused, "others": everybody[1:]}


def preparation(data: Dataset) -> dict[str, Any]:
    """What is cached is computed by one process, which trains alone, and read by all."""
    computed: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        computed.append(distributed.processes())
        model = network(data)
        train(model, data, Supervised(2, True, generator(0, "x")), Loop(), 12)
        return {"linear": model.network[-1].weight.detach()}

    with mock.patch.object(utils.data.images, "ROOT", Path(sys.argv[1]).parent):
        setting = Setting(data, torch.device("cpu"), "fp32")
        read = setting.cached("test", {}, compute)
    return {
        "times": int(distributed.total(torch.tensor(len(computed)))),
        "alone": computed in ([1], []),
        "weights": weights(nn.ParameterDict(read)),
    }


SCENES: dict[str, Callable[[Dataset], dict[str, Any]]] = {
    "supervised": supervised,
    "wanet": controlled(wanet, wanet.WaNet),
    "bpp": controlled(bpp, bpp.Bpp),
    "inputaware": controlled(inputaware, inputaware.InputAware),
    **{f"defense {name}": defended(name) for name in defense.names()},
    "sau, train mode": defended("sau", train_mode=True),
    "sau, random start": defended("sau", pgd_init="random"),
    "sau, resumed": resumed("sau"),
    "ft, resumed": resumed("ft", lr_scheduler="reduce_on_plateau"),
    "scores": scores,
    "preparation": preparation,
    "preparation that fails": preparation_that_fails,
    "careless": careless,
    "small batch": small_batch,
    "odd norms": odd_norms,
    "spare weight": refused(spare_weight),
    "own norm": refused(own_norm),
    "forgetful norm": refused(forgetful_norm),
    "dropout": refused(dropout(0.5)),
    "dropout of none": refused(dropout(0)),
}


def main() -> None:
    torch.set_num_threads(1)
    with distributed.joined():
        found = {name: scene(random_data()) for name, scene in SCENES.items()}
        if distributed.is_main():
            Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
