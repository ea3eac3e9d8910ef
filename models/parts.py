"""Parts of any network that defenses ask for: layers by name, weights that learn.

Names are those of the bare network (`Classifier.network`, else the module itself), as in a
record's state dict: `layer4.1.bn2`. A network that lacks what is asked for is refused in one line.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from models.classifier import Classifier
from utils.errors import UserError, suggestion


def bare(model: nn.Module) -> nn.Module:
    """The network of a `Classifier`; any other module itself."""
    return model.network if isinstance(model, Classifier) else model


def layer(model: nn.Module, name: str, flag: str) -> nn.Module:
    """A layer of the bare network by its name.

    Args:
        flag: that gave the name, for the message.

    Raises:
        UserError: if there is none, naming the nearest, or the last convolutions.
    """
    layers = dict(bare(model).named_modules())
    if name in layers and name:
        return layers[name]
    near = suggestion(name, layers)
    convolutions = [key for key, module in layers.items() if isinstance(module, nn.Conv2d)]
    late = f", e.g. one of its last convolutions: {', '.join(convolutions[-4:])}"
    raise UserError(
        f"{flag}: {name} is no layer of this network{near}; give one of its own"
        + (late if convolutions and not near else "")
    )


def top_level(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that the bare network is made of, by name, in their order.

    Of a network inside another one that has no other layers (it prepares images, spreads them over
    devices, or only calls it), they are its own parts: `1.layer1`, `module.layer1`, ...
    """
    network, prefix = bare(model), ""
    while name := _inside(network):
        network, prefix = network.get_submodule(name), f"{prefix}{name}."
    return {prefix + name: part for name, part in network.named_children()}


def _inside(network: nn.Module) -> str:
    """The name of the network that another one is made around; "" if it is none of that kind."""
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    parts = dict(network.named_children())
    learned = [name for name, part in parts.items() if any(True for _ in part.parameters())]
    is_around = len(learned) == 1 and all(own.dim() < 2 for own in network.parameters(False))
    return learned[0] if is_around and any(True for _ in parts[learned[0]].children()) else ""


def usual_weight(model: nn.Module) -> nn.Parameter:
    """The weight that says device and type of images and features: of a layer, if there is one.

    A network may begin with a scale of another type.
    """
    floats = [weight for weight in model.parameters() if weight.is_floating_point()]
    of_layers = [weight for weight in floats if weight.dim() > 1]
    return [*of_layers, *floats, *model.parameters()][0]


def black_images(model: nn.Module, image_shape: Sequence[int], count: int = 1) -> torch.Tensor:
    """Zeros (count, C, H, W) of the type, and on the device, of the network's weights.

    Args:
        image_shape: (C, H, W).
    """
    weight = usual_weight(model)
    return torch.zeros(count, *image_shape, device=weight.device, dtype=weight.dtype)


def changeable(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raises UserError if not each of the layers has a weight of its own, which can be changed.

    Args:
        layers: of the network, by the names that the message has.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in bare(model).named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((name, module))
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise UserError(
                f"the weight of the layer {name} is computed from others (weight_norm, "
                "spectral_norm or the like), and this method changes it; remove this from the "
                "network, or give another method"
            )
        other = next((name for name, owner in owners[id(weight)] if owner is not module), None)
        if other is not None:
            raise UserError(
                f"the layers {name} and {other} share a weight, and this method would change both; "
                "give each its own, or give another method"
            )


def refuse_scripts(layers: Mapping[str, nn.Module]) -> None:
    """Raises UserError if one of the layers is a script of torch's, into which nobody can look.

    Args:
        layers: by the names that the message has.
    """
    for name, module in layers.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{f'the layer {name}' if name else 'the network'} was made by torch.jit.script or "
                "trace, and can neither be looked into nor changed; give the network that it was "
                "made from"
            )


def learning_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that may be trained.

    Raises:
        UserError: if there is none.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise UserError(
            "the network has no weight that may be trained; set requires_grad on those that "
            "this method shall change"
        )
    return weights
