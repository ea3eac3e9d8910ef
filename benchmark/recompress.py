"""What JPEG costs in accuracy: copies of a folder of photographs, compressed once more.

    python benchmark/recompress.py photos photos_q30 --quality 30 --images 1000
    python attack/prototype.py --dataset folder --dataset_path photos_q30 --save_folder_name q30

The images become 32 x 32 pixels. The copy has PNG files, so nothing is lost after the compression.
Pixels are shifted by half a block for it, since JPEG would leave its own blocks nearly as they are.
Prints the mean squared error to the files that were given, and beside it what such a compression
does to patches of two large photographs, whose first compression at quality 75 (that of the given
files) is known there. From both numbers follows how far the given files, and the copies, are from
lossless ones.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser, check_least
from utils.data.datasets import load_dataset
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import not_written
from utils.process.script import logger, run_script
from utils.records.places import made_folder

SIDE = 32  # of the images, in pixels
SHIFT = 4  # half a block
GIVEN = 75  # the quality of the given files
Pixels = NDArray[np.uint8]


def compressed(pixels: Pixels, quality: int) -> Pixels:
    """Pixels, (H, W, 3) uint8, after JPEG with colours at half of the resolution."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(stream))


def compressed_again(pixels: Pixels, quality: int) -> Pixels:
    """Pixels that were JPEG before, after another one whose blocks lie elsewhere."""
    margin = ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    wide = compressed(np.pad(pixels, margin, mode="reflect"), quality)
    return wide[SHIFT:-SHIFT, SHIFT:-SHIFT]


def error(first: Pixels, second: Pixels) -> float:
    """Mean squared error, in units of pixel values from 0 to 255."""
    return float(np.mean((first.astype(float) - second) ** 2))


def errors_of_patches(quality: int) -> tuple[float, float, float]:
    """Mean squared errors of patches of scikit-learn's two photographs, at a third of their size.

    Returns:
        Of the first compression; of both; of the second, to what the first has left.
    """
    from sklearn.datasets import load_sample_images

    rows = []
    for photograph in load_sample_images().images:
        height, width = (length // 3 for length in photograph.shape[:2])
        small = Image.fromarray(photograph).resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(small)
        for top in range(0, height - SIDE + 1, SIDE):
            for left in range(0, width - SIDE + 1, SIDE):
                patch = pixels[top : top + SIDE, left : left + SIDE]
                once = compressed(patch, GIVEN)
                twice = compressed_again(once, quality)
                rows.append((error(patch, once), error(patch, twice), error(once, twice)))
    first, both, second = np.mean(rows, axis=0)
    return float(first), float(both), float(second)


def copy(source: Path, to: Path, quality: int, images: int) -> float:
    """Writes the copy; returns its mean squared error to the source.

    Args:
        images: of each class and part, at most.

    Raises:
        UserError: if the source is no dataset of the kind `folder`, or `to` exists, is in it or
            cannot be written.
    """
    if to.exists():
        raise UserError(f"{to}: exists already; give a new folder")
    if source.resolve() in to.resolve().parents:
        raise UserError(f"{to}: is in {source}, which it would change; give a folder elsewhere")
    made_folder(to.parent, "to")
    try:
        dataset = load_dataset("folder", source, SIDE)
    except UserError as refusal:
        raise UserError(*map(_of_source, refusal.problems)) from None
    for warning in dataset.warnings:
        logger.warning("warning: %s", _of_source(warning))
    try:
        return _write(dataset, to, quality, images)
    except OSError as failure:  # of a full disk, it names no file
        raise not_written(to, failure) from None


def _write(dataset: Dataset, to: Path, quality: int, images: int) -> float:
    """Writes the copy of a dataset, as `copy` does.

    Raises:
        OSError: if it cannot be written.
    """
    errors = []
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as begun:
        for part, split in (("train", dataset.train), ("test", dataset.test)):
            for label, name in enumerate(dataset.classes):
                folder = Path(begun) / "copy" / part / name
                folder.mkdir(parents=True)
                first = torch.nonzero(split.labels == label).flatten()[:images]
                for number, picture in enumerate(split.images[first]):
                    pixels = picture.permute(1, 2, 0).numpy()
                    again = compressed_again(pixels, quality)
                    errors.append(error(pixels, again))
                    Image.fromarray(again).save(folder / f"{number:05d}.png")
        (Path(begun) / "copy").rename(to)  # an interrupted copy is none
    return float(np.mean(errors))


def _of_source(text: str) -> str:
    """A message about the flag of other scripts as one about the argument of this one."""
    return text.replace("--dataset_path", "source")


def main() -> None:
    """Parses the flags, writes the copy and prints the errors."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("to", type=Path, help="the copy, a new folder")
    parser.add_argument("--quality", type=int, default=GIVEN, help="of JPEG, 1 to 95")
    parser.add_argument("--images", type=int, default=1000, help="of each class and part, >= 1")
    flags = parser.parse_args()
    if not 1 <= flags.quality <= 95:
        raise UserError(f"--quality: {flags.quality} is not allowed; give 1 to 95")
    check_least(flags, images=1)
    added = copy(flags.source, flags.to, flags.quality, flags.images)
    first, both, second = errors_of_patches(flags.quality)
    logger.info("copy to given files: %.1f", added)
    logger.info("patches: first %.1f, both %.1f, second to first %.1f", first, both, second)
    of_first, of_both = (added * error / second for error in (first, both))
    logger.info("so given files to lossless: %.0f, copy to lossless: %.0f", of_first, of_both)


if __name__ == "__main__":
    run_script(main)
