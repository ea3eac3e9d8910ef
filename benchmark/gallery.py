"""Pictures of triggers, from finished records of one dataset.

    python benchmark/gallery.py badnet_demo wanet_demo --to pictures

Writes `attacks.png`, with a row for each record: triggered test images and what the trigger
changed. Also writes `attacks/<attack>.png` for each record: one image clean, triggered, and the
difference. Differences are around mid-grey and amplified; the factor is written beside a row.
Strips of an earlier gallery that the new one does not show are removed.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser
from utils.data.batches import as_float, spread
from utils.errors import UserError
from utils.process.script import logger, run_script
from utils.records import places
from utils.records.attack import AttackRecord, load_attack
from utils.training import ending

COUNT = 6  # images of a row
_STRIP = "strip of benchmark/gallery.py"  # a text in each strip, with the name of its file


def load_rows(
    folders: list[Path], count: int = COUNT, dataset_path: str | None = None
) -> tuple[str, torch.Tensor, dict[str, torch.Tensor]]:
    """The same test images of every record, clean and with each record's trigger.

    Args:
        folders: of the records.
        count: how many images, evenly spaced among those that all records have triggered.
        dataset_path: where the images of the dataset are now; None for the records' path.

    Returns:
        The dataset's name, the clean images, and by attack the triggered images; float
        (count, C, H, W) in [0, 1].

    Raises:
        UserError: if a record has no trigger, two are of one attack, or of different datasets.
    """
    data, shared = None, None
    attacks: dict[str, AttackRecord] = {}
    for folder in folders:
        attack = load_attack(folder)
        if attack.triggered is None:
            raise UserError(f"{folder}: is a clean model; give records of attacks")
        name = places.name_in_tables(attack.attack, attack.attack_label_trans)
        if name in attacks:
            raise UserError(f"{folder}: is a second record of {name}; give one of each attack")
        if data is None:
            data = attack.load_dataset(dataset_path)
        else:
            attack.check_shared(data, f"records: {folder}", str(folders[0]))
        attacks[name] = attack
        index = set(attack.triggered.index.tolist())
        shared = index if shared is None else shared & index
    if data is None or not shared:
        raise UserError("the records have no triggered test image in common; give others")
    common = sorted(shared)
    chosen = [common[place] for place in spread(len(common), count)]
    clean = as_float(data.test.images[chosen])
    return data.name, clean, {name: _triggered(attack, chosen) for name, attack in attacks.items()}


def gallery_rows(
    clean: torch.Tensor, triggered: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rows for `plot.image_grid`: the images, then their amplified differences from the clean."""
    from utils import plot  # here, because `--help` must not wait for it

    rows = {"clean": torch.cat([clean, torch.full_like(clean, 0.5)])}
    for name, images in triggered.items():
        difference, scale = plot.amplified(images - clean)
        rows[f"{name}\nx {scale:.3g}"] = torch.cat([images, difference])
    return rows


def write(records: list[Path], to: Path, dataset_path: str | None = None) -> None:
    """Writes the gallery and the strips into a folder, which is made.

    Args:
        dataset_path: as for `load_rows`.
    """
    from benchmark.reporting.stored import file_stem
    from utils import plot

    dataset, clean, triggered = load_rows(records, dataset_path=dataset_path)
    folder, strips = places.made_folder(to), places.made_folder(to / "attacks")
    title = f"Triggers on {dataset}: test images, and the amplified change"
    figure = plot.image_grid(gallery_rows(clean, triggered), {}, title)
    logger.info("picture: %s", ending.save_figure(folder, "attacks.png", figure))
    files = {f"{file_stem(name)}.png": images for name, images in triggered.items()}
    for file, images in files.items():
        difference, _ = plot.amplified(images - clean)
        strip = plot.strip(torch.stack([clean[-1], images[-1], difference[-1]]))
        mark = PngImagePlugin.PngInfo()
        mark.add_text(_STRIP, file)
        path = strips.write(file, functools.partial(strip.save, pnginfo=mark))
        logger.info("picture: %s", path)
    for path in sorted(strips.path.glob("*.png")):
        if path.name not in files and _is_strip(path):
            path.unlink()
            logger.info("removed: %s", path)


def _is_strip(path: Path) -> bool:
    """Whether a file is a strip under the name that it was written with."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return bool(image.info.get(_STRIP) == path.name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _triggered(attack: AttackRecord, chosen: list[int]) -> torch.Tensor:
    assert attack.triggered is not None  # checked when it was read
    rows = torch.searchsorted(attack.triggered.index, torch.tensor(chosen))
    return as_float(attack.triggered.images[rows])


def main() -> None:
    """Parses the flags and writes the pictures."""
    parser = Parser(__doc__)
    parser.add_argument("records", nargs="+", help="names under record/, or folders")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument(
        "--dataset_path", help="where the images are now; the record's path if not given"
    )
    flags = parser.parse_args()
    records = [places.find_record(name, flags.record_path, "records") for name in flags.records]
    write(records, flags.to, flags.dataset_path)


if __name__ == "__main__":
    run_script(main)
