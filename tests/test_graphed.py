"""CUDA graphs, and BatchNorm's gradient: the same numbers as without."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense import sau
from models import build_model, graphed, prepare
from models.batchnorm import BatchNorm2d, _Linear
from models.graphed import Graphed, is_plain
from utils import poison
from utils.data import Labelled
from utils.runtime import deterministic, generator
from utils.train import Loop, Supervised, train_classifier

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


def test_plain_networks_are_told_from_the_user_s_own() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    assert is_plain(network)
    assert is_plain(classifier())
    assert not is_plain(build_model("resnet18", 10))
    assert not is_plain(nn.Sequential(network, Own()))
    network[1].register_forward_hook(lambda *_: None)
    assert not is_plain(network)


def test_on_a_cpu_a_network_is_called_as_it_is() -> None:
    network = nn.Linear(3, 2)
    learner = Graphed(network)
    images = torch.rand(4, 3)
    for _ in range(graphed.FIRST + 2):
        assert torch.equal(learner(images), network(images))
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
    graphed._Passes(model, images)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.rand(3, device="cuda").max() < 1
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
def test_a_full_gpu_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4, 9))
    model = classifier("cuda").train()
    learner = Graphed(model)
    for _ in range(graphed.FIRST + 2):
        learner(split().images.cuda() / 255).sum().backward()
    assert list(learner._recorded.values()) == [None]


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
