"""What a defense may add to a network: a closed list, kept as plain data in its record.

A defense adds such a part with `insert`. A record keeps `changes_of` the network, and
`apply_changes` makes the same network again, so that its weights fit.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from models.classifier import Classifier
from models.copies import copied
from models.parts import usual_weight
from utils.errors import UserError


class Polarizer(nn.Sequential):
    """A linear map of the channels and BatchNorm; it starts as the identity.

    Shape:
        (N, C, H, W) float -> (N, C, H, W) float.
    """

    does_the_same = True

    def __init__(self, channels: int) -> None:
        convolution = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(convolution.weight)
        super().__init__(convolution, nn.BatchNorm2d(channels))
        self.channels = channels


class Preceded(nn.Sequential):
    """A layer of a network, and the part that a defense has put before it."""

    does_the_same = True

    def __init__(self, part: nn.Module, layer: nn.Module) -> None:
        super().__init__(OrderedDict(polarizer=part, layer=layer))

    @property
    def part(self) -> nn.Module:
        """The part before the layer."""
        return self[0]


KINDS: dict[str, type[Polarizer]] = {"polarizer": Polarizer}


def insert(network: nn.Module, kind: str, layer: str, channels: int) -> nn.Module:
    """Puts a new part before a layer of a network; in place.

    Args:
        network: the bare one.
        kind: one of `KINDS`.
        layer: name of the layer.
        channels: of the layer's input.

    Returns:
        The part, on the network's device and in the layer's mode.
    """
    old = network.get_submodule(layer)
    like = usual_weight(network)
    # Its weights are set, not drawn: the global generator stays where it is.
    with torch.random.fork_rng(devices=[]):
        part = KINDS[kind](channels).to(like.device, like.dtype)
    preceded = Preceded(part, old)
    preceded.train(old.training)
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:  # a network may have a layer under several names
                setattr(parent, name, preceded)
    return part


def changes_of(network: nn.Module) -> list[dict[str, Any]]:
    """What defenses have added to a network, in the order of its layers, as plain data."""
    names = {kind: name for name, kind in KINDS.items()}
    return [
        {"kind": names[type(module.part)], "layer": layer, "channels": module.part.channels}
        for layer, module in network.named_modules()
        if isinstance(module, Preceded) and isinstance(module.part, Polarizer)
    ]


def weights_without(
    network: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a network's state dict by the names that they had before `insert`.

    A layer that the network has under several names is changed under all of them.
    """
    changed = [
        name
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, Preceded) and isinstance(module.part, Polarizer)
    ]
    weights = {}
    for name, value in state.items():
        for layer in reversed(changed):  # from the inside out
            if name.startswith(f"{layer}.polarizer."):
                break
            if name.startswith(f"{layer}.layer."):
                name = f"{layer}.{name.removeprefix(f'{layer}.layer.')}"
        else:
            weights[name] = value
    return weights


def require_promise(model: Classifier) -> None:
    """Raises UserError if a network of the user's file has other weights than when it was made."""
    if model.promise is not None:
        model.promise.require_weights(weights_without(model.network, model.network.state_dict()))


def apply_changes(network: nn.Module, changes: Sequence[Mapping[str, Any]]) -> nn.Module:
    """A copy of a network with the parts that `changes_of` listed.

    Raises:
        UserError: for a kind, or a layer, that is not known.
    """
    network = copied(network)
    for change in changes:
        kind, layer, channels = (change.get(key) for key in ("kind", "layer", "channels"))
        if (
            kind not in KINDS
            or not layer
            or layer not in dict(network.named_modules())
            or type(channels) is not int
            or not 1 <= channels <= 1 << 16
        ):
            raise UserError(f"the change {dict(change)!r} of a network is not known here")
        insert(network, str(kind), str(layer), channels)
    return network
