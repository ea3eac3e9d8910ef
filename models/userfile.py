"""Networks from a user's own file: `my_net.py:build`, called with num_classes and image_size.

Such a file is run only because the user names it in a flag, never because a record does. A record
keeps its name and sha256, so that a defense can check that it is given the same file again. A run
reads a file once. The text that runs is the text that was hashed, even if the file changes in the
meantime. Outside of a run, as in a notebook, the file is read again each time. Modules beside the
file that it imports (`neighbours.py`) are part of it: the sha256 is then of all of them.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from models.neighbours import Neighbours, files_beside, is_of_user
from utils.errors import (
    UserError,
    is_lack_of_memory,
    is_lost_process,
    one_line,
    reason_of,
    shown,
)
from utils.files import TEXT, read_bytes
from utils.tensors import kind_of_numbers

_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)", re.DOTALL)
_PREFIX = "user_model_"  # of the names of the modules that users' files become
_RUNS: list[dict[str, bytes]] = []  # of each run that goes on: the texts of files by path
_LEAVE, _CHANGE_FOLDER = os._exit, os.chdir


def is_user_file(name: str) -> bool:
    """Whether a `--model` value means a constructor in a user's file."""
    return _NAME.fullmatch(name) is not None


def model_identity(name: str) -> tuple[str, str | None]:
    """What a record keeps of a `--model` value: its name, and the sha256 of a user's file.

    If the file imports others beside it, the sha256 is that of a list with a line for each of them,
    in the order of their paths: its sha256, two spaces, its path from the file's folder.

    Returns:
        ("my_net.py:build", sha256) for a file, wherever it is; (name, None) for any other name.

    Raises:
        UserError: if a file cannot be read.
    """
    if not is_user_file(name):
        return name, None
    file, function = _parts(name)
    digest = hashlib.sha256(_source(file)).hexdigest()
    place = Path(os.path.abspath(file))
    beside = {path for paths in files_beside(place, _source).values() for path in paths} - {place}
    if beside:
        listed = {p.relative_to(place.parent).as_posix(): p for p in sorted({place, *beside})}
        lines = [f"{hashlib.sha256(_source(p)).hexdigest()}  {name}" for name, p in listed.items()]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{file.name}:{function}", digest


def check_file(name: str) -> None:
    """Raises UserError if the file of `file.py:function` cannot be read; it is not run."""
    _source(_parts(name)[0])


def build_user_model(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """Runs the user's file and calls its constructor.

    Raises:
        UserError: if the file cannot be read or run, or gives no `nn.Module`.
    """
    file, function = _parts(name)
    source = _source(file)
    # In a module of its own, which dataclasses and the like look up by name.
    module_name = f"{_PREFIX}{hashlib.sha256(source).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(module_name, loader=None, origin=str(file))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    sys.modules[module_name] = module
    place = Path(os.path.abspath(file))
    neighbours = Neighbours(place.parent, list(files_beside(place, _source)), _source)
    module.__dict__["__builtins__"] = neighbours.builtins()
    _guard_process()
    try:
        with neighbours.visible():
            exec(compile(source, str(file), "exec"), module.__dict__)
            build = getattr(module, function, None)
            if not callable(build):
                raise UserError(f"--model: {file} has no function {function}; name one that it has")
            network = build(num_classes=num_classes, image_size=image_size)
        if isinstance(network, nn.Module) and image_size is not None:
            _fill_lazy_layers(network, image_size)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's code may raise anything
        if is_lack_of_memory(error):
            raise
        reason = one_line(error)
        raise UserError(
            f"--model: {name} failed with num_classes={num_classes}, image_size={image_size} "
            f"({type(error).__name__}: {reason}); repair it"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"--model: {name} gave {type(network).__name__}; it has to return an nn.Module"
        )
    return network


SAVED = "be saved as finite tensors alone"  # what a network has to do
Weights = Mapping[str, tuple[tuple[int, ...], str]]  # shape and kind of number by name


@dataclass(frozen=True)
class Promise:
    """What a user's network has to give in every call, and what a record keeps of it.

    Attributes:
        name: the `--model` value.
        num_classes: number of its outputs.
        weights: those that it had when it was made.
    """

    name: str
    num_classes: int
    weights: Weights

    def require_logits(self, logits: object, images: torch.Tensor) -> None:
        """Raises UserError if what the network gave for a batch is no (N, num_classes) of floats.

        A network may give something else for one image, in another mode, or after a while.
        """
        if wrong := not_as_logits(logits, len(images), self.num_classes):
            wanted = (len(images), self.num_classes)
            raise UserError(
                f"--model: {self.name} gives {wrong} for {in_words(images)}; logits of {wanted} "
                "are needed, as floats"
            )

    def require_weights(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the network has got or lost a weight, or has one of another kind.

        Args:
            state: what a record would keep, by name.
        """
        made, kept = self.weights, {name: _shape_and_kind(value) for name, value in state.items()}
        changed = next((n for n in [*made, *kept] if made.get(n) != kept.get(n)), None)
        if changed is None:
            return
        weight = f"the weight {shown(changed, 100)}"
        if changed not in made or changed not in kept:
            what = f"has {'lost' if changed in made else 'got'} {weight}"
        else:
            pairs = zip(made[changed], kept[changed], strict=True)
            before, after = next((one, other) for one, other in pairs if one != other)
            what = f"has changed {weight} from {before} to {after}"
        raise UserError(
            f"--model: {self.name} {what} while it was used, so no record of it could be read; "
            "make all weights in its constructor, and keep them"
        )


def not_as_logits(output: object, count: int, num_classes: int | None = None) -> str:
    """Type, shape or dtype of what a network gave, if it is not that of logits; else "".

    Args:
        output: what should be (count, num_classes) floats.
        num_classes: None for any number from 1.
    """
    if not isinstance(output, torch.Tensor):
        return type(output).__name__
    shape = tuple(output.shape)
    if len(shape) != 2 or shape != (count, num_classes or max(shape[1], 1)):
        return str(shape)
    return "" if output.is_floating_point() else str(output.dtype)


def in_words(images: torch.Tensor) -> str:
    """A batch of images (N, C, H, W), for messages."""
    count = {1: "one image", 2: "a batch of two images"}.get(
        len(images), f"a batch of {len(images)} images"
    )
    return f"{count} of {images.shape[2]} x {images.shape[3]} pixels"


def weights_of(network: nn.Module, name: str) -> Weights:
    """Shape and kind of each of the weights that a record keeps of a user's network.

    Args:
        name: the `--model` value.

    Raises:
        UserError: if it keeps anything but finite tensors.
    """

    def refused(reason: str) -> UserError:
        return UserError(f"--model: {name} cannot {SAVED} ({reason}); repair it")

    state = network.state_dict()
    if not isinstance(state, Mapping):
        raise refused(f"TypeError: {type(state).__name__} is no dictionary")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise refused(f"TypeError: {key} is {type(value).__name__}")
        if is_lazy(value):
            raise refused(f"{key} has no values yet")
        if not value.isfinite().all():
            raise refused(f"{key} is not finite")
    return {key: _shape_and_kind(value) for key, value in state.items()}


def _shape_and_kind(value: Any) -> tuple[tuple[int, ...], str]:
    """Of a tensor; of anything else, its type."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), kind_of_numbers(value)
    return (), type(value).__name__


def _fill_lazy_layers(network: nn.Module, image_size: int) -> None:
    """Gives lazy layers (`nn.LazyLinear`) their weights, in a pass of two black images.

    It is in eval mode, so that BatchNorm counts nothing.
    """
    if not any(is_lazy(value) for value in (*network.parameters(), *network.buffers())):
        return
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        network(torch.zeros(2, 3, image_size, image_size))
    for module, mode in modes:
        module.training = mode


@contextlib.contextmanager
def blamed(but_for: type[BaseException]) -> Iterator[None]:
    """Around a run: an error from the code of a user's file is reported as such, with its line.

    So it does not look like a defect of the program. And `sys.exit(0)` in the file does not look
    like a successful end. A lack of memory, and the end of another process, are no faults of the
    file, and stay what they are.

    Args:
        but_for: what our own handlers of signals raise, which can be in any code.

    Raises:
        UserError: in place of an exception that a frame of the user's file raised or let pass.
    """
    _RUNS.append({})
    try:
        yield
    except (UserError, but_for):
        raise
    except BaseException as error:
        steps = [step for step in traceback.walk_tb(error.__traceback__) if is_of_user(step[0])]
        if not steps or is_lack_of_memory(error) or is_lost_process(error):
            raise
        frame, line = steps[-1]
        raise UserError(
            f"--model: {frame.f_code.co_filename}, line {line}: {type(error).__name__}: "
            f"{one_line(error)}; this is your own file, repair it"
        ) from error
    finally:
        _RUNS.pop()


def _guard_process() -> None:
    """What the code of a user's file does to the whole process is reported as its error.

    These are `os._exit`, instead of an end without a record, and in a run `os.chdir`, by which all
    relative paths of the run would lead elsewhere. For all other code these do not change, also for
    processes that the user's code starts.
    """
    mine = os.getpid()

    def is_ours() -> bool:
        return os.getpid() == mine and is_of_user(sys._getframe(2))

    def leave(status: int) -> NoReturn:
        if is_ours():
            raise SystemExit(f"os._exit({status})")
        _LEAVE(status)

    def change_folder(path: Any) -> None:
        if _RUNS and is_ours():
            raise OSError("os.chdir moves the relative paths of the whole run; use absolute ones")
        _CHANGE_FOLDER(path)

    os._exit, os.chdir = leave, change_folder


def _parts(name: str) -> tuple[Path, str]:
    match = _NAME.fullmatch(name)
    assert match is not None  # callers ask is_user_file
    return Path(match["file"]), match["function"]


def _source(file: Path) -> bytes:
    """The text of a file; within a run, as it was when the run first asked for it."""
    try:
        path = os.path.realpath(file)
        texts = _RUNS[-1] if _RUNS else {}
        if path not in texts:
            texts[path] = read_bytes(file, TEXT)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        raise UserError(
            f"--model: {file} cannot be read ({reason_of(error)}); give file.py:function"
        ) from None
    return texts[path]
