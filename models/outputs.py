"""What layers of any network give: seen, kept or changed while the network runs.

Names are those of the bare network, see `models/parts.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from models.modes import uncompiled
from models.parts import bare, refuse_scripts


@contextmanager
def watching(
    model: nn.Module,
    names: Iterable[str],
    see: Callable[[str, Any], Any],
    of: Literal["output", "input"] = "output",
) -> Iterator[None]:
    """Inside, `see` takes the name and the output (or the input) of layers at each of their calls.

    The layers' hooks are removed at the end. Compiled networks are run as they were written.

    Args:
        names: of layers of the bare network.
        see: what it gives takes the place of the output, unless it is None.

    Raises:
        UserError: if torch has made one of the layers a script.
    """
    layers, names = dict(bare(model).named_modules()), list(names)
    refuse_scripts({name: layers[name] for name in names})
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
        with uncompiled():
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
    with watching(model, [name], lambda _, output: output * factor):
        yield
