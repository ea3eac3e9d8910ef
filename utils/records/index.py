"""The file that names the images of a clean subset."""

import re
from pathlib import Path

import torch

from utils.errors import UserError, shown
from utils.files import TABLE, read_text


def read_index(path: Path, count: int) -> torch.Tensor:
    """Indices of the clean subset, integers with space or lines between them.

    Returns:
        int64 (N,), ascending.

    Raises:
        UserError: for text that is no integer, a repeated index, or one outside 0..count-1.
    """
    try:
        text = read_text(path, TABLE)
        words = text.split()
        wrong = [word for word in words if not re.fullmatch("-?[0-9]{1,18}", word)]
        if wrong:
            raise ValueError(shown(wrong[0], 100))
        numbers = [int(word) for word in words]
    except OSError as error:
        raise UserError(
            f"--index: {path} cannot be read ({error.strerror}); give a text file"
        ) from None
    except ValueError as error:
        raise UserError(
            f"--index: {path} holds something else than integers ({error}); write one per line, "
            f"0 to {count - 1}"
        ) from None
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise UserError(
            f"--index: {path} names image {outside[0]}; the training set has 0 to {count - 1}"
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--index: {path} names an image twice; name each once")
    return torch.tensor(sorted(numbers), dtype=torch.int64)
