"""The loop that runs are counted with."""

import math
import weakref

import pytest
import torch
from torch import nn

from models.userfile import Promise, weights_of
from tests.networks import Scalar, classifier, conv_net
from utils.errors import Diverged, UserError
from utils.process import distributed
from utils.training.loop import Loop, batch_sizes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
