"""SAU against its literal transcription, hand-derived values, and its public promises."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from defense import sau
from defense.sau import (
    Config,
    examples,
    held_out_measure,
    held_out_signals,
    jensen_shannon,
    purify,
    shared_losses,
    shared_perturbation,
    unlearning_loss,
    warn_of_loss,
)
from models import Classifier
from models.preactresnet import PreActResNet
from tests import oracle
from utils.errors import UserError
from utils.process.device import rows_of
from utils.process.seeds import generator
from utils.tensors import load_tensors
from utils.training.labelshare import Tally, add, label_share
from utils.training.loop import Loop
from utils.training.selection import hold_out

NORMS = {"L_inf": 0.2, "L1": 12.0, "L2": 1.2, "Reg": 0.2}
STARTS = ("zero", "random", "max", "min")


def small_network(seed: int, batch_norm: bool, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(6))
    layers += [nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(), nn.Flatten()]
    layers += [nn.Linear(8 * 3 * 3, classes)]
    network = nn.Sequential(*layers).double()
    if batch_norm:  # statistics that eval mode must use
        network[1].running_mean.normal_(0, 0.2)
        network[1].running_var.uniform_(0.5, 2)
        nn.init.uniform_(network[1].weight, 0.5, 2)
    for weight in network.parameters():
        weight.data *= 2  # decisive enough that some images are fooled and some are shared
    return network


def problem(seed: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1000 + seed)
    return torch.rand(count, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (count,))


def models(seed: int, batch_norm: bool) -> tuple[nn.Module, nn.Module]:
    """A reference and a model that has moved away from it a little."""
    reference = small_network(seed, batch_norm)
    model = copy.deepcopy(reference)
    torch.manual_seed(2000 + seed)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model, reference


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_perturbation_equals_the_transcription_exactly(
    norm: str, start: str, batch_norm: bool
) -> None:
    for seed in range(3):
        model, reference = models(seed, batch_norm)
        images, labels = problem(seed)
        config = Config.load(norm_type=norm, pgd_init=start, trigger_norm=NORMS[norm], adv_lr=0.1)
        delta = shared_perturbation(
            model, reference, images, labels, config, generator=generator(seed, "x")
        )
        expected = oracle.perturbation(
            model,
            reference,
            images,
            labels,
            norm=norm,
            start=start,
            bound=NORMS[norm],
            step=0.1,
            steps=config.adv_steps,
            beta_1=config.beta_1,
            beta_2=config.beta_2,
            generator=generator(seed, "x"),
        )
        assert delta.dtype == torch.float64
        assert torch.equal(delta, expected)


def test_the_comparison_exercises_all_three_kinds_of_example() -> None:
    """Shared, differently fooled, and not fooled images all occur."""
    kinds = set()
    for seed in range(3):
        model, reference = models(seed, batch_norm=True)
        model.eval()
        reference.eval()
        images, labels = problem(seed)
        for steps in (0, 1, 5):
            config = Config.load(adv_steps=steps, adv_lr=0.1)
            changed = images + shared_perturbation(model, reference, images, labels, config)
            now, clean = model(changed).argmax(1), model(images).argmax(1)
            ref_now, ref_clean = reference(changed).argmax(1), reference(images).argmax(1)
            for a, b, c, d in zip(now, clean, ref_now, ref_clean, strict=True):
                kinds.add((bool(a != b), bool(c != d), bool(a == c)))
    assert {(True, True, True), (True, True, False)} <= kinds
    assert any(not fooled for fooled, _, _ in kinds)


def test_known_reference_predictions_change_nothing() -> None:
    model, reference = models(0, batch_norm=True)
    reference.eval()
    images, labels = problem(0)
    config = Config.load()
    known = shared_perturbation(
        model, reference, images, labels, config, ref_predictions=reference(images).argmax(1)
    )
    assert torch.equal(known, shared_perturbation(model, reference, images, labels, config))


@pytest.mark.parametrize(("norm", "order"), [("L_inf", math.inf), ("L1", 1), ("L2", 2)])
def test_perturbation_stays_within_the_bound(norm: str, order: float) -> None:
    model, reference = models(1, batch_norm=False)
    images, labels = problem(1)
    config = Config.load(norm_type=norm, trigger_norm=0.7)
    delta = shared_perturbation(model, reference, images, labels, config)
    assert torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1).max() <= 0.7 + 1e-12


def test_with_the_published_values_the_perturbation_takes_three_values() -> None:
    """Start +0.2, step 0.2, bound 0.2: only -0.2, 0 and +0.2 can be reached."""
    model, reference = models(2, batch_norm=False)
    images, labels = problem(2)
    delta = shared_perturbation(model, reference, images, labels, Config.load())
    nearest = (delta / 0.2).round()
    assert torch.allclose(delta, 0.2 * nearest, atol=1e-12)
    assert nearest.unique().tolist() != [1.0]  # it moved


def test_perturbation_restores_modes_and_leaves_no_gradient() -> None:
    model, reference = models(0, batch_norm=True)
    model.train()
    reference.eval()
    images, labels = problem(0)
    shared_perturbation(model, reference, images, labels, Config.load())
    assert model.training
    assert model[1].training
    assert not reference.training
    assert all(weight.grad is None for weight in [*model.parameters(), *reference.parameters()])


@pytest.mark.parametrize("lmd", [(1.0, 0.0, 1.0), (0.3, 0.7, 2.0)])
def test_losses_and_gradients_equal_the_transcription(lmd: tuple[float, float, float]) -> None:
    config = Config.load(lmd_1=lmd[0], lmd_2=lmd[1], lmd_3=lmd[2])
    for seed in range(5):
        torch.manual_seed(seed)
        labels = torch.randint(0, 5, (16,))
        ref = 4 * torch.randn(16, 5, dtype=torch.float64)
        ref_adv = ref + 4 * torch.randn(16, 5, dtype=torch.float64)
        # Large logits reach both clamps.
        ours = [(8 * torch.randn(16, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]
        theirs = [logits.detach().clone().requires_grad_() for logits in ours]
        found = unlearning_loss(ours[0], ours[1], ref, ref_adv, labels, config)
        expected = oracle.losses(theirs[0], theirs[1], ref, ref_adv, labels, lmd)
        assert list(found) == ["clean", "adversarial", "shared", "total"]
        for name in found:
            assert abs(found[name].item() - expected[name].item()) < 1e-10
        assert found["shared"].item() > 0
        found["total"].backward()
        expected["total"].backward()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-10)


def test_a_two_class_case_by_hand() -> None:
    """One image, true label 0, h_bd flips it to 1.

    h gives probabilities (3/4, 1/4) on x: L_cl = -log 3/4. On x + d (1/5, 4/5): cross-entropy
    -log 1/5, and L_sar = -(log(1e-6 + 0.2) + log(1 + 1e-6 - 0.8)) / 2 = -log(0.200001).
    """

    def logits(*probabilities: float) -> torch.Tensor:
        return torch.tensor([probabilities], dtype=torch.float64).log()

    label = torch.tensor([0])
    config = Config.load()
    flipped = unlearning_loss(
        logits(0.75, 0.25), logits(0.2, 0.8), logits(0.9, 0.1), logits(0.3, 0.7), label, config
    )
    assert math.isclose(flipped["clean"], -math.log(0.75), rel_tol=1e-12)
    assert math.isclose(flipped["adversarial"], -math.log(0.2), rel_tol=1e-12)
    assert math.isclose(flipped["shared"], -math.log(0.200001), rel_tol=1e-12)
    assert math.isclose(flipped["total"], -math.log(0.75) - math.log(0.200001), rel_tol=1e-12)
    # h_bd keeps its clean label on x + d: the image does not count.
    kept = unlearning_loss(
        logits(0.75, 0.25), logits(0.2, 0.8), logits(0.9, 0.1), logits(0.6, 0.4), label, config
    )
    assert float(kept["shared"]) == 0
    # h_bd was wrong before and says the same on x + d: not fooled by d, so it does not count.
    wrong = unlearning_loss(
        logits(0.75, 0.25), logits(0.2, 0.8), logits(0.1, 0.9), logits(0.3, 0.7), label, config
    )
    assert float(wrong["shared"]) == 0


@pytest.mark.parametrize("exact_sar", [False, True])
def test_the_gradient_of_sar_stops_below_a_thousandth(exact_sar: bool) -> None:
    """p = 0.0009: both clamps hold, so L_sar is constant; at p = 0.0011 it still pulls."""
    config = Config.load(lmd_1=0.0, exact_sar=exact_sar)
    for p, moves in ((0.0009, False), (0.0011, True)):
        adv = torch.tensor([[1 - p, p]], dtype=torch.float64).log().requires_grad_()
        ref = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        found = unlearning_loss(ref, adv, ref, ref.flip(1), torch.tensor([0]), config)
        found["shared"].backward()
        assert bool(adv.grad.abs().max() > 0) == moves


def test_exact_sar_by_hand() -> None:
    """-log(1 - p_t), of which the derivative by the logit of t is p_t, and by another one minus its
    part of 1 - p_t: with probabilities (0.2, 0.7, 0.1) and t = 1 these are -2/3, 0.7, -1/3 times
    0.7. With a logit of 60 in single precision p_t is 1: the loss is 60 - log(e^1 + e^2), and its
    gradient is whole. The published one is at its end, -log(1e-6), and has none.
    """
    mild = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64).log().requires_grad_()
    loss = shared_losses(mild, torch.tensor([1]), is_exact=True)
    assert math.isclose(loss.item(), -math.log(0.3), rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), mild)
    expected = torch.tensor([[-1.4 / 3, 0.7, -0.7 / 3]], dtype=torch.float64)
    assert torch.allclose(gradient, expected, rtol=1e-12)

    certain = torch.tensor([[1.0, 60.0, 2.0]], requires_grad=True)
    exact, published = (
        shared_losses(certain, torch.tensor([1]), is_exact=is_exact) for is_exact in (True, False)
    )
    assert math.isclose(exact.item(), 60 - math.log(math.e + math.e**2), rel_tol=1e-6)
    (gradient,) = torch.autograd.grad(exact.sum(), certain)
    share = 1 / (1 + math.e)
    assert torch.allclose(gradient, torch.tensor([[-share, 1.0, share - 1]]))
    assert math.isclose(published.item(), -math.log(1e-6), abs_tol=0.1)
    (gradient,) = torch.autograd.grad(published.sum(), certain)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_divergence_in_half_precision_is_that_of_the_same_logits(dtype: torch.dtype) -> None:
    """1e-8 is 0 in float16, and 1 - 1e-8 is 1 in both."""
    logits = torch.tensor([[30.0, 0, -5], [0.5, 0.25, 0]], dtype=dtype)
    other = logits.flip(1)
    for pair in ((logits, other), (logits, logits)):
        for function in (jensen_shannon,):
            found, expected = function(*pair), function(*(x.float() for x in pair))
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)


def test_jensen_shannon_by_hand() -> None:
    """Equal distributions: 0. One-hot on different classes: log 2, less the floor of 1e-8.

    (1/2, 1/2) against (1, 0): m = (3/4, 1/4); half of [1/2 log 2/3 + 1/2 log 2] plus half of
    log 4/3.
    """
    big = 200.0
    one, other = torch.tensor([[big, 0.0]]).double(), torch.tensor([[0.0, big]]).double()
    even = torch.zeros(1, 2).double()
    assert float(jensen_shannon(even, even)) == 0
    assert math.isclose(jensen_shannon(one, other), math.log(2), rel_tol=1e-6)
    expected = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    assert math.isclose(jensen_shannon(even, one), expected, rel_tol=1e-6)


def literal_unlearning(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, config: Config
) -> nn.Module:
    """Batches in order, the oracle's perturbation and losses, Adam with AMSGrad."""
    reference = copy.deepcopy(model).eval()
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, amsgrad=True)
    order = generator(config.random_seed, "batches")
    for _ in range(config.n_rounds):
        for index in torch.randperm(len(images), generator=order).split(config.batch_size):
            x, y = images[index], labels[index]
            delta = oracle.perturbation(
                model,
                reference,
                x,
                y,
                norm=config.norm_type,
                start=config.pgd_init,
                bound=config.trigger_norm,
                step=config.adv_lr,
                steps=config.adv_steps,
                beta_1=config.beta_1,
                beta_2=config.beta_2,
                generator=torch.Generator(),
            )
            for _ in range(config.outer_steps):
                if config.train_mode:
                    model.train()
                logits = model(torch.cat([x, x + delta]))
                model.eval()
                found = oracle.losses(
                    logits[: len(x)],
                    logits[len(x) :],
                    reference(x),
                    reference(x + delta),
                    y,
                    (config.lmd_1, config.lmd_2, config.lmd_3),
                )
                optimizer.zero_grad()
                found["total"].backward()
                optimizer.step()
    return model


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("outer_steps", [1, 2])
def test_purify_follows_the_literal_procedure(train_mode: bool, outer_steps: int) -> None:
    model = small_network(0, batch_norm=True)
    images, labels = problem(0)
    config = Config.load(
        n_rounds=4, batch_size=12, lr=1e-3, train_mode=train_mode, outer_steps=outer_steps
    )
    found = purify(model, images, labels, config).state_dict()
    expected = literal_unlearning(model, images, labels, config).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-9), name
    moved = found["1.running_mean"] - model.state_dict()["1.running_mean"]
    assert bool(moved.abs().max() > 0) == train_mode  # running statistics move in train mode alone


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_a_reference_that_mixes_images_are_those_of_the_batch(seed: int) -> None:
    """BatchNorm without running statistics; a batch has other ones than the first four images."""
    model = small_network(seed, batch_norm=True)
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    images, labels = problem(seed)
    config = Config.load(n_rounds=3, batch_size=4, lr=1e-2)
    found = purify(model, images, labels, config).state_dict()
    expected = literal_unlearning(model, images, labels, config).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-9), name


class Counted(nn.Sequential):
    """Keeps the sizes of the batches that it, or a copy, is called with."""

    sizes: ClassVar[list[int]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize("is_mixing", [False, True])
def test_a_reference_that_mixes_images_is_not_asked_about_all_of_them_first(
    is_mixing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its labels of all 12 are kept: two batches of 5, and the last one of 2."""
    monkeypatch.setattr(Counted, "sizes", [])
    norm = nn.BatchNorm2d(3, track_running_stats=not is_mixing).double()
    model = Counted(norm, small_network(0, batch_norm=False)).eval()
    purify(model, *problem(0), Config.load(n_rounds=0, batch_size=5))
    assert Counted.sizes.count(5) == (1 if is_mixing else 2)


def test_purify_leaves_its_model_untouched_and_moves_the_copy() -> None:
    model = small_network(3, batch_norm=True)
    model.train()
    before = copy.deepcopy(model.state_dict())
    images, labels = problem(3)
    purified = purify(model, images, labels, Config.load(n_rounds=2, batch_size=5))
    assert model.training
    assert not purified.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(purified[0].weight, model[0].weight)
    assert all(weight.requires_grad for weight in purified.parameters())


def test_purify_takes_uint8_images_and_repeats_itself() -> None:
    model = small_network(1, batch_norm=False).float()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 4, (10,))
    config = Config.load(n_rounds=2, batch_size=4, pgd_init="random")
    first, second = (purify(model, images, labels, config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    as_floats = purify(model, images.float() / 255, labels, config).state_dict()
    assert all(torch.allclose(first[name], as_floats[name], atol=1e-6) for name in first)


def test_signals_by_hand() -> None:
    """A linear model of two classes on single pixels, which is its own reference.

    Logits are (x, 0.5). Pixels 0.9, 0.8 and 0.2 are labelled 0, 1 and 1: two are right. With bound
    and start 0.35 and no step, delta is 0.35 everywhere: 0.55 is the only pixel that changes class.
    """
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        network[1].bias.copy_(torch.tensor([0.0, 0.5]))
    images = torch.tensor([0.9, 0.8, 0.2]).view(3, 1, 1, 1)
    labels = torch.tensor([0, 1, 1])
    config = Config.load(trigger_norm=0.35, adv_steps=0, batch_size=2, lmd_3=3.0)
    signals = held_out_signals(network, network, images, labels, config)
    assert signals["acc"] == pytest.approx(2 / 3)
    assert signals["share"] == pytest.approx(1 / 3)
    logits = [(0.9, 0.5, 0), (0.8, 0.5, 1), (0.2, 0.5, 1)]
    clean = [math.log(math.exp(a) + math.exp(b)) - (a, b)[label] for a, b, label in logits]
    assert signals["clean"] == pytest.approx(sum(clean) / 3, abs=1e-6)
    p = math.exp(0.55) / (math.exp(0.55) + math.exp(0.5))
    assert signals["shared"] == pytest.approx(-math.log(1 - p + 1e-6) / 3, abs=1e-6)
    assert signals["total"] == pytest.approx(signals["clean"] + 3 * signals["shared"], abs=1e-6)


def test_signals_of_images_that_only_the_model_is_fooled_on() -> None:
    """Logits (x, 0.5) and, of the reference, (x, 0.3), at 0.4 and at 0.4 + 0.35.

    The model's label goes from 1 to 0, which is the reference's label before and after. So it is no
    shared adversarial example.
    """
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(1, 2)) for _ in range(2)]
    for network, bias in zip(networks, (0.5, 0.3), strict=True):
        network[1].weight.data = torch.tensor([[1.0], [0.0]])
        network[1].bias.data = torch.tensor([0.0, bias])
    config = Config.load(trigger_norm=0.35, adv_steps=0)
    image, label = torch.full((1, 1, 1, 1), 0.4), torch.tensor([1])
    assert held_out_signals(*networks, image, label, config)["share"] == 0
    assert held_out_signals(networks[0], networks[0], image, label, config)["share"] == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_images_start_where_the_seed_says(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same places in each round."""
    started: list[torch.Tensor] = []

    def perturbation(*arguments: Any, **more: Any) -> torch.Tensor:
        started.append(shared_perturbation(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(sau, "shared_perturbation", perturbation)
    model, (images, labels) = small_network(0, batch_norm=True).eval(), problem(0)
    config = Config.load(pgd_init="random", adv_steps=0, random_seed=seed, batch_size=100)
    for _ in range(2):
        held_out_signals(model, model, images, labels, config)
    expected = shared_perturbation(
        model, model, images, labels, config, generator=generator(seed, "held-out perturbation")
    )
    assert torch.equal(started[0], expected)
    assert torch.equal(started[1], expected)


def test_what_stop_auto_decides_by() -> None:
    """Of 100 images, 20 are wrong and 10 shared: 0.3, and the error of two shares of 100 images."""
    value, error = held_out_measure({"acc": 0.8, "share": 0.1, "total": 9.0}, 100)
    assert value == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt((0.2 * 0.8 + 0.1 * 0.9) / 100))
    assert held_out_measure({"acc": 1.0, "share": 0.0}, 4) == (0.0, 0.0)
    assert held_out_measure({"acc": 0.5, "share": 0.5}, 4)[1] == pytest.approx(math.sqrt(0.125))


def test_stop_auto_goes_by_accuracy_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: 0.75, 0.375, 0.75, 0.5, 0.625, of four images with an error of up to 0.35.

    Round 2 has the smallest value, round 5 is within its error, and round 6 is not. Accuracy
    alone would keep round 3, and the share round 1. Patience would end it after round 5, but a
    fifth of all rounds is run in any case.
    """
    names = ("acc", "share", "clean", "shared", "total")
    rounds = [
        (0.25, 0.0, 0.1, 0.1, 0.1),
        (0.75, 0.125, 1.0, 2.0, 3.0),
        (1.0, 0.75, 0.1, 0.1, 0.1),
        (0.75, 0.25, 1.5, 0.5, 2.0),
        (0.75, 0.375, 0.5, 2.0, 2.5),
        (0.5, 0.5, 0.1, 0.1, 0.1),
    ]
    signals = iter([dict(zip(names, values, strict=True)) for values in rounds])
    monkeypatch.setattr(sau, "held_out_signals", lambda *_: next(signals))
    model, (images, labels), loop = small_network(2, batch_norm=True), problem(2), Loop()
    auto = Config.load(stop="auto", patience=3, n_rounds=26)
    fit, held = hold_out(labels, auto.val_ratio, seed=0)
    assert 0.375 + held_out_measure({"acc": 0.75, "share": 0.125}, len(held))[1] >= 0.625
    result = purify(model, images, labels, auto, loop).state_dict()
    assert loop.findings.facts["best_round"] == 5
    assert len(loop.findings.tables["held_out"]) == 6
    expected = purify(model, images[fit], labels[fit], Config.load(n_rounds=5)).state_dict()
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_stop_auto_gives_the_model_of_the_round_that_it_keeps() -> None:
    """It learns from all but the held-out images, as SAU does without them, and ends early."""
    model = small_network(4, batch_norm=True)
    images, labels = problem(4, count=24)
    flags = {"lr": 5e-3, "batch_size": 8, "pgd_init": "random"}
    loop = Loop()
    auto = Config.load(**flags, stop="auto", val_ratio=0.5, patience=2, n_rounds=30)
    result = purify(model, images, labels, auto, loop).state_dict()
    rows = loop.findings.tables["held_out"]
    fit, held = hold_out(labels, 0.5, seed=0)
    assert loop.findings.facts["held_out_images"] == len(held) > 0
    measures = [held_out_measure(row, len(held)) for row in rows]
    value, error = min(measures, key=lambda measure: measure[0])
    first = 1 + [wrong for wrong, _ in measures].index(value)
    assert len(rows) == max(first + 2, 6) < 30
    kept = [row for row, (wrong, _) in zip(rows, measures, strict=True) if wrong <= value + error]
    best = kept[-1]
    assert first <= best["round"] == loop.findings.facts["best_round"] < len(rows)
    plain = Config.load(**flags, n_rounds=best["round"])
    expected = purify(model, images[fit], labels[fit], plain)
    assert all(torch.equal(result[name], value) for name, value in expected.state_dict().items())
    signals = held_out_signals(expected, model.eval(), images[held], labels[held], auto)
    assert signals == {name: best[name] for name in signals}


def test_stop_auto_that_goes_on_keeps_the_best_round_before(tmp_path: Path) -> None:
    """Cut in its last round, two after the best one, whose weights only the checkpoint has."""
    model = small_network(2, batch_norm=True)
    images, labels = problem(2, count=24)
    flags = {"lr": 5e-3, "batch_size": 8, "pgd_init": "random", "val_ratio": 0.25, "patience": 2}
    auto = Config.load(**flags, stop="auto", n_rounds=30)
    whole = Loop()
    expected = purify(model, images, labels, auto, whole).state_dict()
    last = len(whole.findings.tables["held_out"])
    assert whole.findings.facts["best_round"] < last

    def keep(batches: int) -> None:
        if loop.position[0] == last:
            torch.save(loop.snapshot(), tmp_path / "snapshot.pt")

    loop = Loop()
    loop._after_batch = keep
    purify(model, images, labels, auto, loop)
    resumed = Loop(resume=load_tensors(tmp_path / "snapshot.pt"))
    result = purify(model, images, labels, auto, resumed).state_dict()
    assert resumed.findings.facts["best_round"] == whole.findings.facts["best_round"]
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_stop_auto_without_a_round_changes_nothing() -> None:
    model = small_network(2, batch_norm=True)
    config = Config.load(stop="auto", n_rounds=0)
    result = purify(model, *problem(2), config).state_dict()
    assert all(torch.equal(result[name], value) for name, value in model.state_dict().items())


def test_without_an_image_to_hold_out_all_rounds_are_run() -> None:
    images, labels, loop = problem(0, count=3)[0], torch.tensor([0, 1, 2]), Loop()
    auto = Config.load(stop="auto", n_rounds=2)
    result = purify(small_network(0, True), images, labels, auto, loop).state_dict()
    assert loop.findings.warnings == [
        "no image can be held out, so all rounds are run; give more images (--ratio)"
    ]
    plain = purify(small_network(0, True), images, labels, Config.load(n_rounds=2)).state_dict()
    assert all(torch.equal(result[name], value) for name, value in plain.items())


@pytest.mark.parametrize("multiple", [3, 8, 100])
def test_shared_images_that_fill_up_change_nothing(
    multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the inner loop goes on with more images than are left; to the last bit."""
    model = small_network(0, batch_norm=True)
    images, labels = problem(0, count=24)
    config = Config.load(n_rounds=2, batch_size=24)
    reference = purify(model, images, labels, config)
    usual = shared_perturbation(model, reference, images, labels, config)
    sizes = []

    def rounded_up(_: torch.device, count: int) -> int:
        sizes.append(count)
        return -(-count // multiple) * multiple

    monkeypatch.setattr("utils.process.device.rounded_up", rounded_up)
    filled = shared_perturbation(model, reference, images, labels, config)
    assert any(count < 24 and count % multiple for count in sizes), "nothing was filled up"
    assert torch.equal(filled, usual)


def test_a_loss_that_is_not_finite_is_refused_with_its_round() -> None:
    model = small_network(0, batch_norm=False)
    model[-1].weight.data.sign_().mul_(1e308)  # so that logits overflow
    images, labels = problem(0)
    with pytest.raises(UserError, match=r"not finite in round 1 of 2.*--lr"):
        purify(model, images, labels, Config.load(n_rounds=2, batch_size=4))


def test_bf16_unlearns_like_fp32() -> None:
    """Weights move in the same direction (cosine > 0.5) and every loss stays finite.

    In a narrow network: without instructions for bf16 the usual one takes a minute.
    """
    moves = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = Classifier(PreActResNet((1, 1, 1, 1), 4, (8, 16, 32, 64)), (0.5,) * 3, (0.5,) * 3)
        model.precision = precision
        images, labels = problem(0)
        purified = purify(model, images.float(), labels, Config.load(n_rounds=2, batch_size=12))
        before, after = (
            torch.cat([w.flatten() for w in m.parameters()]) for m in (model, purified)
        )
        moves[precision] = (after - before).detach()
        assert moves[precision].isfinite().all()
    assert torch.cosine_similarity(moves["fp32"], moves["bf16"], dim=0) > 0.5


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("wd", 0.1),
        ("lr", 1e-3),
        ("adam_beta_1", 0.8),
        ("adam_beta_2", 0.6),
        ("amsgrad", False),
        ("random_seed", 1),
        ("batch_size", 6),
        ("lmd_1", 0.5),
        ("lmd_2", 0.5),
        ("lmd_3", 0.0),
        ("exact_sar", True),
    ],
)
def test_each_flag_of_the_outer_step_acts(flag: str, value: float) -> None:
    """Three batches of four; the two runs differ in this flag alone.

    The second moment is short, so that it also falls, which AMSGrad does not follow.
    """
    model = small_network(0, batch_norm=False)
    images, labels = problem(0)
    config = Config.load(n_rounds=1, batch_size=4, adam_beta_2=0.5)
    base, other = (
        purify(model, images, labels, flags)
        for flags in (config, dataclasses.replace(config, **{flag: value}))
    )
    assert not torch.equal(base[0].weight, other[0].weight)


def test_the_inner_loop_goes_on_for_a_single_image() -> None:
    """One image that moves in the fifth step, alone, and beside others that are shared by then.

    To the last bit as where all images take part in every step.
    """
    model, reference = models(0, batch_norm=True)
    images, labels = problem(0, count=24)
    config = Config.load(adv_lr=0.1, adv_steps=5)

    def perturbation(index: torch.Tensor, steps: int = 5) -> torch.Tensor:
        flags = dataclasses.replace(config, adv_steps=steps)
        return shared_perturbation(model, reference, images[index], labels[index], flags)

    def does_not_move(index: torch.Tensor, first: int) -> torch.Tensor:
        """Which images stay where they are after so many steps."""
        return (perturbation(index, first) == perturbation(index)).flatten(1).all(1)

    everything = torch.arange(24)
    late = torch.nonzero(~does_not_move(everything, 4)).flatten()[:1]
    early = torch.nonzero(does_not_move(everything, 3)).flatten()
    assert len(late) == 1
    assert len(early) >= 1
    for index in (late, torch.cat([early, late])):
        expected = oracle.perturbation(
            model,
            reference,
            images[index],
            labels[index],
            norm="L_inf",
            start="max",
            bound=0.2,
            step=0.1,
            steps=5,
            beta_1=config.beta_1,
            beta_2=config.beta_2,
            generator=torch.Generator(),
        )
        assert torch.equal(perturbation(index), expected)
        assert not bool(does_not_move(index, 4)[-1])


@pytest.mark.parametrize(
    ("count", "chosen"), [(3, [0, 1, 2]), (8, [*range(8)]), (15, [*range(0, 15, 2)])]
)
def test_examples_are_drawn_beside_up_to_eight_images(count: int, chosen: list[int]) -> None:
    """Spread evenly; both models of the inner problem are the one that was given."""
    model = small_network(2, batch_norm=True)
    images, labels = problem(2, count)
    config = Config.load(pgd_init="random", adv_lr=0.1, random_seed=4)
    picture = examples(model, images, labels, config)
    clean = images[chosen]
    delta = shared_perturbation(
        model, model, clean, labels[chosen], config, generator=generator(4, "examples")
    )
    assert list(picture.rows) == ["clean", "adversarial"]
    assert torch.equal(picture.rows["clean"], clean)
    assert torch.equal(picture.rows["adversarial"], clean + delta)
    assert picture.title == (
        "shared adversarial examples of the model before; label before | after"
    )
    assert picture.is_compared


@pytest.mark.parametrize("size", [24, 8])
def test_where_adversarial_images_of_the_first_batch_went_is_stated(size: int) -> None:
    """They are those of the model with itself; after the first step they would be of another."""
    _, reference = models(1, batch_norm=True)
    images, labels = problem(1, count=24)
    config = Config.load(n_rounds=2, batch_size=size, lr=0.05)
    loop = Loop()
    purify(reference, images, labels, config, loop)
    first = torch.randperm(24, generator=generator(config.random_seed, "batches"))[:size]
    images, labels = images[first], labels[first]
    delta = shared_perturbation(reference.eval(), reference, images, labels, config)
    tally = Tally(4)
    with torch.no_grad():
        sent = [reference(x).argmax(1) for x in (images, images + delta)]
    add(tally, labels, *sent)
    expected = label_share(tally)
    assert max(expected.share) > 0
    assert loop.findings.facts["label_share"] == {
        "top": expected.top,
        "share": max(expected.share),
        "entropy": expected.entropy,
    }


def test_that_no_adversarial_image_goes_anywhere_is_stated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, reference = models(1, batch_norm=True)
    reference[-1].weight.data.zero_()
    caplog.set_level("INFO")
    loop = Loop()
    purify(reference, *problem(1, count=8), Config.load(n_rounds=1, batch_size=8), loop)
    facts = loop.findings.facts["label_share"]
    assert (facts["top"], facts["share"]) == (None, 0.0)
    assert "go to no class most (first batch): 0.0 %" in caplog.text


def test_a_model_too_certain_for_the_published_loss_is_named() -> None:
    """Thousandfold logits: L_sar is at its end. No warning where it is not used, or is exact."""
    images, labels = problem(1, count=24)

    def warned(factor: float, **flags: Any) -> bool:
        _, model = models(1, batch_norm=True)
        model[-1].weight.data.mul_(factor)
        model[-1].bias.data.mul_(factor)
        loop = Loop()
        purify(model, images, labels, Config.load(n_rounds=2, batch_size=24, **flags), loop)
        return any("--exact_sar" in text for text in loop.findings.warnings)

    assert warned(1000)
    assert not warned(1)
    assert not warned(1000, exact_sar=True)
    assert not warned(1000, lmd_3=0.0)
    assert not warned(1000, adv_steps=0, pgd_init="zero")  # no image counts


def test_losses_without_a_weight_are_warned_of() -> None:
    said = (
        "--lmd_1 and --lmd_2 and --lmd_3 are 0, so no loss is left to learn from; give "
        "one of them more than 0"
    )
    for lmd_2, count in ((0.0, 1), (0.1, 0)):
        loop = Loop()
        warn_of_loss(loop.findings, Tally(2), 0.0, Config.load(lmd_1=0, lmd_2=lmd_2, lmd_3=0))
        assert loop.findings.warnings == [said][:count]


def test_the_warning_goes_by_the_images_that_count() -> None:
    """Of ten images four are sent to a label that is neither theirs nor that of the clean image."""
    tally = Tally(2)
    tally["matrix"] += torch.tensor([[3, 2], [2, 3]])
    tally["sent"] += torch.tensor([1, 3])
    for shared, is_named in ((3.9, False), (4.1, True)):
        loop = Loop()
        warn_of_loss(loop.findings, tally, shared, Config.load())
        assert bool(loop.findings.warnings) == is_named


def test_the_warning_goes_by_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this process's ten images counts, and all ten of another one do."""
    tally = Tally(2)
    tally["matrix"] += torch.tensor([[5, 0], [0, 5]])
    totals = {id(tally["matrix"]): torch.full((2, 2), 5), id(tally["sent"]): torch.tensor([5, 5])}
    monkeypatch.setattr(sau.distributed, "total", lambda counts: totals[id(counts)])
    for shared, is_named in ((4.9, False), (5.1, True)):
        loop = Loop()
        warn_of_loss(loop.findings, tally, shared, Config.load())
        assert bool(loop.findings.warnings) == is_named


def test_examples_are_of_the_model_as_it_was_given() -> None:
    model, loop = small_network(2, batch_norm=True), Loop()
    images, labels = problem(2)
    config = Config.load(n_rounds=2, batch_size=5, lr=0.1, adv_lr=0.1)
    purify(model, images, labels, config, loop)
    picture = loop.findings.pictures["perturbations"]
    assert callable(picture)
    expected = examples(model, images, labels, config)
    assert torch.equal(picture().rows["adversarial"], expected.rows["adversarial"])


def test_the_wanted_rows_come_first_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then others, where a device wants more of them."""
    wanted = torch.tensor([False, True, False, True, True])
    assert rows_of(wanted).tolist() == [1, 3, 4]
    assert rows_of(wanted & False).tolist() == []
    monkeypatch.setattr("utils.process.device.rounded_up", lambda device, count: count + 1)
    assert rows_of(wanted).tolist() == [1, 3, 4, 0]


def test_perturbations_are_found_where_gradients_are_off() -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(4, 3, 4, 4)
    labels, config = torch.arange(4) % 3, Config.load()
    expected = shared_perturbation(model, model, images, labels, config)
    with torch.no_grad():
        assert torch.equal(shared_perturbation(model, model, images, labels, config), expected)


def test_after_batchnorm_without_running_statistics_no_image_is_skipped() -> None:
    """There the shared images, too, have a part in what the others are told."""
    shared = 0
    for seed in range(4):
        model, reference = (
            nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), network).double()
            for network in models(seed, batch_norm=True)
        )
        images, labels = problem(seed)
        config = Config.load(adv_lr=0.05, adv_steps=6)
        delta = shared_perturbation(model, reference, images, labels, config)
        expected = oracle.perturbation(
            model,
            reference,
            images,
            labels,
            norm="L_inf",
            start="max",
            bound=0.2,
            step=0.05,
            steps=6,
            beta_1=config.beta_1,
            beta_2=config.beta_2,
            generator=torch.Generator(),
        )
        assert torch.equal(delta, expected)
        after = model(images + delta).argmax(1), reference(images + delta).argmax(1)
        shared += int(((after[0] == after[1]) & (after[1] != labels)).sum())
    assert shared


def test_a_model_that_no_image_moves_is_named() -> None:
    """Its logits are so large that softmax, and with it the inner gradient, is exactly flat."""
    images, labels = problem(1, count=24)
    for lmd_3, is_named in ((1.0, True), (0.0, False)):
        model = small_network(1, batch_norm=True)
        with torch.no_grad():
            model[-1].weight.mul_(1e6)
            model[-1].bias.mul_(1e6)
        loop = Loop()
        purify(model, images, labels, Config.load(n_rounds=1, pgd_init="zero", lmd_3=lmd_3), loop)
        told = any("nothing is unlearned" in text for text in loop.findings.warnings)
        assert told == is_named


def test_holding_out_all_images_is_refused() -> None:
    model, (images, labels) = small_network(0, batch_norm=False), problem(0)
    with pytest.raises(
        UserError, match=r"--val_ratio: 0.95 of 12 images leaves none to learn from"
    ):
        purify(model, images, labels, Config.load(stop="auto", val_ratio=0.95))
