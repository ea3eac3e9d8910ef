"""CUDA graphs, and BatchNorm's gradient: the same numbers as without."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from defense import sau
from models import build_model, prepare
from models.fast import graphed
from models.fast.batchnorm import BatchNorm2d, _Linear
from models.fast.graphed import Graphed, is_plain
from models.inputaware import Painter, PixelGenerator
from utils.data import poison
from utils.data.labelled import Labelled
from utils.process.seeds import deterministic, generator
from utils.training.loop import Loop
from utils.training.sgd import Supervised, train_classifier

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Own(nn.Module):
    """A user's network, of which nobody knows what it does in Python."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def split(count: int = 24, size: int = 16) -> Labelled:
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=source)
    return Labelled(pixels.to(torch.uint8), torch.arange(count) % 10)


def classifier(device: str = "cpu", precision: str = "fp32") -> nn.Module:
    torch.manual_seed(0)
    model = build_model("preactresnet18", 10, (0.5,) * 3, (0.25,) * 3)
    return prepare(model, torch.device(device), precision)


class StandIn(graphed._Passes):
    """Passes "recorded" on a CPU: each replay writes into the same memory, as a CUDA graph does."""

    def _record(
        self, model: nn.Module, weights: dict[str, torch.Tensor], wanted: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        outputs: list[torch.Tensor] = []
        gradients = tuple(torch.zeros_like(x) for x in wanted)

        def forward() -> None:
            with torch.enable_grad():
                outputs[:] = [functional_call(model, weights, (self.images,))]
            self.output.copy_(outputs[0].detach())

        def backward() -> None:
            found = torch.autograd.grad(outputs[0], wanted, self.gradient)
            for kept, new in zip(gradients, found, strict=True):
                kept.copy_(new)

        self.output = torch.zeros_like(model(self.images).detach())
        self.gradient = torch.zeros_like(self.output)
        passes: Any = (SimpleNamespace(replay=replay) for replay in (forward, backward))
        self.forward, self.backward = passes
        return gradients


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Graphed:
    """A small network in float64 that is replayed, with the stand-in, from the fourth call on."""
    monkeypatch.setattr(graphed, "_Passes", StandIn)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9, 10))
    monkeypatch.setattr(Graphed, "forward", Graphed._replayed)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    return Graphed(nn.Sequential(*layers).double())


def batches(count: int) -> torch.Tensor:
    return torch.rand(count, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("to_none", [True, False])
def test_replayed_training_is_training(learner: Graphed, to_none: bool) -> None:
    """Weights and statistics after nine steps, the gradients dropped or set to 0."""
    states = []
    for called in (copy.deepcopy(learner.model), learner):
        optimizer = torch.optim.SGD(called.parameters(), lr=0.1, momentum=0.9)
        for images in batches(9):
            optimizer.zero_grad(set_to_none=to_none)
            called(images).square().sum().backward()
            optimizer.step()
        states.append(getattr(called, "model", called).state_dict())
    assert len(learner._recorded) == 1
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=0, atol=1e-12), name


def test_gradients_add_up_over_two_backward_passes(learner: Graphed) -> None:
    usual = copy.deepcopy(learner.model)
    for images in batches(8):
        for called in (usual, learner):
            called(images).square().sum().backward()
    pairs = zip(gradients(usual), gradients(learner), strict=True)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-9) for pair in pairs)


def test_two_calls_before_one_backward_pass(learner: Graphed) -> None:
    """By a recording each, with gradients that are never dropped, as Input-Aware does."""
    usual, second = copy.deepcopy(learner.model), Graphed(learner.model)
    for images in batches(8):
        for one, other in ((usual, usual), (learner, second)):
            (one(images).square().sum() + other(1 - images).sum()).backward()
    assert replays(learner) == replays(second) == 8 - graphed.FIRST
    pairs = zip(gradients(usual), gradients(learner.model), strict=True)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-9) for pair in pairs)
    states = zip(usual.buffers(), learner.model.buffers(), strict=True)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in states)


def test_the_images_gradient(learner: Graphed) -> None:
    """Without those of weights, as in an inner loop."""
    learner.eval().requires_grad_(False)
    usual = copy.deepcopy(learner.model)
    for batch in batches(6):
        found = []
        for called in (usual, learner):
            images = batch.clone().requires_grad_()
            found += torch.autograd.grad(called(images).square().sum(), images)
        assert torch.allclose(*found, rtol=0, atol=1e-12)
    assert len(learner._recorded) == 1


def replays(learner: Graphed) -> int:
    """How many passes were replayed so far."""
    return sum(passes.calls for passes in learner._recorded.values() if passes is not None)


def test_another_call_before_backward_goes_the_plain_way(learner: Graphed) -> None:
    """Of two calls before one backward pass the second is not replayed; gradients are right."""
    for images in batches(5):
        learner(images).sum().backward()
    usual = copy.deepcopy(learner.model)
    before = replays(learner)
    found = []
    for called in (learner, usual):
        first, second = batches(2)
        called.zero_grad()
        (called(first).square().sum() + 2 * called(second).square().sum()).backward()
        found.append(gradients(called))
    assert replays(learner) == before + 1
    assert all(torch.allclose(*pair, rtol=0, atol=1e-9) for pair in zip(*found, strict=True))


def test_after_a_loss_that_is_thrown_away_calls_are_replayed_again(learner: Graphed) -> None:
    for images in batches(5):
        learner(images).sum().backward()
    image = batches(1)[0]
    loss = learner(image).sum()
    before = replays(learner)
    learner(image).sum().backward()
    assert replays(learner) == before  # the loss before may still want its backward pass
    del loss
    learner(image).sum().backward()
    assert replays(learner) == before + 1


def test_a_second_backward_pass_of_one_call_is_refused(learner: Graphed) -> None:
    for images in batches(5):
        learner(images).sum().backward()
    loss = learner(batches(1)[0]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass for each call"):
        loss.backward()


def test_hooks_that_come_and_go_are_noticed(learner: Graphed) -> None:
    """While there is a hook the network is called as it is; afterwards it is replayed again."""
    for images in batches(5):
        learner(images).sum().backward()
    seen: list[int] = []
    before = replays(learner)
    hook = learner.model[2].register_forward_hook(lambda *_: seen.append(1))
    learner(batches(1)[0]).sum().backward()
    hook.remove()
    assert (seen, replays(learner)) == ([1], before)
    learner(batches(1)[0]).sum().backward()
    assert (seen, replays(learner)) == ([1], before + 1)


def test_each_state_has_a_recording_of_its_own(learner: Graphed) -> None:
    """What is frozen, which module is in which mode, type, shape, and weights in another place."""
    model, images = learner.model, batches(1)[0]
    assert isinstance(model, nn.Sequential)
    states = [graphed.state_of(model, images)]

    def changed() -> None:
        states.append(graphed.state_of(model, images))
        assert len(set(states)) == len(states)

    model[1].eval()
    changed()
    model[1].track_running_stats = False
    changed()
    for number in (0, 4):
        model[number].requires_grad_(False)
        changed()
    model[4].weight.data = model[4].weight.data.clone()
    changed()
    for other in (images.float(), images[1:], images.clone().requires_grad_()):
        images = other
        changed()


def test_what_cannot_be_recorded_is_called_as_it_is(
    learner: Graphed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line is logged; statistics that the failure has changed are put back."""

    def fails(model: nn.Module, images: torch.Tensor) -> None:
        model(images + 1)
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(graphed, "_Passes", fails)
    usual = copy.deepcopy(learner.model)
    with caplog.at_level("INFO", logger="sau"):
        for images in batches(6):
            assert torch.equal(learner(images), usual(images))
    assert [record.message for record in caplog.records] == [
        "no CUDA graph of this network: CUDA out of memory."
    ]
    for name, value in usual.state_dict().items():
        assert torch.equal(value, learner.model.state_dict()[name]), name


def test_a_full_gpu_records_nothing(learner: Graphed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4, 9))
    for images in batches(6):
        learner(images).sum().backward()
    assert list(learner._recorded.values()) == [None]


def test_a_copy_has_no_recordings(learner: Graphed) -> None:
    for images in batches(5):
        learner(images).sum().backward()
    assert learner._recorded
    for copied in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert not copied._recorded
        assert torch.equal(copied(images), learner.model(images))


def test_plain_networks_are_told_from_others() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    assert is_plain(network)
    assert is_plain(classifier())
    for other in (
        Own(),
        nn.Dropout(),
        nn.BatchNorm2d(3, momentum=None),
        Graphed(network),
        nn.DataParallel(network),
        build_model("resnet18", 10),  # torchvision's own blocks
    ):
        assert not is_plain(nn.Sequential(network, other)), other
    patched = nn.Linear(3, 2)
    patched.forward = lambda images: images  # type: ignore[method-assign]
    assert not is_plain(patched)
    network[1].register_forward_hook(lambda *_: None)
    assert not is_plain(network)


def test_on_a_cpu_a_network_is_called_as_it_is() -> None:
    network = nn.Linear(3, 2)
    learner = Graphed(network)
    images = torch.rand(4, 3)
    for _ in range(graphed.FIRST + 2):
        assert torch.equal(learner(images), network(images))
    assert not learner._calls
    assert list(learner.parameters()) == list(network.parameters())


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (1, 3, 1, 7)])
def test_the_gradient_of_batchnorm_in_eval_mode(shape: tuple[int, ...]) -> None:
    """What autograd makes of torch's own, in float64."""
    torch.manual_seed(0)
    norm = BatchNorm2d(3).double()
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert value is not None
        nn.init.uniform_(value, 0.5, 2)
    norm.eval().requires_grad_(False)
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outward = torch.randn(shape, dtype=torch.float64)
    usual = norm(features)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own = _Linear.apply(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    assert torch.allclose(own, usual, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y, features, outward)[0] for y in (own, usual)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_s_gradient_on_a_gpu_is_torch_s(precision: str) -> None:
    model = classifier("cuda", precision).eval().requires_grad_(False)
    images = split().images.cuda().contiguous(memory_format=torch.channels_last) / 255
    gradients = []
    for kind in (BatchNorm2d, nn.BatchNorm2d):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = kind
        x = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert apart < {"fp32": 2e-3, "bf16": 3e-2}[precision]


def painter() -> Painter:
    torch.manual_seed(0)
    pattern, mask = (PixelGenerator(3, outputs, (8, 16), True) for outputs in (3, 1))
    return Painter(pattern, mask.eval().requires_grad_(False))


def test_the_networks_of_input_aware_can_be_recorded() -> None:
    assert is_plain(painter())


@needs_gpu
def test_input_aware_s_networks_on_a_gpu_by_graphs() -> None:
    """The pattern network's gradient, summed over eight steps, and its statistics."""
    usual = painter().cuda()
    made = copy.deepcopy(usual)
    calls = Graphed(made), Graphed(made)
    for step in range(8):
        images = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(step)).cuda()
        for one, other in ((usual, usual), calls):
            (one(images[0]).square().mean() + other(images[1]).mean()).backward()
    assert all(list(call._recorded.values()) != [None] for call in calls)
    found, expected = (torch.cat([g.flatten() for g in gradients(x)]) for x in (made, usual))
    assert (found - expected).norm() < 2e-3 * expected.norm()  # TF32, and sums in any order
    pairs = zip(usual.buffers(), made.buffers(), strict=True)
    assert all(torch.allclose(*pair, rtol=1e-2, atol=1e-3) for pair in pairs)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_by_graphs_is_training(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six epochs of three batches, the last of which is short: weights and statistics."""
    states = []
    for most in (0, graphed.MOST_VALUES):
        monkeypatch.setattr(graphed, "MOST_VALUES", most)
        model = classifier("cuda", precision)
        with deterministic(True):
            train_classifier(
                model,
                poison.unpoisoned(split(20)),
                Supervised(2, True, generator(0, "augmentation", "cuda")),
                epochs=6,
                batch_size=8,
                lr=0.01,
                momentum=0.9,
                weight_decay=5e-4,
                schedule="cosine",
                order=generator(0, "order"),
                loop=Loop(),
                drop_last=False,
            )
        states.append(model.state_dict())
    apart = {
        name: float((value - states[1][name]).double().norm() / (value.double().norm() + 1e-9))
        for name, value in states[0].items()
    }
    assert max(apart.values()) < 1e-5, apart


@needs_gpu
def test_a_recording_leaves_everything_as_it_was() -> None:
    """Statistics, modes, gradients, random numbers; also while an earlier loss is still there."""
    model = classifier("cuda").train()
    learner = Graphed(model)
    images = split().images.cuda() / 255
    loss = learner(images).sum()
    loss.backward()
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    state = torch.cuda.get_rng_state()
    assert learner._record(images) is not None
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in model.parameters())
    assert all(module.training for module in model.modules())
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(copied(images), Graphed(copied)(images))


@needs_gpu
def test_weights_are_read_as_they_are_and_memory_does_not_grow() -> None:
    """A step of the optimizer between the calls, 60 times; the same gradients each time."""
    model = classifier("cuda").train()
    learner = Graphed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    images, labels = split().images.cuda() / 255, split().labels.cuda()
    reserved = []
    for number in range(60):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        with deterministic(True):
            loss = F.cross_entropy(learner(images), labels)
            loss.backward()
            F.cross_entropy(twin(images), labels).backward()
        for ours, usual in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            assert usual.grad is not None
            assert (ours.grad - usual.grad).norm() <= 1e-3 * usual.grad.norm() + 1e-6, number
        optimizer.step()
        reserved.append(torch.cuda.memory_reserved())
    assert len(learner._recorded) == 1
    assert reserved[-1] == reserved[20]


@needs_gpu
def test_the_user_s_own_network_is_called_as_it_is() -> None:
    """One that asks the GPU for a number, which no recording can."""

    class Asks(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * float(images.sum() > 0)

    network = Asks(3, 2).cuda()
    learner = Graphed(network)
    for number in range(graphed.FIRST + 3):
        images = torch.rand(4, 3, device="cuda") - number % 2
        assert torch.equal(learner(images), network(images))


@needs_gpu
def test_sau_by_graphs_is_sau(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rounds for all passes to be recorded; fp32."""
    data = split(40)
    config = dataclasses.replace(sau.Config.load("cifar10"), n_rounds=3, batch_size=10)
    model = classifier("cuda")
    outputs = []
    for most in (0, graphed.MOST_VALUES):
        monkeypatch.setattr(graphed, "MOST_VALUES", most)
        with deterministic(True):
            purified = sau.purify(model, data.images.cuda(), data.labels, config)
        with torch.no_grad():
            outputs.append(purified(data.images.cuda() / 255))
    apart = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert apart < 0.02
