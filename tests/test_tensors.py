"""Tensor files: one way in, and only for plain data and what a format was allowed."""

import ast
import datetime
import zipfile
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


# --- sizes --------------------------------------------------------------------------------------


def test_a_tensor_of_more_values_than_are_stored_is_refused(tmp_path: Path) -> None:
    """One stored value, repeated 10**12 times by a stride of 0, deep inside the file."""
    hollow = torch.zeros(1).expand(10**12)
    torch.save({"a": [{"b": (hollow,)}]}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is stored in fewer values"):
        load_plain(tmp_path / "x.pt")


def test_tensors_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    for number, tensor in enumerate((torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"))):
        torch.save({"a": tensor}, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match="sparse, quantized or empty-shelled"):
            load_plain(tmp_path / f"{number}.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A thousand times smaller than what it would take in memory."""
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    with pytest.raises(ValueError, match="compressed"):
        load_plain(tmp_path / "y.pt")


def test_the_format_before_archives_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="no archive of torch"):
        load_plain(tmp_path / "x.pt")


def test_parts_that_stand_in_many_places_are_looked_at_once(tmp_path: Path) -> None:
    """Forty lists, each twice in the next one: 2**40 ways to the tensor."""
    value: list = [torch.ones(2)]
    for _ in range(40):
        value = [value, value]
    torch.save(value, tmp_path / "x.pt")
    assert isinstance(load_plain(tmp_path / "x.pt"), list)
