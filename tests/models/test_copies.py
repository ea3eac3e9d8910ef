"""Copies of networks, and those that are none."""

import ast
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from models.copies import apart_from, copied, holds_graphs
from tests.networks import ConvNet, conv_net, differing, problem
from utils.errors import UserError
from utils.files import ROOT

# copied


class Keeping(ConvNet):
    """Keeps what it computes, in containers of containers."""

    def __init__(self) -> None:
        super().__init__(4, (6, 8))
        self.last: Any = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        self.last = {"logits": [logits, (logits.exp(), logits)], "images": images}
        return logits


def test_a_copy_has_no_graphs_wherever_a_network_keeps_tensors() -> None:
    network = Keeping()
    assert not holds_graphs(network)
    logits = network(torch.rand(2, 3, 8, 8, requires_grad=True))
    assert holds_graphs(network)
    assert not holds_graphs(copied(network))
    first, (second, same) = copied(network).last["logits"]
    assert torch.equal(first, logits)
    assert torch.equal(second, logits.exp())
    assert same is first
    assert first.grad_fn is second.grad_fn is None
    assert network.last["logits"][0] is logits  # the network's own are left as they are
    assert logits.grad_fn is not None


def test_tensors_of_the_same_copy_are_not_mixed_up() -> None:
    network = conv_net()
    network.many = [network.linear.bias * number for number in range(100)]
    for number, value in enumerate(copied(network).many):
        assert torch.equal(value, network.linear.bias * number)


# apart_from


def by_a_closure(network: ConvNet) -> None:
    before = network.forward
    network.forward = lambda images: before(images * 2 - 1)  # type: ignore[method-assign]


def by_a_head(network: ConvNet) -> None:
    head = network.linear
    network.linear = nn.Identity()
    network.unused = head
    network.register_forward_hook(lambda _, inputs, output: output @ head.weight.detach().T)


def by_statistics(network: ConvNet) -> None:
    statistics = network.bn2.running_mean
    assert statistics is not None

    def forget(*_: object) -> None:
        statistics.mul_(0.9)

    network.register_forward_pre_hook(forget)


@pytest.mark.parametrize("change", [by_a_closure, by_a_head, by_statistics])
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_that_uses_the_network_s_tensors_is_refused_before_it_does(
    change: Callable[[ConvNet], None], training: bool
) -> None:
    network = conv_net().train(training).requires_grad_(False)
    change(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy, (images, _) = copied(network), problem()
    with pytest.raises(UserError, match="not so"), apart_from(network, "not so"):
        copy(images)
    assert not differing(before, network.state_dict())
    copy(images)  # outside, nothing is refused


def of_the_class(self: ConvNet, images: torch.Tensor) -> torch.Tensor:
    return ConvNet.forward(self, images * 2 - 1)


def test_a_copy_with_a_method_of_its_own_passes() -> None:
    network = conv_net()
    network.forward = types.MethodType(of_the_class, network)  # type: ignore[method-assign]
    copy, (images, _) = copied(network), problem()
    with apart_from(network, "not so"):
        logits = copy(images)
    assert torch.equal(logits, network(images))


class Silent(nn.Linear):
    """Returns None where torch returns the network."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)


@pytest.mark.parametrize("training", [True, False, None])
def test_a_copy_has_the_mode_that_is_asked_for(training: bool | None) -> None:
    model = Silent(2, 2)
    model.train(training is None)
    copy_of_it = copied(model, training=training)
    assert copy_of_it is not model
    assert copy_of_it.training == (training is not False)
    assert model.training == (training is None)


CLASSIFIERS = "models/trial.py"  # it has only ours, around the user's network


def is_method_of_a_network(node: ast.AST) -> bool:
    """Whether it is a call of `x.train(...)`, `x.eval()` or `x.requires_grad_(False)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    given = [ast.unparse(value) for value in node.args]
    return node.func.attr in ("train", "eval") or (
        node.func.attr == "requires_grad_" and given == ["False"]
    )


def test_nothing_uses_what_a_network_s_methods_return() -> None:
    """A user's `train()` may return None, and then `eval()` does, too."""
    used, called = [], 0
    for room in ("analysis", "attack", "defense", "interop", "models", "utils"):
        for path in sorted((ROOT / room).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            calls = [node for node in nodes if is_method_of_a_network(node)]
            place = path.relative_to(ROOT).as_posix()
            called += len(calls)
            used += [place for call in calls if id(call) not in alone and place != CLASSIFIERS]
    assert used == []
    assert called > 20
