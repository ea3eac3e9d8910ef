"""A network whose passes are replayed as CUDA graphs: one launch instead of hundreds.

With images of 32 pixels a GPU does the work of a layer faster than Python can ask for the next one.
A CUDA graph is the list of all kernels of a pass, recorded once and then started at once. It holds
for one shape of images and one state of the network, so that each gets its own; weights are read
where they are, as they are then.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

FIRST = 3  # calls that are not replayed: a shape that is rare is not worth a recording
MOST_VALUES = 1 << 21  # of a batch of images; larger ones keep a GPU busy, and a copy costs memory


class Graphed(nn.Module):
    """Calls a network, forward and backward by CUDA graphs where that is possible and worth it.

    The numbers are the network's own. Its output, and the gradients, are overwritten by the next
    call with images of that shape: backward comes before. What needs no gradient, or is no plain
    network (see `is_plain`), is called as it is, and so is everything on a CPU, or on a GPU more
    than half of whose memory is taken: a recording keeps all that its passes need.

    Args:
        model: its weights stay its own, and must stay where they are in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._calls: Counter[Any] = Counter()
        self._recorded: dict[Any, _Passes | None] = {}
        self._is_plain = is_plain(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The network's output.

        Shape:
            As the network's.
        """
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        if (
            images.device.type != "cuda"
            or not self._is_plain
            or not torch.is_grad_enabled()
            or not (learning or images.requires_grad)
            or images.numel() > MOST_VALUES
        ):
            return self.model(images)
        state = images.shape, images.requires_grad, len(learning), self.model.training
        self._calls[state] += 1
        if self._calls[state] <= FIRST:
            return self.model(images)
        if state not in self._recorded:
            free, total = torch.cuda.mem_get_info(images.device)
            has_room = free > total // 2
            self._recorded[state] = _Passes(self.model, images) if has_room else None
        passes = self._recorded[state]
        if passes is None:
            return self.model(images)
        output: torch.Tensor = _Replay.apply(passes, images, *learning)
        return output


class _Passes:
    """Both passes of a network as it is now, recorded, with the tensors that they read and write.

    Attributes:
        images, gradient: what the passes read: the input, and the gradient of the output.
        output: what the forward pass writes.
        gradients: what the backward pass writes: of the images, or None, and of the weights.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self.images = images.detach().clone().requires_grad_(images.requires_grad)
        # The same memory under other names: what autograd knows of a weight belongs to the stream
        # on which it was used first, and a recording has a stream of its own.
        weights = {
            name: weight.detach().requires_grad_(weight.requires_grad)
            for name, weight in model.named_parameters()
        }
        wanted = [x for x in (self.images, *weights.values()) if x.requires_grad]
        # A recording takes some passes, which must not count in BatchNorm's statistics.
        buffers = {buffer: buffer.clone() for buffer in model.buffers()}
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(FIRST):
                output = functional_call(model, weights, (self.images,))
                torch.autograd.grad(output, wanted, torch.zeros_like(output))
            del output
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, stream=stream):
            output = functional_call(model, weights, (self.images,))
        self.gradient = torch.zeros_like(output)
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), stream=stream):
            found = torch.autograd.grad(output, wanted, self.gradient)
        self.output = output.detach()
        self.gradients = found if images.requires_grad else (None, *found)
        for buffer, before in buffers.items():
            buffer.copy_(before)


class _Replay(torch.autograd.Function):
    """The recorded passes as an operation of images and weights."""

    @staticmethod
    def forward(
        ctx: Any, passes: _Passes, images: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.passes = passes
        passes.images.copy_(images)
        passes.forward.replay()
        return passes.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.passes.gradient.copy_(gradient)
        ctx.passes.backward.replay()
        return None, *(None if g is None else g.detach() for g in ctx.passes.gradients)


def is_plain(model: nn.Module) -> bool:
    """Whether all modules are torch's or this project's, without hooks.

    Others may do something else in each call, which a recording would not repeat.
    """
    return not any(
        type(module).__module__.split(".")[0] not in ("torch", "models")
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )
