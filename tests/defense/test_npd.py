"""NPD: targets, perturbations and losses by hand; its rounds against a literal transcription."""

import copy
import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import npd
from defense.npd import Config, polarizer_loss, purify, target_labels, targeted_perturbation
from models import Classifier
from models.changes import Polarizer, changes_of
from models.preactresnet import PreActResNet
from tests.networks import ConvNet, conv_net, copied, differing, problem
from tests.tuning import Momentum
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop

State = dict[str, torch.Tensor]

# targets


def test_the_target_is_the_most_likely_other_label() -> None:
    """Logits (2, 5, 1): beside label 1 it is 0, beside 0 it is 1, beside 2 it is 1."""
    logits = torch.tensor([[2.0, 5.0, 1.0]] * 3)
    before = logits.clone()
    found = target_labels(logits, torch.tensor([1, 0, 2]))
    assert found.tolist() == [0, 1, 1]
    assert found.dtype == torch.int64
    assert torch.equal(logits, before)


def test_the_true_label_s_logit_is_taken_for_minus_ten() -> None:
    """Others of -9 are above it; of -20 and -30 they are not, and the label is its own target."""
    logits = torch.tensor([[-9.0, 5.0, -30.0], [-20.0, 5.0, -30.0]])
    assert target_labels(logits, torch.tensor([1, 1])).tolist() == [0, 1]


# perturbations


class Brightness(nn.Module):
    """Class 1 wins where the mean of an image is over a half: logits (0.5, mean) times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        mean = images.mean(dim=(1, 2, 3))
        return self.factor * torch.stack([torch.full_like(mean, 0.5), mean], dim=1)


def grey(*values: float, side: int = 4) -> torch.Tensor:
    """An image of each value."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def to_one(images: torch.Tensor, model: nn.Module | None = None, **flags: Any) -> torch.Tensor:
    """The perturbation towards class 1, without a bound unless given one."""
    config = Config.load(**{"norm_type": "Reg", "adv_lr": 0.1, **flags})
    targets = torch.ones(len(images), dtype=torch.int64)
    return targeted_perturbation(model or Brightness(), images, targets, config)


def values_of(delta: torch.Tensor) -> list[float]:
    """The value of each image, which is the same in all its pixels."""
    assert torch.equal(delta, delta[:, :1, :1, :1].expand_as(delta))
    return delta[:, 0, 0, 0].tolist()


def test_a_sign_step_is_projected_onto_the_ball() -> None:
    """0.1 sqrt(3072) = 5.5426; a radius of 3 leaves 3 / sqrt(3072) = 0.0541266 in each pixel."""
    images = grey(0.2, side=32)
    free = to_one(images, inner_steps=1)
    assert float(free.norm()) == pytest.approx(5.5426, abs=1e-4)
    bound = to_one(images, inner_steps=1, norm_type="L2", trigger_norm=3.0)
    assert float(bound.norm()) == pytest.approx(3.0)
    assert values_of(bound) == pytest.approx([0.0541266], abs=1e-7)
    inside = to_one(images, inner_steps=1, norm_type="L2", trigger_norm=6.0)
    assert values_of(inside) == pytest.approx([0.1])


def test_each_image_is_projected_by_itself() -> None:
    """Norms 0.1 sqrt(48) = 0.6928 each; of the batch of two it would be 0.98, over the radius."""
    delta = to_one(grey(0.1, 0.2), inner_steps=1, norm_type="L2", trigger_norm=0.7)
    assert values_of(delta) == pytest.approx([0.1, 0.1])


def test_the_published_values_are_the_default() -> None:
    """Two steps of 0.1 by sign in the L2 ball of 3: onto 0.0541, then once more towards the same.

    0.0541266 + 0.1 has the norm 8.5, so it comes back to 0.0541266.
    """
    config = Config.load()
    assert (config.inner_steps, config.adv_lr, config.adv_sign) == (2, 0.1, True)
    assert (config.norm_type, config.trigger_norm) == ("L2", 3.0)
    targets = torch.ones(1, dtype=torch.int64)
    delta = targeted_perturbation(Brightness(), grey(0.2, side=32), targets, config)
    assert values_of(delta) == pytest.approx([0.0541266], abs=1e-7)


@pytest.mark.parametrize(
    ("values", "steps", "calls"),
    [
        ([0.45] * 4 + [0.1], 1, 2),  # four of five are more than 60 %
        ([0.45] * 3 + [0.1] * 2, 5, 5),  # three are not
        ([0.35] * 5, 2, 3),
        ([0.7] * 5, 1, 2),  # there from the start, but asked only after a step
    ],
)
def test_the_steps_end_once_more_than_60_percent_get_there(
    values: list[float], steps: int, calls: int
) -> None:
    """Each step adds 0.1 to each image; at most five are allowed."""
    model = Brightness()
    delta = to_one(grey(*values), model, inner_steps=5)
    assert values_of(delta) == pytest.approx([0.1 * steps] * 5)
    assert model.calls == calls


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_there_are_at_most_so_many_steps(steps: int) -> None:
    delta = to_one(grey(0.05, 0.05), inner_steps=steps)
    assert values_of(delta) == pytest.approx([0.1 * steps] * 2)


def test_the_plain_gradient_by_hand() -> None:
    """Two images of 48 values and means 0.2 and 0.3, logits (0.5, mean): p1 = s(mean - 0.5).

    The mean loss has the gradient -(1 - p1) / 48 / 2 in each value of an image; the step is 0.1 of
    it.
    """
    delta = to_one(grey(0.2, 0.3), inner_steps=1, adv_sign=False)
    expected = [0.1 * (1 - 1 / (1 + math.exp(0.5 - mean))) / 48 / 2 for mean in (0.2, 0.3)]
    assert values_of(delta) == pytest.approx(expected, rel=1e-9)


def bright_corner(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of 0.1 with another value in the first pixel, and where that is."""
    images = grey(0.1, 0.1).clone()
    images[:, :, 0, 0] = value
    where = torch.zeros_like(images, dtype=torch.bool)
    where[:, :, 0, 0] = True
    return images, where


def test_what_is_clipped_has_no_gradient() -> None:
    """0.95 goes to 1.05 in the first step, is clipped and stays; for 0.1 two steps add up.

    Without the clip both would move by 0.2.
    """
    images, where = bright_corner(0.95)
    delta = to_one(images, inner_steps=2)
    assert delta[where].tolist() == pytest.approx([0.1] * 6)
    assert delta[~where].tolist() == pytest.approx([0.2] * (2 * 45))


def test_black_and_white_pixels_are_not_clipped() -> None:
    """0 and 1 are in [0, 1]: the first step moves them like any other pixel."""
    for value in (0.0, 1.0):
        images, _ = bright_corner(value)
        assert values_of(to_one(images, inner_steps=1)) == pytest.approx([0.1] * 2)


def test_a_loss_over_80_pulls_no_more() -> None:
    """Factor 1000: losses 1000 (0.5 - mean) of 100 and 60; the first image stays where it is."""
    delta = to_one(grey(0.4, 0.44), Brightness(1000.0), inner_steps=1)
    assert values_of(delta) == pytest.approx([0.0, 0.1])


def test_a_perturbation_leaves_the_model_as_it_is() -> None:
    """The mode that it has is used, and no weight gets a gradient."""
    images, labels = problem()
    config = Config.load(inner_steps=1)
    deltas = []
    for is_training in (False, True):
        network = conv_net().train(is_training)
        deltas.append(targeted_perturbation(network, images, labels, config))
        assert network.bn1.training == is_training
        assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert not torch.equal(*deltas)
    assert not any(delta.requires_grad for delta in deltas)
    assert deltas[0].dtype == torch.float64


# the loss


def losses(p: list[float], label: int, target: int, **flags: float) -> dict[str, float]:
    """Of one image with these probabilities on x'; on x they are (1/2, 1/4, ...), and o is 2."""
    adv_logits = torch.tensor([p], dtype=torch.float64).log()
    logits = torch.tensor([[0.5, *[0.5 / (len(p) - 1)] * (len(p) - 1)]], dtype=torch.float64).log()
    found = polarizer_loss(
        logits,
        adv_logits,
        torch.tensor([label]),
        torch.tensor([2]),
        torch.tensor([target]),
        Config.load(**flags),
    )
    return {name: float(value) for name, value in found.items()}


def test_the_losses_by_hand() -> None:
    """p' = 1/4 each: -ln(1.0001 - 0.25 + 1e-12) = 0.287549. CE(z, 0) = ln 2, CE(z', 2) = ln 4."""
    found = losses([0.25] * 4, label=0, target=1)
    assert list(found) == ["clean", "robust", "second", "target", "total"]
    assert found["clean"] == pytest.approx(math.log(2), rel=1e-12)
    assert found["robust"] == pytest.approx(math.log(4), rel=1e-12)
    assert found["second"] == pytest.approx(0.287549, abs=1e-6)
    assert found["target"] == pytest.approx(0.287549, abs=1e-6)
    assert found["second"] == pytest.approx(-math.log(1.0001 - 0.25 + 1e-12), rel=1e-12)


@pytest.mark.parametrize(("label", "p2"), [(1, 0.5), (0, 0.3), (2, 0.5)])
def test_the_second_label_is_the_first_one_where_that_is_wrong(label: int, p2: float) -> None:
    """p' = (0.5, 0.3, 0.2): the top one, unless it is the true label. t is a label of its own."""
    found = losses([0.5, 0.3, 0.2], label=label, target=2)
    assert found["second"] == pytest.approx(-math.log(1.0001 - p2), rel=1e-9)
    assert found["target"] == pytest.approx(-math.log(1.0001 - 0.2), rel=1e-9)


def test_a_probability_of_1_has_a_finite_loss() -> None:
    """-ln(0.0001 + 1e-12) = 9.21034."""
    found = losses([1.0, 0.0, 0.0], label=1, target=0)
    assert found["second"] == pytest.approx(9.21034, abs=1e-5)
    assert found["target"] == pytest.approx(9.21034, abs=1e-5)


def test_the_total_weighs_the_four_losses() -> None:
    """1, 0.4, 0.4, 0.4 as published; each weight is that of its own loss."""
    plain = losses([0.5, 0.3, 0.2], label=0, target=2)
    names = ("clean", "robust", "second", "target")
    published = plain["clean"] + 0.4 * (plain["robust"] + plain["second"] + plain["target"])
    assert plain["total"] == pytest.approx(published, rel=1e-12)
    for number, name in enumerate(names, 1):
        flags = {f"lmd{n}": 7.0 if n == number else 0.0 for n in (1, 2, 3, 4)}
        found = losses([0.5, 0.3, 0.2], label=0, target=2, **flags)
        assert found["total"] == pytest.approx(7 * plain[name], rel=1e-12)


def test_losses_are_means_over_images() -> None:
    adv_logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    labels, o, t = torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1, 1])
    found = polarizer_loss(logits, adv_logits, labels, o, t, Config.load())
    expected = {
        "clean": -(math.log(0.5) + math.log(0.1)) / 2,
        "robust": -(math.log(0.5) + math.log(0.6)) / 2,
        "second": -(math.log(0.7001) + math.log(0.4001)) / 2,
        "target": -(math.log(0.7001) + math.log(0.8001)) / 2,
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9)


# the whole defense


def config(**changes: Any) -> Config:
    """Batches of 5, 5 and 2; polarizers before conv2."""
    values = {"n_rounds": 2, "warm_epochs": 2, "batch_size": 5, "target_layer_name": "conv2"}
    values |= {"warm_lr": 0.05, "lr": 0.05, "wd": 0.01, "trigger_norm": 1.0, "random_seed": 3}
    return Config.load(**{**values, **changes})


def test_losses_without_a_weight_are_warned_of() -> None:
    said = (
        "--lmd1 and --lmd2 and --lmd3 and --lmd4 are 0, so no loss is left to learn "
        "from; give one of them more than 0"
    )
    for lmd4, count in ((0.0, 1), (0.1, 0)):
        loop = Loop()
        flags = config(n_rounds=1, warm_epochs=0, lmd1=0.0, lmd2=0.0, lmd3=0.0, lmd4=lmd4)
        purify(conv_net(), *problem(), flags, loop)
        assert loop.findings.warnings == [said][:count]


class Literal:
    """`ConvNet` with a polarizer before conv2, written out, and its training."""

    def __init__(self, host: ConvNet, flags: Config) -> None:
        self.host, self.flags = copy.deepcopy(host).eval(), flags
        double = torch.float64
        self.weights = [torch.eye(6, dtype=double), torch.ones(6).to(double), torch.zeros(6)]
        self.weights[2] = self.weights[2].to(double)
        self.mean, self.variance = torch.zeros(6, dtype=double), torch.ones(6, dtype=double)

    def __call__(self, x: torch.Tensor, mode: str = "eval") -> torch.Tensor:
        """In mode "eval", in "train", or in "keep": train mode without moving the statistics."""
        matrix, gamma, beta = self.weights
        x = self.host.bn1(self.host.conv1(x)).relu()
        x = torch.einsum("oi,nihw->nohw", matrix, x)
        mean, variance = self.mean, self.variance
        if mode != "eval":
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        if mode == "train":
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.variance = 0.9 * self.variance + 0.1 * x.var((0, 2, 3)).detach()

        def wide(values: torch.Tensor) -> torch.Tensor:
            return values.view(1, -1, 1, 1)

        x = (x - wide(mean)) / (wide(variance) + 1e-5).sqrt() * wide(gamma) + wide(beta)
        x = self.host.bn2(self.host.conv2(x)).relu()
        return self.host.linear(x.mean((2, 3)))

    def perturbation(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        flags, delta = self.flags, torch.zeros_like(x)
        for _ in range(flags.inner_steps):
            delta = delta.detach().requires_grad_()
            logits = self((x + delta).clamp(0, 1))
            each = -logits.log_softmax(1)[torch.arange(len(x)), t]
            (g,) = torch.autograd.grad(each.clamp(-80, 80).mean(), delta)
            delta = delta.detach() - flags.adv_lr * (g.sign() if flags.adv_sign else g)
            for i in range(len(delta)):
                delta[i] *= min(1.0, flags.trigger_norm / max(float(delta[i].norm()), 1e-300))
            there = self((x + delta).clamp(0, 1)).argmax(1) == t
            if float(there.double().mean()) > 0.6:
                break
        return delta.detach()

    def train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        flags = self.flags
        self.weights = [weight.requires_grad_() for weight in self.weights]
        warm_up = Momentum(self.weights, 0)
        sgd = Momentum(self.weights, flags.sgd_momentum, flags.wd)
        order = generator(flags.random_seed, "batches")
        for number in range(flags.warm_epochs + flags.n_rounds):
            for index in torch.randperm(len(images), generator=order).split(flags.batch_size):
                x, y = images[index], labels[index]
                if number < flags.warm_epochs:
                    loss = F.cross_entropy(self(x, "train"), y)
                    warm_up.step(torch.autograd.grad(loss, self.weights), flags.warm_lr)
                    continue
                z = self(x).detach()
                others = z.clone()
                others[torch.arange(len(x)), y] = -10
                t, o = others.argmax(1), z.argmax(1)
                adversarial = (x + self.perturbation(x, t)).clamp(0, 1)
                modes = ("train", "keep") if flags.polarizer_train else ("eval", "eval")
                z, z_adv = self(x, modes[0]), self(adversarial, modes[1])
                total = torch.zeros(())
                for i in range(len(x)):
                    p = z_adv[i].softmax(0)
                    first, second = p.argsort(descending=True)[:2].tolist()
                    y2 = second if first == int(y[i]) else first
                    total = total - flags.lmd1 * z[i].log_softmax(0)[y[i]]
                    total = total - flags.lmd2 * z_adv[i].log_softmax(0)[o[i]]
                    total = total - flags.lmd3 * (1.0001 - p[y2] + 1e-12).log()
                    total = total - flags.lmd4 * (1.0001 - p[t[i]] + 1e-12).log()
                sgd.step(torch.autograd.grad(total / len(x), self.weights), flags.lr)

    @property
    def state(self) -> State:
        matrix, gamma, beta = self.weights
        values = (matrix.detach().view(6, 6, 1, 1), gamma, beta, self.mean, self.variance)
        names = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("polarizer_train", [False, True])
@pytest.mark.parametrize("adv_sign", [False, True])
def test_the_polarizer_follows_the_literal_procedure(polarizer_train: bool, adv_sign: bool) -> None:
    """Two passes of warm-up, two of training; a plain gradient step is as long as a sign step."""
    network = conv_net()
    images, labels = problem()
    flags = config(
        **{"polarizer_train": polarizer_train, "adv_sign": adv_sign},
        **{"adv_lr": 0.1 if adv_sign else 30.0, "lmd2": 0.5, "lmd3": 0.3, "lmd4": 0.2},
    )
    found = purify(network, images, labels, flags).conv2.part.state_dict()
    literal = Literal(network, flags)
    literal.train(images, labels)
    for name, value in literal.state.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-9), name


def part_of(flags: Config) -> State:
    """The polarizer's weights and statistics at the end."""
    return purify(conv_net(), *problem(), flags).conv2.part.state_dict()


@cache
def usual_part() -> State:
    return part_of(config())


@pytest.mark.parametrize(
    "change",
    [
        {"warm_epochs": 0},
        {"warm_lr": 0.01},
        {"lr": 0.01},
        {"sgd_momentum": 0.0},
        {"wd": 0.0},
        {"inner_steps": 0},
        {"adv_lr": 0.01},
        {"trigger_norm": 0.2},
        {"lmd1": 0.0},
        {"lmd2": 0.0},
        {"lmd3": 0.0},
        {"lmd4": 0.0},
        {"polarizer_train": True},
        {"random_seed": 1},
    ],
)
def test_each_flag_acts(change: dict[str, Any]) -> None:
    """So that the transcription notices the lack of any."""
    assert "0.weight" in differing(usual_part(), part_of(config(**change)))


def test_only_the_polarizer_learns() -> None:
    """All weights and statistics of the host are the same bits, before and after."""
    network = conv_net().train()
    network.conv1.weight.requires_grad_(False)
    before = copied(network.state_dict())
    found = purify(network, *problem(), config())
    assert differing(network.state_dict(), before) == []
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())
    host = {
        name.replace("conv2.layer.", "conv2."): value
        for name, value in found.state_dict().items()
        if "polarizer" not in name
    }
    assert differing(host, before) == []
    wants = {name: weight.requires_grad for name, weight in found.named_parameters()}
    assert [name for name, wanted in wants.items() if not wanted] == ["conv1.weight"]
    assert all(weight.grad is None for weight in found.conv2.layer.parameters())
    fresh = Polarizer(6).double().state_dict()
    assert differing(found.conv2.part.state_dict(), fresh) == list(fresh)


def test_the_result_is_in_eval_mode() -> None:
    """Each of its modules, whatever the mode of the model that was given."""
    found = purify(conv_net().train(), *problem(), config())
    assert [name for name, module in found.named_modules() if module.training] == []


def test_the_warm_up_fills_the_statistics_and_the_rounds_do_not() -> None:
    """Three batches in each of two passes of warm-up: six updates; then eval mode for good."""
    for rounds in (1, 3):
        part = purify(conv_net(), *problem(), config(n_rounds=rounds)).conv2.part
        assert int(part[1].num_batches_tracked) == 6
    none = purify(conv_net(), *problem(), config(warm_epochs=0)).conv2.part
    assert int(none[1].num_batches_tracked) == 0
    assert none[1].running_mean.tolist() == [0.0] * 6


def test_a_clean_pass_alone_moves_the_statistics_in_train_mode() -> None:
    """Two rounds of three batches: six updates, not twelve."""
    flags = config(warm_epochs=0, polarizer_train=True)
    part = purify(conv_net(), *problem(), flags).conv2.part
    assert int(part[1].num_batches_tracked) == 6
    assert part[1].track_running_stats


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a polarizer was called."""

    is_training: bool
    keeps: bool
    learns: bool


@pytest.mark.parametrize("polarizer_train", [False, True])
def test_the_modes_of_each_pass(polarizer_train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial; then per batch: x without a gradient, two inner steps, and x and x' with one."""
    passes: list[Pass] = []

    def forward(part: Polarizer, features: torch.Tensor) -> torch.Tensor:
        tracks = part[1].track_running_stats
        passes.append(Pass(part.training, tracks, torch.is_grad_enabled()))
        assert part.training == part[1].training
        return nn.Sequential.forward(part, features)

    monkeypatch.setattr(Polarizer, "forward", forward, raising=False)
    monkeypatch.setattr(npd, "ENOUGH", 1.0)
    flags = config(warm_epochs=1, n_rounds=1, batch_size=12, polarizer_train=polarizer_train)
    purify(conv_net(), *problem(), flags)
    trial, warm_up, looked, *inner = passes[:-2]
    assert trial == Pass(False, True, False)
    assert warm_up == Pass(True, True, True)
    assert looked == Pass(False, True, False)
    assert inner == [Pass(False, True, True)] * 2
    assert passes[-2] == Pass(polarizer_train, True, True)
    assert passes[-1] == Pass(polarizer_train, False, True)


def test_phases_and_losses_are_logged() -> None:
    rows = []
    loop = Loop(lambda n, total, losses, _: rows.append((loop.phase, n, total, list(losses))))
    purify(conv_net(), *problem(), config(warm_epochs=1, n_rounds=2), loop)
    names = ["clean", "robust", "second", "target", "total"]
    assert rows == [("warm-up", 1, 1, ["loss"]), ("", 1, 2, names), ("", 2, 2, names)]


def test_at_its_start_a_polarizer_hardly_changes_a_model() -> None:
    """A learning rate near 0 leaves the identity, less sqrt(1 + 1e-5), in eval mode."""
    network = conv_net()
    images, _ = problem()
    flags = config(warm_epochs=0, lr=1e-30, wd=0.0)
    found = purify(network, images, torch.zeros(12, dtype=torch.int64), flags)
    with torch.no_grad():
        features = network.bn1(network.conv1(images)).relu() / math.sqrt(1 + 1e-5)
        features = network.bn2(network.conv2(features)).relu()
        expected = network.linear(features.mean(dim=(2, 3)))
        assert torch.allclose(found(images), expected, rtol=0, atol=1e-12)


def test_the_usual_layer_of_the_usual_network() -> None:
    """Before layer4.1.conv1, of as many channels as the last stage has; also in a `Classifier`."""
    torch.manual_seed(0)
    network = PreActResNet((2, 2, 2, 2), 4, widths=(4, 5, 6, 7))
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3)
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 4
    found = purify(model, images, labels, Config.load(n_rounds=1, warm_epochs=1, batch_size=6))
    assert changes_of(found.network) == [
        {"kind": "polarizer", "layer": "layer4.1.conv1", "channels": 7}
    ]
    assert changes_of(network) == []
    assert found(images).isfinite().all()


def test_uint8_images_are_taken_as_floats() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    labels = problem()[1]
    flags = config(adv_sign=False)
    from_bytes = purify(conv_net().float(), images, labels, flags).state_dict()
    from_floats = purify(conv_net().float(), images.float() / 255, labels, flags).state_dict()
    assert all(torch.allclose(from_bytes[n], from_floats[n], atol=1e-5) for n in from_bytes)


def test_without_rounds_the_model_is_as_it_was() -> None:
    network = conv_net()
    found = purify(network, *problem(), config(n_rounds=0))
    assert found is not network
    assert differing(found.state_dict(), network.state_dict()) == []


# networks without such a layer


class Tokens(nn.Module):
    """Rows of pixels as tokens, like a ViT's patches: (N, H, 3 W)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 24)
        self.unused = nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(24, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.mix(images.permute(0, 2, 1, 3).flatten(2))
        return self.linear(tokens.mean(1))


@pytest.mark.parametrize("name", ["mix", "linear", "unused"])
def test_a_layer_that_no_map_enters_is_refused_in_a_line(name: str) -> None:
    """A token layer, a layer of features, and one that is never called."""
    for rounds in (0, 1):
        flags = config(target_layer_name=name, n_rounds=rounds)
        with pytest.raises(UserError, match=rf"^--target_layer_name: [^\n]*{name}[^\n]*$"):
            purify(Tokens().double(), *problem(), flags)


class Dense(nn.Module):
    """Layers that take a list of maps, two maps, or whose padding the network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.added, self.padded = Listed(), Added(), nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.added(self.listed([images, images]), images)
        return self.linear(self.padded(x * self.padded.padding[0]).mean((2, 3)))


class Listed(nn.Module):
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return maps[0] + maps[1]


class Added(nn.Module):
    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one + other


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("listed", r"no map \(N, C, H, W\) enters listed"),
        ("added", r"before added \(TypeError: "),
        ("padded", r"before padded \(AttributeError: "),
    ],
)
def test_a_layer_that_takes_no_polarizer_is_refused_in_a_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^--target_layer_name: [^\n]*{said}[^\n]*$"):
        purify(Dense().double(), *problem(), config(target_layer_name=name))


@pytest.mark.parametrize("name", ["layer4.1.conv1", "conv3", "conv2.weight"])
def test_an_unknown_layer_is_refused_in_a_line(name: str) -> None:
    network = conv_net()
    with pytest.raises(UserError, match=rf"^--target_layer_name: {name} is no layer[^\n]*$"):
        purify(network, *problem(), config(target_layer_name=name))
    assert not any(module._forward_hooks for module in network.modules())
