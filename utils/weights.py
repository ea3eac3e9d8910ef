"""Weights of a model that was trained elsewhere: checkpoint files, and into a network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models import Classifier
from utils.errors import UserError, first_line, shown
from utils.files import TENSORS, read_bytes
from utils.tensors import load_tensors, not_finite

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, unwrapped, `module.` stripped.

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
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"--state_dict: {path} cannot be read as plain tensors ({reason}); give a file of "
            "torch.save(model.state_dict(), path), or .safetensors"
        ) from None
    wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    state = content if wrapper is None else content[wrapper]
    others = [
        str(key)
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not state:
        what = shown(", ".join(others), 300) or "nothing"
        raise UserError(
            f"--state_dict: {path} holds no state dict ({what} is no tensor); give one, bare or "
            f"under {', '.join(_WRAPPERS)}"
        )
    try:
        broken = not_finite(state)
    except ValueError as error:
        raise UserError(f"--state_dict: {path}: {error}; give another file") from None
    if broken:
        raise UserError(
            f"--state_dict: {path}: not finite: {shown(', '.join(broken), 300)}; give another file"
        )
    stripped = {key.removeprefix("module."): value for key, value in state.items()}
    if len(stripped) < len(state):
        raise UserError(
            f"--state_dict: {path} has names both with and without 'module.' before them; keep "
            "one of each pair"
        )
    return stripped


def fill(model: Classifier, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Puts weights into the bare network; names and shapes have to be the same.

    Raises:
        UserError: listing every name that is missing, not the network's, or of another shape.
    """
    own = model.network.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is not in the network" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"--state_dict: does not fit --model {name}: {'; '.join(problems)}; give its own "
            "network, dataset and image size"
        )
    model.network.load_state_dict(state)
