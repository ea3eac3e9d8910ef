"""A network with what is around it: normalization, resizing, precision."""

import torch
from torch import nn
from torch.nn import functional as F

from models.bf16 import sound_gradients
from models.userfile import Promise
from models.views import any_order, has_own_code


class Normalize(nn.Module):
    """(x - mean) / std per channel; holds nothing in the state dict.

    Shape:
        (N, C, H, W) float in [0, 1] -> (N, C, H, W) float.
    """

    does_the_same = True

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class Resize(nn.Module):
    """Images to S x S, bilinear; holds nothing in the state dict.

    Shape:
        (N, C, H, W) float -> (N, C, S, S) float.
    """

    does_the_same = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shrinks = max(images.shape[2:]) > self.size
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=shrinks)


class Classifier(nn.Module):
    """A network that takes pixels: normalization is its first layer.

    Attributes:
        network: the bare network; its state dict is what a record keeps.
        precision: "bf16" runs the network under bfloat16 autocast; logits are float32 either way.
        promise: what a network of the user's file is held to, in each call and when it is saved.

    Shape:
        (N, C, H, W) float in [0, 1] -> (N, num_classes) float logits.
    """

    does_the_same = True

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network
        self.precision = "fp32"
        self.promise: Promise | None = None
        self._has_own_code = has_own_code(network)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.normalize(images)
        on_cpu = images.device.type == "cpu"
        may_be_half = self.precision != "fp32" or self._has_own_code
        with any_order(self._has_own_code), sound_gradients(on_cpu and may_be_half):
            if self.precision == "fp32":
                logits = self.network(images)
            else:
                with torch.autocast(images.device.type, torch.bfloat16):
                    logits = self.network(images)
        if self.promise is not None:
            self.promise.require_logits(logits, images)
        return logits if self.precision == "fp32" else logits.float()


def prepare(model: Classifier, device: torch.device, precision: str) -> Classifier:
    """Moves a model to the device, channels-last in memory, at "fp32" or "bf16"; in place.

    Weights of `nn.Conv3d` have no such order, and stay as they are.
    """
    model.precision = precision
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model.to(device)
