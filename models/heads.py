"""The head of any network: the linear layers at its end, found in a pass of black images.

Where layers stand in a network says little: an unused projection may be its last linear layer, and
squeeze and excitation, which is linear, may come after the head. So what counts is what is called.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from models.modes import evaluating, frozen
from models.outputs import watching
from models.parts import bare, black_images, layer, top_level
from utils.errors import UserError, listed


class _Pass:
    """Which layers of a network are called, in the order of their ends, with what they give.

    The graph of the logits is cut behind each linear layer, and begins with the output of the
    layers before the first of them. So it shows between which layers no other way leads.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self.layers = dict(bare(model).named_modules())
        self.calls: list[tuple[str, nn.Module, torch.Tensor]] = []
        self._begins: dict[int, int] = {}  # places of the calls by the tensors that were cut
        self._cut: dict[int, torch.Tensor] = {}  # what the calls gave, with the graph before it
        seen = watching(model, self.layers, self._see)
        with seen, evaluating(model), frozen(model), torch.enable_grad():
            self._logits = model(black_images(model, image_shape))
        self.classes = self._logits.shape[-1]

    def _see(self, name: str, output: object) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor):
            return None
        module, place = self.layers[name], len(self.calls)
        self.calls.append((name, module, output))
        is_cut = isinstance(module, nn.Linear) or not output.requires_grad
        if not (is_cut and output.is_floating_point()):
            return None
        begin = output.detach().requires_grad_()
        self._begins[id(begin)], self._cut[place] = place, output
        self.calls[place] = (name, module, begin)  # kept, because else another might get its id
        return begin.clone()  # which may be changed in place

    def _read_by(self, result: torch.Tensor) -> set[int]:
        """The places of the calls whose outputs a result is made from with no cut in between."""
        waiting, seen, places = [result.grad_fn], set(), set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            places.add(self._begins.get(id(getattr(node, "variable", None)), -1))
            waiting += [before for before, _ in node.next_functions]
        return places - {-1}

    def before(self, place: int) -> set[int]:
        """The places of all cut calls that the call at a place reads, with others in between."""
        waiting = [place]
        places: set[int] = set()
        while waiting:
            new = self._read_by(self._cut[waiting.pop()]) - places
            places |= new
            waiting += new
        return places

    def last(self) -> list[tuple[int, str, nn.Linear]]:
        """The last linear layers, if the logits are made from those of such layers alone.

        They are several if the logits are an average of theirs, say; those with one weight count
        as one. Squeeze and excitation is none: what it weighs goes on beside it. Nor is a layer
        that only reads the others, as a calibration of the logits does, nor one beside them that
        has no output per class, as for a temperature.
        """
        read = self._read_by(self._logits) if self._logits.shape[:-1] == (1,) else set()
        layers = {place: (place, *self.calls[place][:2]) for place in sorted(read)}
        linear = {p: (p, name, m) for p, name, m in layers.values() if isinstance(m, nn.Linear)}
        if len(linear) < len(layers):
            return []
        inputs = {place: self._read_by(self._cut[place]) for place in linear}
        apart = [linear[p] for p, reads in inputs.items() if not reads or reads - linear.keys()]
        per_class = [layer for layer in apart if layer[2].out_features == self.classes]
        weights = [layer[2]._parameters.get("weight", layer[2]) for layer in per_class or apart]
        return list(dict(zip(map(id, weights), per_class or apart, strict=True)).values())

    def idle(self) -> dict[str, nn.Linear]:
        """The linear layers with an output per class that are never called, by their names."""
        called = {name for name, _, _ in self.calls}
        return {
            name: module
            for name, module in self.layers.items()
            if isinstance(module, nn.Linear)
            and name not in called
            and module.out_features == self.classes
        }


def head(model: nn.Module, image_shape: Sequence[int]) -> tuple[str, nn.Linear]:
    """The first of the linear layers that end a network, with its name in the bare network.

    They are in one top-level part, and no map (N, C, H, W) or tokens (N, L, D) come between them.
    What makes the logits of the last one's output sees nothing else of the image, but for a
    temperature. The first one takes the features: `linear`, `fc`, VGG's `classifier.0`, a ViT's
    `heads.head`.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if no linear layer makes the logits, or several do, each for itself.
    """
    run = _Pass(model, image_shape)
    end, name, linear = _only(run.last(), "", "give another method or network")
    parts = (part for part in top_level(model) if f"{name}.".startswith(f"{part}."))
    part, read = next(parts, name), run.before(end)
    for place in reversed(range(end)):
        before, module, output = run.calls[place]
        if output.ndim > 2 or not f"{before}.".startswith(f"{part}."):
            break
        if isinstance(module, nn.Linear) and place in read:
            name, linear = before, module
    return name, linear


def last_linear(
    model: nn.Module, image_shape: Sequence[int], flag: str, advice: str
) -> tuple[str, nn.Linear]:
    """The linear layer that gives the logits, with its name in the bare network.

    Args:
        image_shape: (C, H, W).
        flag: that is to blame, for the message.
        advice: what to do, for the message.

    Raises:
        UserError: if there is none, or several.
    """
    return _only(_Pass(model, image_shape).last(), flag, advice)[1:]


def _only(
    layers: Sequence[tuple[int, str, nn.Linear]], flag: str, advice: str
) -> tuple[int, str, nn.Linear]:
    """The only one of the last linear layers; raises UserError if there is none, or several."""
    if len(layers) == 1:
        return layers[0]
    what = "this network has no linear layer that gives its logits, and one is needed"
    if layers:
        names = listed([name for _, name, _ in layers])
        what = f"several linear layers of this network give its logits ({names}), and one is needed"
    raise UserError(f"{flag}{': ' if flag else ''}{what}; {advice}")


def layer_or_last(
    model: nn.Module, name: str | None, flag: str, image_shape: Sequence[int]
) -> tuple[str, nn.Module]:
    """A layer of the bare network by its name; without a name, the linear layer of the logits.

    That is the last one, see `head`, or one whose weight the network uses without calling it, as
    for the cosine of weight and features.

    Args:
        flag: that gave the name, for the message.
        image_shape: (C, H, W).

    Returns:
        The layer's name, and the layer.

    Raises:
        UserError: if there is none, or several linear layers give the logits.
    """
    if name is not None:
        return name, layer(model, name, flag)
    run = _Pass(model, image_shape)
    last = run.last()
    for idle, linear in run.idle().items() if not last else ():
        if "weight" in linear._parameters and _are_used(model, [linear.weight], image_shape):
            return idle, linear
    return _only(last, flag, "name a layer")[1:]


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
    if not _are_used(model, weights, image_shape):
        raise UserError(
            f"{flag}: the logits do not depend on {next(iter(layers))}, so nothing would be "
            "learned there; give a layer that the network uses"
        )


def _are_used(
    model: nn.Module, weights: Iterable[torch.Tensor], image_shape: Sequence[int]
) -> bool:
    """Whether the logits depend on one of the weights that need gradients."""
    learning = [weight for weight in weights if weight.requires_grad]
    with evaluating(model), torch.enable_grad():
        logits = model(black_images(model, image_shape, 2))
        gradients: Sequence[torch.Tensor | None] = ()
        if learning and logits.requires_grad:
            gradients = torch.autograd.grad(logits.sum(), learning, allow_unused=True)
    return any(gradient is not None for gradient in gradients)
