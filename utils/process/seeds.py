"""Random generators, and the same bits for the same seed."""

import contextlib
import hashlib
import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from utils.errors import UserError


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, a GPU gives the same bits for the same seed if that is `wanted`.

    The settings from before are restored at the end. cuDNN and cuBLAS use only deterministic
    algorithms, which may be slower. A CPU always does.

    Raises:
        UserError: if the network has an operation that torch can only do in another way.
    """
    if not wanted:
        yield
        return
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    was_deterministic, was_benchmark = cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(variable)
    was_strict = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    if workspace not in (":4096:8", ":16:8"):
        os.environ[variable] = ":4096:8"  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if not match:
            raise
        raise UserError(
            f"--deterministic: {match[1]} cannot be so on this device; drop the flag, or give "
            "another --model"
        ) from None
    finally:
        cudnn.deterministic, cudnn.benchmark = was_deterministic, was_benchmark
        torch.use_deterministic_algorithms(was_strict, warn_only=only_warned)
        os.environ.pop(variable, None)
        if workspace is not None:
            os.environ[variable] = workspace


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator, so that draws for one purpose never change the draws for another one.

    Args:
        seed: the run's seed.
        purpose: any text, e.g. "poisoned indices".
        device: where it draws.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    rng = torch.Generator(device)
    rng.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return rng


class Draws:
    """An object whose state is that of the generators among its attributes."""

    def state_dict(self) -> dict[str, Any]:
        """The generators' states by the names of the attributes."""
        return {name: rng.get_state() for name, rng in self._generators().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: if it is the state of other generators.
        """
        if state.keys() != self._generators().keys():
            raise ValueError("the generators have other names")
        for name, rng in self._generators().items():
            rng.set_state(state[name])

    def _generators(self) -> dict[str, torch.Generator]:
        values = vars(self).items()
        return {name: value for name, value in values if isinstance(value, torch.Generator)}


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, as plain data and tensors.

    `utils.training.state.restore_random` puts them back.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }


def same_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether nothing was drawn between two calls of `random_states`."""
    leaves, others = (tree_leaves(dict(states)) for states in (one, other))
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )
