"""Weights of a model that was trained elsewhere: read from a checkpoint, put into a network."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch

from models import Classifier
from utils.errors import UserError, first_line, listed, reason_of, shown
from utils.files import TENSORS, read_bytes
from utils.process.script import logger
from utils.tensors import load_tensors, not_finite

# Where programs keep a state dict beside other things.
WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "weights", "params"),
    *("ema", "model_ema", "state_dict_ema"),
)
# What torch puts before, or between, names: of a parallel run, of a compiled module.
_OF_TORCH = re.compile(r"(?:^(?:module\.|_orig_mod\.)+)|(?<=\.)_orig_mod\.")


def read_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint by name, unwrapped.

    If other weights are beside them that may be the network's, too, the names of all have their
    place in the file before them, and `fill` takes those that have the network's names.

    Raises:
        UserError: if the file is no checkpoint, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            content: Mapping[str, Any] = load(read_bytes(path, TENSORS))
        else:
            content = load_tensors(path, arrays=True)  # NumPy's numbers beside weights
    except Exception as error:  # a file of another kind raises anything
        reason = reason_of(error, first_line)
        raise UserError(
            f"--state_dict: {path} cannot be read as plain tensors ({reason}); give a file of "
            f"torch.save(model.state_dict(), path), or .safetensors{_way_out(path, reason)}"
        ) from None
    state = _unwrapped(content)
    others = [
        str(key)
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not state:
        what = f"{listed(others, limit=200)} is no tensor" if others else "it is empty"
        raise UserError(
            f"--state_dict: {path} holds no state dict ({what}); give one, bare or under "
            f"{', '.join(WRAPPERS)}"
        )
    state = _with_rivals(content, state)
    try:
        broken = not_finite(state)
    except ValueError as error:
        raise UserError(f"--state_dict: {path}: {error}; give another file") from None
    if broken:
        names = listed(broken, limit=200)
        raise UserError(f"--state_dict: {path}: not finite: {names}; give another file")
    return state


def fill(model: Classifier, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Puts weights into the bare network; names and shapes have to be the same.

    What torch puts before names does not count, neither in the file nor in a network that is itself
    made by `nn.DataParallel` or `torch.compile`. If all names of the network have a prefix, as
    training frameworks add one, it is removed, and a message says so. Other weights are skipped,
    and a message says so. Counts of batches (BatchNorm's `num_batches_tracked`), which old files
    lack, stay as they are in a new network.

    Args:
        name: of the model, for messages.

    Raises:
        UserError: listing names that are missing, not the network's, or of another shape.
    """
    network_state = model.network.state_dict()
    full_names = {_OF_TORCH.sub("", key): key for key in network_state}
    is_of_torch = full_names.keys() != network_state.keys()
    if is_of_torch and (
        len(full_names) < len(network_state) or _prefixes(state, _counting_none(network_state))
    ):
        full_names = {key: key for key in network_state}
    else:
        state = _without_torch(state)
    network_state = {short: network_state[key] for short, key in full_names.items()}
    needed = _counting_none(network_state)
    state = _without_prefix(state, needed)
    kinds = (
        [f"{key} is missing" for key in needed if key not in state],
        [f"{key} is not in the network" for key in state if key not in network_state],
        [
            f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in network_state.items()
            if key in state and state[key].shape != value.shape
        ],
        [
            f"{key} is {state[key].dtype}, no real number"
            for key, value in network_state.items()
            if key in state and state[key].is_complex() and not value.is_complex()
        ],
        [
            f"{key} is {state[key].dtype} instead of floats"
            for key, value in network_state.items()
            if key in state and value.is_floating_point() and not _has_fractions(state[key])
        ],
    )
    problems = [text for texts in zip_longest(*kinds) for text in texts if text]  # some of each
    if problems:
        told = listed(problems, "; ", limit=200)
        raise UserError(
            f"--state_dict: does not fit --model {name}: {told}; give its own network, dataset and "
            "image size"
        )
    filled = {**network_state, **state}
    model.network.load_state_dict({full_names[short]: value for short, value in filled.items()})
    if broken := not_finite(model.network.state_dict()):  # too large for their type here
        names = listed(broken, limit=200)
        raise UserError(f"--state_dict: too large for the network: {names}; give another file")


def _counting_none(names: Iterable[str]) -> list[str]:
    """The names of weights, without counts of batches."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _without_torch(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The weights without what torch puts before their names.

    Raises:
        UserError: if they are there with and without it.
    """
    stripped = {_OF_TORCH.sub("", key): value for key, value in state.items()}
    if len(stripped) < len(state):
        raise UserError(
            "--state_dict: has names both with and without 'module.' or '_orig_mod.' before them; "
            "keep one of each pair"
        )
    return stripped


def _unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The innermost dictionary under one of the usual names."""
    while True:
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            return content
        content = content[inner]


def _has_fractions(weights: torch.Tensor) -> bool:
    return weights.is_floating_point() or weights.is_complex()


def _with_rivals(
    content: Mapping[Any, Any], state: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The weights alone, or all under the names of their places, if there are others like them."""
    places = list(_state_dicts(content))
    rivals = {
        place: other
        for place, other in places
        if not _are_same(other, state)
        and (_prefixes(other, _bare(state)) or _prefixes(state, _bare(other)))
    }
    if not rivals:
        return state
    home = next(place for place, other in places if other is state)
    together = {home: state, **rivals}
    return {f"{place}{key}": v for place, weights in together.items() for key, v in weights.items()}


def _state_dicts(
    content: Mapping[Any, Any], place: str = ""
) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Each dictionary of nothing but tensors, after its place, such as `model.`."""
    if content and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        yield place, content
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, f"{place}{key}.")


def _are_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same weights, whatever torch puts before their names."""
    if one is other:
        return True
    first, second = ({_OF_TORCH.sub("", k): v for k, v in each.items()} for each in (one, other))
    try:
        return first.keys() == second.keys() and all(
            torch.equal(value, second[key]) for key, value in first.items()
        )
    except RuntimeError:  # of a type that torch cannot compare, and that is not read
        return False


def _bare(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of weights, without counts of batches and without what stands before all names."""
    names = [_OF_TORCH.sub("", key).split(".") for key in _counting_none(state)]
    parents = zip(*(name[:-1] for name in names), strict=False)  # as long as the shortest
    before = sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, parents))
    return [".".join(name[before:]) for name in names]


def _prefixes(state: Mapping[str, torch.Tensor], needed: list[str]) -> list[str]:
    """What stands before all of the needed names, as often as there is a weight of each."""
    if not needed:
        return []
    candidates = [key.removesuffix(needed[0]) for key in state if key.endswith(needed[0])]
    return [
        prefix
        for prefix in candidates
        if (not prefix or prefix.endswith(".")) and all(f"{prefix}{key}" in state for key in needed)
    ]


def _without_prefix(
    state: Mapping[str, torch.Tensor], needed: list[str]
) -> Mapping[str, torch.Tensor]:
    """The weights under the one prefix that has all names of the network.

    Raises:
        UserError: if several have.
    """
    if not needed or all(key in state for key in needed):
        return state
    whole = _prefixes(state, needed)
    if not whole:
        return state
    if len(whole) > 1:
        raise UserError(
            f"--state_dict: has all weights {len(whole)} times, under {listed(whole, limit=200)}; "
            "give a file that has them once"
        )
    (prefix,) = whole
    taken = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    others = [key for key in state if not key.startswith(prefix)]
    rest = f"; skipped beside them: {listed(others, limit=200)}" if others else ""
    logger.info("%s", f"the weights are those under '{shown(prefix, 100)}'{rest}")
    return taken


def _way_out(path: Path, reason: str) -> str:
    """What to do with a file that also holds objects of Python."""
    if "no plain data" not in reason:
        return ""
    return (
        '; where you trust whoever made it, take the weights out: content = torch.load("'
        f'{path}", weights_only=False); torch.save(content["state_dict"], "weights.pt")'
    )
