"""FT-SAM: the move and the loss by hand, and its steps against a literal transcription."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from defense import ft
from defense.ft_sam import Config, adaptive_ascent, purify, smoothed_cross_entropy
from tests.networks import TUNING, conv_net, differing, problem
from tests.tuning import Momentum
from utils.data.batches import augment
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import Scheduler


def config(**changes: Any) -> Config:
    """One round of three batches (5, 5 and 2 images) in which everything acts."""
    return Config.load(**{**TUNING, "n_rounds": 1, "random_seed": 3, **changes})


# the move of the weights


def test_the_move_by_hand() -> None:
    """w (2, 1), g (3, 4): |w| g = (6, 4), of norm sqrt(52); w^2 g = (12, 4).

    2 (12, 4) / 7.2111 = (3.3282, 1.1094), and e / |w| = (1.6641, 1.1094) has the norm 2.
    """
    w, g = torch.tensor([2.0, 1.0]).double(), torch.tensor([3.0, 4.0]).double()
    (move,) = adaptive_ascent([w], [g], 2.0)
    assert move.tolist() == pytest.approx([3.3282, 1.1094], abs=1e-4)
    assert float((move / w).norm()) == pytest.approx(2.0, rel=1e-9)
    assert w.tolist() == [2, 1]
    assert g.tolist() == [3, 4]


def test_one_norm_is_over_all_weights() -> None:
    """The same two numbers as two weights of any shapes, and of any signs: e has that of g."""
    w = [torch.tensor([[-2.0]]).double(), torch.tensor(1.0).double()]
    g = [torch.tensor([[3.0]]).double(), torch.tensor(-4.0).double()]
    moves = adaptive_ascent(w, g, 2.0)
    assert [move.shape for move in moves] == [(1, 1), ()]
    assert [float(move) for move in moves] == pytest.approx([3.3282, -1.1094], abs=1e-4)


def test_a_complex_weight_moves_along_its_gradient() -> None:
    (move,) = adaptive_ascent([torch.tensor([2j])], [torch.tensor([3 + 4j])], 5.0)
    assert move.tolist() == pytest.approx([6 + 8j])


def test_without_a_gradient_or_a_length_nothing_moves() -> None:
    w, g = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 4.0])
    assert adaptive_ascent([w], [torch.zeros(2)], 2.0)[0].tolist() == [0, 0]
    assert adaptive_ascent([torch.zeros(2)], [g], 2.0)[0].tolist() == [0, 0]
    assert adaptive_ascent([w], [g], 0.0)[0].tolist() == [0, 0]


def test_each_weight_has_a_gradient() -> None:
    w, g = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 4.0])
    for weights, gradients in (([w, w], [g]), ([w], [g, g])):
        with pytest.raises(ValueError, match="zip"):
            adaptive_ascent(weights, gradients, 2.0)


# the loss


def test_the_smoothed_loss_of_equal_logits() -> None:
    """Ten classes, 0.1: 0.9 ln 0.9 + 0.1 ln(0.1 / 9) + ln 10 = 1.757780.

    torch's own smoothing, and without the target's entropy, gives ln 10 = 2.302585.
    """
    logits, labels = torch.zeros(4, 10, dtype=torch.float64), torch.tensor([0, 3, 9, 3])
    found = smoothed_cross_entropy(logits, labels, 0.1)
    assert float(found) == pytest.approx(1.757780, abs=1e-6)
    by_hand = 0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 9) + math.log(10)
    assert float(found) == pytest.approx(by_hand, rel=1e-12)


def test_the_smoothed_loss_by_hand() -> None:
    """Softmax (1/2, 1/4, 1/4), label 0, smoothing 0.2: target (0.8, 0.1, 0.1); mean with label 1.

    KL is 0.8 ln(0.8 / 0.5) + 0.2 ln(0.1 / 0.25), and for label 1
    0.1 ln(0.1 / 0.5) + 0.8 ln(0.8 / 0.25) + 0.1 ln(0.1 / 0.25).
    """
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 2, dtype=torch.float64).log() + 3
    first = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    second = 0.1 * math.log(0.2) + 0.8 * math.log(3.2) + 0.1 * math.log(0.4)
    for labels, expected in (([0, 0], first), ([1, 1], second), ([0, 1], (first + second) / 2)):
        found = smoothed_cross_entropy(logits, torch.tensor(labels), 0.2)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_smoothed_loss_is_0_where_the_softmax_is_the_target() -> None:
    logits = torch.tensor([[0.05, 0.9, 0.05]], dtype=torch.float64).log().requires_grad_()
    loss = smoothed_cross_entropy(logits, torch.tensor([1]), 0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


def test_without_smoothing_the_loss_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    found = smoothed_cross_entropy(logits, labels, 0.0)
    assert torch.equal(found, nn.functional.cross_entropy(logits, labels))


# the schedule


def test_the_published_schedule_goes_down_and_up_every_200_steps() -> None:
    """0.005 (1 + cos(pi t / 100)): 2.467e-6 at 99, 0 at 100, 0.01 at 200, whatever the rounds."""
    assert Config.load().lr_scheduler == "cosine_100_steps"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = Scheduler(optimizer, "cosine_100_steps", epochs=3, steps_per_epoch=7)
    rates = []
    for _ in range(201):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.after_step()
    assert rates[0] == 0.01
    assert rates[50] == pytest.approx(0.005)
    assert rates[99] == pytest.approx(2.467e-6, rel=1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[150] == pytest.approx(0.005)
    assert rates[200] == pytest.approx(0.01)


# the whole defense


def literal_tuning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """The four points of a batch written out, on a copy for the second gradient.

    Decay and momentum act on the weights as they were, the rate is that of a cosine of 100 steps.
    """
    model = copy.deepcopy(model).train()
    sgd = Momentum(model.parameters(), config.sgd_momentum, config.wd)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation")
    step = 0

    def gradients(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        logits = network(x)
        target = torch.full_like(logits, config.label_smoothing / (logits.shape[1] - 1))
        target[torch.arange(len(y)), y] = 1 - config.label_smoothing
        logarithms = logits - logits.logsumexp(1, keepdim=True)
        loss = (target * (target.log() - logarithms)).sum(1).mean()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    for _ in range(config.n_rounds):
        shuffled = torch.randperm(len(images), generator=order)
        for first in range(0, len(images), config.batch_size):
            index = shuffled[first : first + config.batch_size]
            x = augment(images[index], config.crop_padding, config.flip, crops)
            away = copy.deepcopy(model)
            here = gradients(model, x, labels[index])  # moves the model's statistics, once
            length = sum(
                (w.detach().abs() * g).square().sum()
                for w, g in zip(model.parameters(), here, strict=True)
            ).sqrt()
            for w, g in zip(away.parameters(), here, strict=True):
                w.data += config.rho * w.data**2 * g / (length + 1e-12)
            there = gradients(away, x, labels[index])
            rate = config.lr * (1 + math.cos(math.pi * step / 100)) / 2
            sgd.step(there, rate)
            step += 1
    return model


@pytest.mark.parametrize("rounds", [1, 3])
def test_fine_tuning_follows_the_literal_procedure(rounds: int) -> None:
    """Three steps, and nine, with momentum, decay and augmentation; statistics, too."""
    network = conv_net()
    images, labels = problem()
    flags = config(n_rounds=rounds)
    found = purify(network, images, labels, flags).state_dict()
    expected = literal_tuning(network, images, labels, flags).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-10), name
        assert not torch.equal(found[name], network.state_dict()[name]), name


@pytest.mark.parametrize(
    "change", [{"rho": 0.0}, {"rho": 1.0}, {"label_smoothing": 0.0}, {"label_smoothing": 0.3}]
)
def test_each_flag_of_its_own_acts(change: dict[str, float]) -> None:
    """All weights move otherwise, those of BatchNorm and the biases among them."""
    network = conv_net()
    usual = purify(network, *problem(), config())
    other = purify(network, *problem(), config(**change))
    names = [name for name, _ in network.named_parameters()]
    assert set(names) <= set(differing(usual.state_dict(), other.state_dict()))


@pytest.mark.parametrize("schedule", ["cosine", "cosine_100_steps", "one_cycle"])
def test_without_a_move_and_smoothing_it_is_fine_tuning_bit_for_bit(schedule: str) -> None:
    network = conv_net()
    images, labels = problem()
    flags = {"n_rounds": 3, "batch_size": 5, "lr": 0.05, "wd": 0.01, "lr_scheduler": schedule}
    found = purify(network, images, labels, Config.load(rho=0.0, label_smoothing=0.0, **flags))
    expected = ft.purify(network, images, labels, ft.Config.load(**flags))
    assert differing(found.state_dict(), expected.state_dict()) == []


def one_batch(**changes: Any) -> Config:
    """A single step on all images as they are."""
    values = {"n_rounds": 1, "batch_size": 12, "crop_padding": 0, "flip": False}
    return Config.load(**{**values, **changes})


def test_statistics_after_a_step_are_those_of_one_plain_pass() -> None:
    """Before the move; its own pass uses the batch's statistics and keeps none."""
    network = conv_net()
    images, labels = problem()
    found = purify(network, images, labels, one_batch())
    plain = copy.deepcopy(network).train()
    order = torch.randperm(12, generator=generator(0, "batches"))
    with torch.no_grad():
        plain(augment(images[order], 0, flip=False))
    for name, buffer in plain.named_buffers():
        assert torch.equal(found.state_dict()[name], buffer), name
    assert int(found.bn1.num_batches_tracked) == 1


def test_weights_are_put_back_exactly() -> None:
    """A step that is too small to change any weight leaves them bit for bit where they were.

    w + e - e would not: rounding changes most of them.
    """
    network = conv_net()
    images, labels = problem()
    found = purify(network, images, labels, one_batch(lr=1e-30, wd=0.0, n_rounds=3))
    weights = dict(network.named_parameters())
    assert differing(dict(found.named_parameters()), weights) == []


def test_the_gradient_of_a_step_is_that_beyond_the_move() -> None:
    """One weight w = 2 of logits (w, 0), label 1: dCE/dw = s(w) = 0.8808.

    e = rho w^2 g / |w g| = 4, so the step takes s(6) = 0.9975: w becomes 2 - 0.1 * 0.9975.
    """

    class OneWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logit = self.weight * torch.ones(len(images), dtype=torch.float64)
            return torch.stack([logit, torch.zeros_like(logit)], dim=1)

    flags = one_batch(rho=2.0, lr=0.1, wd=0.0, label_smoothing=0.0)
    found = purify(OneWeight(), problem()[0], torch.ones(12, dtype=torch.int64), flags)
    expected = 2 - 0.1 / (1 + math.exp(-6))
    assert found.weight.item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_that_is_logged_is_that_of_the_first_pass() -> None:
    network = conv_net()
    images, labels = problem()
    rows: list[dict[str, float]] = []
    loop = Loop(lambda number, total, losses, state: rows.append(losses))
    purify(network, images, labels, one_batch(), loop)
    order = torch.randperm(12, generator=generator(0, "batches"))
    logits = copy.deepcopy(network).train()(images[order])
    expected = smoothed_cross_entropy(logits, labels[order], 0.1)
    assert rows == [{"loss": pytest.approx(expected.item(), rel=1e-12)}]


def test_frozen_and_unused_weights_stay() -> None:
    """The unused one has no gradient, so the move of the others does without it."""
    network = conv_net()
    network.unused = nn.Linear(2, 2).double()
    network.conv1.weight.requires_grad_(False)
    found = purify(network, *problem(), config())
    assert torch.equal(found.conv1.weight, network.conv1.weight)
    assert not found.conv1.weight.requires_grad
    assert torch.equal(found.unused.weight, network.unused.weight)
    assert not torch.equal(found.conv2.weight, network.conv2.weight)


def test_no_rounds_change_nothing() -> None:
    network = conv_net()
    found = purify(network, *problem(), config(n_rounds=0))
    assert differing(found.state_dict(), network.state_dict()) == []
