"""i-BAU: the hypergradient of scalars and matrices by hand, one perturbation, and its rounds."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import ibau
from defense.ibau import Config, hypergradient, inner_loss, outer_loss, purify
from defense.ibau import universal_perturbation as perturb
from models import Classifier
from models.modes import twice_differentiable
from tests.networks import conv_net, copied, differing, problem
from utils.data.batches import augment
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop


def config(**changes: Any) -> Config:
    """Batches of 5, 5 and 2 images of which two, two and none are perturbed, in two rounds."""
    values = {"batch_size": 5, "crop_padding": 1, "random_seed": 3, "n_rounds": 2, "K": 3}
    values |= {"portion": 0.4, "lr": 1e-2, "wd": 0.01, "pert_lr": 0.5, "pert_decay": 0.1}
    return Config.load(**{**values, **changes})


def test_the_published_values_are_the_default() -> None:
    shipped = Config.load()
    assert (shipped.n_rounds, shipped.K, shipped.lr, shipped.wd) == (5, 5, 1e-4, 0.0)
    assert (shipped.adam_beta_1, shipped.adam_beta_2, shipped.amsgrad) == (0.9, 0.999, True)
    assert (shipped.portion, shipped.pert_lr, shipped.pert_decay) == (0.01, 10.0, 1e-3)
    assert (shipped.map_lr, shipped.batch_size, shipped.crop_padding) == (0.1, 256, 4)


# the hypergradient


def of_scalars(steps: int) -> float:
    """L_in = d^2 / 2 - w d, L_out = d^2 / 2 at d = w = 1, step 0.1."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    (found,) = hypergradient(
        lambda d: d.square() / 2,
        lambda d: d.square() / 2 - w * d,
        torch.ones((), dtype=torch.float64),
        [w],
        steps,
        0.1,
    )
    return float(found)


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, 0.0), (1, 0.1), (2, 0.19), (5, 0.40951), (1000, 1.0)]
)
def test_the_hypergradient_of_scalars(steps: int, expected: float) -> None:
    """Phi = 0.9 d + 0.1 w, so v = 1, 1.9, 2.71, 3.439, 4.0951, ... to 10, and the end is 0.1 v.

    With d* = w the outer loss is w^2 / 2, whose derivative is 1.
    """
    assert of_scalars(steps) == pytest.approx(expected, rel=1e-9)


def test_the_hypergradient_of_matrices() -> None:
    """L_in = d' A d / 2 - d' B w, L_out = |d - c|^2 / 2 + w' e: A, B and three steps written out.

    dPhi/dd = 1 - s A (A symmetric), dPhi/dw = s B; v_3 = (1 + M + M^2) (d - c), M = 1 - s A.
    """
    torch.manual_seed(0)
    a, b = torch.randn(4, 4).double(), torch.randn(4, 3).double()
    a = a @ a.T / 4
    c, e, d = torch.randn(4).double(), torch.randn(3).double(), torch.randn(4).double()
    w = torch.randn(3).double().requires_grad_()
    spare = torch.randn(2).double().requires_grad_()
    found, unused = hypergradient(
        lambda d: (d - c).square().sum() / 2 + w @ e,
        lambda d: d @ a @ d / 2 - d @ b @ w,
        d,
        [w, spare],
        3,
        0.2,
    )
    m = torch.eye(4).double() - 0.2 * a
    v = (torch.eye(4).double() + m + m @ m) @ (d - c)
    assert torch.allclose(found, e + 0.2 * b.T @ v, rtol=0, atol=1e-12)
    assert unused.tolist() == [0, 0]
    assert not found.requires_grad


def test_the_losses_are_called_once_and_the_arguments_stay() -> None:
    calls: list[str] = []
    w, d = torch.ones(2, requires_grad=True), torch.ones(2)

    def noted(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def loss(delta: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return value(delta)

        return loss

    outer = noted("outer", lambda d: d.square().sum())
    hypergradient(outer, noted("inner", lambda d: (d * w).square().sum()), d, [w], 7, 0.1)
    assert sorted(calls) == ["inner", "outer"]
    assert w.grad is None
    assert not d.requires_grad
    assert d.tolist() == [1, 1]


def test_the_iteration_ends_once_v_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way from the perturbation to the outer loss at once: v is 0 and stays so."""
    counted: list[Any] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **more: counted.append(a) or grad(*a, **more)
    )
    w = torch.ones((), requires_grad=True)
    (found,) = hypergradient(
        lambda d: w.square(), lambda d: d.square() - w * d, torch.ones(()), [w], 1000, 0.1
    )
    assert float(found) == 2
    assert len(counted) == 4  # of both losses, one iteration, and for the weights


# the perturbation


class Linear(nn.Module):
    """The logit of class 0 is s times the pixels' sum, that of class 1 is 0."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.slope * images.sum(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_two_steps_of_the_perturbation_by_hand() -> None:
    """One pixel of 0.5, of which h's label is 0: CE = ln(1 + e^-(0.5 + d)), L_in = -CE + 0.1 d^2.

    Its slope is s(-(0.5 + d)) + 0.2 d, s the logistic function. From 0 with step 2: d = -0.7551,
    then for the image 0.8: -0.7551 - 2 (s(-0.0449) - 0.1510) = -1.4306.
    """
    batches = [torch.full((1, 1, 1, 1), value).double() for value in (0.5, 0.8)]
    first = -2 * logistic(-0.5)
    second = first - 2 * (logistic(-(0.8 + first)) + 0.2 * first)
    for count, expected in ((1, first), (2, second)):
        found = perturb(Linear(), batches[:count], config(pert_lr=2.0))
        assert found.shape == (1, 1, 1, 1)
        assert not found.requires_grad
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_labels_are_the_network_s_own() -> None:
    """With slope -1 the label of 0.5 is 1: CE = ln(1 + e^-(0.5 + d)) again, as for class 0."""
    batches = [torch.full((1, 1, 1, 1), 0.5).double()]
    found = perturb(Linear(-1.0), batches, config(pert_lr=2.0))
    assert float(found) == pytest.approx(-2 * logistic(-0.5), rel=1e-6)


def test_a_classifier_s_perturbation_is_in_pixels() -> None:
    """Deviation 0.25, mean 0.1: the network sees 1.6 + d, and 0.25 d is what the pixels get."""
    model = Classifier(Linear(), (0.1,), (0.25,)).double()
    batches = [torch.full((1, 1, 1, 1), 0.5).double()]
    found = perturb(model, batches, config(pert_lr=2.0))
    assert float(found) == pytest.approx(0.25 * -2 * logistic(-1.6), rel=1e-6)


def test_one_perturbation_is_for_all_images_and_is_not_bounded() -> None:
    """The mean of both images' gradients, far beyond [0, 1]."""
    images = torch.tensor([0.5, 0.8]).double().view(2, 1, 1, 1)
    found = perturb(Linear(), [images], config(pert_lr=100.0))
    expected = -100 * (logistic(-0.5) + logistic(-0.8)) / 2
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert expected < -30


def test_a_perturbation_leaves_the_model_as_it_was() -> None:
    """It is used in eval mode: weights, buffers, modes and gradients stay."""
    network = conv_net().train()
    before = copied(network.state_dict())
    images, _ = problem()
    found = perturb(network, images.split(5), config())
    assert differing(network.state_dict(), before) == []
    assert all(module.training for module in network.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
    assert torch.equal(found, perturb(network.eval(), images.split(5), config()))


# the two losses


def test_the_losses_by_hand() -> None:
    """Slope 1, deviation 0.5 and mean 0: pixels 0.2 and 0.4 are 0.4 and 0.8 in the network.

    d = 0.3 goes to both in the inner loss, and to the second alone in the outer one.
    """
    model = Classifier(Linear(), (0.0,), (0.5,)).double()
    images = torch.tensor([0.2, 0.4]).double().view(2, 1, 1, 1)
    labels, delta = torch.tensor([0, 1]), torch.full((1, 1, 1, 1), 0.3).double()

    def ce(logits: list[float]) -> float:
        pairs = torch.tensor([[value, 0.0] for value in logits]).double()
        return float(F.cross_entropy(pairs, labels))

    inner = inner_loss(model, images, labels, delta, config(pert_decay=0.5))
    assert float(inner.detach()) == pytest.approx(0.5 * 0.09 - ce([0.7, 1.1]), rel=1e-6)
    for perturbed, logits in (([1], [0.4, 1.1]), ([], [0.4, 0.8]), ([1, 0], [0.7, 1.1])):
        chosen = torch.tensor(perturbed, dtype=torch.int64)
        outer = outer_loss(model, images, labels, delta, chosen)
        assert float(outer.detach()) == pytest.approx(ce(logits), rel=1e-6)


# second derivatives


class Attention(nn.Module):
    """Attention among the rows of an image, as torch fuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.mean(1, keepdim=True)
        return self.linear(F.scaled_dot_product_attention(rows, rows, rows).mean(dim=(1, 2)))


def test_a_network_with_attention_unlearns() -> None:
    """Fused attention has no second derivative; it goes the plain way here."""
    network = Attention().double()
    found = purify(network, *problem(), config())
    assert not torch.equal(found.linear.weight, network.linear.weight)


def test_inside_a_classifier_has_no_autocast_and_then_its_own_again() -> None:
    model = Classifier(conv_net().float(), (0.5,) * 3, (0.25,) * 3)
    model.precision = "bf16"
    images = problem()[0].float()
    half = model(images)
    with twice_differentiable(model):
        full = model(images)
        assert model.precision == "fp32"
    assert model.precision == "bf16"
    assert torch.equal(model(images), half)
    assert not torch.equal(half, full)
    model.precision = "fp32"
    assert torch.equal(model(images), full)


def test_the_bf16_of_a_run_changes_nothing() -> None:
    """The result has the precision of the model that was given."""
    images, labels = problem()
    results = []
    for precision in ("fp32", "bf16"):
        model = Classifier(conv_net().float(), (0.5,) * 3, (0.25,) * 3)
        model.precision = precision
        result = purify(model, images.float(), labels, config())
        assert result.precision == precision
        results.append(result.state_dict())
    assert differing(*results) == []


# the whole defense


def literal_unlearning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """The rounds written out; the hypergradient by the whole matrices, Adam (amsgrad) by hand."""
    model = copy.deepcopy(model).eval()
    weights = list(model.parameters())
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(3)]
    generators = {
        name: generator(config.random_seed, name)
        for name in ("batches", "augmentation", "perturbed images", "cached batches")
    }
    generators["crops"] = generator(config.random_seed, "augmentation of the cached batches")

    def batches(order: str, crops: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shuffled = torch.randperm(len(images), generator=generators[order])
        return [
            (
                augment(images[i], config.crop_padding, config.flip, generators[crops]),
                labels[i],
            )
            for i in shuffled.split(config.batch_size)
        ]

    cached = batches("cached batches", "crops")
    step = 0
    for _ in range(config.n_rounds):
        delta = torch.zeros(1, *images.shape[1:], dtype=images.dtype)
        for x, _ in batches("batches", "augmentation"):
            d = delta.clone().requires_grad_()
            loss = F.cross_entropy(model(x + d), model(x).argmax(1))
            (g,) = torch.autograd.grad(config.pert_decay * d.square().sum() - loss, d)
            delta = delta - config.pert_lr * g
        torch.randperm(len(cached), generator=generators["batches"])  # the loop's own draw
        for x, y in cached:
            count = int(config.portion * len(x))
            chosen = torch.randperm(len(x), generator=generators["perturbed images"])[:count]
            d = delta.clone().requires_grad_()
            stamped = torch.cat([x[[i]] + d if i in chosen else x[[i]] for i in range(len(x))])
            direct = torch.autograd.grad(
                F.cross_entropy(model(stamped), y), [d, *weights], materialize_grads=True
            )
            (x1, y1) = cached[0]
            decay = config.pert_decay * d.square().sum()
            inner = -F.cross_entropy(model(x1 + d), y1) + decay
            (slope,) = torch.autograd.grad(inner, d, create_graph=True)
            slope = slope.flatten()

            def row(i: int, slope: Any = slope, d: Any = d) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(slope[i], [d, *weights], retain_graph=True)

            rows = [row(i) for i in range(len(slope))]
            into_d = torch.stack([r[0].flatten() for r in rows])
            v = torch.zeros(len(slope)).double()
            for _ in range(config.K):
                v = v - config.map_lr * into_d.T @ v + direct[0].flatten()
            step += 1
            for k, w in enumerate(weights):
                into_w = torch.stack([r[k + 1].flatten() for r in rows])
                g = direct[k + 1] - config.map_lr * (into_w.T @ v).view_as(w)
                g = g + config.wd * w.data
                first, second, most = (part[k] for part in moments)
                first.mul_(config.adam_beta_1).add_((1 - config.adam_beta_1) * g)
                second.mul_(config.adam_beta_2).add_((1 - config.adam_beta_2) * g * g)
                most.copy_(torch.maximum(most, second))
                root = (most / (1 - config.adam_beta_2**step)).sqrt() + 1e-8
                w.data -= config.lr * first / (1 - config.adam_beta_1**step) / root
    return model


@pytest.mark.parametrize("rounds", [1, 2])
def test_unlearning_follows_the_literal_procedure(rounds: int) -> None:
    network = conv_net(widths=(4, 5))
    images, labels = problem(side=6)
    flags = config(n_rounds=rounds, amsgrad=True, map_lr=0.3)
    found = purify(network, images, labels, flags)
    expected = literal_unlearning(network, images, labels, flags).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), atol=1e-9), name
    changed = set(differing(found.state_dict(), network.state_dict()))
    assert changed == {name for name, _ in network.named_parameters()}  # and no buffer


@pytest.mark.parametrize(
    "change",
    [{"K": 0}, {"K": 1}, {"portion": 0.8}, {"pert_lr": 5.0}, {"pert_decay": 1.0}, {"map_lr": 1.0}],
)
def test_each_flag_of_its_own_acts(change: dict[str, Any]) -> None:
    network = conv_net()
    usual = purify(network, *problem(), config())
    other = purify(network, *problem(), config(**change))
    assert "conv1.weight" in differing(usual.state_dict(), other.state_dict())


def test_portion_0_is_tuning_with_frozen_statistics_on_the_cached_batches() -> None:
    """Adam on plain cross-entropy, in eval mode, the same batches in each round."""
    network = conv_net()
    images, labels = problem()
    found = purify(network, images, labels, config(portion=0.0))
    tuned = copy.deepcopy(network).eval()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2, weight_decay=0.01, amsgrad=True)
    order = torch.randperm(12, generator=generator(3, "cached batches"))
    crops = generator(3, "augmentation of the cached batches")
    cached = [
        (augment(images[index], 1, True, crops), labels[index]) for index in order.split((5, 5, 2))
    ]
    for _ in range(2):
        for x, y in cached:
            optimizer.zero_grad()
            F.cross_entropy(tuned(x), y).backward()
            optimizer.step()
    for name, value in tuned.state_dict().items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), atol=1e-10), name


def test_a_portion_of_no_image_is_warned_of() -> None:
    loop = Loop()
    purify(conv_net(), *problem(), config(portion=0.19), loop)
    (warning,) = loop.findings.warnings
    assert "--portion: 0.19 of 5 images of a batch is none" in warning
    assert "at least 0.2" in warning
    for portion in (0.0, 0.2):
        loop = Loop()
        purify(conv_net(), *problem(), config(portion=portion), loop)
        assert loop.findings.warnings == []


def test_the_share_of_a_batch_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    counts = []
    outer = ibau.outer_loss

    def counted(*values: Any) -> torch.Tensor:
        counts.append(len(values[-1]))
        return outer(*values)

    monkeypatch.setattr(ibau, "outer_loss", counted)
    purify(conv_net(), *problem(count=100), config(portion=0.29, batch_size=100, n_rounds=1))
    assert set(counts) == {29}


def test_the_picture_has_the_perturbation_of_the_model_that_was_given() -> None:
    loop, network = Loop(), conv_net()
    images, labels = problem()
    purify(network, images, labels, config(), loop)
    picture = loop.findings.pictures["perturbation"]
    order, crops = generator(3, "batches"), generator(3, "augmentation")
    batches = [
        augment(images[index], 1, True, crops)
        for index in torch.randperm(12, generator=order).split(5)
    ]
    expected = perturb(network, batches, config()).float().expand(8, -1, -1, -1)
    difference = picture.rows["perturbed"] - picture.rows["clean"]
    assert torch.allclose(difference, expected, atol=1e-6)


def test_a_frozen_weight_stays_and_a_frozen_network_is_refused() -> None:
    network = conv_net()
    network.conv1.weight.requires_grad_(False)
    found = purify(network, *problem(), config())
    assert torch.equal(found.conv1.weight, network.conv1.weight)
    assert not torch.equal(found.conv2.weight, network.conv2.weight)
    with pytest.raises(UserError, match=r"^the network has no weight that may be trained[^\n]*$"):
        purify(conv_net().requires_grad_(False), *problem(), config())
