"""A network whose passes are replayed as CUDA graphs: one launch instead of hundreds.

With images of 32 pixels a GPU does the work of a layer faster than Python can ask for the next one.
A CUDA graph is the list of all kernels of a pass, recorded once and then started at once. It holds
for one shape of images and one state of the network, so that each gets its own; weights are read
where they are, as they are then.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FIRST = 3  # calls that are not replayed: a shape that is rare is not worth a recording
MOST_VALUES = 1 << 22  # of a batch of images; larger ones keep a GPU busy, and a copy costs memory

logger = logging.getLogger("sau")


class Graphed(nn.Module):
    """Calls a network, forward and backward by CUDA graphs where that is possible and worth it.

    The numbers are the network's own. Its output, and the gradients, are overwritten by the next
    call with images of that shape: backward comes before. What needs no gradient, or is no plain
    network (see `is_plain`), is called as it is, and so is everything on a CPU.

    Args:
        model: its weights stay its own, and must stay where they are in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._calls: Counter[Any] = Counter()
        self._recorded: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._is_plain = is_plain(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The network's output.

        Shape:
            As the network's.
        """
        learns = any(weight.requires_grad for weight in self.model.parameters())
        if (
            images.device.type != "cuda"
            or not self._is_plain
            or not torch.is_grad_enabled()
            or not (learns or images.requires_grad)
            or images.numel() > MOST_VALUES
        ):
            return self.model(images)
        state = images.shape, images.requires_grad, learns, self.model.training
        self._calls[state] += 1
        if self._calls[state] <= FIRST:
            return self.model(images)
        if state not in self._recorded:
            self._recorded[state] = self._record(images)
        return self._recorded[state](images)

    def _record(self, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        sample = images.detach().clone().requires_grad_(images.requires_grad)
        shell = _Shell(self.model)
        # Recording takes some passes, which must not count in BatchNorm's statistics.
        buffers = {buffer: buffer.clone() for buffer in self.model.buffers()}
        try:
            torch.cuda.make_graphed_callables(shell, (sample,))
            return shell
        except RuntimeError as error:
            logger.info("no CUDA graph of this network: %s", str(error).splitlines()[0][:200])
            self._is_plain = False
            return self.model
        finally:
            for buffer, before in buffers.items():
                buffer.copy_(before)


class _Shell(nn.Module):
    """What torch changes in place; the network itself stays as it is, and can be copied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def is_plain(model: nn.Module) -> bool:
    """Whether all modules are torch's, torchvision's or this project's, without hooks.

    The user's own may do something else in each call that a recording would not repeat.
    """
    return not any(
        type(module).__module__.split(".")[0] not in ("torch", "torchvision", "models")
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )
