"""Files of plain data and tensors, read without torch's own reader or a pickle's.

`torch.load(..., weights_only=True)` runs no foreign code, but it takes as much memory as a file
asks for: it lets a file call `bytearray(6 * 10**9)`. And its archive reader may see another list of
parts than the list that was checked. Here a file of `torch.save` is read in three steps, each with
its bounds. `zipfile` reads the archive. A small machine that knows some forty operations and about
twenty names reads the pickle. Each tensor is a view of bytes that are in the file.
"""

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import IO, Any

import numpy as np
import torch
from pydantic import PlainValidator, ValidationError

from utils.errors import UserError, first_line, reason_of, shown
from utils.files import TENSORS, opened

_MOST_PICKLED = 1 << 26  # bytes of all that is not the values of a tensor
# Operations of a pickle, with the parts that its calls copy. The data may have as many parts, each
# counted once for every place in which it stands.
_MOST_STEPS = 3_000_000
_MOST_TENSORS = 20_000  # tensors and arrays together
_MOST_LISTED = 1 << 24  # bytes of an archive's list of its parts
_DEEPEST = 100  # containers inside of each other
_LARGEST_INTEGER = 1 << 127
_MOST_SIDES = 64  # dimensions of a tensor; NumPy, too, has no more
_MOST_EMPTY_ROWS = 1 << 16  # before a dimension of 0

_SCALARS = (str, bytes, int, float, bool, type(None), np.number, np.bool_)


def load_plain(path: Path, arrays: bool = False) -> Any:
    """The content of a file of `torch.save`, tensors on the CPU; nothing that it names is run.

    Args:
        arrays: whether NumPy's arrays and numbers (integers, floats of up to 64 bits, truth values)
            are read, too; files of other programs have them.

    Raises:
        OSError: if it is no regular file, or cannot be read.
        ValueError: if the file holds anything but plain data and tensors, or would take more memory
            than about its own size. A damaged file can raise anything.
    """
    with opened(path, TENSORS) as file, _archive(file) as archive:
        (pickled,) = _members(archive, "data.pkl")
        if pickled.file_size > _MOST_PICKLED:
            raise ValueError(f"beside tensors it holds {pickled.file_size:,} bytes, too many")
        storages = _Storages(archive, pickled.filename.removesuffix("data.pkl"))
        content = _Machine(storages, arrays).run(archive.read(pickled))
    _refuse_unfolding(content)
    return content


def load_tensors(path: Path, arrays: bool = False) -> dict[str, Any]:
    """A dictionary of plain data and tensors.

    Args:
        arrays: see `load_plain`.

    Raises:
        OSError, ValueError: as `load_plain`, and if the file holds no dictionary.
    """
    content = load_plain(path, arrays)
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")
    return content


# --- the archive --------------------------------------------------------------------------------


@contextmanager
def _archive(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """An archive that is as large as its content.

    Raises:
        ValueError: if it is no such archive.
    """
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if not end:
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":  # as each archive begins
            raise ValueError("it is cut short or damaged: its end is missing")
        raise ValueError("it is no archive of torch.save; torch before 1.6 wrote another format")
    if end[zipfile._ECD_SIZE] > _MOST_LISTED:  # type: ignore[attr-defined]
        raise ValueError("it has too many parts")
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts claim to be larger than the file")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two of its parts have the same name")
        if any(archive.read(order) != b"little" for order in _members(archive, "byteorder", 0)):
            raise ValueError("it was written on a machine with another order of bytes")
        yield archive


def _members(archive: zipfile.ZipFile, name: str, least: int = 1) -> list[zipfile.ZipInfo]:
    """The part of that name below the archive's one folder, in a list.

    Raises:
        ValueError: if there are several, or fewer than `least`.
    """
    members = [m for m in archive.infolist() if re.fullmatch(rf"[^/]+/{name}", m.filename)]
    if not least <= len(members) <= 1:
        raise ValueError(f"it is no archive of torch.save: it has {len(members)} parts '{name}'")
    return members


class _Storages:
    """The bytes of tensors, each part read once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive = archive
        self._folder = folder
        self._read: dict[str, torch.Tensor] = {}

    def get(self, reference: Any) -> torch.Tensor:
        """A one-dimensional tensor of all values of a part.

        Args:
            reference: `("storage", type, name, device, count)`, as torch.save refers to one.

        Raises:
            ValueError: if it is no such reference, or the part has another size.
        """
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("it refers to something that is no tensor's values")
        _, kind, name, _, count = reference
        if not isinstance(kind, _Storage) or type(name) is not str or type(count) is not int:
            raise ValueError("it refers to a tensor's values in an unknown way")
        if name not in self._read:
            self._read[name] = self._bytes(self._archive.getinfo(f"{self._folder}data/{name}"))
        values = self._read[name]
        if len(values) != count * kind.dtype.itemsize:
            raise ValueError(f"a part of {len(values)} bytes is said to have {count} values")
        return values.view(kind.dtype)

    def _bytes(self, member: zipfile.ZipInfo) -> torch.Tensor:
        values = torch.empty(member.file_size, dtype=torch.uint8)
        room = values.numpy()
        with self._archive.open(member) as source:
            place = 0
            while piece := source.read(1 << 20):
                room[place : place + len(piece)] = np.frombuffer(piece, np.uint8)
                place += len(piece)
        if place != len(room):
            raise ValueError("a part of it is cut short")
        return values


# --- names --------------------------------------------------------------------------------------


class _Storage:
    """The type of a storage: what its values are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
}
_NO_PLAIN_TENSORS = ("_rebuild_sparse", "_rebuild_meta", "_rebuild_qtensor", "_rebuild_nested")


def _view(values: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A tensor on stored values: `torch._utils._rebuild_tensor_v2`.

    Raises:
        ValueError: if it reaches beyond them, or claims more values than there are.
    """
    if len(size) > _MOST_SIDES:
        raise ValueError(f"it holds a tensor of {len(size):,} dimensions")
    numbers = (offset, *size, *stride)
    if (
        not isinstance(values, torch.Tensor)
        or values.dim() != 1
        or len(size) != len(stride)
        or any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers)
    ):
        raise ValueError("it describes a tensor in an unknown way")
    count = _values_in(size)
    if count > len(values):
        raise ValueError(f"a tensor of {tuple(size)} is stored in fewer values")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if count and last > len(values):
        raise ValueError(f"a tensor of {tuple(size)} reaches beyond its values")
    return values.as_strided(size, stride, offset) if count else values.new_empty(size)


def _values_in(size: Iterable[int]) -> int:
    """How many values a tensor or array of these sides has.

    Raises:
        ValueError: if it has many rows, and nothing in them.
    """
    count, rows = 1, 1
    for side in size:
        count *= side
        rows *= side or 1
        if side == 0:
            break
    if count == 0 and rows > _MOST_EMPTY_ROWS:
        raise ValueError(f"a tensor of {tuple(size)} has rows of nothing")
    return count


def _typed_view(
    values: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any
) -> torch.Tensor:
    """`torch._utils._rebuild_tensor_v3`, of types that have no storage of their own."""
    if not isinstance(values, torch.Tensor) or not isinstance(dtype, torch.dtype):
        raise ValueError("it describes a tensor in an unknown way")
    return _view(values.view(dtype), offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> torch.Tensor:
    """`torch._utils._rebuild_parameter`, as a plain tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError("it describes a parameter in an unknown way")
    return tensor


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    """`collections.OrderedDict`, as a plain dictionary."""
    if not isinstance(pairs, (list, tuple)):
        raise ValueError("it describes a dictionary in an unknown way")
    result: dict[Any, Any] = {}
    for key, value in pairs:
        result[_key(key)] = value
    return result


def _set(members: Any = ()) -> set[Any]:
    if not isinstance(members, (list, tuple)):
        raise ValueError("it describes a set in an unknown way")
    return {_key(member) for member in members}


def _size(sides: Any = ()) -> tuple[int, ...]:
    if not isinstance(sides, tuple) or any(type(side) is not int for side in sides):
        raise ValueError("it describes a size in an unknown way")
    return sides


def _device(kind: Any, *_: Any) -> str:
    if type(kind) is not str:  # a list may unfold to a text of gigabytes
        raise ValueError("it describes a device in an unknown way")
    return shown(kind, 100)


def _encoded(text: Any, encoding: Any = "") -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it describes bytes in an unknown way")
    return text.encode("latin1")


def _number_type(name: Any, *_: Any) -> np.dtype:
    if type(name) is not str:
        raise ValueError("it describes a type of numbers in an unknown way")
    if not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
        kind = _NO_NUMBERS.get(name[:1], "another type")
        what = f"{kind} ({shown(name, 100)})"
        raise ValueError(f"it holds an array of {what}, which is no plain data and is not read")
    return np.dtype(name)


def _number(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(content) is not bytes:
        raise ValueError("it describes a number in an unknown way")
    (number,) = np.frombuffer(content, dtype)
    return number


_NO_NUMBERS = {
    "O": "objects",
    "U": "text",
    "S": "text",
    "M": "dates",
    "m": "times",
    "c": "complex numbers",
    "V": "records",
}


class _NumPyArray:
    """The name `numpy.ndarray`, which is allowed only as an argument of `_reconstruct`."""


def _empty_array(kind: Any, *_: Any) -> np.ndarray:
    if not isinstance(kind, _NumPyArray):
        raise ValueError("it describes an array in an unknown way")
    return np.empty(0)


# What a name of a file stands for here; what can be called is ours, and checks its arguments.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): _Storage(torch.uint8),
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes those of no length
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    **{("torch", name): _Storage(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}
_NUMPY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NumPyArray(),
    ("numpy", "dtype"): _number_type,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")  # of NumPy 1 and 2
        for name, function in (("_reconstruct", _empty_array), ("scalar", _number))
    },
}


# --- the pickle ---------------------------------------------------------------------------------


def _key(value: Any) -> Any:
    """A key of a dictionary: hashing anything else could take forever.

    Raises:
        ValueError: if it is no scalar.
    """
    if not isinstance(value, _SCALARS):
        raise ValueError(f"it has a {type(value).__name__} in the place of a name")
    return value


class _Machine:
    """Reads one pickle."""

    def __init__(self, storages: _Storages, arrays: bool) -> None:
        self._names = {**_NAMES, **(_NUMPY_NAMES if arrays else {})}
        self._storages = storages
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._tensors = 0
        self._most_copied = 0  # bytes

    def run(self, pickled: bytes) -> Any:
        """Gives what the pickle holds.

        Raises:
            ValueError: if it holds anything but plain data and what is named above.
        """
        # Protocol 2 writes an array's bytes as a text: they are copied twice, once from that text.
        self._most_copied = 2 * len(pickled)
        steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
            "MEMOIZE": lambda _: self._remember(len(self._memo)),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda place: self._push(self._memo[place])),
            **dict.fromkeys(
                (
                    *("BININT", "BININT1", "BININT2", "BINFLOAT"),
                    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
                    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
                ),
                self._push,
            ),
            "LONG1": self._integer,
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "MARK": self._mark,
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set_items([self._stack.pop(), self._stack.pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "TUPLE": lambda _: self._push(tuple(self._since_mark())),
            **{f"TUPLE{count}": self._tuple_of(count) for count in (1, 2, 3)},
            "GLOBAL": lambda name: self._name(*name.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(*[self._stack.pop(), self._stack.pop()][::-1]),
            "REDUCE": self._call,
            "BUILD": self._set_state,
            "BINPERSID": lambda _: self._push(self._storages.get(self._stack.pop())),
        }
        try:
            for operation, argument, _ in pickletools.genops(pickled):
                self._count_steps(1)
                if operation.name == "STOP":
                    (content,) = self._stack
                    return content
                if operation.name not in steps:
                    raise ValueError(
                        f"it holds something of the kind {operation.name}, which is no plain data "
                        "and is not read"
                    )
                steps[operation.name](argument)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its parts do not fit together ({first_line(error)})") from None
        raise ValueError("it ends too early")

    def _count_steps(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ValueError("it holds too many parts")

    def _count_copied(self, content: bytes) -> None:
        self._most_copied -= len(content)
        if self._most_copied < 0:
            raise ValueError("its bytes and arrays are larger than the file")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _integer(self, value: int) -> None:
        if abs(value) > _LARGEST_INTEGER:
            raise ValueError("it holds an integer of too many digits")
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._marks.pop()
        return values

    def _tuple_of(self, count: int) -> Callable[[Any], None]:
        def step(_: Any) -> None:
            values = tuple(self._stack[-count:])
            if len(values) < count:
                raise IndexError("a part is missing")
            self._stack[-count:] = [values]

        return step

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("a value is appended to what is no list")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise TypeError("a value is put into what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is no text")
        if module == "torch._utils" and name.startswith(_NO_PLAIN_TENSORS):
            raise ValueError("it holds a sparse, quantized or empty-shelled tensor")
        if (module, name) not in self._names:
            what = shown(f"{module}.{name}", 100)
            raise ValueError(f"it holds {what}, which is no plain data and is not read")
        self._stack.append(self._names[module, name])

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, FunctionType):  # those on the stack are from the names above
            raise TypeError("something is called that is no function")
        result = function(*arguments)
        self._count_result(result)
        self._stack.append(result)

    def _count_result(self, result: Any) -> None:
        """Counts what a call gives: a file may call many times, each with the same long argument.

        Raises:
            ValueError: if it is too much.
        """
        if isinstance(result, (torch.Tensor, np.ndarray)):
            self._tensors += 1
            if self._tensors > _MOST_TENSORS:
                raise ValueError("it holds too many tensors")
        elif isinstance(result, bytes):
            self._count_copied(result)
        elif isinstance(result, (dict, set)):
            self._count_steps(len(result))

    def _set_state(self, _: Any) -> None:
        """Gives an object its data: an array its content; the notes of a state dict are dropped."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is dict:
            return
        if isinstance(target, np.dtype):
            if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
                raise ValueError("it holds an array of another order of bytes, or of records")
            return
        if type(target) is not np.ndarray:
            raise TypeError("a state is given to what has none")
        _version, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, np.dtype) or type(content) is not bytes:
            raise ValueError("it holds an array that is not of numbers")
        self._count_copied(content)
        _values_in(_size(shape))
        array_state = (1, shape, dtype, bool(is_fortran), content)
        target.__setstate__(array_state)  # type: ignore[arg-type]


def _refuse_unfolding(content: Any) -> None:
    """Raises ValueError if plain data are too deep, hold themselves, or unfold to too many parts.

    A part may be in several places. It counts once for each place, because code that goes through
    the data meets it there each time.
    """
    counts: dict[int, int] = {}  # of containers that are done; 0 while they are looked at
    waiting: list[tuple[Any, bool]] = [(content, False)]
    depth = 0
    while waiting:
        value, is_done = waiting.pop()
        parts = _parts(value)
        if parts is None:
            continue
        if is_done:
            depth -= 1
            counts[id(value)] = 1 + sum(counts.get(id(part), 1) for part in parts)
            if counts[id(value)] > _MOST_STEPS:
                raise ValueError("its parts unfold to more than it holds")
        elif id(value) not in counts:
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"it holds more than {_DEEPEST} containers inside of each other")
            counts[id(value)] = 0
            waiting.append((value, True))
            waiting += [(part, False) for part in parts]
        elif counts[id(value)] == 0:
            raise ValueError("a part of it holds itself")


def _parts(value: Any) -> list[Any] | None:
    """The parts of a container; None of anything else."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else None


# --- what is read -------------------------------------------------------------------------------


def kind_of_numbers(tensor: torch.Tensor) -> str:
    """What two tensors have in common if one can be loaded for the other: "float", "int64", ..."""
    is_float = tensor.is_floating_point()
    return "float" if is_float else str(tensor.dtype).removeprefix("torch.")


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or a NaN.

    Raises:
        ValueError: for a type for which torch cannot say it.
    """
    names = []
    for name, value in state.items():
        is_small_float = value.is_floating_point() and value.element_size() == 1
        try:  # torch cannot ask 8-bit floats themselves
            if not (value.float() if is_small_float else value).isfinite().all():
                names.append(name)
        except RuntimeError:  # of torch 2.6; later a NotImplementedError, which is one
            raise ValueError(f"{name} is of {value.dtype}, which is not read") from None
    return names


def text_up_to(most: int, least: int = 1) -> PlainValidator:
    """A schema's check of a text: `least` to `most` characters, and no NUL.

    Unlike pydantic's own check, it accepts halves of characters. They represent bytes of a path
    that are no UTF-8.
    """

    def check(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most or "\0" in value:
            raise ValueError(f"is no text of {least} to {most} characters")
        return value

    return PlainValidator(check)


@contextmanager
def explained(path: Path, expected: str, advice: str = "") -> Iterator[None]:
    """Turns any failure to read a file into a UserError: '<path>: is not <expected> (<reason>)'.

    Args:
        advice: what to do; it follows after a semicolon.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file raises anything from zipfile's to unpickling errors
        if isinstance(error, ValidationError):
            first, count = error.errors(include_input=False)[0], error.error_count()
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg']}" + (f", and {count - 1} more" if count > 1 else "")
        else:
            reason = reason_of(error, first_line)
        end = f"; {advice}" if advice else ""
        raise UserError(f"{path}: is not {expected} ({reason}){end}") from error
