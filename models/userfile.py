"""Networks from a user's own file: `my_net.py:build`, called with num_classes and image_size.

Such a file is run only because the user names it in a flag, never because a record does. A record
keeps its name and sha256, so that a defense can check that it is given the same file again.
"""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path

from torch import nn

from utils.errors import UserError, one_line

_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)", re.DOTALL)


def is_user_file(name: str) -> bool:
    """Whether a `--model` value means a constructor in a user's file."""
    return _NAME.fullmatch(name) is not None


def model_identity(name: str) -> tuple[str, str | None]:
    """What a record keeps of a `--model` value: its name, and the sha256 of a user's file.

    Returns:
        ("my_net.py:build", sha256) for a file, wherever it is; (name, None) for any other name.

    Raises:
        UserError: if the file cannot be read.
    """
    if not is_user_file(name):
        return name, None
    file, function = _parts(name)
    return f"{file.name}:{function}", hashlib.sha256(_source(file)).hexdigest()


def build_user_model(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """Runs the user's file and calls its constructor.

    Raises:
        UserError: if the file cannot be read or run, or gives no `nn.Module`.
    """
    file, function = _parts(name)
    source = _source(file)
    # In a module of its own, which dataclasses and the like look up by name.
    module_name = f"user_model_{hashlib.sha256(source).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(module_name, loader=None, origin=str(file))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    sys.modules[module_name] = module
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
        build = getattr(module, function, None)
        if not callable(build):
            raise UserError(f"--model: {file} has no function {function}; name one that it has")
        network = build(num_classes=num_classes, image_size=image_size)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
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


def _parts(name: str) -> tuple[Path, str]:
    match = _NAME.fullmatch(name)
    assert match is not None  # callers ask is_user_file
    return Path(match["file"]), match["function"]


def _source(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"--model: {file} cannot be read ({error.strerror}); give file.py:function"
        ) from None
