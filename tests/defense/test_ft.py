"""Fine-tuning against a literal transcription, and the recipe that other defenses share."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import ft
from tests.networks import TUNING, ConvNet, conv_net, differing, problem
from tests.tuning import Momentum
from utils.data.batches import augment
from utils.process.seeds import generator
from utils.training import sgd
from utils.training.loop import Loop
from utils.training.sgd import fine_tune


def config(**changes: Any) -> ft.Config:
    """Three rounds of three batches (5, 5 and 2 images) in which everything acts."""
    return ft.Config.load(**{**TUNING, "random_seed": 3, **changes})


def learning_rates(schedule: str, rounds: int, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step, in the words of `utils.training.sgd`."""
    return {
        "constant": lambda step: 1.0,
        "cosine": lambda step: (1 + math.cos(math.pi * (step // steps) / rounds)) / 2,
        "cosine_100": lambda step: (1 + math.cos(math.pi * (step // steps) / 100)) / 2,
        "cosine_100_steps": lambda step: (1 + math.cos(math.pi * step / 100)) / 2,
        "one_cycle": lambda step: (
            0.1 + 0.9 * (step / (rounds * steps)) / 0.25
            if step / (rounds * steps) < 0.25
            else (1 - step / (rounds * steps)) / 0.75
        ),
    }[schedule]


def literal_tuning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: ft.Config
) -> nn.Module:
    """Decay, momentum, step; train mode; each round a new order."""
    model = copy.deepcopy(model).train()
    weights = list(model.parameters())
    sgd = Momentum(weights, config.sgd_momentum, config.wd)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation")
    steps = math.ceil(len(images) / config.batch_size)
    factor = learning_rates(config.lr_scheduler, config.n_rounds, steps)
    step = 0
    for _ in range(config.n_rounds):
        shuffled = torch.randperm(len(images), generator=order)
        for first in range(0, len(images), config.batch_size):
            index = shuffled[first : first + config.batch_size]
            batch = augment(images[index], config.crop_padding, config.flip, crops)
            gradients = torch.autograd.grad(F.cross_entropy(model(batch), labels[index]), weights)
            sgd.step(gradients, config.lr * factor(step))
            step += 1
    return model


@pytest.mark.parametrize(
    "schedule", ["constant", "cosine", "cosine_100", "cosine_100_steps", "one_cycle"]
)
def test_fine_tuning_follows_the_literal_procedure(schedule: str) -> None:
    """Bit for bit, BatchNorm's buffers too; each ingredient alone would show (next test)."""
    network = conv_net()
    images, labels = problem()
    flags = config(lr_scheduler=schedule)
    tuned = ft.purify(network, images, labels, flags)
    expected = literal_tuning(network, images, labels, flags)
    assert differing(tuned.state_dict(), expected.state_dict()) == []
    assert len(differing(tuned.state_dict(), network.state_dict())) == len(network.state_dict())


@cache
def usual_state() -> dict[str, torch.Tensor]:
    return ft.purify(conv_net(), *problem(), config()).state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"sgd_momentum": 0.0},
        {"wd": 0.0},
        {"crop_padding": 0},
        {"flip": False},
        {"lr_scheduler": "constant"},
        {"lr": 0.01},
        {"batch_size": 6},
        {"random_seed": 1},
        {"n_rounds": 2},
    ],
)
def test_each_ingredient_moves_the_weights(change: dict[str, Any]) -> None:
    """So that the transcription notices the lack of any."""
    other = ft.purify(conv_net(), *problem(), config(**change)).state_dict()
    moved = differing(usual_state(), other)
    assert {"conv1.weight", "bn1.weight", "bn2.bias", "linear.bias"} <= set(moved)


def on_a_plateau(rounds: int) -> ft.Config:
    """Steps of 1e-7 times the gradient, on all images as they are."""
    return config(
        lr_scheduler="reduce_on_plateau",
        n_rounds=rounds,
        lr=1e-7,
        **{"batch_size": 12, "sgd_momentum": 0.0, "wd": 0.0, "crop_padding": 0, "flip": False},
    )


def test_a_plateau_lowers_the_rate_after_eleven_bad_rounds() -> None:
    """A step of 1e-7 does not lower the loss by a ten-thousandth of itself.

    Round 1 sets the mark, 2 to 12 are eleven bad ones, so round 13 goes at a tenth: without
    momentum and decay it moves the weights a tenth as far as round 12 did.
    """
    network = conv_net()
    images, labels = problem()
    weights = []
    for rounds in (11, 12, 13):
        flags = on_a_plateau(rounds)
        weights.append(ft.purify(network, images, labels, flags).linear.weight)
    twelfth, thirteenth = weights[1] - weights[0], weights[2] - weights[1]
    assert torch.allclose(thirteenth, twelfth / 10, rtol=1e-3, atol=1e-15)
    assert bool(twelfth.abs().max() > 1e-8)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "reduce_on_plateau"])
def test_no_rounds_change_nothing(schedule: str) -> None:
    network = conv_net()
    images, labels = problem()
    tuned = ft.purify(network, images, labels, config(n_rounds=0, lr_scheduler=schedule))
    assert differing(tuned.state_dict(), network.state_dict()) == []


def test_uint8_images_are_taken_as_floats() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    network = conv_net().float()
    labels = problem()[1]
    from_bytes = ft.purify(network, images, labels, config()).state_dict()
    from_floats = ft.purify(network, images.float() / 255, labels, config()).state_dict()
    assert all(
        torch.allclose(from_bytes[name], from_floats[name], atol=1e-6) for name in from_bytes
    )


# the recipe that other defenses share


def shared(
    network: ConvNet, flags: ft.Config, loop: Loop | None = None, **hooks: Any
) -> dict[str, torch.Tensor]:
    """The state after `fine_tune`."""
    model = copy.deepcopy(network)
    fine_tune(model, *problem(), flags, loop or Loop(), **hooks)
    assert not any(module.training for module in model.modules())
    return model.state_dict()


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "reduce_on_plateau"])
def test_the_shared_recipe_is_fine_tuning_bit_for_bit(schedule: str) -> None:
    network, flags = conv_net(), config(lr_scheduler=schedule)
    expected = ft.purify(network, *problem(), flags).state_dict()
    assert differing(shared(network, flags), expected) == []


def test_the_shared_recipe_follows_a_plateau_too() -> None:
    """Round 13 goes at a tenth, as above, so its weights are another 13th round's."""
    network, flags = conv_net(), on_a_plateau(13)
    expected = ft.purify(network, *problem(), flags).state_dict()
    assert differing(shared(network, flags), expected) == []


def test_the_shared_recipe_logs_the_losses_of_fine_tuning() -> None:
    rows: list[list[tuple[int, int, dict[str, float]]]] = [[], []]
    for kept, run in zip(rows, (ft.purify, None), strict=True):
        loop = Loop(
            lambda number, total, losses, _, kept=kept: kept.append((number, total, losses))
        )
        if run:
            run(conv_net(), *problem(), config(), loop)
        else:
            shared(conv_net(), config(), loop)
    assert rows[0] == rows[1]
    assert [row[:2] for row in rows[0]] == [(1, 3), (2, 3), (3, 3)]


def test_a_hook_makes_the_loss() -> None:
    """Half the cross-entropy without decay and momentum is half the learning rate."""
    network = conv_net()
    plain = {"wd": 0.0, "sgd_momentum": 0.0}
    found = shared(network, config(**plain), loss=lambda z, y: F.cross_entropy(z, y) / 2)
    expected = shared(network, config(**plain, lr=0.025))
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-12), name


def test_a_hook_leaves_the_gradient() -> None:
    """Given what computes the loss, it may call it again; gradients that it adds up count twice."""
    network = conv_net()
    calls = []

    def twice(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        values = [compute(), compute()]
        calls.append(values)
        torch.stack(values).sum().backward()
        return values[0]

    plain = {"wd": 0.0, "sgd_momentum": 0.0}
    found = shared(network, config(**plain), gradient=twice)
    expected = shared(network, config(**plain, lr=0.1))
    assert len(calls) == 9
    assert all(torch.equal(*values) for values in calls)  # the same images
    for name in ("conv1.weight", "bn1.bias", "linear.weight"):
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-12), name
    assert int(found["bn1.num_batches_tracked"]) == 18


def test_a_hook_is_called_after_each_step() -> None:
    """After it: a weight that it holds stays where it is, against momentum and decay."""
    network = conv_net()
    model = copy.deepcopy(network)
    calls = []

    @torch.no_grad()
    def hold() -> None:
        calls.append(float(model.linear.bias[0]))
        model.linear.bias[0] = 7.0

    fine_tune(model, *problem(), config(), Loop(), after_step=hold)
    assert len(calls) == 9
    assert calls[0] != network.linear.bias[0].item()
    assert all(value != 7.0 for value in calls)
    assert model.linear.bias[0].item() == 7.0


def test_a_phase_has_its_own_name_and_number_of_rounds() -> None:
    """Its schedule ends with its own rounds; `n_rounds` of the flags is not read."""
    network = conv_net()
    seen = []
    loop = Loop(lambda number, total, losses, _: seen.append((loop.phase, number, total)))
    found = shared(network, config(n_rounds=7), loop, phase="teacher", rounds=2)
    assert seen == [("teacher", 1, 2), ("teacher", 2, 2)]
    assert differing(found, shared(network, config(n_rounds=2))) == []


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_phase_without_rounds_changes_nothing(schedule: str) -> None:
    network = conv_net()
    found = shared(network, config(lr_scheduler=schedule), phase="teacher", rounds=0)
    assert differing(found, network.state_dict()) == []


def test_a_frozen_weight_stays() -> None:
    network = conv_net()
    network.conv1.weight.requires_grad_(False)
    found = shared(network, config())
    assert torch.equal(found["conv1.weight"], network.conv1.weight)
    assert not torch.equal(found["conv2.weight"], network.conv2.weight)


def test_images_are_moved_as_a_part_of_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several processes move them as one would; see `test_data.py` for the rest."""
    asked: list[Any] = []

    def spy(*given: Any, **how: Any) -> torch.Tensor:
        asked.append(how)
        return augment(*given, **how)

    for module in (ft, sgd):
        monkeypatch.setattr(module, "augment", spy)
    ft.purify(conv_net(), *problem(), config(n_rounds=1))
    shared(conv_net(), config(n_rounds=1))
    assert asked == [{"is_part": True}] * 6


class Blind(Loop):
    """A loop that does not ask for the value of a loss, which a meta tensor does not have."""

    def losses(self) -> dict[str, float]:
        return {"loss": 0.0}


def test_batches_go_to_where_the_model_is() -> None:
    """On the device `meta` there are shapes alone, and mixing it with another one is an error."""
    unchecked = ft.purify.__wrapped__
    model = unchecked(conv_net().to("meta"), *problem(), config(), Blind())
    assert all(value.is_meta for value in model.state_dict().values())
    assert all(value.is_meta for value in shared(conv_net().to("meta"), config(), Blind()).values())
