"""torchvision's trained weights, and the image size that they need."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, one_line


def pretrained_size(name: str, image_size: int) -> int | None:
    """The side to which the network itself has to resize images; None if it need not resize.

    Most networks take every size above a smallest one; a ViT takes only the size at which its
    positions were learned.

    Raises:
        UserError: if torchvision has no weights of that name.
    """
    weights = _weights(name)
    trained_size = int(weights.transforms().crop_size[0])
    fits = (
        trained_size == image_size if name.startswith("vit_") else image_size >= _smallest(weights)
    )
    return None if fits else trained_size


def load_pretrained(network: nn.Module, name: str) -> str:
    """Fills a network with torchvision's weights, except a head of other classes; in place.

    Args:
        network: as `build_model` makes it, perhaps behind a layer that resizes.

    Returns:
        The name of these weights in torchvision.

    Raises:
        UserError: if the weights cannot be downloaded or read.
    """
    from torchvision.models import get_model

    weights = _weights(name)
    kept = Path(torch.hub.get_dir()) / "checkpoints"
    file = weights.url.rpartition("/")[2]
    try:
        # torchvision reads its files as pickles, which can run anything; so they are first read as
        # tensors alone.
        weights.get_state_dict(check_hash=True, weights_only=True)
        trained = get_model(name, weights=weights).state_dict()
    except Exception as error:  # what urllib, torch.hub and torch.load raise
        reason = one_line(error)
        raise UserError(
            f"--pretrained: the weights of {name} cannot be downloaded or read ({reason}); put "
            f"{weights.url} into {kept} as {file}, or drop the flag"
        ) from None
    target = network[1] if isinstance(network, nn.Sequential) and len(network) == 2 else network
    state = target.state_dict()
    state |= {
        key: value
        for key, value in trained.items()
        if key in state and state[key].shape == value.shape
    }
    target.load_state_dict(state)
    return str(weights)


def _weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        raise UserError(
            f"--pretrained: torchvision has no trained weights of {name}; drop the flag, or "
            "give --model one of its classifiers, e.g. resnet18"
        ) from None


def _smallest(weights: Any) -> int:
    return max(weights.meta["min_size"])
