"""BTI-DBF: the loss of unlearning by hand, and the whole against a literal transcription."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.bti_dbf import Config, purify, unlearning_loss
from models import Classifier
from models.outputs import recording
from tests.inversions import TWICE, Step, features_of, literal, logits_of
from tests.networks import ConvNet, conv_net, differing, problem
from utils.errors import UserError
from utils.training.loop import Loop


def config(**changes: Any) -> Config:
    """Everything twice, in batches of 5, 5 and 2 images."""
    return Config.load(**{**TWICE, "lr": 1e-3, **changes})


class OneFeature(nn.Module):
    """f is w times the image; the logits are (mean of f, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(1, 1, 1, bias=False).double()
        nn.init.constant_(self.map.weight, 2.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.map(images).mean(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_the_loss_by_hand() -> None:
    """w = 2, x = (0.1, 0.5), x' = (0.4, 0.5), labels 0 and 1.

    Logits of x' 0.8 and 1: (ln(1 + e^-0.8) + ln(1 + e)) / 2 = (0.371101 + 1.313262) / 2 = 0.842181.
    MSE of f: (0.6^2 + 0) / 2 = 0.18. Both terms have a gradient: that of MSE for w is
    2 w 0.3^2 / 2 = 0.18, that of CE (0.4 (s(0.8) - 1) + 0.5 s(1)) / 2 = 0.120760.
    """
    model, labels = OneFeature(), torch.tensor([0, 1])
    loss = unlearning_loss(model, "map", grey(0.1, 0.5), grey(0.4, 0.5), labels)
    assert loss.item() == pytest.approx(0.842181 + 0.18, abs=1e-6)
    loss.backward()
    assert model.map.weight.grad.item() == pytest.approx(0.18 + 0.120760, abs=2e-6)
    assert not model.map._forward_hooks


def test_the_change_of_features_is_measured_in_float32() -> None:
    """Under autocast the features are bf16, whose sums have eight bits."""
    model = Classifier(conv_net().float(), (0.5,) * 3, (0.25,) * 3)
    model.precision = "bf16"
    images, mixed, labels = torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8), torch.arange(5) % 4
    loss = unlearning_loss(model, "bn2", images, mixed, labels)
    with recording(model, ["bn2"]) as features, torch.no_grad():
        model(images)
        clean = features["bn2"]
        logits = model(mixed)
        change = features["bn2"]
    assert clean.dtype == torch.bfloat16
    expected = F.cross_entropy(logits, labels) + (change.double() - clean.double()).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def make_step(flags: Config, model: ConvNet) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)

    def step(model: ConvNet, x: torch.Tensor, mixed: torch.Tensor, y: torch.Tensor) -> None:
        clean, features = features_of(model, x), features_of(model, mixed)
        loss = F.cross_entropy(logits_of(model, features), y)
        loss = loss + (features - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("changes", [{}, {"generated_ratio": 0.5}, {"image_bound": 1e-4}])
def test_the_defense_follows_the_literal_procedure(changes: dict[str, float]) -> None:
    """Weights and statistics, the label, and the picture's generated images."""
    network, (images, labels), flags, loop = conv_net(), problem(), config(**changes), Loop()
    result = purify(network, images, labels, flags, loop)
    expected, unet, target = literal(network, images, labels, flags, lambda m: make_step(flags, m))
    for name, value in expected.state_dict().items():
        assert torch.allclose(result.state_dict()[name].double(), value.double(), atol=1e-9), name
        assert not torch.equal(result.state_dict()[name], network.state_dict()[name]), name
    is_searched = "image_bound" not in changes  # else each step exceeds it
    assert loop.findings.facts["identity_only"] == [0.0 if is_searched else 1.0] * 2
    assert loop.findings.facts.get("targets") == ([target] if is_searched else None)
    with torch.no_grad():
        generated = unet(images[:8]).clamp(0, 1).float()
    assert torch.allclose(loop.findings.pictures["generated"].rows["generated"], generated)


def test_the_rounds_that_the_report_follows_are_those_of_the_last_unlearning() -> None:
    rounds: list[tuple[str, int, int]] = []
    loop = Loop(lambda number, total, losses, state: rounds.append((loop.phase, number, total)))
    purify(conv_net(), *problem(), config(inversion_rounds=3, n_rounds=1), loop)
    phases = [phase for phase, *_ in rounds]
    assert [phase for phase in phases if phase.startswith("unl")] == [
        "unlearning 1",
        "unlearning 2",
    ]
    assert rounds[-1] == ("", 1, 1)
    assert phases.count("") == 1


def test_published_values_are_the_default() -> None:
    flags = Config.load("cifar10")
    assert (flags.inversion_rounds, flags.identity_epochs, flags.mask_epochs) == (5, 50, 20)
    assert (flags.generator_epochs, flags.n_rounds, flags.batch_size) == (30, 30, 128)
    assert (flags.generator_lr, flags.mask_lr, flags.lr) == (1e-3, 1e-2, 1e-4)
    assert (flags.generated_ratio, flags.feature_bound) == (0.1, 3.0)


def test_no_rounds_change_nothing_and_search_for_nothing() -> None:
    network, loop = conv_net(), Loop()
    result = purify(network, *problem(), config(n_rounds=0), loop)
    assert differing(result.state_dict(), network.state_dict()) == []
    assert loop.findings.facts == {}


def test_a_network_without_a_map_is_told_in_a_line() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    with pytest.raises(UserError, match=r"^[^\n]*map of features[^\n]*$"):
        purify(network, *problem(), config())
    frozen = copy.deepcopy(conv_net()).requires_grad_(False)
    with pytest.raises(UserError, match="requires_grad"):
        purify(frozen, *problem(), config())
