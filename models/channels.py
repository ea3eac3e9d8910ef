"""Channels of any network, which pruning defenses scale or cut: those of BatchNorm, convolutions.

Names are those of the bare network, see `models/parts.py`. A network that lacks what is asked for
is refused in one line.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from models.classifier import Classifier
from models.copies import copied
from models.modes import evaluating
from models.outputs import watching
from models.parts import bare, black_images, changeable
from utils.errors import UserError

Pairs = Literal["order", "direct"]
Norm = nn.BatchNorm2d | nn.SyncBatchNorm  # the latter of several processes, or of one


def norms(model: nn.Module) -> dict[str, Norm]:
    """The BatchNorm layers that have weights, by name.

    Raises:
        UserError: if there is none.
    """
    layers = {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, Norm) and module.affine
    }
    _require(layers, "BatchNorm layers (BatchNorm2d)")
    changeable(layers, model)
    return layers


def running_norms(model: nn.Module) -> dict[str, Norm]:
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
    _require(by_name, "convolutions (Conv2d)")
    return by_name


def _require(layers: Mapping[str, nn.Module], what: str) -> None:
    if not layers:
        raise UserError(
            f"this method works on the channels of {what}, and this network has none; give another "
            "method or network"
        )


def convolutions_before(
    model: nn.Module, pairs: Pairs, image_shape: Sequence[int]
) -> dict[str, nn.Conv2d]:
    """For BatchNorm layers with running statistics, the convolution before each, by their names.

    Args:
        pairs: `order` takes the last convolution that was registered before the layer; a layer is
            skipped if that one has another width, or is no Conv2d. `direct` takes the one whose
            output is the layer's input; other layers are skipped.
        image_shape: (C, H, W) of a black image that the network is called with.

    Raises:
        UserError: if no layer has one.
    """
    wanted = running_norms(model)
    before: dict[str, nn.Conv2d] = {}
    if pairs == "order":
        with evaluating(model), torch.no_grad():
            # A weight that is computed from others (weight_norm) is that of the last pass.
            model(black_images(model, image_shape))
        last: nn.Module | None = None
        for name, module in bare(model).named_modules():
            last = module if isinstance(module, _ConvNd) else last
            norm = wanted.get(name)  # one of another width has other channels
            if norm and isinstance(last, nn.Conv2d) and last.out_channels == norm.num_features:
                before[name] = last
    else:
        all_convolutions = convolutions(model)
        image = black_images(model, image_shape)
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


def require_replaceable(model: nn.Module) -> None:
    """Raises UserError if `called_with` cannot call the network with other weights."""
    if isinstance(bare(model), nn.DataParallel):
        raise UserError(
            "this method cannot change the weights of a DataParallel network; give the network "
            "that is in it (model.module)"
        )


def _prefix(model: nn.Module) -> str:
    """Of the names of the bare network's weights in the model, for `functional_call`."""
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
    model = copied(model, training=False)
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
