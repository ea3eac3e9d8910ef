"""The head of any network: the linear layers at its end, found in a pass of black images.

Where layers stand in a network says little: an unused projection may be its last linear layer, and
squeeze and excitation, which is linear, may come after the head. So what counts is what is called.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from models.modes import evaluating
from models.outputs import watching
from models.parts import bare, black_images, layer, top_level
from utils.errors import UserError


class _Pass:
    """Which layers of a network are called, in the order of their ends, with what they give."""

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self.layers = dict(bare(model).named_modules())
        self.calls: list[tuple[str, torch.Tensor]] = []
        is_linear = any(isinstance(module, nn.Linear) for module in self.layers.values())
        watched = self.layers if is_linear else ()  # a script's layers take no hooks
        with evaluating(model), torch.no_grad(), watching(model, watched, self._see):
            self.logits = model(black_images(model, image_shape))

    def _see(self, name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            self.calls.append((name, output))

    def linear(self, place: int) -> tuple[str, nn.Linear]:
        """The linear layer of a call, with its name."""
        name = self.calls[place][0]
        found = self.layers[name]
        assert isinstance(found, nn.Linear)
        return name, found

    def of_logits(self, refusal: str) -> int:
        """The place among `calls` of the last linear layer with an output per class.

        Raises:
            UserError: with this text, if there is none.
        """
        classes = self.logits.shape[1]
        places = [
            place
            for place, (name, output) in enumerate(self.calls)
            if isinstance(self.layers[name], nn.Linear) and output.shape[-1] == classes
        ]
        if not places:
            raise UserError(refusal)
        return places[-1]


def head(model: nn.Module, image_shape: Sequence[int]) -> tuple[str, nn.Linear]:
    """The first of the linear layers that end a network, with its name in the bare network.

    They are in the top-level part that makes the logits, and no map (N, C, H, W) or tokens
    (N, L, D) come between them. The first one takes the features: `linear`, `fc`, VGG's
    `classifier.0`, a ViT's `heads.head`.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if no linear layer makes the logits.
    """
    run = _Pass(model, image_shape)
    last = first = run.of_logits(
        "this network has no linear layer that gives its logits, which this method works on; give "
        "another method or network"
    )
    of_last = run.calls[last][0]
    parts = (name for name in top_level(model) if f"{of_last}.".startswith(f"{name}."))
    part = next(parts, of_last)
    for place in reversed(range(last)):
        name, output = run.calls[place]
        if output.ndim > 2 or not f"{name}.".startswith(f"{part}."):
            break
        if isinstance(run.layers[name], nn.Linear):
            first = place
    return run.linear(first)


def last_linear(
    model: nn.Module, image_shape: Sequence[int], flag: str, advice: str
) -> tuple[str, nn.Linear]:
    """The linear layer that gives the logits, with its name in the bare network.

    Args:
        image_shape: (C, H, W).
        flag: that is to blame, for the message.
        advice: what to do, for the message.

    Raises:
        UserError: if there is none.
    """
    run = _Pass(model, image_shape)
    place = run.of_logits(
        f"{flag}: this network has no linear layer that gives its logits, which would be taken; "
        f"{advice}"
    )
    return run.linear(place)


def layer_or_last(
    model: nn.Module, name: str | None, flag: str, image_shape: Sequence[int]
) -> tuple[str, nn.Module]:
    """A layer of the bare network by its name; without a name, the linear layer of the logits.

    Args:
        flag: that gave the name, for the message.
        image_shape: (C, H, W).

    Returns:
        The layer's name, and the layer.

    Raises:
        UserError: if there is none.
    """
    if name is not None:
        return name, layer(model, name, flag)
    return last_linear(model, image_shape, flag, "name a layer")


def require_use(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    image_shape: Sequence[int],
    flag: str,
) -> None:
    """Raises UserError if the logits do not depend on the weight of a single one of the layers.

    Args:
        layers: with a weight that needs gradients, by their names for the message.
        image_shape: (C, H, W).
        flag: that named them.
    """
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    with evaluating(model), torch.enable_grad():
        logits = model(black_images(model, image_shape, 2))
        gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise UserError(
            f"{flag}: the logits do not depend on {next(iter(layers))}, so nothing would be "
            "learned there; give a layer that the network uses"
        )
