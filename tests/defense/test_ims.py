"""IMS: factors, agreements and perturbations by hand; the whole against a literal transcription."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from defense import ims
from defense.ims import (
    Config,
    agreement,
    disagreement,
    factors,
    mask_loss,
    perturbation,
    purify,
    stalls,
)
from tests.networks import ConvNet, conv_net, differing, problem
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {"stage1_steps": 4, "n_rounds": 4, "inner_steps": 3, "batch_size": 8}
    values |= {"lr": 0.2, "lmd": 0.01, "adv_lr": 0.01, "random_seed": 3}
    return Config.load(**{**values, **changes})


# factors


def test_the_factors_by_hand() -> None:
    """sigmoid(10) = 0.9999546, sigmoid(-10) = 0.0000454, sigmoid(0) = 1/2."""
    a = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0]).double()
    s = torch.tensor([0.0, 0.0, 0.0, 0.4, 0.3]).double()
    expected = [0.9999546, 0.0000454, 0.5, 0.7, 0.3000318]
    assert factors(a, s).tolist() == pytest.approx(expected, abs=1e-7)


def test_at_the_start_the_mask_and_its_inverse_are_the_network() -> None:
    """s is 1: the factor is 1 whatever a is."""
    a = torch.tensor([1.0, 0.0, 0.3]).double()
    assert factors(a, torch.ones(3).double()).tolist() == pytest.approx([1, 1, 1], abs=1e-15)


# agreement


def logits(*rows: tuple[float, float]) -> torch.Tensor:
    """Of these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log() + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agreement_in_half_precision_is_that_of_the_same_logits(dtype: torch.dtype) -> None:
    """1e-8 is 0 in float16, and 1 - 1e-8 is 1 in both."""
    logits = torch.tensor([[30.0, 0, -5], [0.5, 0.25, 0]], dtype=dtype)
    other = logits.flip(1)
    for pair in ((logits, other), (logits, logits)):
        for function in (agreement, disagreement):
            found, expected = function(*pair), function(*(x.float() for x in pair))
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)


def test_masks_are_learned_with_all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 0.001 from 1 is none in bfloat16."""
    seen = set()

    def spied(a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        seen.add(a.dtype)
        return factors(a, s)

    monkeypatch.setattr(ims, "factors", spied)
    images, labels = problem()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        seen.clear()
        purify(conv_net().to(dtype), images.to(dtype), labels, Config.load(n_rounds=1, lr=1e-3))
        assert seen == {expected}


def test_agreement_and_disagreement_by_hand() -> None:
    """(1/2, 1/2) . (1/4, 3/4) = 1/2, (0.9, 0.1) . (0.2, 0.8) = 0.26, image by image."""
    one, other = logits((0.5, 0.5), (0.9, 0.1)), logits((0.25, 0.75), (0.2, 0.8))
    expected = [-math.log(0.5), -math.log(0.26)]
    assert agreement(one, other).tolist() == pytest.approx(expected, abs=1e-7)
    expected = [-math.log(0.5), -math.log(0.74)]
    assert disagreement(one, other).tolist() == pytest.approx(expected, abs=1e-7)


def test_sure_predictions_have_finite_losses() -> None:
    """-ln 1e-8 = 18.42068, in single precision, too."""
    sure = torch.tensor([[100.0, 0.0]])
    assert float(agreement(sure, sure.flip(1))) == pytest.approx(18.42068, abs=1e-4)
    assert float(disagreement(sure, sure)) == pytest.approx(18.42068, abs=1e-4)


# perturbations


class Brightness(nn.Module):
    """Logits (k times the mean of an image, 0)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.factor * images.mean(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def perturbed(values: tuple[float, ...], **flags: Any) -> list[float]:
    """The value of each image's perturbation; network and inverse prefer class 0, by brightness."""
    delta = perturbation(Brightness(3.0), Brightness(3.0), grey(*values), config(**flags))
    assert not delta.requires_grad
    assert torch.equal(delta, delta[:, :1, :1, :1].expand_as(delta))
    return delta[:, 0, 0, 0].tolist()


def test_a_step_of_adam_is_as_long_as_its_learning_rate() -> None:
    """Both losses fall where a bright image, sure of class 0, becomes dark."""
    assert perturbed((1.0,), inner_steps=1, adv_lr=0.01) == pytest.approx([-0.01], abs=1e-6)
    expected = [-0.01 * (1 - 0.01 * 0.01) - 0.01]  # torch's decay of 0.01
    found = perturbed((1.0,), inner_steps=2, adv_lr=0.01)
    assert found == pytest.approx(expected, abs=2e-4)
    assert perturbed((1.0,), inner_steps=0) == [0]


def test_each_image_is_perturbed_by_itself() -> None:
    """The same beside another image as alone."""
    both = perturbed((1.0, 0.4), inner_steps=5)
    alone = perturbed((1.0,), inner_steps=5) + perturbed((0.4,), inner_steps=5)
    assert both == pytest.approx(alone, abs=1e-12)


def test_a_perturbation_is_clamped_after_each_step() -> None:
    assert perturbed((1.0,), inner_steps=3, adv_lr=0.5, trigger_norm=0.3) == [-0.3]


def test_a_perturbation_brings_inverse_and_network_together_away_from_the_clean_label() -> None:
    network, inverse = conv_net(), conv_net(1)
    images, _ = problem()

    def loss(delta: torch.Tensor) -> float:
        moved = network(images + delta)
        apart = disagreement(moved, network(images))
        return float((agreement(inverse(images + delta), moved) + apart).mean().detach())

    delta = perturbation(network, inverse, images, config(inner_steps=20))
    assert loss(delta) < loss(torch.zeros_like(delta))
    assert all(weight.grad is None for weight in network.parameters())


# the loss of the masks


def test_the_loss_of_both_stages_by_hand() -> None:
    """x = 1 and d = -3, all by brightness: network 1, masked 2, inverse 0.5 times the mean.

    p . r of logits (u, 0) and (v, 0) is s(u) s(v) + s(-u) s(-v), s the logistic function.
    """

    def dot(u: float, v: float) -> float:
        p, r = 1 / (1 + math.exp(-u)), 1 / (1 + math.exp(-v))
        return p * r + (1 - p) * (1 - r)

    networks = [Brightness(k) for k in (1.0, 2.0, 0.5)]
    first = -math.log(dot(2, 1)) - math.log(1 - dot(0.5, 1))
    found = mask_loss(*networks, grey(1.0), None)
    assert found.item() == pytest.approx(first, abs=1e-6)
    second = first - math.log(dot(-4, 1)) - math.log(dot(-1, -2)) - math.log(1 - dot(-1, 1))
    found = mask_loss(*networks, grey(1.0), grey(-3.0))
    assert found.item() == pytest.approx(second, abs=1e-6)
    found.backward()
    assert networks[0].factor.grad is None


def test_a_stage_ends_after_so_many_steps_without_two_percent() -> None:
    """10, then 9.81 and 9.80 are no improvement of 10; 9.79 is, and counts from there."""
    search = {"best": torch.tensor(math.inf).double(), "stall": torch.tensor(0)}
    ends = [stalls(search, loss, 3) for loss in (10, 9.81, 9.80, 9.79, 9.7, 9.6, 9.595, 5)]
    assert ends == [False, False, False, False, False, False, True, False]


# the whole defense


@contextmanager
def hooked(network: ConvNet, side: torch.Tensor, s: torch.Tensor) -> Iterator[None]:
    """Inside, the outputs of both convolutions are multiplied by their factors."""
    q = 1 / (1 + (-20 * (side - 0.5)).exp())
    whole = q + s * (1 - q)
    hooks = [
        layer.register_forward_hook(lambda _, __, y, k=k: y * k.view(1, -1, 1, 1))
        for layer, k in zip((network.conv1, network.conv2), whole.split([6, 8]), strict=True)
    ]
    yield
    for hook in hooks:
        hook.remove()


def literal_masks(
    network: ConvNet, images: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both stages written out, with hooks in the place of changed weights."""
    a, s = (torch.ones(14, dtype=torch.float64).requires_grad_() for _ in range(2))
    order = generator(config.random_seed, "batches")

    def called(x: torch.Tensor, side: torch.Tensor | None = None) -> torch.Tensor:
        if side is None:
            return network(x).softmax(1)
        with hooked(network, side, s):
            return network(x).softmax(1)

    def agree(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return -((p * r).sum(1) + 1e-8).log()

    def apart(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return -(1 - (p * r).sum(1) + 1e-8).log()

    for stage, steps in ((1, config.stage1_steps), (2, config.n_rounds)):
        optimizer = torch.optim.AdamW([a, s], lr=config.lr)
        for _ in range(steps):
            x = images[torch.randint(len(images), (1, config.batch_size), generator=order)[0]]
            clean = called(x).detach()
            d = torch.zeros_like(x).requires_grad_()
            inner = torch.optim.AdamW([d], lr=config.adv_lr)
            for _ in range(config.inner_steps if stage == 2 else 0):
                loss = agree(called(x + d, 1 - a), called(x + d)) + apart(called(x + d), clean)
                d.grad = torch.autograd.grad(loss.sum(), d)[0]
                inner.step()
                d.data.clamp_(-config.trigger_norm, config.trigger_norm)
            moved = (x + d).detach()
            loss = agree(called(x, a), clean) + apart(called(x, 1 - a), clean)
            if stage == 2:
                loss = loss + agree(called(moved, a), clean)
                loss = loss + agree(called(moved, 1 - a), called(moved).detach())
                loss = loss + apart(called(moved, 1 - a), clean)
            total = loss.mean() + config.lmd * (1 - s).abs().mean()
            a.grad, s.grad = torch.autograd.grad(total, (a, s))
            optimizer.step()
            a.data.clamp_(0, 1)
            s.data.clamp_(0, 1)
    return a.detach(), s.detach()


@pytest.mark.parametrize(
    "changes", [{}, {"trigger_norm": 0.02}, {"stage1_steps": 0, "lmd": 0.0}, {"lmd": 0.05}]
)
def test_the_result_follows_the_literal_procedure(changes: dict[str, float]) -> None:
    """Its convolutions are multiplied by the factors; all else is bit for bit the model's."""
    network, (images, labels), flags = conv_net(), problem(), config(**changes)
    result = purify(network, images, labels, flags)
    a, s = literal_masks(copy.deepcopy(network), images, flags)
    expected = copy.deepcopy(network)
    with hooked(expected, a, s), torch.no_grad():
        assert torch.allclose(result(images), expected(images), rtol=0, atol=1e-10)
    changed = differing(result.state_dict(), network.state_dict())
    assert changed
    assert {*changed} <= {"conv1.weight", "conv2.weight"}
    assert float(a.min()) < 0.999
    assert float(s.min()) < 1


def test_biases_are_scaled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias outside of the factor would not be what the hooked network adds."""
    network = conv_net()
    network.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 6).double())
    monkeypatch.setattr(ims, "factors", lambda a, s: 0.5 + 0 * a * s)
    result = purify(network, *problem(), config())
    assert torch.equal(result.conv1.bias, network.conv1.bias / 2)
    assert torch.equal(result.conv1.weight, network.conv1.weight / 2)


def test_factors_of_one_give_the_model_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ims, "factors", lambda a, s: 1 + 0 * a * s)
    network = conv_net()
    result = purify(network, *problem(), config())
    assert differing(result.state_dict(), network.state_dict()) == []


def test_labels_are_not_read() -> None:
    network, (images, labels) = conv_net(), problem()
    one, other = (purify(network, images, y, config()) for y in (labels, (labels + 1) % 4))
    assert differing(one.state_dict(), other.state_dict()) == []


def test_a_stage_may_end_early_and_the_next_one_begins() -> None:
    """Patience 1 and a learning rate that hardly moves: the second step is no better."""
    rounds: list[tuple[str, int, int]] = []
    loop = Loop(lambda number, total, losses, state: rounds.append((loop.phase, number, total)))
    purify(conv_net(), *problem(), config(lr=1e-9, patience=1, batch_size=2000), loop)
    assert rounds == [("stage 1", 1, 4), ("stage 1", 2, 4), ("", 1, 4), ("", 2, 4)]


def test_it_says_how_many_channels_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14, those with a factor below a half."""
    values = torch.tensor([0.49, 0.5, 0.1, *[1.0] * 11]).double()
    monkeypatch.setattr(ims, "factors", lambda a, s: values + 0 * a * s)
    loop = Loop()
    purify(conv_net(), *problem(), config(), loop)
    assert loop.findings.facts == {"channels": 14, "masked_channels": 2}


def test_published_values_are_the_default() -> None:
    flags = Config.load("cifar10")
    assert (flags.stage1_steps, flags.n_rounds, flags.batch_size) == (100, 200, 256)
    assert (flags.lr, flags.lmd, flags.patience) == (0.02, 10.0, 25)
    assert (flags.inner_steps, flags.adv_lr, flags.trigger_norm) == (20, 1e-3, 1.0)


def test_no_rounds_change_nothing() -> None:
    network, loop = conv_net(), Loop()
    result = purify(network, *problem(), config(n_rounds=0), loop)
    assert differing(result.state_dict(), network.state_dict()) == []
    assert loop.phase == ""


def test_a_network_without_a_convolution_is_told_in_a_line() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    with pytest.raises(UserError, match=r"^[^\n]*Conv2d[^\n]*has none[^\n]*$"):
        purify(network, *problem(), config())
