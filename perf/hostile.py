"""Bad files in place of good ones: changed in their structure, not only in their bytes.

Every function takes a `random.Random` and gives a value, or changes a file in place.
"""

import collections
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

NAMES = (
    *("", " ", "a" * 300, "x" * 5000, "y" * 200_000, ".", "..", "../../x", "/tmp/x", "a/b", "a\\b"),
    *("a\nb", "a\r\nerror: b", "\x1b[2J\x1b[31mred", "\x9b31m", "\0", "a\0b", "\udcff", "\ud800x"),
    *("\u202egnp.exe", "\u2028line", "\ufeff", "é" * 90, "\u0301" * 50, "中文", "\U0001f600"),
    *("$\\frac$", "$$", "$x", "\\", "{}", "%s%n", "{0!r}", "<script>alert(1)</script>", "a|b`c`"),
    *("--help", "-", "x.py:f", "nul", "config.yaml", "=cmd()", "None", "true", "1e999"),
)
NUMBERS = (
    *(0, 1, -1, 2, 255, 256, 1023, 1025, 10**6, 10**9, 10**12, 10**18, 2**31, 2**63, -(2**63)),
    *(2**64, 10**40, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
)


def name(rng: random.Random) -> str:
    """A hostile name, or a mixture of two."""
    return rng.choice(NAMES) if rng.random() < 0.8 else rng.choice(NAMES) + rng.choice(NAMES)


def tensor(rng: random.Random, like: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of another type, shape, range, or kind."""
    is_odd = like is not None and (
        like.layout != torch.strided or like.is_meta or not 0 < like.numel() < 10**8
    )
    if like is None or is_odd or rng.random() < 0.3:  # odd: damaged before
        return rng.choice(
            (
                torch.zeros(0),
                torch.zeros(0, 7),
                torch.tensor(0.0),
                torch.tensor(-(2**62)),
                torch.full((3,), float("nan")),
                torch.zeros(2, 2, dtype=torch.complex64),
                torch.zeros(1).expand(10**12),
                torch.zeros(3).to_sparse(),
                torch.zeros(3, device="meta"),
                torch.ones(5, dtype=torch.bool),
                torch.ones(4, dtype=torch.float16),
                torch.arange(100_000),
            )
        )
    wide = like.reshape(-1)
    changes: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: like[:-1] if like.dim() else like[None],
        lambda: like[1:] if like.dim() else like[None],
        lambda: like[:0] if like.dim() else like[None],
        lambda: like[None],
        lambda: like.unsqueeze(-1),
        lambda: wide,
        lambda: wide[0],
        lambda: torch.cat([wide, wide]),
        lambda: torch.cat([like, like]) if like.dim() else like,
        lambda: like.flip(0) if like.dim() else like,
        lambda: like.transpose(0, -1) if like.dim() else like,
        lambda: like.to(
            rng.choice((torch.float64, torch.float16, torch.int16, torch.bool, torch.complex64))
        ),
        lambda: like.to(rng.choice((torch.int32, torch.uint8, torch.float32, torch.int64))),
        lambda: like.clone().fill_(1) * 250 if like.dtype == torch.uint8 else like - 1000,
        lambda: like + 1000 if like.dtype != torch.bool else ~like,
        lambda: like.float() * rng.choice((float("nan"), float("inf"), 1e30, -1)),
        lambda: torch.full_like(like, 7) if like.dtype != torch.bool else ~like,
    )
    return rng.choice(changes)()


def plain(rng: random.Random, most_shared: int) -> Any:
    """A plain value of any kind.

    Args:
        most_shared: how many lists, each of which is twice in the next one: 2 ** lists if unfolded.
    """
    nested: Any = []
    for _ in range(rng.choice((3, 90, 900))):
        nested = rng.choice(([nested], (nested,), {"a": nested}))
    shared: Any = [1, 2]
    for _ in range(rng.choice((5, most_shared))):
        shared = [shared, shared]
    return rng.choice(
        (
            *(None, True, False, [], {}, (), b"", b"\xff" * 9, nested, shared, range(3), {1, 2}),
            *(name(rng), rng.choice(NUMBERS), [rng.choice(NUMBERS)] * 5, {name(rng): 1}),
            *([name(rng)] * 3, {rng.choice(NUMBERS): name(rng)}, bytearray(5), Call(dict)),
            *(Call(bytearray, 6 * 10**9), Call(torch.zeros, 10**10), Call(os.getcwd)),
            *(tensor(rng), [tensor(rng)], collections.OrderedDict(a=1), 1j),
        )
    )


def value(good: Any, rng: random.Random, most_shared: int = 40) -> Any:
    """Plain data and tensors with a part of another kind, size, range, or name.

    Args:
        most_shared: see `plain`.
    """
    if isinstance(good, dict) and good and rng.random() < 0.92:
        key = rng.choice(list(good))
        chance = rng.random()
        if chance < 0.1:
            return {other: part for other, part in good.items() if other != key}
        if chance < 0.17:
            return good | {name(rng): good[key]}
        if chance < 0.22:
            return {(name(rng) if other == key else other): part for other, part in good.items()}
        return good | {key: value(good[key], rng, most_shared)}
    if isinstance(good, (list, tuple)) and good and rng.random() < 0.8:
        place = rng.randrange(len(good))
        parts = list(good)
        chance = rng.random()
        if chance < 0.15:
            del parts[place]
        elif chance < 0.3:
            parts += parts
        else:
            parts[place] = value(parts[place], rng, most_shared)
        return type(good)(parts)
    if isinstance(good, torch.Tensor) and rng.random() < 0.8:
        return tensor(rng, good)
    if isinstance(good, str) and rng.random() < 0.7:
        return name(rng)
    if isinstance(good, (int, float)) and rng.random() < 0.7:
        return rng.choice(NUMBERS)
    return plain(rng, most_shared)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


# --- bytes --------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage."""
    for _ in range(rng.randint(1, 3)):
        if not content:
            return content
        place, size = rng.randrange(len(content)), rng.randint(1, 64)
        piece = content[place : place + size]
        if (kind := rng.randrange(7)) == 0:
            content = content[:place]
        elif kind == 1:
            flipped = bytes([content[place] ^ 1 << rng.randrange(8)])
            content = content[:place] + flipped + content[place + 1 :]
        elif kind == 2:
            content = content[:place] + rng.randbytes(len(piece)) + content[place + len(piece) :]
        elif kind == 3:
            content = content[:place] + piece * rng.randint(2, 50) + content[place:]
        elif kind == 4:
            content = content[place:] + content[:place]
        elif kind == 5:
            content = content[:place] + content[place + size :]
        else:
            eight = rng.choice((b"\xff" * 8, b"\0" * 8, b"9" * 9))
            content = content[:place] + eight + content[place + 8 :]
    return content


def damage_bytes(path: Path, rng: random.Random) -> None:
    """Damages a file."""
    path.write_bytes(damaged(path.read_bytes(), rng))


def replace_file(path: Path, rng: random.Random) -> None:
    """Replaces a file by something that is not a file of ordinary size."""
    path.unlink()
    kind = rng.choice(("pipe", "folder", "zero", "itself", "nowhere", "sparse", "empty", "random"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(200 * 10**9)
    elif kind == "empty":
        path.touch()
    elif kind == "random":
        path.write_bytes(rng.randbytes(rng.choice((1, 100, 100_000))))
    else:
        target = {"zero": "/dev/zero", "itself": str(path), "nowhere": "/nowhere/at/all"}[kind]
        path.symlink_to(target)


# --- files of tensors ---------------------------------------------------------------------------

# Pieces of pickles, as an attacker would write them by hand; see `pickletools`.
_PIECES = (
    *(b"N", b"]", b"}", b")", b"(", b"l", b"t", b"d", b"0", b"2", b"a", b"e", b"s", b"u", b"R"),
    *(b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"K\x01", b"h\x00", b"q\x01"),
    *(b"Q", b"\x90", b"\x8f", b"\x93", b"\x94", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\x7f"),
    b"\x8a\x05" + (6 * 10**9).to_bytes(5, "little"),
    b"\x8b" + struct.pack("<I", 2**31 - 1),
    b"X" + struct.pack("<I", 2**32 - 1),
    b"\x8d" + struct.pack("<Q", 2**40),
    b"\x8e" + struct.pack("<Q", 6 * 10**9),
    b"\x96" + struct.pack("<Q", 6 * 10**9),
    b"]" * 100_000 + b"a" * 99_999,
    b"\x85" * 300_000,
    b"cbuiltins\nbytearray\n",
    b"cbuiltins\neval\n",
    b"ctorch\nTensor\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"c_codecs\nencode\n",
    b"cos\nsystem\n",
    b"X\x04\x00\x00\x00true",
    b"J" + struct.pack("<i", 10**9),
    b"I" + b"9" * 5000 + b"\n",
)


def damage_pickle(path: Path, rng: random.Random) -> None:
    """Puts pieces of a pickle into another one, or a pickle made by hand, into a good archive."""
    with zipfile.ZipFile(path) as archive:
        parts = [(member.filename, archive.read(member)) for member in archive.infolist()]
    folder = parts[0][0].split("/")[0]
    pickled = next(content for part, content in parts if part.endswith("data.pkl"))
    if rng.random() < 0.5:
        pickled = b"\x80\x02" + b"".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 12)))
        pickled += b"."
    else:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(pickled))
            pickled = pickled[:place] + rng.choice(_PIECES) + pickled[place:]
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts:
            archive.writestr(part, pickled if part == f"{folder}/data.pkl" else content)


def damage_archive(path: Path, rng: random.Random) -> None:
    """Another archive with the same parts: compressed, or parts twice, missing or cut, or two."""
    with zipfile.ZipFile(path) as archive:
        parts = [(member.filename, archive.read(member)) for member in archive.infolist()]
    way = rng.choice(("compress", "twice", "missing", "cut", "grow", "rename", "two", "sizes"))
    place = rng.randrange(len(parts))
    part, content = parts[place]
    if way == "twice":
        parts.append((part, content[::-1]))
    elif way == "missing":
        del parts[place]
    elif way == "cut":
        parts[place] = part, content[: len(content) // 2]
    elif way == "grow":
        parts[place] = part, content * 2
    elif way == "rename":
        parts[place] = name(rng).replace("\0", "")[:1000] or "x", content
    compression = zipfile.ZIP_DEFLATED if way in ("compress", "two") else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for part, content in parts:
            with_name = zipfile.ZipInfo(part.encode("utf-8", "replace").decode())
            with_name.compress_type = compression
            archive.writestr(with_name, content)
    whole = buffer.getvalue()
    if way == "two":
        whole = rng.choice((whole + path.read_bytes(), path.read_bytes() + whole))
    elif way == "sizes":
        entry = whole.index(b"PK\x01\x02")
        for _ in range(rng.randrange(len(parts))):
            entry = whole.index(b"PK\x01\x02", entry + 1)
        lie = struct.pack("<II", *rng.choices((0, 1, 2**31, 2**32 - 1), k=2))
        whole = whole[: entry + 20] + lie + whole[entry + 28 :]
    path.write_bytes(whole)


def damage_tensors(path: Path, rng: random.Random, read: Callable[[Path], Any]) -> None:
    """Damages a file of `torch.save`: its bytes, its archive, its pickle, or its values.

    Args:
        read: reads a good one.
    """
    way = rng.random()
    if way < 0.2:
        damage_bytes(path, rng)
    elif way < 0.3:
        damage_archive(path, rng)
    elif way < 0.45:
        damage_pickle(path, rng)
    else:
        content = read(path)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            content = value(content, rng)
        try:
            torch.save(content, path)
        except (TypeError, AttributeError, pickle.PicklingError, RecursionError, OverflowError):
            damage_bytes(path, rng)  # such a value cannot be written


# --- texts --------------------------------------------------------------------------------------


def damage_json(path: Path, rng: random.Random) -> None:
    """Damages a JSON file: its bytes, or its values."""
    content = value(json.loads(path.read_text(encoding="utf-8")), rng, most_shared=12)
    try:
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError):
        text = "[" * rng.choice((10, 100_000)) + str(rng.choice(NUMBERS)) * rng.choice((1, 5000))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if rng.random() < 0.3:
        damage_bytes(path, rng)


def damage_table(path: Path, rng: random.Random) -> None:
    """Damages a CSV file: cells of other kinds, lines that are cut, names of columns."""
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(rows)
        cell = rng.choice((name(rng), str(rng.choice(NUMBERS)), '"', ",", "", "nan"))
        row[rng.randrange(len(row))] = cell
    text = "\n".join(",".join(row) for row in rows)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _odd_value(rng: random.Random) -> str:
    """What may stand behind a colon in YAML, and is no plain value or a rare one."""
    return rng.choice(
        (
            *('!!int ""', "!!bool foo", "!!map", "!!set {a, b}", "!!timestamp 2001-01-01", "!x y"),
            *(
                "!!python/object/apply:os.system [ls]",
                "!!binary gIGC",
                "!!float",
                "!!null",
                "!!seq",
            ),
            *("2001-01-01", "2001-01-01 10:00:00", "=", "<<", "~", "0o17", "0x1f", "1:30", "1_000"),
            *("&a [1]", "*a", "[" * 500, "{a: " * 300, "[1, 2", "'", '"\\ud800"', '"\\x1b[31m"'),
            *(
                "|\n  text\n",
                ">\n  text\n",
                "? a",
                "- b",
                "@x",
                "`x`",
                "%TAG",
                "\t",
                "\x00",
                "\x85",
            ),
            *("9" * 5000, "1e999", ".inf", ".nan", "-.inf", "+1", "''", "null", "yes", "on"),
            *("../../config", "/etc/passwd", "a" * 300, str(rng.choice(NUMBERS)), name(rng)),
        )
    )


def yaml_text(good: str, rng: random.Random) -> bytes:
    """A flat YAML file with a line of another kind."""
    lines = good.splitlines()
    names = [line.split(":")[0] for line in lines if ":" in line]
    key = rng.choice(names)
    odd = _odd_value(rng)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines) + 1)
        way = rng.random()
        if way < 0.5:
            lines = [line for line in lines if not line.startswith(f"{key}:")]
            lines.insert(min(place, len(lines)), f"{key}: {odd}")
        elif way < 0.6:
            lines.insert(place, f"{key}: {odd}")
        elif way < 0.7:
            lines.insert(
                place, rng.choice(("---", "...", "# x", "a", "- a", "{a: 1}", "<<: {b: 1}"))
            )
        elif way < 0.8:
            lines.insert(place, f"{odd}: 1")
        elif way < 0.85:
            lines += [f"k{number}: 1" for number in range(rng.choice((100, 90_000)))]
        elif way < 0.9:
            lines = [
                line.replace(": ", rng.choice((":", " : ", ": !!str ", ":\t"))) for line in lines
            ]
        else:
            lines[:100] = [f"{name(rng)}: {line}" for line in lines[:100]]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = damaged(content, rng)
    if rng.random() < 0.1:
        content = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + content
    return content


# --- pictures -----------------------------------------------------------------------------------

_OTHER_PICTURES = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
    b"%PDF-1.4\n",
    b"8BPS\0\1" + bytes(6) + b"\0\3" + (8).to_bytes(4, "big") * 2 + b"\0\x08\0\3",
    b"DDS " + struct.pack("<7I", 124, 0x1007, 60_000, 60_000, 0, 0, 0) + bytes(96),
    b"BLP2" + struct.pack("<I4B2I", 1, 1, 0, 0, 0, 50_000, 50_000) + bytes(2000),
    b"\0\0\0\x1cftypavif" + bytes(60),
    b"P6\n60000 60000\n255\n",
    b"P7\nWIDTH 9\n",
    b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(30),
    b"BM" + struct.pack("<IHHIIii", 99, 0, 0, 54, 40, 2**31 - 1, -(2**31)) + bytes(60),
    b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(30),
    b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
)


def damage_picture(path: Path, rng: random.Random) -> None:
    """Another format, another size in the header, many pixels in few bytes, or damage."""
    content = path.read_bytes()
    way = rng.random()
    if way < 0.25:
        path.write_bytes(rng.choice(_OTHER_PICTURES))
    elif way < 0.4:  # a number in the first bytes becomes a large one
        place = rng.randrange(min(60, len(content)))
        number = struct.pack(rng.choice(("<I", ">I")), rng.choice((0, 1, 60_000, 2**31 - 1)))
        path.write_bytes(content[:place] + number + content[place + 4 :])
    elif way < 0.45:
        mode, side = rng.choice(("1", "L", "P", "RGBA", "I;16")), rng.choice((3000, 9400, 9500))
        Image.MAX_IMAGE_PIXELS = None
        Image.new(mode, (side, side)).save(path, "PNG")
    else:
        path.write_bytes(damaged(content, rng))
