"""The loop that runs are counted with, learning rates, and ordinary training."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import utils.training.sgd
from models import Classifier
from models.userfile import Promise, weights_of
from tests.networks import classifier, conv_net
from utils.data.batches import as_float
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import PoisonedSet, unpoisoned
from utils.errors import Diverged, UserError
from utils.process import distributed
from utils.training.loop import Loop, batch_sizes
from utils.training.sgd import Schedule, Scheduler, Supervised, lr_multiplier, train_classifier
from utils.training.state import device_of


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scalar(nn.Module):
    """One weight, so that a training step is arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.ones(len(images), 3, dtype=torch.float64)


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


# --- loop ---------------------------------------------------------------------------------------


def test_rounds_count_from_one_and_report_mean_losses() -> None:
    """Three images of loss 1 and one of loss 5: (3 * 1 + 1 * 5) / 4 = 2; each round starts anew."""
    seen = []
    loop = Loop(after_round=lambda *args: seen.append(args))
    for number in loop.rounds(2, model="m"):
        loop.log(3, loss=torch.tensor(1.0 * number))
        loop.log(1, loss=torch.tensor(5.0 * number))
    assert seen == [(1, 2, {"loss": 2.0}, {"model": "m"}), (2, 2, {"loss": 4.0}, {"model": "m"})]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_means_of_many_batches_do_not_depend_on_the_type_of_the_loss(dtype: torch.dtype) -> None:
    """A sum of 60,000 losses of 2 is infinite in float16, and stands still at 512 in bfloat16."""
    loop = Loop()
    for _ in range(600):
        loop.log(100, loss=torch.tensor(2.0, dtype=dtype))
    assert loop.losses() == {"loss": 2.0}
    loop.log(60_000, loss=torch.tensor(3.0, dtype=dtype))
    assert loop.losses() == {"loss": 2.5}


def test_rounds_report_each_loss_by_its_name() -> None:
    seen = []
    loop = Loop(after_round=lambda number, total, losses, state: seen.append(losses))
    for _ in loop.rounds(1):
        loop.log(2, clean=torch.tensor(1.0), shared=torch.tensor(3.0))
        loop.log(2, clean=torch.tensor(2.0), shared=torch.tensor(5.0))
    assert seen == [{"clean": 1.5, "shared": 4.0}]


def test_a_loop_can_be_used_without_rounds_and_batches() -> None:
    """The weight of a loss is 1 then."""
    loop, weight = Loop(), torch.ones((), requires_grad=True)
    assert loop.losses() == {}
    loop.backward(3 * weight)
    assert float(weight.grad) == 3
    loop.log(2, loss=torch.tensor(5.0))
    assert loop.losses() == {"loss": 5.0}


def test_a_phase_without_rounds_has_no_losses_of_the_one_before() -> None:
    loop = Loop()
    for _ in loop.rounds(1, "search"):
        loop.log(4, loss=torch.tensor(1.0))
    assert loop.losses() == {"loss": 1.0}
    list(loop.rounds(0))
    assert loop.losses() == {}
    loop.log(2, loss=torch.tensor(3.0))
    assert loop.losses() == {"loss": 3.0}


class Box:
    """What the graph of a loss keeps of a tensor; it goes when the graph goes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_logging_keeps_no_graph() -> None:
    """A loss kept with its graph until the round ends would keep every batch in memory."""
    kept: list[weakref.ref[Box]] = []

    def pack(tensor: torch.Tensor) -> Box:
        box = Box(tensor)
        kept.append(weakref.ref(box))
        return box

    loop = Loop()
    rounds = loop.rounds(1)
    next(rounds)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = torch.ones((), requires_grad=True).square()  # keeps its input
    loop.log(1, loss=loss)
    assert [box() is None for box in kept] == [False]
    del loss
    assert [box() is None for box in kept] == [True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_round(value: float) -> None:
    finished = []
    loop = Loop(after_round=lambda number, *_: finished.append(number))

    def run() -> None:
        for number in loop.rounds(3):
            loop.log(4, clean=torch.tensor(1.0), shared=torch.tensor(1.0))
            loop.log(4, clean=torch.tensor(1.0), shared=torch.tensor([1.0, value, 1.0][number - 1]))

    message = "the loss 'shared' is not finite in round 2 of 3; give a smaller --lr, or"
    with pytest.raises(UserError, match=message):
        run()
    assert finished == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss 'loss'", "weight bias"])
def test_what_diverges_has_no_snapshot(what: str, value: float) -> None:
    """A weight may be broken before the first loss is; nothing could go on from either."""
    model, loop = nn.Linear(2, 2), Loop()
    for _ in loop.rounds(1, "warm-up", model=model, rate="--warm_lr"):
        loop.log(1, loss=torch.tensor(1.0))
        loop.snapshot()
        if what == "weight bias":
            model.bias.data[0] = value
        else:
            loop.log(1, loss=torch.tensor(value))
        message = rf"the {what} is not finite in round 1 of 1 \(warm-up\); give a smaller --warm_lr"
        with pytest.raises(Diverged, match=message):
            loop.snapshot()
        return


def test_a_snapshot_has_the_weights_that_a_record_could_have() -> None:
    """Else a run would be told only when it is resumed that it cannot be."""
    model, loop = classifier(conv_net()), Loop()
    model.promise = Promise("net.py:build", 4, weights_of(model.network, "net.py:build"))
    for _ in loop.rounds(1, model=model):
        loop.snapshot()
        model.network.bn1.num_batches_tracked = torch.tensor(0.5)
        with pytest.raises(UserError, match=r"weight bn1\.num_batches_tracked from int64 to float"):
            loop.snapshot()
        return


def test_a_loop_without_callbacks_only_counts() -> None:
    loop = Loop()
    assert (loop.phase, loop.position, loop.total) == ("", (0, 0), 0)
    assert list(loop.rounds(0, "search")) == []
    assert (loop.phase, loop.position, loop.total) == ("search", (0, 0), 0)
    assert list(loop.rounds(3)) == [1, 2, 3]
    assert [len(batch) for batch in loop.batches(6, 2, rng())] == [2, 2, 2]


@pytest.mark.parametrize(
    ("count", "size", "least", "sizes"),
    [
        (9, 4, 2, [4, 5]),
        (9, 4, 1, [4, 4, 1]),
        (10, 4, 2, [4, 4, 2]),
        (8, 4, 2, [4, 4]),
        (3, 1, 2, [1, 1, 1]),
        (1, 4, 2, [1]),
        (3, 4, 2, [3]),
    ],
)
def test_a_last_batch_of_one_image_joins_the_one_before(
    count: int, size: int, least: int, sizes: list[int]
) -> None:
    """All images come once, in the order of the permutation, whatever the batches are."""
    assert batch_sizes(count, size, least) == sizes
    batches = list(Loop().batches(count, size, rng(), least=least))
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), torch.randperm(count, generator=rng()))


def test_a_single_image_is_left_out_where_batches_have_to_be_full() -> None:
    assert [len(batch) for batch in Loop().batches(9, 4, rng(), drop_last=True)] == [4, 4]


def test_two_processes_share_a_batch_that_one_image_has_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "parallel", lambda model: model)
    parts = []
    for number in range(2):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        loop = Loop()
        loop.parallel(Scalar())
        parts.append(list(loop.batches(9, 4, rng())))
    assert [[len(own) for own in part] for part in parts] == [[2, 2], [2, 3]]
    joined = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)])
    assert torch.equal(joined, torch.randperm(9, generator=rng()))


def test_no_image_and_no_weight_to_train_are_refused() -> None:
    with pytest.raises(UserError, match="no image is left to learn from"):
        next(Loop().batches(0, 4, rng(), steps=3))
    with pytest.raises(UserError, match="no weight that may be trained; set requires_grad"):
        Loop().parallel(Scalar().requires_grad_(False))


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
def test_batches_cover_everything_once(size: int) -> None:
    batches = list(Loop().batches(10, size, rng()))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(torch.cat(batches).tolist()) == list(range(10))
    assert batches[0].dtype == torch.int64


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4]), (12, [4, 4, 4]), (3, [])])
def test_drop_last_leaves_out_a_batch_that_is_not_full(count: int, sizes: list[int]) -> None:
    batches = list(Loop().batches(count, 4, rng(), drop_last=True))
    assert [len(batch) for batch in batches] == sizes
    everything = [int(index) for batch in batches for index in batch]
    assert len(set(everything)) == sum(sizes)


def test_every_pass_has_its_own_order_which_the_generator_sets() -> None:
    """One of 100! orders comes twice by chance with no probability worth naming."""

    def passes(seed: int) -> list[list[int]]:
        source, loop = rng(seed), Loop()
        return [torch.cat(list(loop.batches(100, 30, source))).tolist() for _ in range(2)]

    first, again, other = passes(0), passes(0), passes(1)
    assert first[0] != first[1]
    assert first == again
    assert first != other


def test_batches_tell_their_number_after_each_one() -> None:
    """Ten images in fours: two whole batches and one of two, or without it two."""
    seen: list[int] = []
    loop = Loop(after_batch=seen.append)
    for done, _ in enumerate(loop.batches(10, 4, rng())):
        assert len(seen) == done
    assert seen == [3, 3, 3]
    seen.clear()
    list(loop.batches(10, 4, rng(), drop_last=True))
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("rank", "sizes", "factors"), [(0, [2, 2], [0.8, 0.8]), (1, [3, 3], [1.2, 1.2])]
)
def test_each_process_has_its_part_of_a_batch(
    rank: int, sizes: list[int], factors: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, ten images in fives: 2 and 3 of each.

    The mean over two of five counts 2/5, and half of it once gradients are averaged: 2/5 * 2.
    """
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "parallel", lambda model: model)
    loop, model = Loop(), Scalar()
    assert loop.parallel(model) is model
    assert loop.alone(model) is model
    parts, found = [], []
    for own in loop.batches(10, 5, rng()):
        parts.append(own)
        model.weight.grad = None
        loop.backward(model.weight * 1)
        found.append(float(model.weight.grad))
    assert [len(own) for own in parts] == sizes
    assert found == pytest.approx(factors)
    whole = torch.randperm(10, generator=rng()).split(5)
    for own, batch in zip(parts, whole, strict=True):
        assert own.tolist() == (batch[:2] if rank == 0 else batch[2:]).tolist()


def test_a_whole_batch_goes_to_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the step needs it; the gradient of its mean counts as it is."""
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    loop, model = Loop(), Scalar()
    batches = loop.batches(10, 5, rng(), whole=True)
    assert len(next(batches)) == 5
    loop.backward(model.weight * 1)
    assert float(model.weight.grad) == 1


def test_what_several_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without `parallel`; a last batch of one for two processes, but not a larger one."""
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "parallel", lambda model: model)
    loop = Loop()
    with pytest.raises(UserError, match="does not train data-parallel; start it without torchrun"):
        next(loop.batches(10, 5, rng()))
    loop.parallel(Scalar())
    with pytest.raises(UserError, match="the last batch has 1 of 10 images, fewer than the 2"):
        next(loop.batches(10, 3, rng(), least=1))
    assert [len(own) for own in loop.batches(10, 4, rng())] == [2, 2, 1]
    assert [len(own) for own in loop.batches(9, 4, rng(), drop_last=True)] == [2, 2]
    assert list(loop.batches(3, 4, rng(), drop_last=True)) == []


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


def test_a_plateau_of_the_training_loss_lowers_the_rate_to_a_tenth() -> None:
    """The first loss is the best; after ten epochs that are no better, the eleventh lowers it.

    So the twelfth call changes the rate, which steps never do, and eleven more change it again.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = Scheduler(optimizer, "reduce_on_plateau", epochs=30, steps_per_epoch=2)
    rates = []
    for _ in range(23):
        optimizer.step()
        scheduler.after_step()
        scheduler.after_epoch(2.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0] * 11 + [0.1] * 11 + [0.01])


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


def test_the_device_of_a_state_is_that_of_its_first_tensor() -> None:
    """In a module or a dictionary, too; what has none is passed over."""
    meta = torch.zeros(1, device="meta")
    for value in (meta, {"mask": meta}, nn.Linear(1, 1, device="meta")):
        state = {
            "order": rng(),
            "empty": {},
            "none": nn.Identity(),
            "it": value,
            "cpu": torch.ones(1),
        }
        assert device_of(state) == torch.device("meta")
    assert device_of({"order": rng()}) == torch.device("cpu")


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
