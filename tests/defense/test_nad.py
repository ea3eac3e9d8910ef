"""NAD: maps and distances by hand, and its two trainings against a literal transcription."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import ft
from defense.nad import Config, attention_distance, attention_map, purify, stages
from models import Classifier, Resize
from models.preactresnet import PreActResNet
from tests.networks import TUNING, conv_net, differing, problem
from tests.tuning import Momentum
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop

LAYERS = ("conv1", "bn2")


def config(**changes: Any) -> Config:
    """Three rounds of three batches (5, 5 and 2 images), momentum and decay; two layers."""
    values = {
        "te_epochs": 2,
        "attention_layers": LAYERS,
        "random_seed": 3,
        "lr_scheduler": "cosine",
    }
    return Config.load(**{**TUNING, **values, **changes})


# maps and distances

STUDENT = torch.tensor([[[[1.0, 2.0]], [[2.0, 0.0]]]], dtype=torch.float64)  # B 1, C 2, H 1, W 2
TEACHER = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)


def test_maps_and_their_distance_by_hand() -> None:
    """Sums of squares (5, 4) over sqrt(41), and (9, 16) over sqrt(337).

    The mean of (0.780869 - 0.490261)^2 and (0.624695 - 0.871575)^2 is 0.0727014.
    """
    assert attention_map(STUDENT, 2.0).flatten().tolist() == pytest.approx([0.780869, 0.624695])
    found = attention_map(TEACHER, 2.0).flatten().tolist()
    assert found == pytest.approx([0.490261, 0.871575], abs=1e-6)
    assert float(attention_distance(STUDENT, TEACHER, 2.0)) == pytest.approx(0.0727014, abs=1e-6)


def test_the_power_by_hand() -> None:
    """Power 1: (3, 2) over sqrt(13), whatever the signs; power 3: (9, 8) over sqrt(145)."""
    found = attention_map(-STUDENT, 1.0).flatten().tolist()
    assert found == pytest.approx([3 / math.sqrt(13), 2 / math.sqrt(13)], abs=1e-6)
    found = attention_map(STUDENT, 3.0).flatten().tolist()
    assert found == pytest.approx([9 / math.sqrt(145), 8 / math.sqrt(145)], abs=1e-6)


def test_each_image_has_its_own_norm() -> None:
    """The distance is the mean over images, and of every map over its own pixels."""
    both = torch.cat([STUDENT, TEACHER])
    assert attention_map(both, 2.0).shape == (2, 1, 2)
    assert float(attention_distance(both, both.flip(0), 2.0)) == pytest.approx(0.0727014, abs=1e-6)
    half = torch.cat([STUDENT, TEACHER]), torch.cat([TEACHER, TEACHER])
    assert float(attention_distance(*half, 2.0)) == pytest.approx(0.0727014 / 2, abs=1e-6)


def test_the_norm_is_over_rows_and_columns() -> None:
    features = torch.ones(1, 1, 2, 2)
    assert torch.allclose(attention_map(features, 2.0), torch.full((1, 2, 2), 0.5))


def test_scale_and_single_pixels_say_nothing() -> None:
    """Ten times the features: the same map. Maps of a pixel are 1, whatever they are of."""
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 5)
    assert torch.allclose(
        attention_map(10 * features, 2.0), attention_map(features, 2.0), atol=1e-6
    )
    pixels, others = torch.randn(3, 4, 1, 1) + 2, torch.randn(3, 4, 1, 1) + 2
    assert float(attention_distance(pixels, others, 2.0)) < 1e-11


def test_channels_may_differ_in_number() -> None:
    """A channel of zeros adds nothing."""
    wider = torch.cat([TEACHER, torch.zeros_like(TEACHER)], dim=1)
    expected = attention_distance(STUDENT, TEACHER, 2.0)
    assert torch.equal(attention_distance(STUDENT, wider, 2.0), expected)


def test_a_map_of_zeros_has_a_gradient() -> None:
    features = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention_distance(features, torch.ones(1, 2, 2, 2), 2.0).backward()
    assert bool(features.grad.isfinite().all())


def test_maps_are_at_least_float32() -> None:
    """Also under autocast, where features are bf16; float64 stays."""
    features = torch.ones(1, 3, 1, 2, dtype=torch.bfloat16)
    assert attention_map(features, 2.0).dtype == torch.float32
    assert attention_map(features.double(), 2.0).dtype == torch.float64


# the layers


def small() -> Classifier:
    torch.manual_seed(0)
    network = PreActResNet((1, 1, 1, 1), 4, (4, 4, 4, 6))
    return Classifier(network, (0.5,) * 3, (0.25,) * 3)


def test_the_last_three_stages_are_taken() -> None:
    """Of 16 pixels the last stage has 2 x 2; of 8 it has one, which says nothing."""
    images = torch.rand(2, 3, 16, 16)
    model = small().train()
    assert stages(model, images, []) == ["layer2", "layer3", "layer4"]
    assert model.training
    assert stages(model, images[:, :, :8, :8], []) == ["layer1", "layer2", "layer3"]
    behind = nn.Sequential(Resize(16), small().network)
    assert stages(behind, images, []) == ["1.layer2", "1.layer3", "1.layer4"]
    assert stages(model, images, ["layer4", "layer1.0.conv1"]) == ["layer4", "layer1.0.conv1"]


class Two(nn.Module):
    """Two parts that give maps (VGG has one), a third that is never called, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.spare, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(images)).mean((2, 3)))


def test_layers_without_maps_are_told() -> None:
    images, labels = problem()
    network = Two().double()
    with pytest.raises(UserError, match=r"--attention_layers: 2 of .* name one to three"):
        purify(network, images, labels, config(attention_layers=()))
    for name, said in (("last", "last gives no map"), ("spare", "spare gives no map")):
        with pytest.raises(UserError, match=f"--attention_layers: {said}"):
            purify(network, images, labels, config(attention_layers=("first", name)))
    with pytest.raises(UserError, match=r"--attention_layers: frist .*first"):
        purify(network, images, labels, config(attention_layers=("frist",)))
    with pytest.raises(UserError, match="attention_layers"):
        config(attention_layers=("first",) * 4)
    with pytest.raises(UserError, match="first is named twice; name each layer once"):
        purify(network, images, labels, config(attention_layers=("second", "first", "first")))


# the whole defense


def literal_tuning(
    model: nn.Module, teacher: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """The student's loss, from layers called one by one, and a constant rate."""
    model = copy.deepcopy(model).train()
    sgd = Momentum(model.parameters(), config.sgd_momentum, config.wd)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation")

    def maps_and_logits(network: Any, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        first = network.conv1(x)
        second = network.bn2(network.conv2(network.bn1(first).relu()))
        maps = [features.square().sum(1) for features in (first, second)]
        maps = [m / (m.square().sum((1, 2), keepdim=True).sqrt() + 1e-6) for m in maps]
        return maps, network.linear(second.relu().mean((2, 3)))

    for _ in range(config.n_rounds):
        shuffled = torch.randperm(len(images), generator=order)
        for start in range(0, len(images), config.batch_size):
            index = shuffled[start : start + config.batch_size]
            x = augment(images[index], config.crop_padding, config.flip, crops)
            maps, logits = maps_and_logits(model, x)
            with torch.no_grad():
                wanted, _ = maps_and_logits(teacher, x)
            loss = F.cross_entropy(logits, labels[index])
            for beta, mine, theirs in zip((config.beta1, config.beta2), maps, wanted, strict=True):
                loss = loss + beta * (mine - theirs).square().mean()
            sgd.step(torch.autograd.grad(loss, list(model.parameters())), config.lr)
    return model


def teacher_of(network: nn.Module, **changes: Any) -> nn.Module:
    flags = {**TUNING, "n_rounds": 2, "lr_scheduler": "cosine", "random_seed": 3, **changes}
    return ft.purify(network, *problem(), ft.Config.load(**flags))


def test_both_trainings_follow_the_literal_procedure() -> None:
    """Nine steps with momentum, decay and augmentation after the teacher's; statistics, too."""
    network = conv_net()
    flags = config(beta1=5.0, beta2=20.0)
    found = purify(network, *problem(), flags).state_dict()
    expected = literal_tuning(network, teacher_of(network), *problem(), flags).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-9), name


@pytest.mark.parametrize(
    "change",
    [
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"p": 3.0},
        {"te_epochs": 1},
        {"lr_scheduler": "constant"},
        {"attention_layers": LAYERS[::-1]},
        {"attention_layers": LAYERS[:1]},
    ],
)
def test_each_flag_of_its_own_acts(change: dict[str, Any]) -> None:
    network = conv_net()
    usual = purify(network, *problem(), config())
    other = purify(network, *problem(), config(**change))
    assert "conv1.weight" in differing(usual.state_dict(), other.state_dict())


def test_the_third_stage_has_the_third_beta() -> None:
    network, layers = conv_net(), (*LAYERS, "conv2")
    usual, other = (
        purify(network, *problem(), config(attention_layers=layers, beta3=beta)).state_dict()
        for beta in (0.0, 1000.0)
    )
    two = purify(network, *problem(), config()).state_dict()
    assert torch.allclose(usual["conv1.weight"], two["conv1.weight"], rtol=0, atol=1e-12)
    assert not torch.allclose(other["conv1.weight"], two["conv1.weight"], rtol=0, atol=1e-6)


def test_without_betas_it_is_fine_tuning_at_a_constant_rate_bit_for_bit() -> None:
    network = conv_net()
    zero = {"beta1": 0.0, "beta2": 0.0, "beta3": 0.0}
    found = purify(network, *problem(), config(**zero))
    expected = teacher_of(network, n_rounds=3, lr_scheduler="constant")
    assert differing(found.state_dict(), expected.state_dict()) == []


def test_the_phases_and_losses_that_are_told() -> None:
    """The attention is what the maps cost beside the cross-entropy; the teacher begins at 0."""
    seen: list[tuple[str, int, dict[str, float]]] = []
    loop = Loop(lambda number, total, losses, _: seen.append((loop.phase, number, dict(losses))))
    flags = config(te_epochs=1, n_rounds=2, batch_size=12, crop_padding=0, flip=False)
    purify(conv_net(), *problem(), flags, loop)
    assert [row[:2] for row in seen] == [("teacher", 1), ("", 1), ("", 2)]
    assert list(seen[0][2]) == ["loss"]
    for _, _, losses in seen[1:]:
        assert losses["loss"] == pytest.approx(losses["cross_entropy"] + losses["attention"])
        assert losses["attention"] > 0


def test_one_step_moves_statistics_once() -> None:
    network = conv_net()
    flags = config(te_epochs=0, n_rounds=1, batch_size=12)
    found = purify(network, *problem(), flags)
    assert int(found.bn1.num_batches_tracked) == 1
    plain = copy.deepcopy(network).train()
    images, _ = problem()
    shuffled = images[torch.randperm(12, generator=generator(3, "batches"))]
    plain(augment(shuffled, 1, True, generator(3, "augmentation")))
    assert torch.equal(found.bn2.running_mean, plain.bn2.running_mean)
