"""Parts of any network that defenses ask for: layers by name, the head, weights that learn.

Names are those of the bare network (`Classifier.network`, else the module itself), as in a
record's state dict: `layer4.1.bn2`. A network that lacks what is asked for is refused in one line.
"""

from collections.abc import Mapping

from torch import nn

from models import Classifier
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

    Of a network inside another one that only prepares its images (a `Resize`, a normalization), or
    spreads them over devices, they are its own parts: `1.layer1`, `module.layer1`, ...
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
    is_around = len(parts) > 1 and len(learned) == 1 and not network._parameters
    return learned[0] if is_around and any(True for _ in parts[learned[0]].children()) else ""


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The first linear layer inside the last top-level part of the bare network, with its name.

    It takes the features: `linear`, `fc`, VGG's `classifier.0`, a ViT's `heads.head`.

    Raises:
        UserError: if there is none.
    """
    children = list(top_level(model).items())
    last, part = children[-1] if children else ("", bare(model))
    for inner, module in part.named_modules():
        if isinstance(module, nn.Linear):
            return ".".join(filter(None, (last, inner))), module
    raise UserError(
        "this network's last part has no linear layer, which this method works on; give another "
        "method or network"
    )


def usual_weight(model: nn.Module) -> nn.Parameter:
    """The weight that says device and type of images and features: of a layer, if there is one.

    A network may begin with a scale of another type.
    """
    floats = [weight for weight in model.parameters() if weight.is_floating_point()]
    of_layers = [weight for weight in floats if weight.dim() > 1]
    return [*of_layers, *floats, *model.parameters()][0]


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


def layer_or_last(model: nn.Module, name: str | None, flag: str) -> nn.Module:
    """A layer of the bare network by its name; without a name its last linear layer.

    Args:
        flag: that gave the name, for the message.

    Raises:
        UserError: if there is none.
    """
    if name is not None:
        return layer(model, name, flag)
    return last_linear(model, flag, "name a layer")[1]


def last_linear(model: nn.Module, flag: str, advice: str) -> tuple[str, nn.Linear]:
    """The last linear layer of the bare network, with its name.

    Args:
        flag: that is to blame, for the message.
        advice: what to do, for the message.

    Raises:
        UserError: if there is none.
    """
    linear = [
        (name, module)
        for name, module in bare(model).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not linear:
        raise UserError(
            f"{flag}: this network has no linear layer, of which the last one would be taken; "
            f"{advice}"
        )
    return linear[-1]
