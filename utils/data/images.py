"""Picture files as uint8 pixels, decoded once into a cache file."""

import contextlib
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from utils.data.batches import mapped
from utils.errors import UserError, reason_of
from utils.files import (
    ROOT,
    at_home,
    file_sha256,
    not_written,
    opened,
    prepare_folder,
    replaced,
)
from utils.process import distributed
from utils.process.progress import Progress
from utils.process.script import logger

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"),
        *(".gif", ".tga", ".jp2"),
    )
)
# What Pillow calls these formats. It would open others, too, whatever the ending: PostScript, which
# starts Ghostscript, among them.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "TGA", "JPEG2000")
_WAITING = 512  # pictures that are read ahead
# What brings a picture upright, by the orientation in its EXIF data.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = 89_000_000  # of a picture; where Pillow, too, begins to suspect a decompression bomb
_HUNGRY = ("WEBP", "JPEG2000")  # their decoders take twice as much memory for a pixel
_LARGEST = 1 << 29  # bytes of a picture file
# Bytes that Pillow asks for at once; so much goes back to the system when a picture is done, less
# would stay with the thread.
_BLOCK = 1 << 26


def data_folder() -> Path:
    """Where downloads and caches are kept: `SAU_DATA`, or `data/` of this checkout."""
    return Path(at_home(os.environ.get("SAU_DATA", "")) or ROOT / "data")


def no_cache(path: Path, error: Exception) -> UserError:
    """The message for the user if nothing can be kept, as in a checkout that is read-only."""
    text = str(not_written(path, error))
    return UserError(f"{text}, or name another folder for downloads and caches in SAU_DATA")


def read_image(file: Path, image_size: int) -> np.ndarray:
    """One picture file as uint8 (3, S, S), squashed if it is not square.

    Grey, palette and CMYK become RGB, transparency is dropped, and grey of 12 or 16 bits is scaled.
    A photo is turned upright by its EXIF data.

    Raises:
        UserError: if the file is missing, no picture, cut short, of floats, of signed or of 32-bit
            integers, or huge.
    """
    try:
        with opened(file, _LARGEST) as source, Image.open(source, formats=_FORMATS) as image:
            pixels = image.width * image.height * (2 if image.format in _HUNGRY else 1)
            if pixels > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            with _ROOM.of(pixels):  # 8 to 10 bytes for each
                Image.core.set_block_size(_BLOCK)
                return _resized(image, image_size)
    except Exception as error:  # what Pillow's readers stumble over in damaged files is anything
        raise UserError(
            f"{file}: not a readable image ({reason_of(error)}); repair or remove it"
        ) from None


class _Room:
    """A limit on the pixels that are decoded at once, for any number of threads.

    Args:
        size: pixels, >= those of any picture.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Waits until so many pixels are free, and reserves them while inside."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(MOST_PIXELS)


def _resized(image: Image.Image, side: int) -> np.ndarray:
    """uint8 (3, S, S) of an opened picture; few copies of a large one are held at once."""
    image.load()
    most, is_negative = _meaning(image)
    image = _eight_bits(_upright(image), most, is_negative)
    if image.mode == "P":  # a palette goes by way of RGBA, or Pillow warns of its transparency
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Turned by the camera's note; as it is if that note cannot be read."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF data raise anything; the pixels are there
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _meaning(image: Image.Image) -> tuple[int, bool]:
    """The largest value that grey of more than 8 bits can have, and whether it means black.

    Pillow gives what is in a TIFF file. Of all other formats it makes 0 to 65535, and of 8 bits and
    fewer, also in TIFF files, 0 (black) to 255.

    Raises:
        ValueError: if the file says no range.
    """
    if not (isinstance(image, TiffImageFile) and image.mode.startswith("I")):
        return 65535, False
    if image.mode == "I":
        raise ValueError("integers that are signed, or of 32 bits, have no known range")
    return (1 << max(image.tag_v2[258])) - 1, image.tag_v2[262] == 0


def _eight_bits(image: Image.Image, most: int, is_negative: bool) -> Image.Image:
    """Grey of more bits scaled to 8, which Pillow's own conversion would clip; others as they are.

    Args:
        most, is_negative: see `_meaning`.

    Raises:
        ValueError: if the range of the values is not known.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > most:
        raise ValueError("values beyond 16 bits, or floats, have no known range")
    if is_negative:
        levels = most - levels
    levels = levels // 257 if most == 65535 else levels.astype(np.uint32) * 255 // most
    return Image.fromarray(levels.astype(np.uint8))


def decoded(root: Path, files: list[Path], image_size: int) -> torch.Tensor:
    """uint8 (N, 3, S, S), mapped from `data/cache/<key>.bin`, keyed by the files' content.

    Args:
        root: a folder that holds all files; their paths below it are part of the key.

    Raises:
        UserError: if a file is no readable image, or the cache cannot be written.
    """
    shape = (len(files), 3, image_size, image_size)
    with distributed.main_alone() as is_mine:
        cache = _cache_of(root, files, image_size, shape) if is_mine else None
    return mapped(distributed.from_main(cache), shape)


def _cache_of(root: Path, files: list[Path], image_size: int, shape: tuple[int, ...]) -> Path:
    """The file that holds the pixels, written if it is not there."""
    digest = hashlib.sha256(f"pixels 3, {image_size}".encode())
    with ThreadPoolExecutor() as pool:
        with Progress(len(files), "looking for changes", "file") as progress:
            for file, content in zip(files, _ahead(pool, _file_digest, files), strict=True):
                digest.update(os.fsencode(file.relative_to(root)) + b"\0" + content)
                progress.advance()
        cache = data_folder() / "cache" / f"{digest.hexdigest()[:32]}.bin"
        if not cache.exists() or cache.stat().st_size != int(np.prod(shape)):
            logger.info("decoding %d images of %s; kept in %s", len(files), root, cache)
            try:
                prepare_folder(cache.parent)
                with (
                    replaced(cache) as partial,
                    partial.open("wb") as out,
                    Progress(len(files), "decoding", "image") as progress,
                    warnings.catch_warnings(),
                ):
                    # Huge images get our own line, and no second one; damaged notes beside the
                    # pixels do no harm.
                    warnings.simplefilter("ignore")
                    for pixels in _ahead(pool, lambda file: read_image(file, image_size), files):
                        out.write(pixels.tobytes())
                        progress.advance()
            except OSError as error:
                raise no_cache(cache, error) from None
    return cache


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: list) -> Iterator:
    """pool.map in order, with at most `_WAITING` results that nobody has taken yet."""
    waiting = deque(pool.submit(function, item) for item in items[:_WAITING])
    for item in items[_WAITING:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()


def _file_digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(file_sha256(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); repair or remove it") from None
