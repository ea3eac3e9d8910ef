"""A network whose passes are replayed as CUDA graphs: one launch instead of hundreds.

With images of 32 pixels, a GPU computes a layer faster than Python can start the next one. A CUDA
graph is the list of all kernels of a pass. It is recorded once and then started with one call. It
is valid for one shape of images and one state of the network, so each of these gets its own graph.
A replay reads the weights' current values at the addresses that were recorded.
"""

import logging
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from models.views import is_unchanged
from utils.errors import first_line

FIRST = 3  # calls that are not replayed: a shape that is rare is not worth a recording
WARM_UP = 3  # passes before a recording, in which kernels are chosen
MOST_VALUES = 1 << 21  # of a batch of images; larger ones keep a GPU busy, and a copy costs memory

# Of torch's modules those that do the same in every call, whatever the numbers. A class of `models`
# says so of itself, by `does_the_same = True`.
KNOWN = (
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample),
)

logger = logging.getLogger("sau")


class Graphed(nn.Module):
    """Calls a network, forward and backward by CUDA graphs if that is possible and useful.

    The kernels, and so the numbers, are the network's own. The network is called as it is, without
    a graph, in these cases: no gradient is needed; it is not plain at that time (`is_plain`); it is
    called again before the backward pass of the last call; it is on a CPU; more than half of the
    GPU's memory is in use, because a recording keeps all memory that its passes need.

    Args:
        model: the network; its weights are used, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._calls: Counter[Any] = Counter()
        self._recorded: dict[Any, _Passes | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy without recordings, which are only for this network."""
        return {**self.__dict__, "_calls": Counter(), "_recorded": {}}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The network's output.

        Shape:
            As the network's.

        Raises:
            RuntimeError: in a second backward pass of one call.
        """
        is_small = images.numel() <= MOST_VALUES
        if images.device.type != "cuda" or not (torch.is_grad_enabled() and is_small):
            return self.model(images)
        return self._replayed(images)

    def _replayed(self, images: torch.Tensor) -> torch.Tensor:
        if not is_plain(self.model):  # asked each time, because hooks come and go
            return self.model(images)
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        if not (learning or images.requires_grad):
            return self.model(images)
        state = state_of(self.model, images)
        self._calls[state] += 1
        if self._calls[state] <= FIRST:
            return self.model(images)
        if state not in self._recorded:
            self._recorded[state] = self._record(images)
        passes = self._recorded[state]
        if passes is None or passes.is_awaited:
            return self.model(images)
        output: torch.Tensor = _Replay.apply(passes, images, *learning)
        return output

    def _record(self, images: torch.Tensor) -> "_Passes | None":
        """The passes; None if there is not enough memory, or torch cannot record them."""
        free, total = torch.cuda.mem_get_info(images.device)
        if free <= total // 2:
            return None
        # A recording takes some passes, which must not count in BatchNorm's statistics.
        buffers = {buffer: buffer.clone() for buffer in self.model.buffers()}
        try:
            return _Passes(self.model, images)
        except RuntimeError as error:  # out of memory, for one
            logger.info("no CUDA graph of this network: %s", first_line(error))
            return None
        finally:
            for buffer, before in buffers.items():
                buffer.data.copy_(before)  # to autograd, which may wait for a backward, no change


def state_of(model: nn.Module, images: torch.Tensor) -> tuple[Any, ...]:
    """Everything that a recording depends on."""
    return (
        (images.shape, images.dtype, images.device, images.requires_grad),
        tuple((weight.data_ptr(), weight.requires_grad) for weight in model.parameters()),
        tuple(
            (module.training, getattr(module, "track_running_stats", None))
            for module in model.modules()
        ),
    )


class _Passes:
    """Both passes of a network as it is now, recorded, with the tensors that they read and write.

    Attributes:
        images, gradient: what the passes read: the input, and the gradient of the output.
        output: what the forward pass writes.
        gradients: what the backward pass writes: of the images, or None, and of the weights.
        calls: how many passes there were; a backward pass follows its own forward pass.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self.calls = 0
        self._call: weakref.ref[_Call] | None = None
        self.images = images.detach().clone().requires_grad_(images.requires_grad)
        # The same memory under other names: what autograd knows of a weight belongs to the stream
        # on which it was used first, and a recording has a stream of its own.
        weights = {
            name: weight.detach().requires_grad_(weight.requires_grad)
            for name, weight in model.named_parameters()
        }
        wanted = [x for x in (self.images, *weights.values()) if x.requires_grad]
        gradients = self._record(model, weights, wanted)
        self.gradients = gradients if images.requires_grad else (None, *gradients)

    @property
    def is_awaited(self) -> bool:
        """Whether a backward pass may still come, which reads what the forward pass has written."""
        call = None if self._call is None else self._call()
        return call is not None and not call.is_over

    def begin(self) -> "_Call":
        """An object that the graph of a new forward pass keeps for as long as it lives."""
        self.calls += 1
        call = _Call(self.calls)
        self._call = weakref.ref(call)
        return call

    def _record(
        self, model: nn.Module, weights: dict[str, torch.Tensor], wanted: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Sets the passes and their tensors; returns the gradients that are wanted."""
        with torch.cuda.device(self.images.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    output = functional_call(model, weights, (self.images,))
                    torch.autograd.grad(output, wanted, torch.zeros_like(output))
                del output
            torch.cuda.current_stream().wait_stream(stream)
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward, stream=stream):
                output = functional_call(model, weights, (self.images,))
            self.gradient = torch.zeros_like(output)
            with torch.cuda.graph(self.backward, pool=self.forward.pool(), stream=stream):
                gradients = torch.autograd.grad(output, wanted, self.gradient)
        self.output = output.detach()
        return gradients


class _Call:
    """A forward pass; as long as this object lives, its backward pass may still come."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_over = False


class _Replay(torch.autograd.Function):
    """The recorded passes as an operation of images and weights."""

    @staticmethod
    def forward(
        ctx: Any, passes: _Passes, images: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.passes, ctx.weights, ctx.call = passes, weights, passes.begin()
        passes.images.copy_(images)
        passes.forward.replay()
        return passes.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        passes = ctx.passes
        if ctx.call.is_over or ctx.call.number != passes.calls:
            raise RuntimeError("there is one backward pass for each call of a CUDA graph")
        ctx.call.is_over = True
        for weight, recorded in zip(ctx.weights, passes.gradients[1:], strict=True):
            # torch takes what it is given for the weight's gradient; the replay would overwrite it.
            if weight.grad is not None and weight.grad.data_ptr() == recorded.data_ptr():
                weight.grad = weight.grad.clone()
        passes.gradient.copy_(gradient)
        passes.backward.replay()
        return None, *(None if g is None else g.detach() for g in passes.gradients)


def is_plain(model: nn.Module) -> bool:
    """Whether all modules are of a kind that does the same in every call, without hooks.

    Other modules may do something else in the next call, and a recording would repeat the first.
    """
    return not any(
        (type(module) not in KNOWN and "does_the_same" not in vars(type(module)))
        or isinstance(module, Graphed)
        or getattr(module, "momentum", 0) is None  # BatchNorm asks how many batches there were
        or not is_unchanged(module)
        for module in model.modules()
    )
