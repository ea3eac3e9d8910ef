"""Tensor files: plain data alone are read, in no more memory than the file's size."""

import ast
import codecs
import collections
import datetime
import io
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import NO_FILES, put_no_file
from tests.test_layers import modules_under
from utils.errors import UserError
from utils.files import ROOT
from utils.tensors import explained, load_plain, load_tensors


def test_no_pickle_is_run_anywhere() -> None:
    """Neither torch.load nor a pickle is called."""
    found = []
    for module, path in modules_under(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *("torch.load", "pickle.load", "pickle.loads", "np.load", "pd.read_pickle"),
                *("pickle.Unpickler", "load_state_dict_from_url", "torch.hub.load"),
            ):
                found.append(module)
    assert found == []


# --- what is read -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_that_torch_reads_is_read_alike(tmp_path: Path, protocol: int) -> None:
    content = {
        "text": ["é\ud800 \U0001f600", "x" * 300, ""],
        "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**40, -(2**100), 1.5, float("inf")],
        "bytes": b"\x00\xff",
        "nested": ({"a": [()]}, (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "python": random.getstate(),
        "size": torch.Size([2, 3]),
        "type": torch.float32,
        3: None,
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    assert load_plain(tmp_path / "x.pt") == content
    assert load_plain(tmp_path / "x.pt")["nested"][1].__class__ is tuple


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.arange(20)[4:9],
        torch.arange(20)[::3],
        torch.zeros(1).expand(1, 1),
        torch.zeros(0),
        torch.zeros(0, 3, 4),
        torch.tensor(1.5),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(3, dtype=torch.complex64),
        nn.Parameter(torch.ones(2)).data,
        *(
            torch.ones(3).to(dtype)
            for dtype in (
                *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32),
                *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn),
                torch.uint16,
            )
        ),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",
)
def test_tensors_are_read_as_they_were(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor, "b": [tensor]}, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")["a"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.stride() == tensor.stride() or found.numel() == 0
    assert found.tolist() == tensor.tolist()


def test_parameters_and_state_dicts_become_plain(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": network.state_dict(), "weight": network[0].weight}, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")
    assert type(found["model"]) is dict
    assert list(found["model"]) == list(network.state_dict())
    assert torch.equal(found["model"]["0.weight"], network[0].weight)
    assert not isinstance(found["weight"], nn.Parameter)
    assert torch.equal(found["weight"], network[0].weight)


ARRAYS = [
    np.arange(3),
    np.float64(1.5),
    np.int64(-4),
    np.float32(0.5),
    np.float16(0.5),
    np.bool_(True),
    np.array([True, False]),
    *(np.arange(3).astype(kind) for kind in ("i1", "i2", "i4", "u1", "u2", "u4", "u8", "f2", "f4")),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros(0),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: str(value.dtype))
def test_numpy_is_read_where_it_is_allowed(tmp_path: Path, value: Any) -> None:
    torch.save({"a": value}, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt", arrays=True)["a"]
    assert type(found) is type(value)
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert (found == value).all()
    with pytest.raises(ValueError, match=r"^it holds numpy\..*, which is no plain data"):
        load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "value",
    [
        np.array(["text"]),
        np.array([object()]),
        np.array([{"a": 1}]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.array([1j]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.arange(3, dtype=">i8"),
        np.complex128(1),
        np.datetime64("2020-01-01"),
        np.ma.masked_array([1]),
        np.longdouble(1),
    ],
    ids=lambda value: str(value.dtype),
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"^it holds .*(order of bytes|no plain data)"):
        load_tensors(tmp_path / "x.pt", arrays=True)


def test_the_type_of_an_array_is_named(tmp_path: Path) -> None:
    for value, what in (
        (np.array(["text"]), r"text \(U4\)"),
        (np.array([object()]), r"objects \(O8\)"),
        (np.array([1j]), r"complex numbers \(c16\)"),
        (np.datetime64("2020-01-01"), r"dates \(M8\)"),
    ):
        torch.save({"a": value}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"it holds an array of {what}, which is no plain"):
            load_tensors(tmp_path / "x.pt", arrays=True)


# --- what is refused ----------------------------------------------------------------------------


def refuse(path: Path, match: str, arrays: bool = True) -> None:
    with pytest.raises(ValueError, match=match):
        load_plain(path, arrays)


def test_what_is_no_plain_data_is_named(tmp_path: Path) -> None:
    """And the message does not repeat torch's advice to load the file without the check."""
    for value, name in (
        (datetime.timedelta(1), r"datetime\.timedelta"),
        (collections.Counter("a"), r"collections\.Counter"),
        (range(3), r"(__builtin__\.xrange|builtins\.range)"),
        (slice(3), r"__builtin__\.slice"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (bytearray(3), r"(__builtin__|builtins)\.bytearray"),
    ):
        torch.save({"day": value}, tmp_path / "x.pt")
        refuse(tmp_path / "x.pt", rf"^it holds {name}, which is no plain data and is not read$")


def archive(path: Path, pickled: bytes, **parts: bytes) -> Path:
    """A file as torch.save makes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickled)
        made.writestr("x/byteorder", b"little")
        for name, content in parts.items():
            made.writestr(f"x/data/{name.strip('_')}", content)
    return path


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def newobj(name: str, argument: bytes) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + argument + b"\x85\x81."


SIX_GB = b"\x8a\x05" + (6 * 10**9).to_bytes(5, "little")
BILLION = b"J" + struct.pack("<i", 10**9)
HOSTILE: dict[str, bytes] = {
    "bytearray called": pickle.dumps(Call(bytearray, 6 * 10**9), 2),
    "bytearray made": newobj("builtins.bytearray", SIX_GB),
    "bytes called": pickle.dumps(Call(bytes, 6 * 10**9), 2),
    "a tensor made": newobj("torch.Tensor", BILLION),
    "a tensor called": pickle.dumps(Call(torch.Tensor, 10**9), 2),
    "a float tensor made": newobj("torch.FloatTensor", BILLION),
    "a float tensor called": b"\x80\x02ctorch\nFloatTensor\n" + BILLION + b"\x85R.",
    "a storage called": b"\x80\x02ctorch\nFloatStorage\n" + BILLION + b"\x85R.",
    "a storage made": newobj("torch.FloatStorage", BILLION),
    "a parameter made": newobj("torch.nn.parameter.Parameter", BILLION),
    "an array made": newobj("numpy.ndarray", BILLION),
    "zeros": pickle.dumps(Call(torch.zeros, 10**9), 2),
    "encode inside itself": pickle.dumps(
        Call(codecs.encode, Call(codecs.encode, "\xff" * 10**5, "latin1"), "hex"), 2
    ),
    "encode to utf-32": pickle.dumps(Call(codecs.encode, "x" * 10**5, "utf-32"), 2),
    "nested tuples": b"\x80\x02" + b")" + b"\x85" * 300_000 + b".",
    "nested tuples as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "nested lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "nested dictionaries": b"\x80\x02" + b"}K\x01" * 300_000 + b"N" + b"s" * 300_000 + b".",
    "bytes called by their old name": b"\x80\x02c__builtin__\nbytes\n" + SIX_GB + b"\x85R.",
    "a byte array of gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 6 * 10**9) + b"x.",
    "bytes of gigabytes": b"\x80\x04\x8e" + struct.pack("<Q", 6 * 10**9) + b"x.",
    "a text of gigabytes": b"\x80\x04\x8d" + struct.pack("<Q", 6 * 10**9) + b"x.",
    "an integer of megabytes": b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".",
    "an integer of digits": b"\x80\x02I" + b"9" * 10**6 + b"\n.",
    "five million dictionaries": b"\x80\x02(" + b"}" * 5_000_000 + b"l.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary of itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "no start": b".",
    "too much": b"\x80\x02NN.",
    "a mark without values": b"\x80\x02(.",
    "values without a mark": b"\x80\x02t.",
    "a missing memo": b"\x80\x02h\x07.",
    "an instance": b"\x80\x02(i__main__\nX\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent text": b"\x80\x02P17\n.",
    "a name with a line break": b"\x80\x04\x8c\x02os\x8c\x08sy\nstem\x1b\x93.",
    "the name of a name": b"\x80\x04\x8c\x05torch\x8c\x0bnn.Linear.x\x93.",
    "an unhashable name": b"\x80\x04]]\x93.",
    "a dictionary as a key": b"\x80\x02}}Ns.",
    "a tuple as a key": b"\x80\x02}K\x01\x85Ns.",
    "something called": b"\x80\x02K\x01K\x02\x85R.",
    "a type called": b"\x80\x02ctorch\nfloat32\n)R.",
    "a state for a number": b"\x80\x02K\x01K\x02b.",
    "a value put into a number": b"\x80\x02K\x01K\x02K\x03s.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_take_neither_memory_nor_time(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "x.pt", HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught, explained(path, "a record"):
        load_plain(path, arrays=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 512  # MiB
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_lists_that_unfold_are_refused(tmp_path: Path) -> None:
    """Forty lists, each twice in the next one, are 2**40 ways to the same tensor."""
    value: list = [torch.ones(2)]
    for _ in range(40):
        value = [value, value]
    torch.save(value, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "unfold to more than it holds")


def described(
    values: int, size: tuple, stride: tuple, offset: int = 0, kind: str = "FloatStorage"
) -> bytes:
    """The pickle of a tensor on a part named 0."""

    class Reference:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Reference):
                return ("storage", getattr(torch, kind), "0", "cpu", values)
            return None

    file = io.BytesIO()
    arguments = (Reference(), offset, size, stride, False, collections.OrderedDict())
    Pickler(file, 2).dump(Call(torch._utils._rebuild_tensor_v2, *arguments))
    return file.getvalue()


def calls(function: Callable[..., Any], *arguments: Any, times: int) -> bytes:
    """The pickle of many calls with the same arguments, which it holds once."""
    return pickle.dumps([Call(function, *arguments) for _ in range(times)], 2)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (calls(codecs.encode, "x" * 10**5, "latin1", times=8), "bytes and arrays are larger"),
        (calls(set, [*range(10_000)], times=300), "too many parts"),
        (
            calls(collections.OrderedDict, [(n, n) for n in range(10_000)], times=300),
            "too many parts",
        ),
        (calls(set, "text", times=1), "a set in an unknown way"),
        (described(4, (1,) * 65, (0,) * 65), "a tensor of 65 dimensions"),
    ],
    ids=["bytes", "sets", "dictionaries", "a set of a text", "dimensions"],
)
def test_copies_of_one_part_are_counted(tmp_path: Path, pickled: bytes, match: str) -> None:
    """A call of three bytes makes another copy of a long text, of many members, of sides."""
    refuse(archive(tmp_path / "x.pt", pickled, _0=bytes(16)), match)


def test_what_is_copied_once_is_read(tmp_path: Path) -> None:
    """Protocol 2 writes bytes as a text and a set as a list; an array's bytes are copied twice."""
    content = {
        "bytes": [bytes([n % 256]) * 1000 for n in range(200)],
        "arrays": [np.full(1000, n % 100, np.int8) for n in range(200)],
        "sets": [set(range(n, n + 50)) for n in range(200)],
        "names": {np.int64(n): {"label": n, "path": f"{n}.png"} for n in range(30_000)},
    }
    torch.save(content, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt", arrays=True)
    for one, other in zip(found.pop("arrays"), content.pop("arrays"), strict=True):
        assert np.array_equal(one, other)
    assert found == content


def twice(times: int) -> list:
    """A list that unfolds to a text of 2**times brackets."""
    value: list = []
    for _ in range(times):
        value = [value, value]
    return value


NAMED_BY_TUPLES = (
    b"\x80\x02)q\x00"
    + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(18))
    + b"h\x12h\x12\x93."
)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (pickle.dumps(Call(torch.device, twice(18)), 2), "a device in an unknown way"),
        (pickle.dumps(Call(np.dtype, twice(18)), 2), "a type of numbers in an unknown way"),
        (NAMED_BY_TUPLES, "a name is no text"),
    ],
    ids=["device", "type", "name"],
)
def test_lists_are_not_shown_before_they_are_counted(
    tmp_path: Path, pickled: bytes, match: str
) -> None:
    refuse(archive(tmp_path / "x.pt", pickled), match)


def test_an_array_of_rows_of_nothing_is_refused(tmp_path: Path) -> None:
    torch.save({"a": np.zeros((10**9, 0))}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "rows of nothing")


def test_a_memo_takes_no_room_for_what_is_not_in_it(tmp_path: Path) -> None:
    """Python's own machine makes a table of 32 GiB for the four billionth entry."""
    path = archive(tmp_path / "x.pt", b"\x80\x02Nr" + b"\xff\xff\xff\xff" + b".")
    assert load_plain(path) is None


def test_parts_may_stand_in_two_places(tmp_path: Path) -> None:
    part = {"a": [1, 2]}
    torch.save([part, part], tmp_path / "x.pt")
    assert load_plain(tmp_path / "x.pt") == [part, part]


@pytest.mark.parametrize(
    ("values", "size", "stride", "offset", "match"),
    [
        (4, (10**12,), (0,), 0, "is stored in fewer values"),
        (4, (2, 10**9), (1, 0), 0, "is stored in fewer values"),
        (4, (10**9, 0), (1, 1), 0, "rows of nothing"),
        (4, (10**5, 10**5, 0), (1, 1, 1), 0, "rows of nothing"),
        (4, (4,), (1,), 1, "reaches beyond"),
        (4, (2,), (4,), 0, "reaches beyond"),
        (4, (4,), (-1,), 3, "in an unknown way"),
        (4, (-4,), (1,), 0, "in an unknown way"),
        (4, (4,), (1,), -1, "in an unknown way"),
        (4, (2, 2), (1,), 0, "in an unknown way"),
        (4, (4.0,), (1,), 0, "in an unknown way"),
        (4, (2**63,), (1,), 0, "in an unknown way"),
        (4, 4, 1, 0, "do not fit together"),
        (5, (4,), (1,), 0, "said to have 5 values"),
        (3, (3,), (1,), 0, "said to have 3 values"),
        (4.0, (4,), (1,), 0, "in an unknown way"),
    ],
)
def test_a_tensor_is_a_view_of_what_is_stored(
    tmp_path: Path, values: Any, size: Any, stride: Any, offset: int, match: str
) -> None:
    path = archive(tmp_path / "x.pt", described(values, size, stride, offset), _0=bytes(16))
    refuse(path, match)
    path = archive(tmp_path / "x.pt", described(4, (4,), (1,)), _0=bytes(16))
    assert load_plain(path).tolist() == [0.0] * 4


def test_a_hollow_tensor_of_torch_s_own_is_refused(tmp_path: Path) -> None:
    """One stored value, repeated 10**12 times by a stride of 0, deep inside the file."""
    hollow = torch.zeros(1).expand(10**12)
    torch.save({"a": [{"b": (hollow,)}]}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "is stored in fewer values")


def test_tensors_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    for number, tensor in enumerate(
        (
            torch.zeros(3).to_sparse(),
            torch.zeros(3, 3).to_sparse_csr(),
            torch.zeros(3, device="meta"),
            torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
            torch.nested.nested_tensor([torch.zeros(2)]),
        )
    ):
        torch.save({"a": tensor}, tmp_path / f"{number}.pt")
        refuse(tmp_path / f"{number}.pt", "sparse, quantized or empty-shelled")


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    """Each takes half a kilobyte, and could take three bytes of the file."""
    one = described(4, (4,), (1,))
    call = one[2 : one.rindex(b"R")]  # the function, then its arguments
    repeated = b"\x80\x02](" + call + b"R" + (call + b"R") * 20_000 + b"e."
    refuse(archive(tmp_path / "x.pt", repeated, _0=bytes(16)), "too many tensors")


# --- archives -----------------------------------------------------------------------------------


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A thousand times smaller than what it would take in memory."""
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    refuse(tmp_path / "y.pt", "compressed")


def test_an_archive_of_two_lists_is_read_by_one_reader(tmp_path: Path) -> None:
    """A compressed archive in front of a stored one: what is checked is what is read."""
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data.pkl", described(10**7, (10**7,), (1,)))
        made.writestr("x/data/0", bytes(4 * 10**7))
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as made:
        made.writestr("x/data.pkl", described(4, (4,), (1,)))
        made.writestr("x/data/0", bytes(16))
    path = tmp_path / "x.pt"
    path.write_bytes(small.getvalue() + stored.getvalue())
    assert load_plain(path).tolist() == [0.0] * 4
    path.write_bytes(stored.getvalue() + small.getvalue())
    refuse(path, "compressed")


def test_archives_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", described(4, (4,), (1,)), _0=bytes(16))
    good = path.read_bytes()
    header = good.index(b"PK\x01\x02")  # of the first part in the list
    for size in (2**31, 2**32 - 2):
        lie = struct.pack("<II", size, size)
        path.write_bytes(good[: header + 20] + lie + good[header + 28 :])
        refuse(path, "claim to be larger")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("x/data.pkl", b"\x80\x02N.")
    refuse(path, "the same name")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", b"\x80\x02N.")
        made.writestr("y/data.pkl", b"\x80\x02N.")
    refuse(path, "2 parts 'data.pkl'")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/other", b"")
    refuse(path, "0 parts 'data.pkl'")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", b"\x80\x02N.")
        made.writestr("x/byteorder", b"big")
    refuse(path, "another order of bytes")
    path.write_bytes(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**31, 0, 0))
    refuse(path, "too many parts")


def test_a_part_that_was_changed_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.full((1000,), 7.0)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(struct.pack("<f", 7.0) * 3) + 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        load_plain(tmp_path / "x.pt")


def test_an_archive_that_was_cut_short_is_told_from_other_formats(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    for count in (4, len(content) // 2, len(content) - 30):
        (tmp_path / "x.pt").write_bytes(content[:count])
        refuse(tmp_path / "x.pt", r"^it is cut short or damaged: its end is missing$")


def test_the_format_before_archives_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    refuse(tmp_path / "x.pt", "no archive of torch")


@pytest.mark.slow
def test_a_large_file_takes_little_more_than_its_size(tmp_path: Path) -> None:
    """In a process of its own: 200 MiB of values, and less than half of that beside."""
    torch.save({"a": torch.zeros(50 << 20)}, tmp_path / "x.pt")
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom utils.tensors import load_plain\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024\n"
        "before = peak()\nload_plain(Path(sys.argv[1]))\nprint(peak() - before)"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    text = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert 190 < float(text) < 300


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_regular_files_of_sane_size_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pt"
    put_no_file(path, kind)
    with pytest.raises(OSError, match=rf"{re.escape(str(path))}"):
        load_plain(path)
    with pytest.raises(UserError) as caught, explained(path, "a record"):
        load_plain(path)
    assert str(caught.value).startswith(f"{path}: is not a record (")
    assert len(str(caught.value).splitlines()) == 1


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
