"""BackdoorBench's files, written as it writes them."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.files import not_written
from utils.process.progress import Progress
from utils.records.backdoorbench import TRAIN


def write_images(
    folder: Path, images: torch.Tensor, index: torch.Tensor, originals: torch.Tensor
) -> None:
    """Writes `<original label>/<index>.png` for each image.

    Args:
        images: uint8 (P, 3, H, W).
        index, originals: int64 (P,), positions in the clean split and true labels.

    Raises:
        UserError: if the folder cannot be written.
    """

    def write(row: int) -> None:
        path = folder / str(int(originals[row])) / f"{int(index[row])}.png"
        Image.fromarray(images[row].permute(1, 2, 0).contiguous().numpy()).save(path, "PNG")

    try:
        for label in originals.unique().tolist():
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
        with (
            ThreadPoolExecutor() as pool,
            Progress(len(images), f"writing {folder.name}", "image") as progress,
        ):
            for _ in pool.map(write, range(len(images))):
                progress.advance()
    except OSError as error:
        raise not_written(folder, error) from None


def split_state(
    folder: str, count: int, index: torch.Tensor, labels: torch.Tensor, originals: torch.Tensor
) -> dict[str, Any]:
    """The state of a poisoned set, as `attack_result.pt` keeps it.

    A training set shows all images of the split, a test set only the replaced ones.

    Args:
        folder: of its images, `<record>/<subfolder>`.
        count: images of the clean split.
        index, labels, originals: int64 (P,), see `Replaced`.
    """
    exposes_all = folder.endswith(TRAIN)
    folder = f"./record/{folder}"
    indicator = np.zeros(count, dtype=np.float64)
    indicator[index.numpy()] = 1
    rows = zip(index.tolist(), labels.tolist(), originals.tolist(), strict=True)
    return {
        "bd_data_container": {
            "save_folder_path": folder,
            "save_file_format": ".png",
            "data_dict": {
                number: {
                    "path": f"{folder}/{original}/{number}.png",
                    "other_info": [label, original],
                }
                for number, label, original in rows
            },
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(count, dtype=np.int64) if exposes_all else index.numpy(),
        "poison_indicator": indicator,
        "save_folder_path": folder,
    }


def attack_result(
    model: Mapping[str, Any],
    dataset: str,
    image_shape: tuple[int, int, int],
    train: Mapping[str, Any] | None,
    test: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `attack_result.pt`.

    Args:
        model: of `model_result`.
        train, test: of `split_state`; None for an attack that stores no poisoned training set.
    """
    channels, height, width = image_shape
    return {
        **model,
        "data_path": f"./data/{dataset}",
        "img_size": (height, width, channels),
        "clean_data": dataset,
        "bd_train": train,
        "bd_test": test,
    }


def model_result(
    model_name: str, num_classes: int, state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The content of a `defense_result.pt`.

    Args:
        state: of the bare network, on the CPU, in its own order.
    """
    return {"model_name": model_name, "num_classes": num_classes, "model": OrderedDict(state)}


def is_in_place(folder: Path) -> bool:
    """Whether BackdoorBench would look for `./data` beside the `record` that the folder is in.

    It cuts a record's path at the first occurrence of that text.
    """
    path = folder.resolve()
    return path.parent.name == "record" and "record" not in str(path.parent.parent)
