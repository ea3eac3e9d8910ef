"""RNP: a step of ascent and of the masks by hand, and both phases against a literal procedure."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.rnp import Config, purify, recovered_masks, unlearned
from models import Classifier
from models.channels import norms
from tests.networks import conv_net, copied, differing, problem
from tests.tuning import Momentum
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop

Tensors = dict[str, torch.Tensor]


def config(**changes: Any) -> Config:
    """Batches of 5, 5 and 2 images; the ascent never ends by itself."""
    values = {"batch_size": 5, "crop_padding": 1, "random_seed": 3, "clean_threshold": 0.0}
    return Config.load(**{**values, "unlearning_epochs": 2, "n_rounds": 2, **changes})


def test_the_published_values_are_the_default() -> None:
    """1 % of the images in batches of 128, 20 epochs at most, and the level chosen by `val`."""
    shipped = Config.load()
    assert (shipped.ratio, shipped.batch_size, shipped.selection) == (0.01, 128, "val")
    assert (shipped.unlearning_epochs, shipped.unlearning_lr, shipped.schedule) == (
        *(20, 0.01),
        (10, 20),
    )
    assert (shipped.clean_threshold, shipped.n_rounds, shipped.recovering_lr) == (0.2, 20, 0.2)
    assert (shipped.alpha, shipped.sgd_momentum, shipped.wd) == (0.2, 0.9, 5e-4)


@pytest.mark.parametrize("schedule", [[0], [3.5], [-1, 4]])
def test_a_schedule_of_no_epochs_is_refused_in_a_line(schedule: list[float]) -> None:
    with pytest.raises(UserError, match=r"schedule: [^\n]*a list of int >= 1[^\n]*$"):
        Config.load(schedule=schedule)


# the ascent


def literal_ascent(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """The gradient of minus the loss, the decay beside it, and momentum."""
    model = copy.deepcopy(model).train()
    sgd = Momentum(model.parameters(), config.sgd_momentum, config.wd)
    order = generator(config.random_seed, "batches of the ascent")
    crops = generator(config.random_seed, "augmentation of the ascent")
    for epoch in range(1, config.unlearning_epochs + 1):
        rate = config.unlearning_lr
        for milestone in config.schedule:
            rate = rate / 10 if epoch > milestone else rate
        shuffled = torch.randperm(len(images), generator=order)
        for first in range(0, len(images), config.batch_size):
            index = shuffled[first : first + config.batch_size]
            x = augment(images[index], config.crop_padding, config.flip, crops)
            risen = -F.cross_entropy(model(x), labels[index])
            sgd.step(torch.autograd.grad(risen, list(model.parameters())), rate)
    return model


@pytest.mark.parametrize("schedule", [[10, 20], [1], [1, 2]])
def test_the_ascent_follows_the_literal_procedure(schedule: list[int]) -> None:
    """Nine steps, with momentum, decay and crops; statistics move, too."""
    network = conv_net()
    images, labels = problem()
    flags = config(unlearning_epochs=3, schedule=schedule, unlearning_lr=0.02, wd=0.05)
    found = unlearned(network, images, labels, flags)
    assert all(module.training for module in found.modules())
    expected = literal_ascent(network, images, labels, flags).state_dict()
    for name, value in expected.items():
        mine = found.state_dict()[name]
        assert torch.allclose(mine.double(), value.double(), rtol=0, atol=1e-10), name
        assert not torch.equal(mine, network.state_dict()[name]), name


def test_a_step_of_the_ascent_raises_the_loss_of_its_batch() -> None:
    """Without decay, on all images as they are; the other way it would fall."""
    network = conv_net().train()
    images, labels = problem()

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(copy.deepcopy(model)(images), labels))

    flags = {"batch_size": 12, "crop_padding": 0, "flip": False, "wd": 0.0}
    flags |= {"unlearning_epochs": 1, "unlearning_lr": 1e-3}
    assert loss(unlearned(network, images, labels, config(**flags))) > loss(network) + 1e-4


class OneWeight(nn.Module):
    """The logits are (w, 0), whatever the image."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.weight * torch.ones(len(images), dtype=torch.float64)
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def test_decay_pulls_to_0_also_in_the_ascent() -> None:
    """Label 0: dCE/dw = s(2) - 1 = -0.1192, so the ascent goes down, and decay, too.

    2 - 0.1 (0.1192 + 0.5 * 2) = 1.8881.
    """
    flags = {"unlearning_epochs": 1, "batch_size": 4, "unlearning_lr": 0.1, "wd": 0.5}
    found = unlearned(
        OneWeight(2.0), torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), config(**flags)
    )
    assert float(found.weight.detach()) == pytest.approx(2 - 0.1 * (0.119203 + 1), abs=1e-6)


def epochs(threshold: float, most: int = 12) -> Loop:
    """The loop of an ascent on w = 0.5, of which an epoch is one step of rate 1 without momentum.

    Labels 0, 0, 0, 1: the accuracy is 0.75 while w > 0, else 0.25; dCE/dw = s(w) - 0.75.
    """
    loop = Loop()
    flags = {"unlearning_epochs": most, "batch_size": 4, "unlearning_lr": 1.0, "wd": 0.0}
    flags |= {"sgd_momentum": 0.0, "clean_threshold": threshold, "schedule": [50]}
    labels = torch.tensor([0, 0, 0, 1])
    unlearned(OneWeight(0.5), torch.zeros(4, 1, 2, 2), labels, config(**flags), loop)
    return loop


def test_the_ascent_ends_after_the_first_epoch_at_the_threshold() -> None:
    """w: 0.5, 0.372, 0.214, 0.018, -0.228: the accuracy of epoch 5 is that of its own pass, 0.25.

    The steps s(w) - 0.75 are -0.1275, -0.1580, -0.1967, -0.2456.
    """
    facts = epochs(0.25).findings.facts
    assert facts == {"unlearning_epochs": 5, "unlearned_acc": 0.25}
    assert epochs(0.75).findings.facts == {"unlearning_epochs": 1, "unlearned_acc": 0.75}
    assert epochs(0.25).findings.warnings == []


def test_a_network_that_does_not_forget_is_warned_of() -> None:
    loop = epochs(0.25, most=3)
    assert loop.findings.facts == {"unlearning_epochs": 3, "unlearned_acc": 0.75}
    (warning,) = loop.findings.warnings
    assert "accuracy is 75.00 % after 3 epochs" in warning
    assert epochs(0.25, most=5).findings.warnings == []


def test_an_ascent_of_no_epoch_is_warned_of() -> None:
    loop = Loop()
    purify(conv_net(), *problem(), config(unlearning_epochs=0, selection="fixed"), loop)
    assert loop.findings.warnings[0].startswith("--unlearning_epochs is 0, so the network has not")


def test_masks_without_a_loss_are_warned_of() -> None:
    loop = Loop()
    recovered_masks(conv_net(), *problem(), config(alpha=0.0), loop)
    assert loop.findings.warnings == [
        "--alpha is 0, so no loss is left to learn from; give more than 0"
    ]


def test_a_frozen_weight_forgets_too() -> None:
    """The copy is thrown away, so that nothing need stay."""
    network = conv_net()
    network.conv1.weight.requires_grad_(False)
    found = unlearned(network, *problem(), config())
    assert not torch.equal(found.conv1.weight, network.conv1.weight)
    assert not network.conv1.weight.requires_grad


# the masks


class OneChannel(nn.Module):
    """BatchNorm of one channel: the logit of class 0 is its mean output, that of class 1 is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1, eps=1e-14)
        nn.init.constant_(self.bn.weight, 2.0)
        nn.init.constant_(self.bn.bias, 0.5)
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.bn(images).mean(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def test_the_gradient_of_a_mask_is_gamma_times_that_of_the_scale() -> None:
    """Black and white become -1 and 1, the logits v = 2 m (+-1) + 0.5: at m = 1 -1.5 and 2.5.

    Black is class 0, white class 1: d mean CE / dm = 2 ((s(-1.5) - 1)(-1) + s(2.5)) / 2
    = 0.8176 + 0.9241 = 1.7417, gamma 2 times 0.8709. With lr 0.1 and alpha 0.5 the mask becomes
    1 - 0.05 * 1.7417; with the other labels it would rise, and is clamped.
    """

    def logistic(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).double()
    flags = config(
        **{"n_rounds": 1, "batch_size": 2, "recovering_lr": 0.1, "alpha": 0.5},
        **{"crop_padding": 0, "flip": False},
    )
    gradient = 2 * ((logistic(-1.5) - 1) * -1 + logistic(2.5)) / 2
    assert gradient == pytest.approx(1.7417, abs=1e-4)
    mask = recovered_masks(OneChannel(), images, torch.tensor([0, 1]), flags)["bn"]
    assert float(mask) == pytest.approx(1 - 0.05 * gradient, rel=1e-9)
    assert not mask.requires_grad
    other = recovered_masks(OneChannel(), images, torch.tensor([1, 0]), flags)["bn"]
    assert float(other) == 1


def train_pass(network: nn.Module, x: torch.Tensor, masks: Tensors) -> torch.Tensor:
    """`ConvNet` in train mode written out: batch statistics, variance divided by n."""
    for number in (1, 2):
        convolution, norm = getattr(network, f"conv{number}"), getattr(network, f"bn{number}")
        x = F.conv2d(x, convolution.weight, stride=convolution.stride, padding=convolution.padding)
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
        gamma = (norm.weight * masks[f"bn{number}"]).view(1, -1, 1, 1)
        x = ((x - mean) / (variance + 1e-5).sqrt() * gamma + norm.bias.view(1, -1, 1, 1)).relu()
    return F.linear(x.mean(dim=(2, 3)), network.linear.weight, network.linear.bias)


def literal_masks(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> Tensors:
    masks = {
        name: torch.ones_like(norm.weight, requires_grad=True)
        for name, norm in norms(network).items()
    }
    sgd = Momentum(masks.values(), config.sgd_momentum)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation")
    for _ in range(config.n_rounds):
        shuffled = torch.randperm(len(images), generator=order)
        for first in range(0, len(images), config.batch_size):
            index = shuffled[first : first + config.batch_size]
            x = augment(images[index], config.crop_padding, config.flip, crops)
            loss = config.alpha * F.cross_entropy(train_pass(network, x, masks), labels[index])
            sgd.step(torch.autograd.grad(loss, list(masks.values())), config.recovering_lr)
            for mask in masks.values():
                mask.data.clamp_(0, 1)
    return masks


def test_the_masks_follow_the_literal_procedure() -> None:
    """Nine steps without decay; some masks reach 0 and some 1, so that clamping matters."""
    network = conv_net()
    images, labels = problem()
    flags = config(n_rounds=3, recovering_lr=3.0, wd=0.5)
    found = recovered_masks(network, images, labels, flags)
    expected = literal_masks(network, images, labels, flags)
    assert list(found) == ["bn1", "bn2"]
    for name, mask in found.items():
        assert torch.allclose(mask, expected[name], rtol=0, atol=1e-9), name
    values = torch.cat(list(found.values()))
    assert float(values.min()) == 0
    assert float(values.max()) == 1
    assert bool(((values > 0) & (values < 1)).any())


def test_masks_of_a_classifier_have_the_bare_network_s_names() -> None:
    network = Classifier(conv_net(), (0.5,) * 3, (0.25,) * 3).double()
    masks = recovered_masks(network, *problem(), config())
    assert {name: len(mask) for name, mask in masks.items()} == {"bn1": 6, "bn2": 8}


# the whole defense


@pytest.mark.parametrize("phase", [unlearned, recovered_masks, purify])
def test_the_model_stays_as_it_is(phase: Any) -> None:
    """Weights, buffers, modes and gradients."""
    network = conv_net()
    network.bn1.train()
    before = copied(network.state_dict())
    phase(network, *problem(), config())
    assert differing(network.state_dict(), before) == []
    assert network.bn1.training
    assert not network.bn2.training
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def test_the_model_before_the_ascent_is_pruned_at_the_masks_after_it() -> None:
    """`fixed`: all images are fitted; but for scales of 0 all stays bit for bit, also buffers."""
    network = conv_net()
    images, labels = problem()
    flags = config(selection="fixed", pruning_number=0.9, recovering_lr=3.0, unlearning_lr=0.05)
    loop = Loop()
    pruned = purify(network, images, labels, flags, loop)
    masks = recovered_masks(unlearned(network, images, labels, flags), images, labels, flags)
    assert set(differing(pruned.state_dict(), network.state_dict())) <= {"bn1.weight", "bn2.weight"}
    count = 0
    for name, mask in masks.items():
        gone = mask.mul(1e4).round() <= 9000
        weight, before = (norms(model)[name].weight for model in (pruned, network))
        assert torch.equal(weight == 0, gone)
        assert torch.equal(weight[~gone], before[~gone])
        count += int(gone.sum())
    assert 0 < count < 14
    facts = loop.findings.facts
    assert facts["pruned_channels"] == count
    assert facts["unlearning_epochs"] == 2
    assert 0 <= facts["recovered_acc"] <= 1


def test_a_part_is_held_out_of_both_phases() -> None:
    """`val`: of 40 images 8 are held out, so an epoch of either phase has 32, in 7 batches."""
    seen: dict[str, list[int]] = {}

    class Watched(Loop):
        def batches(self, count: int, *arguments: Any, **more: Any) -> Any:
            for index in super().batches(count, *arguments, **more):
                seen.setdefault(self.phase, []).append(len(index))
                yield index

    images, _ = problem(count=40)
    flags = config(selection="val", acc_ratio=1.0)
    purify(conv_net(), images, torch.arange(40) % 4, flags, Watched())
    assert list(seen) == ["unlearning", ""]
    for sizes in seen.values():
        assert sizes == [5, 5, 5, 5, 5, 5, 2] * 2


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_network_without_batchnorm_is_refused_before_it_forgets(rounds: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    loop = Loop()
    with pytest.raises(UserError, match=r"^[^\n]*BatchNorm[^\n]*$"):
        purify(network, *problem(), config(n_rounds=rounds), loop)
    assert loop.findings.facts == {}


def test_without_rounds_nothing_is_learned_and_the_model_is_given_back() -> None:
    network, loop = conv_net(), Loop()
    found = purify(network, *problem(), config(n_rounds=0), loop)
    assert found is not network
    assert differing(found.state_dict(), network.state_dict()) == []
    assert loop.findings.facts == {}


def test_an_ascent_that_leaves_the_numbers_names_its_rate() -> None:
    images, labels = problem()
    flags = config(unlearning_lr=1e30, unlearning_epochs=9, acc_ratio=1.0)
    with pytest.raises(UserError, match=r"not finite[^\n]*give a smaller --unlearning_lr, or"):
        purify(conv_net().float(), images.float(), labels, flags)
