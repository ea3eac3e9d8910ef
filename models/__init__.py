"""Classifiers by name: ours for small images, every torchvision classifier, and the user's own."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.preactresnet import preactresnet18
from models.pretrained import load_pretrained, pretrained_size
from models.userfile import build_user_model, is_user_file, model_identity
from utils.errors import UserError, one_line, suggestion

__all__ = [
    "CONSTRUCTORS",
    "Classifier",
    "Normalize",
    "Resize",
    "build_model",
    "check_model",
    "is_user_file",
    "load_pretrained",
    "model_identity",
    "model_names",
    "prepare",
    "pretrained_size",
]

# Networks of our own: num_classes -> module. Any other name is torchvision's.
CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {
    "preactresnet18": preactresnet18,
}


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

    Shape:
        (N, C, H, W) float in [0, 1] -> (N, num_classes) float logits.
    """

    does_the_same = True

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
    """Every name that `build_model` takes, `file.py:function` aside."""
    return sorted([*CONSTRUCTORS, *_torchvision_names()])


def _torchvision_names() -> list[str]:
    import torchvision  # here, because it takes seconds and 170 MiB that our own networks need not

    return torchvision.models.list_models(module=torchvision.models)


def build_model(
    name: str,
    num_classes: int,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
    *,
    image_size: int | None = None,
    network_size: int | None = None,
) -> Classifier:
    """A freshly initialised classifier, with weights from torch's global generator.

    Args:
        name: one of `model_names()`, or `file.py:function`, which is run.
        num_classes: number of outputs, >= 1.
        mean, std: per-channel constants of the normalization, pixel units in [0, 1].
        image_size: side of the images in pixels, for networks that fix it (ViT, the user's own);
            None for their own.
        network_size: side to which the network resizes the images first; None for no such layer.

    Raises:
        UserError: for an unknown name, listing the valid ones; if the user's file fails.
    """
    if is_user_file(name):
        network = build_user_model(name, num_classes, network_size or image_size)
    elif name in CONSTRUCTORS:
        network = CONSTRUCTORS[name](num_classes)
    elif name in _torchvision_names():
        network = _torchvision_network(name, num_classes, network_size or image_size)
    else:
        raise UserError(
            f"--model: {name} is unknown{suggestion(name, model_names())}; "
            f"give file.py:function, or one of {', '.join(model_names())}"
        )
    if network_size is not None:
        # The order, and so the keys, in which the literature exchanges such networks.
        network = nn.Sequential(Resize(network_size), network)
    return Classifier(network, mean, std)


def _torchvision_network(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    from torchvision.models import get_model

    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple in train mode.
        extra = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}
    return get_model(name, weights=None, num_classes=num_classes, **extra)


def check_model(
    name: str, num_classes: int, image_size: int, network_size: int | None = None
) -> None:
    """Raises UserError if a network of that name cannot train on images of that size.

    Tried without memory or arithmetic (on torch's meta device), with a batch of two; but for
    preactresnet18, which takes every size, because the first use of that device takes two seconds;
    and for the user's own, which may not work there.

    Args:
        network_size: as for `build_model`.
    """

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                model = build_model(
                    name, num_classes, image_size=size, network_size=network_size
                ).train()
                model(torch.empty(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError):
            return False
        return True

    if name == "preactresnet18":
        return
    if is_user_file(name):
        _try_user_model(name, num_classes, image_size)
        return
    if name not in CONSTRUCTORS and name not in _torchvision_names():
        build_model(name, num_classes)  # says which names there are
    if not fits(image_size):
        able = [str(size) for size in (16, 28, 32, 48, 64, 96, 128, 224, 299) if fits(size)]
        raise UserError(
            f"--model: {name} cannot take images of {image_size} x {image_size} pixels; "
            f"give --image_size {' or '.join(able)}, or another model"
        )


def _try_user_model(name: str, num_classes: int, image_size: int) -> None:
    model = build_model(name, num_classes, image_size=image_size).train()
    images = f"a batch of two images of {image_size} x {image_size} pixels"
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # the user's code may raise anything
        reason = one_line(error)
        raise UserError(
            f"--model: {name} cannot take {images} ({type(error).__name__}: {reason}); repair it, "
            "or give another --image_size"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise UserError(
            f"--model: {name} gives {shape} for {images}; logits of {(2, num_classes)} are needed"
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"--model: {name} has no weight with requires_grad; a defense trains them")
    try:
        copy.deepcopy(model)
    except Exception as error:  # whatever its parts raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"--model: {name} cannot be copied by copy.deepcopy, as defenses do ({reason}); "
            "repair it"
        ) from error
