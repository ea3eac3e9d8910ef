"""The user's own networks: what their code may do that ours and torch's does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_OURS = (f"{__name__.rpartition('.')[0]}.", "torch.", "torchvision.")


def has_own_code(model: nn.Module) -> bool:
    """Whether a class of the network, or of one of its modules, is from elsewhere.

    Or the forward pass is: it may be replaced in a network of torchvision.
    """
    return not all(
        f"{type(module).__module__}.".startswith(_OURS) and "forward" not in vars(module)
        for module in model.modules()
    )


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
