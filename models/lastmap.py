"""The last map of features of any network: what it pools, or flattens, at its end."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.modes import evaluating
from models.outputs import watching
from models.parts import bare, black_images, top_level
from utils.errors import UserError

_MEANS = ("mean", "sum", "amax", "max", "logsumexp")  # and what has `pool` in its name
_KEEPING = (
    *("__getitem__", "clone", "contiguous", "dropout", "float", "permute", "relu", "to"),
    *("batch_norm", "group_norm", "layer_norm"),
)
_WEIGHING = ("mul", "multiply", "div", "divide")
_MOVING = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")
_Result = tuple[torch.Tensor, torch.Tensor | None, int]


@dataclass(frozen=True)
class _Pooled:
    """What a map was pooled, or flattened, to.

    Attributes:
        node: of autograd, that gave the result; None without a gradient.
        origin: the map; None if there is none, or if several maps are pooled and joined.
        place: what `place` gave when it was pooled.
        is_joined: whether several maps are pooled and joined.
    """

    node: object
    origin: torch.Tensor | None
    place: int
    is_joined: bool = False


class _Pooling(TorchFunctionMode):
    """Inside, keeps the maps (N, C, H, W) that are pooled, or flattened, to (N, D).

    Pooling and flattening may be two calls, with others between, and a map may be pooled in several
    ways that are joined. Maps that become tokens (N, L, D) do not count, nor those that are pooled
    to weigh channels, as squeeze and excitation does. What is pooled as (N, H, W, C) is of the map
    that was brought into this order, or else of none.

    Attributes:
        pooled: in the order of the calls.
    """

    def __init__(self, place: Callable[[], int]) -> None:
        super().__init__()
        self.pooled: list[_Pooled] = []
        self._place = place
        # Maps in another order of dimensions, with the map, and what is of no map (N, C, H, W).
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        # Results that a map was pooled or flattened to, with the map (None for several maps) and
        # its place. Each result is kept, because else another tensor might get its id.
        self._results: dict[int, _Result] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        name, given = getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()]
        source = given[0] if given else None
        if isinstance(source, (list, tuple)):
            self._join(source, result)
        elif isinstance(source, torch.Tensor):
            others = [other for other in given[1:] if isinstance(other, torch.Tensor)]
            if source.ndim > 2:
                if source.ndim == 4 and name in (*_MOVING, *_MEANS):
                    self._move(source, result, _order(func, args, kwargs or {}))
                self._look(name, source, result, any(other.ndim == 4 for other in others))
            elif result.ndim == 2:
                self._follow(name.strip("_"), [source, *others], result)
        return result

    def _move(self, source: torch.Tensor, result: torch.Tensor, order: list[int]) -> None:
        """Remembers the map (N, C, H, W) of what is, or is pooled as, (N, H, W, C).

        Args:
            order: the dimensions of the source that the result has.
        """
        moved = self._moved.get(id(source))
        if len(order) == 4 and order != sorted(order) and (moved or order != [0, 3, 1, 2]):
            self._moved[id(result)] = (result, moved[1] if moved else source)
        elif order == [0, 3] and not moved:
            self._moved[id(result)] = (result, None)

    def _look(
        self, name: str, source: torch.Tensor, result: torch.Tensor, has_others: bool
    ) -> None:
        this_map, this_place = self._moved.get(id(source), (source, source))[1], self._place()
        if id(source) in self._moved and name in (*_KEEPING, *_MEANS) and result.ndim == 4:
            self._moved.setdefault(id(result), (result, this_map))
        if this_map is None or (id(result) in self._moved and self._moved[id(result)][1] is None):
            if result.ndim < 4:
                self.pooled.append(_Pooled(result.grad_fn, None, this_place))
            return
        origin, place = self._results.get(id(source), (None, this_map, this_place))[1:]
        if origin is not None and origin.ndim != 4:
            return
        pixels = result.shape[2:].numel()
        is_whole = "adaptive" in name or pixels == 1
        is_small = pixels == 1 and source.shape[2:].numel() == 1
        # Weights of channels times a map of one pixel are a map of its own.
        is_after = name in _KEEPING or (is_small and ("conv" in name or not has_others))
        if result.ndim == 2:
            self._keep(result, origin, place)
        elif result.ndim == 4 and is_whole and ("pool" in name or name in _MEANS):
            self._results[id(result)] = (result, this_map, this_place)
        elif result.ndim == 4 and is_after and origin is not this_map:
            self._results[id(result)] = (result, origin, place)
        elif result.ndim == 3 and source.ndim == 4:
            self._results[id(result)] = (result, origin, place)
            # Tokens, unless the next call pools or flattens them.
            self.pooled.append(_Pooled(result.grad_fn, None, place))

    def _join(self, sources: Sequence[Any], result: torch.Tensor) -> None:
        results = self._results_among(sources)
        if _of_several(results) or (results and (result.ndim == 2 or len(results) == len(sources))):
            _, origin, place = results[0]
            self._keep(result, None if _of_several(results) else origin, place)

    def _follow(self, name: str, sources: Sequence[torch.Tensor], result: torch.Tensor) -> None:
        """What is made from pooled features is of their map; what only weighs them has none."""
        results = self._results_among(sources)
        if results and (name in _WEIGHING or not _of_several(results)):
            self._results[id(result)] = (result, *results[0][1:])
        elif results:
            self._keep(result, None, results[0][2])

    def _results_among(self, sources: Sequence[Any]) -> list[_Result]:
        return [self._results[id(source)] for source in sources if id(source) in self._results]

    def _keep(self, result: torch.Tensor, origin: torch.Tensor | None, place: int) -> None:
        self._results[id(result)] = (result, origin, place)
        if result.ndim == 2:
            self.pooled.append(_Pooled(result.grad_fn, origin, place, origin is None))


def _of_several(results: Sequence[_Result]) -> bool:
    """Whether results are of different maps."""
    return any(origin is not results[0][1] for _, origin, _ in results)


def _order(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The dimensions of a function's first argument (of four) that its result has, in its order."""
    like = torch.empty(2, 3, 5, 7, device="meta")
    named = dict(kwargs) if args else {**kwargs, next(iter(kwargs)): like}
    try:
        shape = func(*([like, *args[1:]] if args else ()), **named).shape
    except (RuntimeError, TypeError):  # it has other tensors
        return []
    return [like.shape.index(size) for size in shape if size != 1]


def _of_logits(candidates: Sequence[_Pooled], logits: torch.Tensor) -> _Pooled | None:
    """The last result from which the logits are made; they are not made from auxiliary ones.

    Where no gradient leads from the logits, as in a frozen network, it is the last one of all.
    """
    nodes: set[object] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    used = [pooled for pooled in candidates if pooled.node is None or pooled.node in nodes]
    return next(reversed(used or list(candidates)), None)


def last_map(model: nn.Module, image_shape: Sequence[int], least_pixels: int = 1) -> str:
    """The layer whose output is the last map of features, which is pooled over all pixels.

    A network that does not pool may flatten its map. The map is searched in a pass of black images.
    If it is no layer's output, because a function such as `F.relu` made it, the last layer before
    it with an output of that shape is taken, or else with at least as many pixels. A layer that is
    used more than once is never taken. For PreAct-ResNet18 it is `layer4`.

    Args:
        image_shape: (C, H, W) of an image.
        least_pixels: if the map has fewer, the last part of the network before it that has more.

    Returns:
        The layer's name in the bare network.

    Raises:
        UserError: if there is none.
    """
    images = black_images(model, image_shape, 2)
    seen: list[tuple[str, torch.Tensor]] = []
    names = [name for name, _ in bare(model).named_modules() if name]
    with (
        watching(model, names, lambda *output: seen.append(output)),
        evaluating(model),
        torch.enable_grad(),
        _Pooling(lambda: len(seen)) as pooling,
    ):
        logits = model(images)
    pooled = _of_logits(pooling.pooled, logits)
    times = Counter(name for name, _ in seen)
    maps = [
        (name, output)
        for name, output in seen[: pooled.place if pooled else 0]
        if times[name] == 1 and isinstance(output, torch.Tensor) and output.ndim == 4
    ]
    if pooled and pooled.is_joined:
        raise UserError(
            "this network joins features of several maps, and this method masks those of one; give "
            "another method or network"
        )
    last, names = pooled.origin if pooled else None, []
    if last is not None and last.shape[2:].numel() < least_pixels:
        parts = top_level(model)
        names = [n for n, x in maps if n in parts and x.shape[2:].numel() >= least_pixels]
    elif last is not None:
        same = [n for n, x in maps if x is last] or [n for n, x in maps if x.shape == last.shape]
        names = same or [n for n, x in maps if x.shape[2:].numel() >= last.shape[2:].numel()]
    if not names:
        raise UserError(
            "this method works on the map of features (N, C, H, W) before global pooling, and this "
            "network has none; give another method or a convolutional network"
        )
    return names[-1]
