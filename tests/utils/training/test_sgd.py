"""Learning rates, and ordinary training."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import utils.training.sgd
from models import Classifier
from tests.networks import Scalar
from utils.data.batches import as_float
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import PoisonedSet, unpoisoned
from utils.errors import UserError
from utils.process import distributed
from utils.training.loop import Loop
from utils.training.sgd import Schedule, Scheduler, Supervised, lr_multiplier, train_classifier


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mean:
    """The step whose loss is the mean of the model's output."""

    def __init__(self) -> None:
        self.updates = 0

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(as_float(images)).mean()

    def update(self) -> None:
        self.updates += 1


def recipe(**changes: Any) -> dict[str, Any]:
    """A plain recipe for 12 images: three steps per epoch, lr 1."""
    plain = {
        "epochs": 1,
        "batch_size": 4,
        "lr": 1.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "order": rng(1),
        "loop": Loop(),
    }
    return plain | changes


# --- learning rates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        # (1 + cos(pi * epoch / 4)) / 2 with two steps per epoch: cos is 1, 0.7071, 0, -0.7071, -1.
        ("cosine", [1, 1, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447, 0]),
        (
            "cosine_100",
            [1, 1, 0.999753, 0.999753, 0.999013, 0.999013, 0.997781, 0.997781, 0.996057],
        ),
        # 0.1 + 0.9 * (step / 8) / 0.25 for two steps, then (1 - step / 8) / 0.75.
        ("one_cycle", [0.1, 0.55, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
    ],
)
def test_learning_rate_factors(schedule: Schedule, factors: list[float]) -> None:
    """Four epochs of two steps; the ninth value is the one after the last step."""
    multiplier = lr_multiplier(schedule, epochs=4, steps_per_epoch=2)
    assert [multiplier(step) for step in range(9)] == pytest.approx(factors, abs=1e-6)


def rates_after(losses: list[float]) -> list[float]:
    """The rate after each epoch of `reduce_on_plateau` with such a loss, from 1 on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = Scheduler(optimizer, "reduce_on_plateau", epochs=30, steps_per_epoch=2)
    rates = []
    for loss in losses:
        optimizer.step()
        scheduler.after_step()
        scheduler.after_epoch(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("loss", [2.0, -2.0, 0.0])
def test_a_plateau_of_the_training_loss_lowers_the_rate_to_a_tenth(loss: float) -> None:
    """The first loss is the best; after ten epochs that are no better, the eleventh lowers it.

    So the twelfth call changes the rate, which steps never do, and eleven more change it again.
    D3's loss is below 0.
    """
    assert rates_after([loss] * 23) == pytest.approx([1.0] * 11 + [0.1] * 11 + [0.01])


@pytest.mark.parametrize("first", [2.0, -2.0])
@pytest.mark.parametrize(("fall", "rate"), [(3e-4, 1.0), (1e-5, 0.1), (-3e-4, 0.1)])
def test_a_loss_that_falls_by_a_ten_thousandth_of_itself_is_on_no_plateau(
    first: float, fall: float, rate: float
) -> None:
    """In each epoch; slower than that, it does not in ten."""
    losses = [first - fall * epoch for epoch in range(12)]
    assert rates_after(losses)[-1] == pytest.approx(rate)


def test_training_gives_the_plateau_the_mean_loss_of_the_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of the loss w is 1: at rate 1 two steps per epoch see 0 and -1, then -2, -3."""
    seen: list[float] = []
    monkeypatch.setattr(Scheduler, "after_epoch", lambda self, loss: seen.append(loss))
    data = unpoisoned(Labelled(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), torch.zeros(8).long()))
    steps = recipe(epochs=2, lr=1.0, schedule="reduce_on_plateau")
    train_classifier(Scalar(), data, step=Mean(), **steps)
    assert seen == [-0.5, -2.5]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_stays_at_zero_after_its_end(schedule: Schedule) -> None:
    multiplier = lr_multiplier(schedule, epochs=2, steps_per_epoch=3)
    assert multiplier(7) == pytest.approx(0, abs=1e-12)
    assert lr_multiplier(schedule, epochs=1, steps_per_epoch=2)(2) == pytest.approx(0, abs=1e-12)
    assert multiplier(100) == pytest.approx(0, abs=1e-12)


def test_training_follows_the_schedule_step_by_step() -> None:
    """The gradient of the loss w is 1, so w falls by lr times the sum of the factors.

    Four epochs of two steps of one_cycle: 0.1 + 0.55 + 1 + (5 + 4 + 3 + 2 + 1) / 6 = 4.15; with
    lr 0.2 w ends at -0.83.
    """
    model = Scalar()
    data = unpoisoned(Labelled(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), torch.zeros(8).long()))
    train_classifier(
        model,
        data,
        step=Mean(),
        **recipe(epochs=4, lr=0.2, schedule="one_cycle"),
    )
    assert model.weight.item() == pytest.approx(-0.83, abs=1e-6)


def test_training_uses_momentum_and_weight_decay() -> None:
    """lr 1, momentum 0.5, decay 0.1, gradient 1 + 0.1 w, three steps from w = 0.

    v1 = 1, w1 = -1; v2 = 0.5 + 0.9 = 1.4, w2 = -2.4; v3 = 0.7 + 0.76 = 1.46, w3 = -3.86.
    """
    model = Scalar()
    data = unpoisoned(Labelled(torch.zeros(12, 3, 2, 2, dtype=torch.uint8), torch.zeros(12).long()))
    train_classifier(
        model,
        data,
        step=Mean(),
        **recipe(momentum=0.5, weight_decay=0.1),
    )
    assert model.weight.item() == pytest.approx(-3.86, abs=1e-6)


# --- training -----------------------------------------------------------------------------------


class Recorder(Supervised):
    """The ordinary step, which keeps what it gives to the model."""

    def __init__(self, crop_padding: int = 0, flip: bool = False, seed: int = 2) -> None:
        super().__init__(crop_padding, flip, rng(seed))
        self.images: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.modes: list[bool] = []

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.labels.append(labels.clone())
        self.modes.append(model.training)
        hook = model.register_forward_pre_hook(
            lambda _, given: self.images.append(given[0].clone())
        )
        try:
            return super().loss(model, images, labels)
        finally:
            hook.remove()

    def seen(self) -> set[tuple[tuple[float, ...], int]]:
        """Pairs of an image's bytes and its label."""
        images, labels = torch.cat(self.images), torch.cat(self.labels)
        as_bytes = (images * 255).round().flatten(1).tolist()
        return {(tuple(row), label) for row, label in zip(as_bytes, labels.tolist(), strict=True)}


def pairs(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[tuple[float, ...], int]]:
    return [
        (tuple(i.float().flatten().tolist()), int(y)) for i, y in zip(images, labels, strict=True)
    ]


def test_training_replaces_poisoned_images_and_labels(tiny_data: Dataset) -> None:
    """Images 1, 5 and 10 of 12 are replaced; every other one is met as it is, and each once."""
    index = torch.tensor([1, 5, 10])
    replaced = torch.tensor([[[[201]]], [[[202]]], [[[203]]]], dtype=torch.uint8).expand(3, 3, 8, 8)
    poisoned = PoisonedSet(
        tiny_data.train,
        index,
        replaced.contiguous(),
        torch.tensor([2, 2, 0]),
        torch.zeros(3, dtype=torch.uint8),
    )
    expected = pairs(tiny_data.train.images, tiny_data.train.labels)
    for place, (image, label) in zip(index.tolist(), pairs(replaced, poisoned.labels), strict=True):
        expected[place] = (image, label)
    before = tiny_data.fingerprint()
    recorder = Recorder()
    train_classifier(Scalar(), poisoned, step=recorder, **recipe())
    assert sum(len(batch) for batch in recorder.labels) == 12
    assert recorder.seen() == set(expected)
    assert tiny_data.fingerprint() == before


def test_training_gives_floats_to_a_model_in_train_mode(tiny_data: Dataset) -> None:
    recorder = Recorder()
    model = Scalar().eval()
    train_classifier(model, unpoisoned(tiny_data.train), step=recorder, **recipe(epochs=2))
    assert recorder.modes == [True] * 6
    images = torch.cat(recorder.images)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_an_epoch_leaves_out_a_last_batch_that_is_not_full(tiny_data: Dataset) -> None:
    """12 images in fives: two batches, and two images wait for the next epoch's order."""
    recorder = Recorder()
    train_classifier(
        Scalar(), unpoisoned(tiny_data.train), step=recorder, **recipe(epochs=3, batch_size=5)
    )
    assert [len(batch) for batch in recorder.labels] == [5] * 6


def test_training_crops_and_mirrors_if_asked(tiny_data: Dataset) -> None:
    """Without augmentation every image is one of the set; with flips some are mirrors of them."""
    originals = set(pairs(tiny_data.train.images, tiny_data.train.labels))
    mirrors = set(pairs(tiny_data.train.images.flip(3), tiny_data.train.labels))
    recorder = Recorder(flip=True)
    train_classifier(Scalar(), unpoisoned(tiny_data.train), step=recorder, **recipe())
    assert recorder.seen() <= originals | mirrors
    assert recorder.seen() & mirrors
    assert recorder.seen() & originals
    recorder = Recorder(crop_padding=2)
    train_classifier(Scalar(), unpoisoned(tiny_data.train), step=recorder, **recipe())
    assert not recorder.seen() <= originals


def test_training_is_set_by_its_generators(tiny_data: Dataset) -> None:
    def run(order: int, augmentation: int) -> torch.Tensor:
        recorder = Recorder(crop_padding=2, seed=augmentation)
        clean = unpoisoned(tiny_data.train)
        train_classifier(Scalar(), clean, step=recorder, **recipe(order=rng(order)))
        return torch.cat(recorder.images)

    assert torch.equal(run(1, 2), run(1, 2))
    assert not torch.equal(run(1, 2), run(1, 3))
    assert not torch.equal(run(1, 2), run(3, 2))


def test_training_reports_its_loss_and_state(tiny_data: Dataset) -> None:
    """The loss is the weight before each step, which falls by 1 per step: 0, -1, -2; mean -1."""
    seen = []
    loop = Loop(after_round=lambda *args: seen.append(args))
    model = Scalar()
    train_classifier(
        model,
        unpoisoned(tiny_data.train),
        step=Mean(),
        **recipe(loop=loop),
    )
    ((number, total, losses, state),) = seen
    assert (number, total) == (1, 1)
    assert losses == {"loss": pytest.approx(-1.0)}
    assert state["model"] is model


def test_training_learns(tiny_data: Dataset, tiny_model: Classifier) -> None:
    """The loss on twelve images is lower after 20 epochs than the logarithm of three classes."""
    losses: list[float] = []
    loop = Loop(after_round=lambda number, total, found, state: losses.append(found["loss"]))
    train_classifier(
        tiny_model,
        unpoisoned(tiny_data.train),
        step=Supervised(0, False, rng(2)),
        **recipe(epochs=20, lr=0.1, loop=loop),
    )
    assert losses[-1] < losses[0]
    assert losses[-1] < math.log(3)


def test_a_batch_may_be_the_whole_set(tiny_data: Dataset) -> None:
    recorder = Recorder()
    train_classifier(Scalar(), unpoisoned(tiny_data.train), recorder, **recipe(batch_size=12))
    assert [len(batch) for batch in recorder.labels] == [12]


def test_a_batch_larger_than_the_set_is_refused(tiny_data: Dataset) -> None:
    with pytest.raises(UserError, match="--batch_size: 13 is more than the 12 training images"):
        train_classifier(Scalar(), unpoisoned(tiny_data.train), Mean(), **recipe(batch_size=13))


def test_the_ordinary_step_is_cross_entropy() -> None:
    """Equal logits for three classes: log 3. Logits (log 2, 0, 0) give 1/2, 1/4, 1/4: log 2."""

    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[math.log(2), 0.0, 0.0]]).expand(len(images), 3)

    step = Supervised(0, False, rng())
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert step.loss(Fixed(), black[:1], torch.tensor([0])).item() == pytest.approx(math.log(2))
    equal = step.loss(Scalar(), black, torch.tensor([0, 2]))
    assert equal.item() == pytest.approx(math.log(3))


def test_an_attack_that_controls_training_updates_its_networks_after_each_step(
    tiny_data: Dataset,
) -> None:
    """12 images in fives, two epochs: two steps per epoch, or three with the last batch kept."""
    for drop_last, expected in ((True, 4), (False, 6)):
        step = Mean()
        changes = {"epochs": 2, "batch_size": 5, "drop_last": drop_last}
        train_classifier(Scalar(), unpoisoned(tiny_data.train), step, **recipe(**changes))
        assert step.updates == expected


def test_multi_step_falls_to_a_tenth_every_hundred_epochs() -> None:
    """Two steps per epoch: the step 199 is in epoch 99, 200 in 100, 1000 and more in 500."""
    multiplier = lr_multiplier("multi_step", epochs=600, steps_per_epoch=2)
    factors = [multiplier(step) for step in (0, 199, 200, 400, 800, 1000)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 1e-4, 1e-4])


def test_a_gpu_takes_clean_and_poisoned_images_together_or_neither(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 clean images and 3 that replace some, asked for at once."""
    asked = []
    monkeypatch.setattr("utils.training.sgd.fits", lambda _, count: asked.append(count))
    images = tiny_data.train.images
    poisoned = PoisonedSet(
        tiny_data.train,
        torch.tensor([1, 4, 7]),
        images[:3],
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.uint8),
    )
    train_classifier(Scalar(), poisoned, Mean(), **recipe())
    assert asked == [images.nbytes + images[:3].nbytes]


@pytest.mark.parametrize(("how", "sizes"), [({}, [2, 2, 2]), ({"whole": True}, [4, 4, 4])])
def test_several_processes_train_on_parts_or_on_whole_batches(
    how: dict[str, bool], sizes: list[int], tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that needs the batch as a whole gets it, and a model that puts parts together."""
    gathered: list[nn.Module] = []
    compared: list[nn.Module] = []
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "total", lambda values: values)
    monkeypatch.setattr(distributed, "parallel", lambda model: model)
    monkeypatch.setattr(distributed, "require_equal", compared.append)
    monkeypatch.setattr(distributed, "Gathered", lambda model: gathered.append(model) or model)
    recorder, model = Recorder(), Scalar()
    train_classifier(model, unpoisoned(tiny_data.train), recorder, **recipe(**how))
    assert [len(batch) for batch in recorder.labels] == sizes
    assert gathered == ([model] if how else [])
    assert compared == [model]


def test_one_process_gathers_nothing(tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distributed, "Gathered")
    train_classifier(Scalar(), unpoisoned(tiny_data.train), Mean(), **recipe(whole=True))


@pytest.mark.parametrize("has_room", [True, False])
def test_batches_are_given_on_their_device(
    has_room: bool, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the set is there or stays where it is; on `meta` there are shapes alone."""
    monkeypatch.setattr("utils.training.sgd.fits", lambda *_: has_room)
    images = tiny_data.train.images
    index, zeros = torch.tensor([1, 4]), torch.zeros(2, dtype=torch.int64)
    data = PoisonedSet(tiny_data.train, index, images[:2], zeros, zeros.byte())
    batches = utils.training.sgd._Batches(data, torch.device("meta"))
    assert batches._images.is_meta == has_room
    taken, labels = batches.take(torch.tensor([0, 1, 5]))
    assert taken.is_meta
    assert labels.is_meta
    assert taken.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 2), (False, 3)])
def test_a_schedule_counts_the_steps_of_an_epoch(
    drop_last: bool, steps: int, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve images in fives: two steps, or three with the last batch."""
    asked: list[tuple[Any, ...]] = []

    def spy(optimizer: torch.optim.Optimizer, *given: Any) -> Scheduler:
        asked.append(given)
        return Scheduler(optimizer, *given)

    monkeypatch.setattr("utils.training.sgd.Scheduler", spy)
    flags = recipe(batch_size=5, epochs=3, schedule="cosine", drop_last=drop_last)
    train_classifier(Scalar(), unpoisoned(tiny_data.train), Mean(), **flags)
    assert asked == [("cosine", 3, steps)]
    assert type(asked[0][2]) is int


@pytest.mark.parametrize(("padding", "flip"), [(2, False), (0, True)])
def test_training_moves_images_as_a_part_of_their_batch(
    padding: int, flip: bool, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that several processes move them as one would."""
    asked: list[tuple[Any, ...]] = []

    def spy(images: torch.Tensor, *given: Any, **how: Any) -> torch.Tensor:
        asked.append((*given, how))
        return images

    monkeypatch.setattr("utils.training.sgd.augment", spy)
    order = rng(2)
    Supervised(padding, flip, order).loss(Scalar(), tiny_data.train.images, tiny_data.train.labels)
    assert asked == [(padding, flip, order, {"is_part": True})]
