"""ANP: noise, masks and levels by hand, and its rounds against a literal transcription."""

import copy
import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.anp import Config, adversarial_noise, learned_masks, mask_loss, purify
from models import Classifier
from models.channels import norms
from tests.networks import conv_net, copied, differing, problem
from tests.tuning import Momentum
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training import pruning
from utils.training.loop import Loop
from utils.training.pruning import channels_up_to, pruned_by_masks

Tensors = dict[str, torch.Tensor]


class OneChannel(nn.Module):
    """BatchNorm of one channel: the logit of class 0 is its mean output, that of class 1 is 0.

    Statistics 0 and 1 and hardly an epsilon, so eval mode leaves images as they are.
    """

    def __init__(self, gamma: float = 2.0, beta: float = 0.5) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1, eps=1e-14)
        nn.init.constant_(self.bn.weight, gamma)
        nn.init.constant_(self.bn.bias, beta)
        self.double().eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.bn(images).mean(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


ONES = torch.ones(1, 1, 2, 2, dtype=torch.float64)  # one image
ZERO = torch.tensor([0])  # its label


def mask_of(value: float) -> Tensors:
    return {"bn": torch.tensor([value], dtype=torch.float64)}


def noise_of(d: float, e: float) -> Tensors:
    return {"bn": torch.tensor([[d], [e]], dtype=torch.float64)}


# the loss of the masks


def test_the_two_passes_by_hand() -> None:
    """Input 1, gamma 2, beta 0.5, m 0.8, d 0.3, e -0.1.

    Noisy 2 (0.8 + 0.3) + 0.5 (1 - 0.1) = 2.65, clean 2 * 0.8 + 0.5 = 2.10; the cross-entropy of
    logits (v, 0) and label 0 is ln(1 + e^-v).
    """
    masks, noise = mask_of(0.8), noise_of(0.3, -0.1)

    def loss(alpha: float, noise: Tensors | None) -> float:
        config = Config.load(anp_alpha=alpha)
        return float(mask_loss(OneChannel(), ONES, ZERO, masks, noise, config).detach())

    clean, noisy = math.log1p(math.exp(-2.10)), math.log1p(math.exp(-2.65))
    assert loss(1.0, noise) == pytest.approx(clean, rel=1e-12)
    assert loss(0.0, noise) == pytest.approx(noisy, rel=1e-12)
    assert loss(0.2, noise) == pytest.approx(0.2 * clean + 0.8 * noisy, rel=1e-12)
    assert loss(0.2, None) == pytest.approx(0.2 * clean, rel=1e-12)


def test_the_gradient_of_a_mask_is_gamma_times_that_of_the_scale() -> None:
    """d/dm ln(1 + e^-(2 m + 0.5)) = -2 / (1 + e^2.1) at m = 0.8."""
    masks = {name: value.requires_grad_() for name, value in mask_of(0.8).items()}
    mask_loss(OneChannel(), ONES, ZERO, masks, None, Config.load(anp_alpha=1.0)).backward()
    assert float(masks["bn"].grad) == pytest.approx(-2 / (1 + math.exp(2.1)), rel=1e-12)


def test_no_gradient_reaches_frozen_weights_or_the_noise() -> None:
    network = OneChannel().requires_grad_(False)
    masks = {name: value.requires_grad_() for name, value in mask_of(0.8).items()}
    mask_loss(network, ONES, ZERO, masks, noise_of(0.3, -0.1), Config.load()).backward()
    assert masks["bn"].grad is not None
    assert all(weight.grad is None for weight in network.parameters())


# the noise


@pytest.mark.parametrize(
    ("gamma", "beta", "signs"),
    [(2.0, 0.5, (-1, -1)), (-2.0, 0.5, (1, -1)), (2.0, -0.5, (-1, 1)), (2.0, 0.0, (-1, 0))],
)
def test_a_step_of_the_noise_by_hand(gamma: float, beta: float, signs: tuple[int, int]) -> None:
    """The loss of label 0 rises where gamma d + beta e falls, so each goes against its factor."""
    config = Config.load(anp_eps=0.4, anp_steps=1)
    network = OneChannel(gamma, beta)
    found = adversarial_noise(network, ONES, ZERO, mask_of(0.8), noise_of(0.1, -0.2), config)
    assert list(found) == ["bn"]
    expected = [0.1 + 0.4 * signs[0], -0.2 + 0.4 * signs[1]]
    assert found["bn"].flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_the_noise_is_not_projected() -> None:
    """From -0.4 a step of 0.4 goes to -0.8, twice the largest start."""
    config = Config.load(anp_eps=0.4, anp_steps=1)
    found = adversarial_noise(OneChannel(), ONES, ZERO, mask_of(0.8), noise_of(-0.4, -0.4), config)
    assert found["bn"].flatten().tolist() == pytest.approx([-0.8, -0.8], abs=1e-12)


def test_several_steps_share_the_way() -> None:
    """Four of 0.1. The gradient is taken anew: label 1 on top makes the third step turn back.

    The network's logit is -(gamma (m + d) + beta (1 + e) - 2)^2, gamma = 1, beta = 0, m = 1: away
    from its top at d = 1 the loss of label 0 rises, so from d = 1.05 it goes on to 1.45, and from
    0.95 down to 0.55.
    """

    class Top(OneChannel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logit = -((self.bn(images).mean(dim=(1, 2, 3)) - 2) ** 2)
            return torch.stack([logit, torch.zeros_like(logit)], dim=1)

    config = Config.load(anp_eps=0.4, anp_steps=4)
    for start, end in ((1.05, 1.45), (0.95, 0.55)):
        masks, noise = mask_of(1.0), noise_of(start, 0.0)
        found = adversarial_noise(Top(1.0, 0.0), ONES, ZERO, masks, noise, config)
        assert float(found["bn"][0]) == pytest.approx(end, abs=1e-12)
    # Towards the top for label 1: up to 1.0, then beyond and back again.
    masks, noise = mask_of(1.0), noise_of(0.95, 0.0)
    found = adversarial_noise(Top(1.0, 0.0), ONES, torch.tensor([1]), masks, noise, config)
    assert float(found["bn"][0]) == pytest.approx(0.95, abs=1e-12)  # 1.05, 0.95, 1.05, 0.95


def test_no_steps_leave_the_noise_as_it_was_given() -> None:
    noise = noise_of(0.3, -0.1)
    config = Config.load(anp_steps=0)
    found = adversarial_noise(OneChannel(), ONES, ZERO, mask_of(0.8), noise, config)
    assert torch.equal(found["bn"], noise["bn"])


def test_the_noise_s_arguments_stay_as_they_are() -> None:
    masks = {name: value.requires_grad_() for name, value in mask_of(0.8).items()}
    noise, network = noise_of(0.3, -0.1), OneChannel()
    before = copied(noise)
    found = adversarial_noise(network, ONES, ZERO, masks, noise, Config.load())
    assert differing(noise, before) == []
    assert not noise["bn"].requires_grad
    assert not found["bn"].requires_grad
    assert masks["bn"].grad is None
    assert all(weight.grad is None for weight in network.parameters())


class Spare(OneChannel):
    """With a second BatchNorm that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.BatchNorm2d(1).double()


def test_a_batchnorm_that_is_never_called_is_left_alone() -> None:
    """It has no gradient: its noise and its mask stay, and the other's are as without it."""
    config = Config.load(
        **{"nb_iter": 2, "n_rounds": 1, "batch_size": 8, "crop_padding": 0, "flip": False},
        **{"anp_eps": 0.4, "anp_steps": 2},
    )
    spare = torch.tensor([[0.1], [-0.2]], dtype=torch.float64)
    masks, noise = mask_of(0.8), noise_of(0.3, -0.1)
    one = adversarial_noise(OneChannel(), ONES, ZERO, masks, noise, config)
    masks, noise = masks | {"spare": torch.ones_like(masks["bn"])}, noise | {"spare": spare}
    two = adversarial_noise(Spare(), ONES, ZERO, masks, noise, config)
    assert torch.equal(two["spare"], spare)
    assert torch.equal(two["bn"], one["bn"])
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).double()
    learned = learned_masks(Spare(), images, torch.tensor([0, 1]), config)
    assert learned["spare"].tolist() == [1.0]
    assert 0 <= float(learned["bn"]) < 1


# the masks


def train_pass(network: nn.Module, x: torch.Tensor, gamma: Tensors, beta: Tensors) -> torch.Tensor:
    """`ConvNet` in train mode written out: batch statistics, variance divided by n."""
    for number in (1, 2):
        convolution = getattr(network, f"conv{number}")
        x = F.conv2d(x, convolution.weight, stride=convolution.stride, padding=convolution.padding)
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        name = f"bn{number}"
        x = (x * gamma[name].view(1, -1, 1, 1) + beta[name].view(1, -1, 1, 1)).relu()
    return F.linear(x.mean(dim=(2, 3)), network.linear.weight, network.linear.bias)


def literal_masks(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config, drawn: list[int]
) -> Tensors:
    """The outer and inner steps written out; `drawn` gives the number of batches of each round."""
    gamma = {name: norm.weight.detach() for name, norm in norms(network).items()}
    beta = {name: norm.bias.detach() for name, norm in norms(network).items()}
    masks = {name: torch.ones_like(value, requires_grad=True) for name, value in gamma.items()}
    sgd = Momentum(masks.values(), config.sgd_momentum)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation")
    start = generator(config.random_seed, "noise")

    def loss(masks: Tensors, noise: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scales = {name: gamma[name] * (masks[name] + noise[name][0]) for name in gamma}
        shifts = {name: beta[name] * (1 + noise[name][1]) for name in gamma}
        return F.cross_entropy(train_pass(network, x, scales, shifts), y)

    for steps in drawn:
        for index in torch.randint(len(images), (steps, config.batch_size), generator=order):
            x = augment(images[index], config.crop_padding, config.flip, crops)
            y = labels[index]
            noise = {
                name: (2 * torch.rand(2, len(m), dtype=m.dtype, generator=start) - 1)
                * config.anp_eps
                for name, m in masks.items()
            }
            for _ in range(config.anp_steps):
                for value in noise.values():
                    value.requires_grad_()
                gradients = torch.autograd.grad(loss(masks, noise, x, y), list(noise.values()))
                noise = {
                    name: noise[name].detach() + config.anp_eps / config.anp_steps * g.sign()
                    for name, g in zip(noise, gradients, strict=True)
                }
            still = {name: torch.zeros_like(value) for name, value in noise.items()}
            total = config.anp_alpha * loss(masks, still, x, y)
            if config.anp_eps > 0:
                total = total + (1 - config.anp_alpha) * loss(masks, noise, x, y)
            sgd.step(torch.autograd.grad(total, list(masks.values())), config.lr)
            for mask in masks.values():
                mask.data.clamp_(0, 1)
    return masks


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("eps", [0.4, 0.0])
def test_the_masks_follow_the_literal_procedure(eps: float, steps: int) -> None:
    """Seven iterations over three rounds: 7 // 3 = 2, 14 // 3 - 2 = 2, 7 - 4 = 3.

    Some masks reach 0 and some 1, so that clamping and momentum meet.
    """
    network = conv_net()
    images, labels = problem()
    config = Config.load(
        **{"nb_iter": 7, "n_rounds": 3, "batch_size": 5, "crop_padding": 1, "lr": 1.0},
        **{"anp_eps": eps, "anp_steps": steps, "random_seed": 3},
    )
    found = learned_masks(network, images, labels, config)
    expected = literal_masks(network, images, labels, config, [2, 2, 3])
    assert list(found) == ["bn1", "bn2"]
    for name, mask in found.items():
        assert torch.allclose(mask, expected[name], rtol=0, atol=1e-9), name
        assert not mask.requires_grad
    values = torch.cat(list(found.values()))
    assert bool((values == 1).any())
    assert bool(((values > 0) & (values < 1)).any())


def test_masks_are_clamped_at_both_ends() -> None:
    """A learning rate of 50 sends them to 0 or 1 at once; their momentum goes on."""
    images, labels = problem()
    config = Config.load(nb_iter=2, n_rounds=1, batch_size=8, lr=50.0)
    values = torch.cat(list(learned_masks(conv_net(), images, labels, config).values()))
    assert float(values.min()) == 0
    assert float(values.max()) == 1


def test_one_step_of_a_mask_by_hand() -> None:
    """OneChannel with gamma 2 and beta 0.5, no noise, alpha 1, lr 0.1, m = 1.

    Of 64 drawn images a share q is white, the rest black: train mode makes them
    sqrt((1 - q) / q) and -sqrt(q / (1 - q)), times 2 plus 0.5 the logits v. Black is class 0, white
    class 1, so dCE/dv is s(v) - 1 and s(v), s the logistic function, and dv/dm twice the value. For
    the other labels the mask would rise, and is clamped to 1.
    """
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).double()
    config = Config.load(
        **{"nb_iter": 1, "n_rounds": 1, "batch_size": 64, "lr": 0.1, "anp_eps": 0.0},
        **{"anp_alpha": 1.0, "crop_padding": 0, "flip": False, "sgd_momentum": 0.9},
    )
    q = float(torch.randint(2, (1, 64), generator=generator(0, "batches")).double().mean())
    black, white = -math.sqrt(q / (1 - q)), math.sqrt((1 - q) / q)

    def logistic(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    of_black = (logistic(2 * black + 0.5) - 1) * 2 * black
    of_white = logistic(2 * white + 0.5) * 2 * white
    gradient = (1 - q) * of_black + q * of_white
    assert gradient > 1
    mask = learned_masks(OneChannel(), images, torch.tensor([0, 1]), config)["bn"]
    assert float(mask) == pytest.approx(1 - 0.1 * gradient, rel=1e-9)
    other = learned_masks(OneChannel(), images, torch.tensor([1, 0]), config)["bn"]
    assert float(other) == 1


@pytest.mark.parametrize(
    ("iterations", "rounds", "expected"),
    [(7, 3, [2, 2, 3]), (8, 4, [2, 2, 2, 2]), (2, 4, [0, 1, 0, 1]), (0, 2, [0, 0])],
)
def test_iterations_are_spread_evenly_over_the_rounds(
    iterations: int, rounds: int, expected: list[int]
) -> None:
    """Of 2 over 4 rounds 1/2, 1, 3/2 and 2 would be done, cut to whole ones."""
    counts: list[int] = []
    seen = [0]

    def after_round(number: int, total: int, losses: Any, state: Any) -> None:
        counts.append(seen[0] - sum(counts))
        assert total == rounds

    loop = Loop(after_round, lambda batches: seen.__setitem__(0, seen[0] + 1))
    config = Config.load(nb_iter=iterations, n_rounds=rounds, batch_size=4, crop_padding=0)
    masks = learned_masks(conv_net(), *problem(), config, loop)
    assert counts == expected
    if iterations == 0:
        assert all(mask.tolist() == [1.0] * len(mask) for mask in masks.values())


def test_batches_are_drawn_with_replacement_and_are_full() -> None:
    """Sixteen of five images: each is there more than once, and none is used up."""
    taken = []

    class Watched(Loop):
        def batches(self, *arguments: Any, **more: Any) -> Any:
            for index in super().batches(*arguments, **more):
                taken.append(index)
                yield index

    images, labels = problem(count=5)
    config = Config.load(nb_iter=3, n_rounds=1, batch_size=16, crop_padding=0)
    learned_masks(conv_net(), images, labels, config, Watched())
    assert [len(index) for index in taken] == [16] * 3
    assert len({tuple(index.tolist()) for index in taken}) == 3
    assert all(0 <= int(index.min()) <= int(index.max()) < 5 for index in taken)


def test_learning_leaves_the_model_as_it_is() -> None:
    """Weights, buffers, modes and gradients; a copy's statistics may move."""
    network = conv_net()
    network.bn1.train()
    before = copied(network.state_dict())
    learned_masks(network, *problem(), Config.load(nb_iter=4, n_rounds=2, batch_size=4))
    assert differing(network.state_dict(), before) == []
    assert network.bn1.training
    assert not network.bn2.training
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def test_masks_of_a_classifier_have_the_bare_network_s_names() -> None:
    network = Classifier(conv_net(), (0.5,) * 3, (0.25,) * 3).double()
    masks = learned_masks(network, *problem(), Config.load(nb_iter=1, n_rounds=1, batch_size=4))
    assert {name: len(mask) for name, mask in masks.items()} == {"bn1": 6, "bn2": 8}


def test_a_network_without_batchnorm_is_refused_in_a_line() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    for flags in ({}, {"n_rounds": 0}):
        with pytest.raises(UserError, match=r"^[^\n]*BatchNorm[^\n]*$"):
            purify(network, *problem(), Config.load(**flags))


# levels


def test_masks_are_rounded_to_four_decimals() -> None:
    """0.20004 counts as 0.2, 0.20006 as 0.2001; 0 is at most 0."""
    masks = {"bn": torch.tensor([0.0, 0.00004, 0.00006, 0.2, 0.20004, 0.20006, 0.9])}
    assert channels_up_to(masks, 0.0)["bn"].tolist() == [True, True] + [False] * 5
    assert channels_up_to(masks, 0.2)["bn"].tolist() == [True] * 5 + [False] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_at_a_level_is_pruned_at_it(dtype: torch.dtype) -> None:
    """At each of the 19 levels 0, 0.05 ... 0.9, whatever the rounding of float32."""
    levels = [number / 20 for number in range(19)]
    masks = {"bn": torch.tensor(levels, dtype=dtype)}
    for number, level in enumerate(levels):
        pruned = channels_up_to(masks, round(number * 0.05, 10))["bn"]
        assert pruned.tolist() == [other <= level for other in levels]


class Colours(nn.Module):
    """Three classes, one a colour: an image's logits are its three channels' means."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        nn.init.constant_(self.bn.bias, 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn(images).mean(dim=(2, 3))


def coloured(count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is of the pure colour i mod 3, which is its label."""
    labels = torch.arange(count) % 3
    images = F.one_hot(labels, 3).double().view(-1, 3, 1, 1).expand(-1, 3, 2, 2)
    return images.contiguous(), labels


@dataclasses.dataclass
class Outcome:
    """What a selection came to, and on what the masks were learned."""

    pruned: nn.Module
    loop: Loop
    images: torch.Tensor
    labels: torch.Tensor

    @property
    def weights(self) -> list[float]:
        return self.pruned.bn.weight.tolist()


def selected(masks: list[float], **flags: Any) -> Outcome:
    """`pruned_by_masks` with masks that are given.

    A silenced colour gives its shift, 0.5, less than the 1.5 of a colour that is there; all else
    gives 0.5, too. So its images have equal logits, and the first class wins: those of class 0 stay
    right. The accuracies are 1, without colour 0, and a third less for each of the others.
    """
    given = []

    def learn(
        model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config, loop: Loop
    ) -> Tensors:
        given.append((images, labels))
        return {"bn": torch.tensor(masks, dtype=torch.float64)}

    loop = Loop()
    network = Colours().double().eval()
    pruned = pruned_by_masks(network, *coloured(), Config.load(**flags), loop, learn)
    ((images, labels),) = given
    return Outcome(pruned, loop, images, labels)


def test_a_fixed_level_is_taken_and_all_images_are_fitted() -> None:
    outcome = selected([0.2, 0.20006, 0.1], selection="fixed", pruning_number=0.2)
    assert outcome.weights == [0, 1, 0]
    assert torch.equal(outcome.images, coloured()[0])
    assert torch.equal(outcome.labels, coloured()[1])
    assert outcome.loop.findings.facts == {
        "level": 0.2,
        "channels": 3,
        "pruned_channels": 2,
        "pruned": {"bn": [0, 2]},
    }
    assert outcome.loop.findings.tables == {
        "pruned": [{"layer": "bn", "channel": 0}, {"layer": "bn", "channel": 2}]
    }


def test_the_last_level_before_accuracy_breaks_is_taken() -> None:
    """Masks 0, 0.3, 0.6. Levels 0 to 0.25 prune colour 0, which costs nothing; 0.3 costs a third.

    So 0.25 is taken, and nothing after 0.3 is tried.
    """
    outcome = selected([0.0, 0.3, 0.6], acc_ratio=0.05)
    assert outcome.weights == [0, 1, 1]
    rows = outcome.loop.findings.tables["levels"]
    assert [row["level"] for row in rows] == [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    assert [row["held_out_acc"] for row in rows] == pytest.approx([1] * 6 + [2 / 3])
    assert outcome.loop.findings.facts == {
        "held_out_images": 6,
        "held_out_acc_before": 1.0,
        "levels": [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3],
        "held_out_accs": pytest.approx([1] * 6 + [2 / 3]),
        "level": 0.25,
        "channels": 3,
        "pruned_channels": 1,
        "pruned": {"bn": [0]},
    }
    assert outcome.loop.findings.tables["pruned"] == [{"layer": "bn", "channel": 0}]


def test_accuracies_by_level_and_pruned_channels_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Level 0 prunes colour 0, which costs nothing, and level 0.5 a second one, and so a third."""
    with caplog.at_level(logging.INFO, "sau"):
        selected([0.0, 0.5, 0.6], pruning_step=0.5, acc_ratio=0.4)
        selected([0.0, 0.9, 0.6], selection="fixed", pruning_number=0.6)
    assert [record.message for record in caplog.records] == [
        "held-out accuracy 100.00 %; by level: 0: 100.00 %, 0.5: 66.67 %",
        "level 0.5: 2 of 3 channels pruned",
        "pruned of bn: 0, 1",
        "level 0.6: 2 of 3 channels pruned",
        "pruned of bn: 0, 2",
    ]


@pytest.mark.parametrize(
    ("acc_ratio", "level", "weights", "tried"),
    [(0.4, 0.55, [0, 0, 1], 13), (1.0, 0.9, [0, 0, 0], 19)],
)
def test_a_larger_loss_allows_a_higher_level(
    acc_ratio: float, level: float, weights: list[int], tried: int
) -> None:
    """The limits are 0.6, under which the third of level 0.6 falls, and 0: all 19 are good."""
    outcome = selected([0.0, 0.3, 0.6], acc_ratio=acc_ratio)
    assert outcome.loop.findings.facts["level"] == level
    assert outcome.weights == weights
    assert len(outcome.loop.findings.tables["levels"]) == tried


def test_the_levels_go_up_to_the_largest_one() -> None:
    """0, 0.3, 0.6, 0.9 and no more; 0.4 by 0.3 ends at 0.3. 0.3 / 0.1 is 2.9999999999999996."""
    for step, most, expected in (
        (0.3, 0.9, [0, 0.3, 0.6, 0.9]),
        (0.3, 0.4, [0, 0.3]),
        (0.1, 0.3, [0, 0.1, 0.2, 0.3]),
    ):
        outcome = selected([1.0] * 3, pruning_step=step, pruning_max=most)
        assert [row["level"] for row in outcome.loop.findings.tables["levels"]] == expected


def test_more_levels_than_masks_tell_apart_are_refused_before_the_work() -> None:
    with pytest.raises(UserError, match="--pruning_step: 1e-09 makes more than 10,000 levels"):
        selected([1.0] * 3, pruning_step=1e-9)


def test_masks_are_learned_beside_the_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten images of each colour two are held out; the accuracies are of these alone."""
    asked = []
    predict = pruning.predict

    def spy(model: nn.Module, images: torch.Tensor, *more: Any) -> torch.Tensor:
        asked.append(images)
        return predict(model, images, *more)

    monkeypatch.setattr(pruning, "predict", spy)
    outcome = selected([0.0, 0.3, 0.6], val_ratio=0.2)
    assert torch.bincount(outcome.labels).tolist() == [8, 8, 8]
    assert torch.equal(outcome.images.argmax(1)[:, 0, 0], outcome.labels)
    assert {len(images) for images in asked} == {6}


def test_where_no_level_is_good_the_model_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    """Masks of 0 for colours 1 and 2: already level 0 costs two thirds."""
    with caplog.at_level(logging.INFO, "sau"):
        outcome = selected([0.5, 0.0, 0.0], acc_ratio=0.05)
    assert differing(outcome.pruned.state_dict(), Colours().double().state_dict()) == []
    findings = outcome.loop.findings
    (warning,) = findings.warnings
    assert warning.startswith("no level of pruning kept the accuracy on held-out images")
    assert "\n" not in warning
    assert "level" not in findings.facts
    assert findings.facts["levels"] == [0.0]
    assert findings.facts["held_out_accs"] == [pytest.approx(1 / 3)]
    assert findings.tables["levels"] == [
        {"level": 0.0, "held_out_acc": pytest.approx(1 / 3)},
    ]
    assert "pruned" not in findings.tables
    assert "pruned" not in findings.facts


def test_without_held_out_images_no_level_is_good() -> None:
    """One image per class: none can be held out, and no mask is learned in vain."""
    network, loop = Colours().double().eval(), Loop()
    config = Config.load(val_ratio=0.2)
    pruned = pruned_by_masks(network, *coloured(3), config, loop, never_learned)
    assert pruned.bn.weight.tolist() == [1, 1, 1]
    assert loop.findings.warnings == [
        "no image can be held out, so no level can be chosen, and the model is given back as it "
        "was; give more images (--ratio)"
    ]


def never_learned(*_: Any) -> dict[str, torch.Tensor]:
    raise AssertionError("masks are learned, although no level can be chosen")


@pytest.mark.parametrize(("right", "said"), [(0, "0.00 %"), (1, "33.33 %")])
def test_a_model_no_better_than_a_single_class_cannot_choose(right: int, said: str) -> None:
    """Of six held-out images, two of each class, it labels none or those of one class right.

    Every level could pass there: one at which all images get the same class has two right, too.
    """
    network, loop = Colours().double().eval(), Loop()
    images, labels = coloured(30)
    wrong = torch.tensor([0, 2, 1] if right else [1, 2, 0])[labels]
    config = Config.load(val_ratio=0.2)
    pruned = pruned_by_masks(network, images, wrong, config, loop, never_learned)
    assert pruned.bn.weight.tolist() == [1, 1, 1]
    (warning,) = loop.findings.warnings
    assert warning.startswith(f"held-out accuracy is {said} (6 images)")
    assert "\n" not in warning
    assert "level" not in loop.findings.facts


def test_where_every_loss_is_accepted_such_a_model_is_pruned() -> None:
    network, loop = Colours().double().eval(), Loop()
    images, labels = coloured(30)
    config = Config.load(val_ratio=0.2, acc_ratio=1.0)
    masks = {"bn": torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)}
    pruned = pruned_by_masks(network, images, (labels + 1) % 3, config, loop, lambda *_: masks)
    assert pruned.bn.weight.tolist() == [0, 0, 0]
    assert loop.findings.warnings == []


@pytest.mark.parametrize(("prune_bias", "shift"), [(False, 0.5), (True, 0.0)])
def test_a_pruned_channel_gives_its_shift_or_nothing(prune_bias: bool, shift: float) -> None:
    outcome = selected([0.0, 1.0, 1.0], selection="fixed", prune_bias=prune_bias)
    with torch.no_grad():
        maps = outcome.pruned.bn(torch.rand(4, 3, 2, 2, dtype=torch.float64))
    assert maps[:, 0].unique().tolist() == [shift]
    assert outcome.pruned.bn.bias.tolist() == [shift, 0.5, 0.5]


# the whole defense


@pytest.mark.parametrize("selection", ["fixed", "val"])
def test_all_but_the_pruned_scales_is_the_model_s_bit_for_bit(selection: str) -> None:
    """Its statistics, too, although the masks were learned in train mode."""
    network = conv_net().train()
    before = copied(network.state_dict())
    config = Config.load(
        **{"nb_iter": 6, "n_rounds": 2, "batch_size": 6, "lr": 5.0, "crop_padding": 1},
        **{"selection": selection, "pruning_number": 0.5, "acc_ratio": 1.0},
    )
    loop = Loop()
    pruned = purify(network, *problem(count=20), config, loop)
    assert differing(network.state_dict(), before) == []
    assert network.training
    assert not any(module.training for module in pruned.modules())
    assert differing(pruned.state_dict(), before) == ["bn1.weight", "bn2.weight"]
    rows = loop.findings.tables["pruned"]
    assert len(rows) == loop.findings.facts["pruned_channels"] > 0
    for name in ("bn1", "bn2"):
        silent = [row["channel"] for row in rows if row["layer"] == name]
        expected = before[f"{name}.weight"].clone()
        expected[silent] = 0
        assert torch.equal(pruned.state_dict()[f"{name}.weight"], expected)


def test_the_masks_decide_which_channels_are_pruned() -> None:
    network = conv_net()
    images, labels = problem(count=20)
    config = Config.load(
        **{"nb_iter": 6, "n_rounds": 2, "batch_size": 6, "lr": 5.0, "selection": "fixed"},
        pruning_number=0.5,
    )
    masks = learned_masks(network, images, labels, config)
    pruned = purify(network, images, labels, config)
    for name, norm in norms(pruned).items():
        assert torch.equal(norm.weight == 0, channels_up_to(masks, 0.5)[name])


def test_masks_that_no_level_reaches_change_nothing() -> None:
    """Zero iterations leave all masks at 1."""
    network = conv_net()
    for flags in ({"nb_iter": 0}, {"n_rounds": 0}):
        for selection in ("fixed", "val"):
            pruned = purify(network, *problem(), Config.load(selection=selection, **flags))
            assert pruned is not network
            assert differing(pruned.state_dict(), network.state_dict()) == []


def test_two_runs_give_the_same_and_another_seed_does_not() -> None:
    images, labels = problem()
    flags = {"nb_iter": 4, "n_rounds": 2, "batch_size": 4}
    first, second, other = (
        learned_masks(copy.deepcopy(conv_net()), images, labels, Config.load(**flags, **seed))
        for seed in ({}, {}, {"random_seed": 1})
    )
    assert differing(first, second) == []
    assert differing(first, other) == ["bn1", "bn2"]


@pytest.mark.parametrize(("rounds", "silent"), [(0, False), (1, True)])
def test_a_level_of_one_prunes_all_but_after_no_round(rounds: int, silent: bool) -> None:
    flags = {"nb_iter": 1, "batch_size": 6, "selection": "fixed", "pruning_number": 1.0}
    pruned = purify(conv_net(), *problem(), Config.load(n_rounds=rounds, **flags))
    assert bool((pruned.bn1.weight == 0).all()) == silent
