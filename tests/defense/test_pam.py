"""PAM: the shift by hand, and the whole against a literal transcription."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.pam import Config, purify, towards
from models.modes import moved
from tests.inversions import TWICE, Step, literal
from tests.networks import ConvNet, conv_net, differing, problem
from tests.tuning import Momentum
from utils.training.loop import Loop


def config(**changes: Any) -> Config:
    """Everything twice, in batches of 5, 5 and 2 images."""
    return Config.load(**{**TWICE, "lr": 0.01, **changes})


# the shift


def test_the_shift_by_hand() -> None:
    """r - w = (3, 4), of norm 5; rho 0.5: (0.3, 0.4). w' is on the line to r, 0.5 away from w."""
    w, r = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 2.0]).double()
    (shift,) = towards([w], [r], 0.5)
    assert shift.tolist() == pytest.approx([0.3, 0.4], abs=1e-12)
    assert float((w + shift - r).norm()) == pytest.approx(4.5, abs=1e-12)


def test_one_norm_is_over_all_weights() -> None:
    """The same two numbers as two weights of any shapes; it may reach beyond r."""
    w = [torch.tensor([[1.0]]).double(), torch.tensor(-2.0).double()]
    r = [torch.tensor([[4.0]]).double(), torch.tensor(2.0).double()]
    shifts = towards(w, r, 10.0)
    assert [shift.shape for shift in shifts] == [(1, 1), ()]
    assert [float(shift) for shift in shifts] == pytest.approx([6.0, 8.0], abs=1e-12)


def test_at_the_backdoored_weights_and_without_rho_there_is_no_shift() -> None:
    w, r = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])
    assert towards([w], [w.clone()], 0.5)[0].tolist() == [0, 0]
    assert towards([w], [r], 0.0)[0].tolist() == [0, 0]


def test_each_weight_has_a_reference() -> None:
    w = torch.tensor([1.0, 2.0])
    for weights, references in (([w, w], [w]), ([w], [w, w])):
        with pytest.raises(ValueError, match="zip"):
            towards(weights, references, 0.5)


def test_moved_weights_are_put_back_exactly() -> None:
    """0.1 + 1e9 - 1e9 would not be 0.1; also after an error."""
    weight = nn.Parameter(torch.tensor([0.1]))
    with moved([weight], [torch.tensor([1e9])]):
        assert weight.item() == 1e9
    assert torch.equal(weight.data, torch.tensor([0.1]))
    with pytest.raises(ZeroDivisionError), moved([weight], [torch.tensor([1e9])]):
        raise ZeroDivisionError
    assert torch.equal(weight.data, torch.tensor([0.1]))
    assert weight.grad is None
    with pytest.raises(ValueError, match="zip"), moved([weight], []):
        pass


# the whole defense


def literal_step(flags: Config, start: ConvNet, rho: float) -> Any:
    """Makes steps that take the gradient on a shifted copy, whose statistics are carried back."""

    def make_step(model: ConvNet) -> Step:
        sgd = Momentum(model.parameters(), flags.sgd_momentum)

        def step(model: ConvNet, x: torch.Tensor, mixed: torch.Tensor, y: torch.Tensor) -> None:
            away = copy.deepcopy(model)
            pairs = list(zip(away.parameters(), start.parameters(), strict=True))
            norm = sum((r.data - w.data).square().sum() for w, r in pairs).sqrt()
            for w, r in pairs:
                if norm > 0:
                    w.data += rho * (r.data - w.data) / norm
            F.cross_entropy(away(mixed), y).backward()
            for one, other in zip(model.buffers(), away.buffers(), strict=True):
                one.copy_(other)
            sgd.step([weight.grad for weight in away.parameters()], flags.lr)

        return step

    return make_step


@pytest.mark.parametrize("rho", [0.0, 0.5, 3.0])
def test_the_defense_follows_the_literal_procedure(rho: float) -> None:
    """With rho 0 it is plain tuning. Weights and statistics, and the label."""
    network, (images, labels), flags, loop = conv_net(), problem(), config(rho=rho), Loop()
    result = purify(network, images, labels, flags, loop)
    step = literal_step(flags, copy.deepcopy(network), rho)
    expected, _, target = literal(network, images, labels, flags, step)
    for name, value in expected.state_dict().items():
        assert torch.allclose(result.state_dict()[name].double(), value.double(), atol=1e-9), name
        assert not torch.equal(result.state_dict()[name], network.state_dict()[name]), name
    assert loop.findings.facts["targets"] == [target]


def test_the_first_step_is_plain_tuning_and_the_second_is_not() -> None:
    """At the backdoored weights there is no way to go."""
    for batch_size, is_same in ((12, True), (5, False)):
        flags = {"inversion_rounds": 1, "n_rounds": 1, "batch_size": batch_size}
        one, other = (
            purify(conv_net(), *problem(), config(**flags, rho=rho)) for rho in (0.0, 2.0)
        )
        assert (differing(one.state_dict(), other.state_dict()) == []) == is_same


def test_published_values_are_the_default() -> None:
    flags = Config.load("cifar10")
    assert (flags.inversion_rounds, flags.n_rounds, flags.batch_size) == (3, 30, 128)
    assert (flags.lr, flags.sgd_momentum, flags.rho) == (0.01, 0.1, 0.5)
    assert (flags.generated_ratio, flags.identity_epochs) == (0.1, 50)


def test_the_rounds_that_the_report_follows_are_those_of_the_last_tuning() -> None:
    rounds: list[tuple[str, int, int]] = []
    loop = Loop(lambda number, total, losses, state: rounds.append((loop.phase, number, total)))
    purify(conv_net(), *problem(), config(n_rounds=1), loop)
    phases = [phase for phase, *_ in rounds]
    assert phases.count("tuning 1") == phases.count("") == 1
    assert "tuning 2" not in phases
    assert rounds[-1] == ("", 1, 1)


def test_no_rounds_change_nothing() -> None:
    network, loop = conv_net(), Loop()
    result = purify(network, *problem(), config(n_rounds=0), loop)
    assert differing(result.state_dict(), network.state_dict()) == []
    assert loop.findings.facts == {}
