"""Copies of networks, which have to be networks of their own."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.errors import UserError

M = TypeVar("M", bound=nn.Module)


class _WithoutGraphs(TorchFunctionMode):
    """Inside, a copy of a tensor has no graph."""

    def __init__(self) -> None:
        super().__init__()
        # Each tensor that is copied is kept, because else another one might get its id.
        self._copied: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and args[0].grad_fn is not None:
            self._copied.append(args[0].detach())
            args = (self._copied[-1], *args[1:])
        return func(*args, **(kwargs or {}))


def copied(model: M, training: bool | None = None) -> M:
    """A deep copy, also after a pass with gradients.

    Such a pass leaves tensors with a graph, which torch refuses to copy: weights that are computed
    in each pass, as `torch.nn.utils.spectral_norm` does, and features that a network keeps, also in
    lists and dictionaries. In the copy they have none.

    Args:
        training: the mode of the copy; None for the model's own. What `train()` returns is never
            used, here and elsewhere: many a network that keeps BatchNorm frozen returns None.
    """
    with _WithoutGraphs():
        copy_of_it = copy.deepcopy(model)
    if training is not None:
        copy_of_it.train(training)
    return copy_of_it


def holds_graphs(model: nn.Module) -> bool:
    """Whether the network keeps a tensor with a graph, also in lists and dictionaries."""
    return any(
        isinstance(value, torch.Tensor) and value.grad_fn is not None
        for module in model.modules()
        for value in tree_leaves(vars(module))
    )


class _Apart(TorchDispatchMode):
    """Inside, whatever reads or writes certain memory raises an error, before it does so."""

    def __init__(self, places: set[int], refusal: str) -> None:
        super().__init__()
        self._places, self._refusal = places, refusal

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(_place(tensor) in self._places for tensor in given):
            raise UserError(self._refusal)
        return func(*args, **(kwargs or {}))


@contextmanager
def apart_from(model: nn.Module, copy_of_it: str) -> Iterator[None]:
    """Inside, a copy of a model is called, which must not compute with the model's own tensors.

    `copy.deepcopy` copies no functions. So a copy of a network with `forward = lambda x: ...` would
    call the network itself.

    Args:
        copy_of_it: the copy, as the message names it.

    Raises:
        UserError: if it does; the model is as it was.
    """
    refusal = (
        f"{copy_of_it} computes with the weights of the network itself, which a function in it "
        "holds on to, e.g. one of net.forward = lambda x: ...; make this function a method of a "
        "class, or a module"
    )
    tensors = (*model.parameters(), *model.buffers())
    with _Apart({place for tensor in tensors if (place := _place(tensor))}, refusal):
        yield


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's values begin in memory; 0 if they have no such place."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of a sparse tensor, for one
        return 0
