"""Classifiers by name: ours for small images, every torchvision classifier, and the user's own."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from models import userfile
from models.copies import apart_from, copied
from models.preactresnet import preactresnet18, preactresnet18_half
from models.pretrained import load_pretrained, pretrained_size
from models.tiny import TinyNet
from models.userfile import Promise, build_user_model, check_file, is_user_file, model_identity
from models.views import any_order, has_own_code
from utils.errors import UserError, listed, nearest, one_line, suggestion, told

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

T = TypeVar("T")

# Networks of our own, for images of every size: num_classes -> module. Any other name is
# torchvision's.
CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {
    "preactresnet18": preactresnet18,
    "preactresnet18_half": preactresnet18_half,
    "tiny": TinyNet,
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
        with any_order(self._has_own_code):
            if self.precision == "fp32":
                logits = self.network(images)
            else:
                with torch.autocast(images.device.type, torch.bfloat16):
                    logits = self.network(images)
        if self.promise is not None:
            self.promise.require_logits(logits, images)
        return logits if self.precision == "fp32" else logits.float()


def prepare(model: Classifier, device: torch.device, precision: str) -> Classifier:
    """Moves a model to the device, channels-last in memory, at "fp32" or "bf16"; in place."""
    model.precision = precision
    model.to(memory_format=torch.channels_last)
    return model.to(device)


def model_names() -> list[str]:
    """Every name that `build_model` takes, except `file.py:function`."""
    return sorted([*CONSTRUCTORS, *_torchvision_names()])


def check_name(name: str) -> None:
    """Raises UserError if `build_model` knows no network of that name, or cannot read its file."""
    if is_user_file(name):
        check_file(name)
    elif name not in CONSTRUCTORS and name not in _torchvision_names():
        raise UserError(
            f"--model: {name} is unknown{suggestion(name, model_names())}; "
            f"give file.py:function, or one of {listed(nearest(name, model_names()))}"
        )


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
        UserError: for an unknown name, listing the valid ones; for no number of classes; if the
            network cannot be made for such images; if the user's file fails.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise UserError(f"num_classes: {num_classes} is not allowed; give int >= 1")
    check_name(name)
    if is_user_file(name):
        network = build_user_model(name, num_classes, network_size or image_size)
    elif name in CONSTRUCTORS:
        network = CONSTRUCTORS[name](num_classes)
    else:
        network = _torchvision_network(name, num_classes, network_size or image_size)
    if network_size is not None:
        # The order, and so the keys, in which the literature exchanges such networks.
        network = nn.Sequential(Resize(network_size), network)
    model = Classifier(network, mean, std)
    if is_user_file(name):
        model.promise = Promise(name, num_classes, userfile.weights_of(network, name))
    return model


def _torchvision_network(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    from torchvision.models import get_model

    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple in train mode.
        extra = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}
    try:
        return get_model(name, weights=None, num_classes=num_classes, **extra)
    except (AssertionError, ValueError) as error:  # of a ViT, whose patches have a size
        raise UserError(
            f"--model: {name} cannot be made for images of {image_size} pixels "
            f"({one_line(error)}); give another --image_size"
        ) from None


def check_model(
    name: str, num_classes: int, image_size: int, network_size: int | None = None
) -> None:
    """Raises UserError if a network of that name cannot train on images of that size.

    It is tried with a batch of two, without memory or arithmetic (on torch's meta device). Our own
    networks are not tried: they take every size, and the first use of that device takes two
    seconds. The user's own networks are not tried in this way, because they may not work there.

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

    if name in CONSTRUCTORS:
        return
    if is_user_file(name):
        _try_user_model(name, num_classes, image_size)
        return
    if name not in _torchvision_names():
        build_model(name, num_classes)  # says which names there are
    if not fits(image_size):
        able = [str(size) for size in (16, 28, 32, 48, 64, 96, 128, 224, 299) if fits(size)]
        raise UserError(
            f"--model: {name} cannot take images of {image_size} x {image_size} pixels; "
            f"give --image_size {' or '.join(able)}, or another model"
        )


def _try_user_model(name: str, num_classes: int, image_size: int) -> None:
    """Tries everything that attacks and defenses will do with the user's network."""

    def tried(work: Callable[[], T], what: str, advice: str = "repair it") -> T:
        return told(f"--model: {name}", work, what, advice)

    def logits(count: int, model: Classifier) -> torch.Tensor:
        """A model's logits of that many black images."""
        images = torch.zeros(count, 3, image_size, image_size)
        what = f"take {userfile.in_words(images)}"
        return tried(lambda: model(images), what, "repair it, or give another --image_size")

    def weights(of: Classifier) -> userfile.Weights:
        return tried(lambda: userfile.weights_of(of.network, name), userfile.SAVED)

    def built() -> Classifier:
        return tried(lambda: build_model(name, num_classes, image_size=image_size), userfile.SAVED)

    model = built()
    before = weights(model)
    tried(model.train, "be put in train mode")
    loss = logits(2, model).float().square().sum()
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"--model: {name} has no weight with requires_grad; a defense trains them")
    tried(loss.backward, "be trained")
    tried(model.eval, "be put in eval mode")
    with torch.no_grad():
        for count in (3, 1):
            logits(count, model)
    if weights(model) != before:
        raise UserError(
            f"--model: {name} has other names or shapes of weights after a call than before; make "
            "all of them in its constructor"
        )
    again = built()
    tried(
        lambda: again.network.load_state_dict(model.network.state_dict()),
        "load the weights of another one that the same call has built",
    )
    second = tried(lambda: copied(model), "be copied by copy.deepcopy, as defenses do")
    shared = {*map(id, second.parameters())} & {*map(id, model.parameters())}
    if shared or weights(second) != before:
        raise UserError(f"--model: {name} gives copy.deepcopy no copy with weights of its own")
    refusal = (
        f"--model: {name} gives copy.deepcopy a copy that computes with the weights of the network "
        "itself, which a function in it holds on to, e.g. one of net.forward = lambda x: ...; make "
        "this function a method of a class, or a module"
    )
    with torch.no_grad(), apart_from(model, refusal):
        for is_training in (False, True):
            logits(2, second.train(is_training))
