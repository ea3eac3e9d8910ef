"""Parts of any network that defenses ask for or change: layers by name, features, channels.

Names are those of the bare network (`Classifier.network`, else the module itself), as in a
record's state dict: `layer4.1.bn2`. A network that lacks what is asked for is refused in one line.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from models import Classifier
from models.copies import copied
from models.modes import evaluating
from utils.errors import UserError, suggestion

Pairs = Literal["order", "direct"]


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


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The BatchNorm layers that have weights, by name.

    Raises:
        UserError: if there is none.
    """
    layers = {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine
    }
    if not layers:
        raise UserError(
            "this method works on the channels of BatchNorm layers (BatchNorm2d), and this network "
            "has none; give another method or network"
        )
    changeable(layers, model)
    return layers


def running_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The layers of `norms` that keep running statistics.

    Raises:
        UserError: if there is none.
    """
    layers = {name: norm for name, norm in norms(model).items() if norm.running_var is not None}
    if not layers:
        raise UserError(
            "this method reads the running statistics of BatchNorm, and this network keeps none; "
            "give another method or network"
        )
    return layers


def mixes_images(model: nn.Module) -> bool:
    """Whether the label of an image depends on the other ones of its batch, also in eval mode.

    It does after BatchNorm that keeps no running statistics.
    """
    return any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


def convolutions_before(
    model: nn.Module, pairs: Pairs, image_shape: Sequence[int]
) -> dict[str, nn.Conv2d]:
    """For BatchNorm layers with running statistics, the convolution before each, by their names.

    Args:
        pairs: `order` takes the last convolution that was registered before the layer; a layer of
            another width than that one is skipped. `direct`
            takes the one whose output is the layer's input, found in a pass of one black image;
            other layers are skipped.
        image_shape: (C, H, W) of that image.

    Raises:
        UserError: if no layer has one.
    """
    wanted = running_norms(model)
    before: dict[str, nn.Conv2d] = {}
    if pairs == "order":
        last: nn.Conv2d | None = None
        for name, module in bare(model).named_modules():
            last = module if isinstance(module, nn.Conv2d) else last
            norm = wanted.get(name)  # one of another width has other channels
            if norm and last and last.out_channels == norm.num_features:
                before[name] = last
    else:
        all_convolutions = convolutions(model)
        weight = usual_weight(model)
        image = torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype)
        outputs: dict[str, tuple[torch.Tensor, int]] = {}
        inputs: dict[str, tuple[torch.Tensor, int]] = {}
        with (
            watching(model, all_convolutions, _noting(outputs)),
            watching(model, wanted, _noting(inputs), of="input"),
            evaluating(model),
            torch.no_grad(),
        ):
            model(image)
        for name, (entered, version) in inputs.items():
            for other, (output, first_version) in outputs.items():
                if entered is output and version == first_version:
                    before[name] = all_convolutions[other]
    if not before:
        raise UserError(
            "this method works on a convolution with a BatchNorm behind it, and this network has "
            "no such pair; give another method or network"
        )
    return before


def _noting(values: dict[str, tuple[torch.Tensor, int]]) -> Callable[[str, torch.Tensor], None]:
    """For `watching`: keeps a tensor, and how often it was changed in place, under a name."""
    return lambda name, value: values.update({name: (value, value._version)})


@contextmanager
def watching(
    model: nn.Module,
    names: Iterable[str],
    see: Callable[[str, Any], Any],
    of: Literal["output", "input"] = "output",
) -> Iterator[None]:
    """Inside, `see` takes the name and the output (or the input) of layers at each of their calls.

    The layers' hooks are removed at the end.

    Args:
        names: of layers of the bare network.
        see: what it gives takes the place of the output, unless it is None.
    """
    layers = dict(bare(model).named_modules())
    hooks = []

    def look(name: str, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        return see(name, output if of == "output" else next(iter((*inputs, *named.values()))))

    try:
        for name in names:
            hook = layers[name].register_forward_hook(
                lambda _, inputs, named, output, name=name: look(name, inputs, named, output),
                with_kwargs=True,
            )
            hooks.append(hook)
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recording(
    model: nn.Module, names: Iterable[str], of: Literal["output", "input"] = "output"
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the last output (or input) of layers is kept under their names; see `watching`.

    The network goes on with a copy of the output, so that nothing behind the layer that works in
    place, as `ReLU(inplace=True)` does, changes what is kept. Gradients are those of the output.

    Example:
        with recording(model, ["layer4"]) as features:
            logits = model(images)
        features["layer4"]
    """
    values: dict[str, torch.Tensor] = {}

    def keep(name: str, value: Any) -> torch.Tensor | None:
        values[name] = value
        return value.clone() if of == "output" and isinstance(value, torch.Tensor) else None

    with watching(model, names, keep, of):
        yield values


@contextmanager
def weighted(model: nn.Module, name: str, factor: torch.Tensor) -> Iterator[None]:
    """Inside, the output of a layer of the bare network is multiplied by a factor.

    Gradients reach the factor. The layer's hook is removed at the end.
    """
    hook = (
        bare(model)
        .get_submodule(name)
        .register_forward_hook(lambda _, inputs, output: output * factor)
    )
    try:
        yield
    finally:
        hook.remove()


def _prefix(model: nn.Module) -> str:
    """Of the names of the bare network's weights in the model, for `functional_call`."""
    if isinstance(bare(model), nn.DataParallel):
        raise UserError(
            "this method cannot change the weights of a DataParallel network; give the network "
            "that is in it (model.module)"
        )
    return "network." if isinstance(model, Classifier) else ""


def called_with(
    model: nn.Module, changed: Mapping[str, torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    """The network's output with other weights or biases, from `scaled` or `scaled_convolutions`.

    A layer that the network registers under several names is changed under the first one, and so
    under all: torch must not change it again, see `tie_weights`.
    """
    output: torch.Tensor = functional_call(model, dict(changed), (images,), tie_weights=False)
    return output


def scaled(
    model: nn.Module,
    scales: Mapping[str, torch.Tensor],
    shifts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """BatchNorm's weights times factors, as parameters for `torch.func.functional_call`.

    The network behaves as if its layers had the weight gamma * scale and the bias beta * shift. Its
    own weights and biases stay as they are, and gradients reach the factors.

    Args:
        scales: (C,) by the layer's name.
        shifts: likewise; None keeps the biases.

    Returns:
        By the parameters' names in `model`.
    """
    layers = norms(model)
    prefix = _prefix(model)
    changed = {f"{prefix}{name}.weight": layers[name].weight * scales[name] for name in scales}
    for name, shift in (shifts or {}).items():
        bias = layers[name].bias
        if bias is not None:
            changed[f"{prefix}{name}.bias"] = bias * shift
    return changed


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions (Conv2d) of the bare network, by name.

    Raises:
        UserError: if there is none.
    """
    by_name = {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, nn.Conv2d)
    }
    if not by_name:
        raise UserError(
            "this method works on the channels of convolutions (Conv2d), and this network has "
            "none; give another method or network"
        )
    return by_name


def scalable(layers: Mapping[str, nn.Conv2d], model: nn.Module) -> None:
    """Raises UserError if a factor on a layer's weight is none on its output.

    A subclass of Conv2d may compute its weight from another one, e.g. standardize it.

    Args:
        layers: of the network, by the names that the message has.
    """
    changeable(layers, model)
    for name, layer in layers.items():
        if type(layer).forward is nn.Conv2d.forward:
            continue
        weight, bias = layer.weight.detach(), layer.bias
        side = 8 + max(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        images = torch.linspace(-1, 1, layer.in_channels * side**2).to(weight)
        images = images.view(1, layer.in_channels, side, side)
        halves = {"weight": weight / 2} | ({} if bias is None else {"bias": bias.detach() / 2})
        with torch.no_grad(), evaluating(layer):
            whole, half = layer(images), functional_call(layer, halves, (images,))
        if not torch.allclose(whole / 2, half, rtol=0.01, atol=float(whole.abs().max()) / 1e4):
            raise UserError(
                f"the layer {name} computes its weight from another one, so a factor on this is "
                "none on its output, as this method needs it; give another method or network"
            )


def scaled_convolutions(
    model: nn.Module, scales: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Convolutions whose output channels are multiplied by factors, as changed parameters.

    They are for `torch.func.functional_call`, or to replace the model's own parameters, which are
    not changed here. Gradients reach the factors.

    Args:
        scales: (C,) by the layer's name, C its output channels.

    Returns:
        Weights and biases by the parameters' names in `model`.
    """
    layers = convolutions(model)
    prefix = _prefix(model)
    changed = {}
    for name, scale in scales.items():
        changed[f"{prefix}{name}.weight"] = layers[name].weight * scale.view(-1, 1, 1, 1)
        bias = layers[name].bias
        if bias is not None:
            changed[f"{prefix}{name}.bias"] = bias * scale
    return changed


def silenced(model: nn.Module, channels: Mapping[str, torch.Tensor], with_bias: bool) -> nn.Module:
    """A copy in which channels give a constant: their BatchNorm's weight is 0.

    Everything else stays the same, bit for bit.

    Args:
        channels: bool (C,) by the layer's name: which channels.
        with_bias: whether the bias becomes 0, too; if not, the constant is the bias.

    Returns:
        The copy, in eval mode.
    """
    model = copied(model).eval()
    layers = norms(model)
    with torch.no_grad():
        for name, is_pruned in channels.items():
            parameters = [layers[name].weight, *([layers[name].bias] if with_bias else [])]
            for parameter in parameters:
                if parameter is not None:  # of a layer without biases
                    parameter[is_pruned.to(parameter.device)] = 0
    return model


def named_channels(channels: Mapping[str, torch.Tensor]) -> list[dict[str, int | str]]:
    """The chosen channels as rows of a table: layer, and number in it."""
    return [
        {"layer": name, "channel": number}
        for name, chosen in channels.items()
        for number in torch.nonzero(chosen).flatten().tolist()
    ]


@contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode uses the batch's statistics and does not keep them."""
    tracking = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
