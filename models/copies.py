"""Copies of networks."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """A deep copy, also after a pass with gradients.

    Such a pass leaves weights that are computed in each pass, as `torch.nn.utils.spectral_norm`
    does, with a graph, which torch refuses to copy. The copy has none; the next pass makes it anew.
    """
    with_graphs = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    try:
        for module, name, value in with_graphs:
            setattr(module, name, value.detach())
        return copy.deepcopy(model)
    finally:
        for module, name, value in with_graphs:
            setattr(module, name, value)
