"""What goes into layers and comes out of them."""

import pytest
import torch
from torch import nn

from models.outputs import recording, watching, weighted
from tests.networks import classifier, conv_net, hooks, problem

# recording


@pytest.mark.parametrize("wrapped", [False, True])
def test_recording_keeps_what_goes_in_and_what_comes_out(wrapped: bool) -> None:
    network = conv_net()
    model = classifier(network) if wrapped else network
    images, _ = problem()
    entering = (images - 0.5) / 0.25 if wrapped else images
    with torch.no_grad():
        maps = network.conv1(entering)
        with recording(model, ["bn1", "linear"]) as outputs:
            logits = model(images)
        with recording(model, ["bn1"], of="input") as inputs:
            model(images)
    assert list(outputs) == ["bn1", "linear"]
    assert torch.equal(outputs["linear"], logits)
    assert torch.equal(outputs["bn1"], network.bn1(maps))
    assert list(inputs) == ["bn1"]
    assert torch.equal(inputs["bn1"], maps)


def test_recording_keeps_the_last_call_alone() -> None:
    network = conv_net()
    with torch.no_grad(), recording(network, ["linear"]) as features:
        assert features == {}
        for seed in (0, 1):
            logits = network(problem(seed)[0])
            assert torch.equal(features["linear"], logits)


def test_watching_sees_a_network_that_was_compiled_and_called_before() -> None:
    network, (images, _) = conv_net(), problem()
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        compiled(images)
        with recording(compiled, ["_orig_mod.linear"]) as outputs:
            logits = compiled(images)
        with weighted(compiled, "_orig_mod.linear", torch.tensor(0.0).double()):
            silent = compiled(images)
        assert torch.equal(outputs["_orig_mod.linear"], logits)
        assert not silent.any()
        assert torch.equal(compiled(images), logits)


def test_watching_sees_each_call_also_with_a_keyword() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(input=self.linear(x))

    network, seen = Twice(), []
    x = torch.rand(3, 2)
    with torch.no_grad(), watching(network, ["linear"], lambda *now: seen.append(now), of="input"):
        network(x)
    with torch.no_grad():
        assert [name for name, _ in seen] == ["linear", "linear"]
        assert torch.equal(seen[0][1], x)
        assert torch.equal(seen[1][1], network.linear(x))
    assert not network.linear._forward_hooks
    with torch.no_grad(), recording(network, ["linear"], of="input") as inputs:
        network(x)
    assert torch.equal(inputs["linear"], seen[1][1])


def test_recording_leaves_the_gradient_of_a_feature() -> None:
    network = conv_net()
    with recording(network, ["bn1"]) as features:
        network(problem()[0])
    assert features["bn1"].requires_grad


class InPlace(nn.Module):
    """A convolution whose output a module or a function overwrites, or nothing does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=kind == "module")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        relu = torch.relu_ if self.kind == "function" else self.relu
        return relu(self.conv(images)).mean(dim=(2, 3))


@pytest.mark.parametrize("kind", ["module", "function"])
def test_recording_keeps_an_output_that_is_then_overwritten(kind: str) -> None:
    """The same as of a network where nothing is in place: the output, its gradient, the logits."""
    images, _ = problem()
    seen = []
    for each in ("nothing", kind):
        torch.manual_seed(0)
        network = InPlace(each).double()
        with recording(network, ["conv"]) as features:
            logits = network(images)
        (gradient,) = torch.autograd.grad(logits.square().sum(), features["conv"])
        seen.append((features["conv"], gradient, logits))
    assert bool((seen[0][0] < 0).any())
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first, second)


def test_recording_takes_an_output_that_is_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x + 1

    network = nn.Sequential(Pair())
    with recording(network, ["0"]) as outputs:
        first, second = network(torch.zeros(2))
    assert outputs["0"] == (first, second)


def test_recording_removes_its_hooks_at_the_end_and_on_an_error() -> None:
    network = conv_net()
    with recording(network, ["conv1", "bn1"]):
        assert hooks(network) == 2
    assert hooks(network) == 0
    with pytest.raises(ZeroDivisionError), recording(network, ["conv1", "bn1"]):
        raise ZeroDivisionError
    assert hooks(network) == 0


def test_recording_of_an_unknown_layer_leaves_no_hook() -> None:
    network = conv_net()
    with pytest.raises(KeyError), recording(network, ["conv1", "nothing"]):
        pass
    assert hooks(network) == 0


# weighted


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_output_of_a_layer_is_weighted(wrapped: bool) -> None:
    network = conv_net()
    model = classifier(network) if wrapped else network
    images, _ = problem()
    factor = torch.rand(6, 8, 8, dtype=torch.float64).requires_grad_()
    with weighted(model, "bn1", factor):
        found = model(images)
        assert hooks(network) == 1
    assert hooks(network) == 0
    features = network.bn1(network.conv1((images - 0.5) / 0.25 if wrapped else images))
    features = network.bn2(network.conv2((factor * features).relu())).relu()
    assert torch.allclose(found, network.linear(features.mean(dim=(2, 3))), rtol=0, atol=1e-12)
    found.sum().backward()
    assert factor.grad is not None
    with pytest.raises(ZeroDivisionError), weighted(model, "bn1", factor):
        raise ZeroDivisionError
    assert hooks(network) == 0
