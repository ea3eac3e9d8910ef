"""Picture files: the nine formats that are promised, whatever a file is called, and no others."""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import NO_FILES, put_no_file
from utils.data import images
from utils.data.images import IMAGE_SUFFIXES, MOST_PIXELS, read_image
from utils.errors import UserError
from utils.files import ROOT

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
# What Pillow also opens: a header, and the format that Pillow takes it for.
FOREIGN = {
    "EPS": POSTSCRIPT + b"{} loop\nshowpage\n%%EOF\n",
    "EPS that is whole": POSTSCRIPT + b"0 0 32 32 rectfill showpage\n%%EOF\n",
    "EPS inside": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + POSTSCRIPT,
    "PDF": b"%PDF-1.4\n",
    "XPM": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "XBM": b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0x00};\n",
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + (8).to_bytes(4, "big") * 2 + b"\0\x08\0\3",
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(40),
    "text": b"hello\n",
    "nothing": b"",
}
OTHERS = ("DDS", "BLP", "AVIF", "ICO", "ICNS", "PCX", "SGI", "IM", "MSP", "PDF", "EPS")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".eps"])
def test_other_formats_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    """No program is started, though one that Pillow would start is on the path."""
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin/gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / f"x{suffix}").write_bytes(FOREIGN[name])
    with pytest.raises(UserError, match=r"x\.\w+: not a readable image \(.*\); repair or remove"):
        read_image(tmp_path / f"x{suffix}", 8)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_what_pillow_itself_writes_in_other_formats_is_not_opened(
    tmp_path: Path, name: str
) -> None:
    picture = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    if name == "MSP":
        picture = picture.convert("1")
    try:
        picture.save(tmp_path / "x.jpg", name)
    except (KeyError, OSError, ValueError) as error:
        pytest.skip(f"this Pillow does not write {name}: {error}")
    with pytest.raises(UserError, match="not a readable image"):
        read_image(tmp_path / "x.jpg", 8)


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "TGA", "JPEG2000"]
)
def test_the_nine_formats_are_read_by_their_content(tmp_path: Path, name: str) -> None:
    pixels = np.full((20, 30, 3), 128, np.uint8)
    for suffix in (".png", ".jpg"):
        Image.fromarray(pixels).save(tmp_path / f"x{suffix}", name)
        found = read_image(tmp_path / f"x{suffix}", 8)
        assert found.shape == (3, 8, 8)
        assert abs(found.astype(int) - 128).max() <= 2


def test_each_ending_that_is_listed_is_of_a_format_that_is_opened() -> None:
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES} == set(images._FORMATS)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    put_no_file(path, kind)
    for read in (lambda: read_image(path, 8), lambda: images.decoded(tmp_path, [path], 8)):
        with pytest.raises(UserError, match=r"x\.png"):
            read()


def test_16_bits_become_8(tmp_path: Path) -> None:
    """65535 / 257 = 255; what is between two levels goes down."""
    levels = np.array([[0, 256, 257, 513, 514, 65534, 65535, 32768]], np.uint16)
    Image.fromarray(np.repeat(levels, 8, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 8)[0, 0].tolist() == [0, 0, 1, 1, 2, 254, 255, 127]


def tiff(path: Path, rows: bytes, width: int, bits: int, is_negative: bool, kind: int = 1) -> None:
    """A grey TIFF file of two equal rows, in the order of little-endian bytes.

    Args:
        rows: of the packed values, each row in whole bytes.
        kind: SampleFormat: 1 without and 2 with a sign.
    """
    tags = {256: width, 257: 2, 258: bits, 259: 1, 262: 1 - is_negative}
    tags |= {273: 8, 277: 1, 278: 2, 279: len(rows), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHI", b"II", 42, 8 + len(rows)) + rows
    path.write_bytes(content + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_of_a_tiff_file_is_what_its_bits_mean(
    tmp_path: Path, bits: int, is_negative: bool
) -> None:
    """From black to white in the steps that 1 bit has, or 2, and the largest value is white."""
    most = (1 << bits) - 1
    greys = [0.0, 1.0] if bits == 1 else [0.0, 1 / 3, 2 / 3, 1.0]
    values = [round(grey * most) for grey in greys] * (8 // len(greys))
    stored = [most - value for value in values] if is_negative else values
    if bits == 16:
        row = struct.pack("<8H", *stored)
    else:
        digits = "".join(f"{value:0{bits}b}" for value in stored)
        row = int(digits, 2).to_bytes(bits, "big")
    tiff(tmp_path / "x.tif", 2 * row, 8, bits, is_negative)
    try:
        with Image.open(tmp_path / "x.tif") as opened:
            opened.load()
    except OSError as error:  # 12 bits of which white is 0, for one
        with pytest.raises(UserError, match="not a readable image"):
            read_image(tmp_path / "x.tif", 8)
        pytest.skip(f"this Pillow does not read it: {error}")
    found = read_image(tmp_path / "x.tif", 8)[0, 0].tolist()
    assert found == [round(255 * grey) for grey in greys] * (8 // len(greys))


def test_signed_values_have_no_known_range(tmp_path: Path) -> None:
    tiff(tmp_path / "x.tif", struct.pack("<16h", *range(0, 32000, 2000)), 8, 16, False, kind=2)
    with pytest.raises(UserError, match="signed, or of 32 bits, have no known range"):
        read_image(tmp_path / "x.tif", 8)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_of_every_format_that_has_them_mean_the_same(tmp_path: Path, name: str) -> None:
    levels = np.repeat(np.arange(8, dtype=np.uint16)[None] * 257 * 36, 8, 0)
    Image.fromarray(levels).save(tmp_path / "x.png", name)
    assert read_image(tmp_path / "x.png", 8)[0, 0].tolist() == [36 * n for n in range(8)]


def test_hungry_formats_may_have_half_as_many_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    pixels = np.zeros((30, 30, 3), np.uint8)
    for name in ("PNG", "JPEG", "GIF", "BMP"):
        Image.fromarray(pixels).save(tmp_path / "x.png", name)
        assert read_image(tmp_path / "x.png", 8).shape == (3, 8, 8)
    for name in ("WEBP", "JPEG2000"):
        Image.fromarray(pixels).save(tmp_path / "x.png", name)
        with pytest.raises(UserError, match="30 x 30 pixels are too many"):
            read_image(tmp_path / "x.png", 8)
        Image.fromarray(pixels[:16]).save(tmp_path / "x.png", name)
        assert read_image(tmp_path / "x.png", 8).shape == (3, 8, 8)


def test_a_picture_of_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    """A bitmap of 100,000 x 1,000 black pixels in a few kilobytes."""
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        Image.new("1", (100_000, 1_000)).save(tmp_path / "x.png")
        with pytest.raises(UserError, match="100000 x 1000 pixels are too many"):
            read_image(tmp_path / "x.png", 8)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_large_pictures_are_decoded_one_after_the_other() -> None:
    """Six threads of pictures that are each more than half of the room: never two at once."""
    room = images._Room(100)
    now, most = 0, 0

    def work() -> None:
        nonlocal now, most
        with room.of(60):
            now += 1
            most = max(most, now)
            time.sleep(0.01)
            now -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, now) == (1, 0)
    with pytest.raises(ZeroDivisionError), room.of(100):
        _ = 1 / 0
    with room.of(100):
        pass


@pytest.mark.slow
def test_pictures_of_88_million_pixels_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    """Two of them, in a process of its own; each alone takes most of it."""
    for number in range(2):
        Image.new("P", (9400, 9400)).save(tmp_path / f"{number}.png")
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom utils.data import images\n"
        "images.ROOT = Path(sys.argv[1])\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024\n"
        "before = peak()\n"
        "images.decoded(Path(sys.argv[1]), sorted(Path(sys.argv[1]).glob('*.png')), 8)\n"
        "print(peak() - before)"
    )
    call = [sys.executable, "-c", code, str(tmp_path)]
    text = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert 500 < float(text) < 1024
    assert MOST_PIXELS > 9400 * 9400
