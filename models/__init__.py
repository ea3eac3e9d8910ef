"""Classifiers by name: our networks for small images, and every torchvision classifier."""

from collections.abc import Callable

import torch
from torch import nn

from models.preactresnet import preactresnet18
from utils.errors import UserError, suggestion

# Networks of our own: num_classes -> module. Any other name is torchvision's.
CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {
    "preactresnet18": preactresnet18,
}


class Normalize(nn.Module):
    """(x - mean) / std per channel; holds nothing in the state dict.

    Shape:
        (N, C, H, W) float in [0, 1] -> (N, C, H, W) float.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A network that takes pixels: normalization is its first layer.

    Attributes:
        network: the bare network; its state dict is what a record keeps.
        precision: "bf16" runs the network under bfloat16 autocast; logits are float32 either way.

    Shape:
        (N, C, H, W) float in [0, 1] -> (N, num_classes) float logits.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network
        self.precision = "fp32"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.normalize(images)
        if self.precision == "fp32":
            return self.network(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.network(images)
        return logits.float()


def prepare(model: Classifier, device: torch.device, precision: str) -> Classifier:
    """Moves a model to the device, channels-last in memory, at "fp32" or "bf16"; in place."""
    model.precision = precision
    model.to(memory_format=torch.channels_last)
    return model.to(device)


def model_names() -> list[str]:
    """Every name that `build_model` takes."""
    return sorted([*CONSTRUCTORS, *_torchvision_names()])


def _torchvision_names() -> list[str]:
    import torchvision  # here, because it takes seconds and 170 MiB that our own networks need not

    return torchvision.models.list_models(module=torchvision.models)


def build_model(
    name: str,
    num_classes: int,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Classifier:
    """A freshly initialised classifier, with weights from torch's global generator.

    Args:
        name: one of `model_names()`.
        num_classes: number of outputs, >= 1.
        mean, std: per-channel constants of the normalization, pixel units in [0, 1].

    Raises:
        UserError: for an unknown name, listing the valid ones.
    """
    if name in CONSTRUCTORS:
        network = CONSTRUCTORS[name](num_classes)
    elif name in _torchvision_names():
        from torchvision.models import get_model

        # Auxiliary heads would make the output a tuple in train mode.
        has_auxiliary = name in ("googlenet", "inception_v3")
        extra = {"aux_logits": False, "init_weights": True} if has_auxiliary else {}
        network = get_model(name, weights=None, num_classes=num_classes, **extra)
    else:
        raise UserError(
            f"--model: {name} is unknown{suggestion(name, model_names())}; "
            f"give one of {', '.join(model_names())}"
        )
    return Classifier(network, mean, std)


def check_model(name: str, num_classes: int, image_size: int) -> None:
    """Raises UserError if a network of that name cannot train on images of that size.

    Tried without memory or arithmetic (on torch's meta device), with a batch of two; but for
    preactresnet18, which takes every size, because the first use of that device takes two seconds.
    """

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                build_model(name, num_classes).train()(torch.empty(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError):
            return False
        return True

    if name == "preactresnet18":
        return
    if name not in CONSTRUCTORS and name not in _torchvision_names():
        build_model(name, num_classes)  # says which names there are
    if not fits(image_size):
        able = [str(size) for size in (16, 28, 32, 48, 64, 96, 128, 224, 299) if fits(size)]
        raise UserError(
            f"--model: {name} cannot take images of {image_size} x {image_size} pixels; "
            f"give --image_size {' or '.join(able)}, or another model"
        )
