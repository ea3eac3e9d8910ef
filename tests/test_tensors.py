"""Tensor files: one way in, and only for plain data and what a format was allowed."""

import ast
import datetime
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.test_layers import modules_under
from utils.errors import UserError
from utils.runtime import ROOT
from utils.tensors import explained, load_plain, load_tensors


def test_only_one_function_calls_torch_load() -> None:
    """Neither torch.load nor a pickle is called anywhere else."""
    found = []
    for module, path in modules_under(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *("torch.load", "pickle.load", "pickle.loads", "np.load", "pd.read_pickle"),
            ):
                found.append(module)
    assert found == ["utils.tensors"]


def test_plain_data_and_tensors_are_read(tmp_path: Path) -> None:
    content = {"a": torch.arange(3), "b": [1, 2.5, "x", None, True, (1,)], "c": {"d": 1}}
    torch.save(content, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")
    assert found.pop("a").tolist() == [0, 1, 2]
    assert found == {"b": content["b"], "c": content["c"]}
    torch.save([1, 2], tmp_path / "x.pt")
    assert load_plain(tmp_path / "x.pt") == [1, 2]
    with pytest.raises(ValueError, match="holds no dictionary"):
        load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("load", [load_plain, load_tensors])
def test_what_is_allowed_is_allowed_for_one_file(tmp_path: Path, load: Callable) -> None:
    """And the message does not repeat torch's advice to load the file without the check."""
    path = tmp_path / "x.pt"
    torch.save({"day": datetime.timedelta(1)}, path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^it holds datetime\.timedelta, which is no plain"):
            load(path)
        with pytest.raises(ValueError, match=r"datetime\.timedelta"):
            load(path, [Fraction])
        assert load(path, [datetime.timedelta]) == {"day": datetime.timedelta(1)}


def test_failures_are_explained_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for error, reason in (
        (ValueError("first\nsecond"), "(first)"),
        (KeyError("model"), "('model')"),
        (MemoryError(), "(MemoryError)"),
    ):
        with pytest.raises(UserError) as caught, explained(path, "a record"):
            raise error
        assert str(caught.value) == f"{path}: is not a record {reason}"
    with pytest.raises(UserError, match=r"^as it was$"), explained(path, "a record"):
        raise UserError("as it was")
