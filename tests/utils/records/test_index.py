"""A file of indices: the images of a clean subset."""

from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.records.index import read_index


@pytest.mark.parametrize(
    ("text", "expected"), [("3\n1\n2\n", [1, 2, 3]), ("0\r\n9", [0, 9]), ("\n\n", []), ("", [])]
)
def test_indices_are_read_in_ascending_order(
    tmp_path: Path, text: str, expected: list[int]
) -> None:
    path = tmp_path / "index.txt"
    path.write_text(text)
    found = read_index(path, 10)
    assert found.tolist() == expected
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"1\n2.5\n", "2.5"),
        (b"1\ntwo\n", "two"),
        (b"1_0\n", "1_0"),  # which Python takes for 10
        (b"+1\n", "+1"),
        (b"1\n10\n", "names image 10; the training set has 0 to 9"),
        (b"-1\n", "names image -1; the training set has 0 to 9"),
        (b"4\n1\n4\n", "twice"),
        (b"\xff\xfe\n", "something else than integers"),
    ],
)
def test_an_index_that_cannot_be_meant_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / "index.txt"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_index(path, 10)
    assert str(caught.value).startswith(f"--index: {path}")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_an_index_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"--index: .* cannot be read"):
        read_index(tmp_path / name, 10)
