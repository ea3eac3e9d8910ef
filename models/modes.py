"""Modes and weights of networks: temporary changes, which are restored at the end."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from models.classifier import Classifier

_TURN = threading.RLock()
_CAST = ("cpu", "cuda", "mps", "xpu")  # devices for which torch has autocast


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module gets its own mode back after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Inside is one thread of the process; the others wait at the door.

    Random generators and the default type belong to the process. A thread that seeds them, or puts
    them back, would change what the others compute.
    """
    with _TURN:
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, the modes that a caller may have switched on change nothing, and nobody else is.

    Every function that a user calls from Python (`sau.__all__`) does its work in it.
    """
    with in_turn(), learning(), made_on_the_cpu(), without_autocast(), uncompiled():
        yield


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Inside, gradients can be computed, also if it is called under `no_grad`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def made_on_the_cpu() -> Iterator[None]:
    """Inside, tensors whose device is not named are made on the CPU, whatever the caller's is."""
    if torch.empty(0).device.type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, each operation computes in the type of its tensors, whatever the caller's mode is."""
    with contextlib.ExitStack() as stack:
        for device in _CAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Inside, new weights are drawn in float32, whatever the caller's default type is."""
    with in_turn():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight needs a gradient inside; each gets its own `requires_grad` back after."""
    weights = [w for model in models for w in model.parameters() if w.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what `torch.compile` made runs as it was written.

    Compiled code does not call hooks that came later, and each change of mode or weights would be
    compiled anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, a network's gradients have gradients: no autocast of a `Classifier`, plain attention.

    Fused attention has no second derivative, and bfloat16 has too few digits for one.
    """
    precision = model.precision if isinstance(model, Classifier) else "fp32"
    if isinstance(model, Classifier):
        model.precision = "fp32"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if isinstance(model, Classifier):
            model.precision = precision


@contextlib.contextmanager
def moved(weights: Sequence[torch.Tensor], moves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, each weight w is w + move; after, each is bit for bit what it was.

    Args:
        weights, moves: tensors of the same shapes.
    """
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def mixes_images(model: nn.Module) -> bool:
    """Whether the label of an image depends on the other ones of its batch, also in eval mode.

    It does after BatchNorm that keeps no running statistics.
    """
    return any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


@contextlib.contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode uses the batch's statistics and does not keep them.

    Nor does InstanceNorm, in train mode, that keeps an average of its images' statistics.
    """
    modules = list(model.modules())
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    averaging = [
        (module, name, module._buffers[name])
        for module in modules
        if isinstance(module, _InstanceNorm) and module.training
        for name in ("running_mean", "running_var")
    ]
    for norm in tracking:
        norm.track_running_stats = False
    for instance_norm, name, _ in averaging:
        instance_norm._buffers[name] = None
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
        for instance_norm, name, value in averaging:
            instance_norm._buffers[name] = value
