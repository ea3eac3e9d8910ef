"""Classifiers by name: ours for small images, every torchvision classifier, and the user's own."""

from collections.abc import Callable
from typing import Any

from torch import nn

from models import userfile
from models.classifier import Classifier, Normalize, Resize, prepare
from models.modes import in_turn
from models.preactresnet import preactresnet18, preactresnet18_half
from models.pretrained import load_pretrained, pretrained_size
from models.tiny import TinyNet
from models.trial import try_size, try_user_model
from models.userfile import Promise, build_user_model, check_file, is_user_file, model_identity
from utils.errors import UserError, listed, nearest, one_line, suggestion

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

# Networks of our own, for images of every size: num_classes -> module. Any other name is
# torchvision's.
CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {
    "preactresnet18": preactresnet18,
    "preactresnet18_half": preactresnet18_half,
    "tiny": TinyNet,
}


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


@in_turn()
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

    It is made as torch's own layers are: on the caller's default device, in the default type.

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
    name: str,
    num_classes: int,
    image_size: int,
    network_size: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Raises UserError if a network of that name cannot train on images of that size.

    It is tried (`models/trial.py`). Our own networks are not: they take every size, and the first
    use of torch's meta device takes two seconds. The user's own networks are tried on the CPU,
    because they may not work there.

    Args:
        network_size: as for `build_model`.
        warn: gets a line about a user's network whose state a run cannot keep.
    """
    if name in CONSTRUCTORS:
        return
    if is_user_file(name):
        try_user_model(
            name, image_size, lambda: build_model(name, num_classes, image_size=image_size), warn
        )
        return
    check_name(name)
    try_size(
        name,
        image_size,
        lambda size: build_model(name, num_classes, image_size=size, network_size=network_size),
    )
