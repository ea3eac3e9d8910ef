"""The user's own networks: what their code may do that ours and torch's does not."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_OURS = (f"{__name__.rpartition('.')[0]}.", "torch.", "torchvision.")


def has_own_code(model: nn.Module) -> bool:
    """Whether a class of the network, or of one of its modules, is from elsewhere.

    Or what a call runs is: the forward pass of a network of torchvision may be replaced, and it may
    have hooks.
    """
    return not all(_is_ours(type(module)) and is_unchanged(module) for module in model.modules())


def is_unchanged(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's forward pass, and no hooks."""
    return "forward" not in vars(module) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_ours(kind: type) -> bool:
    """Whether a class is what a module of ours or torch's has under its name.

    The name of its module alone tells nothing: a package beside the user's file may be called
    `models`, too, and torch makes classes from the user's code, as `torch.fx` does.
    """
    if not f"{kind.__module__}.".startswith(_OURS):
        return False
    try:
        return attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
    except (KeyError, AttributeError):
        return False


class _Views(TorchFunctionMode):
    """`x.view(shape)` copies where the order in memory allows no view."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.view:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            return args[0].reshape(*args[1:], **(kwargs or {}))


@contextmanager
def any_order(own_code: bool) -> Iterator[None]:
    """Inside, a network of the user's own may be written for images in torch's usual order.

    Ours are channels-last in memory, because convolutions are faster so. There, the usual
    `x.view(len(x), -1)` before a linear layer would raise an error. Here it is `x.reshape`, which
    copies: what is then changed in place does not change x.

    Args:
        own_code: see `has_own_code`; if not, nothing changes, and nothing is slower.
    """
    if not own_code:
        yield
        return
    with _Views():
        yield
