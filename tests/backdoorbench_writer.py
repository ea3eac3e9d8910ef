"""A writer of BackdoorBench records that shares nothing with ours: what its format says, by hand.

Beside records as BackdoorBench's main branch leaves them it makes each variant that is around.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

STYLES: dict[str, Callable[[str], str]] = {
    "main": lambda path: f"./record/theirs/{path}",
    "v2": lambda path: f"../record/theirs/{path}",
    "zip": lambda path: f"/home/somebody/BackdoorBench/record/badnet_0_1/{path}",
    "backslash": lambda path: f".\\record\\theirs\\{path}".replace("/", "\\"),
}


@dataclass
class Rows:
    """Replaced images of a split: index -> (uint8 (H, W, 3), backdoor label, original label)."""

    count: int
    images: dict[int, tuple[np.ndarray, int, int]]
    exposes_all: bool
    folder: str


@dataclass
class Record:
    """What a record is written from; change any of it."""

    model: Mapping[str, torch.Tensor]
    train: Rows | None
    test: Rows
    model_name: str = "tiny"
    num_classes: int = 10
    dataset: str = "cifar10"
    size: int = 32
    style: str = "main"
    numpy: int = 2
    key: Callable[[int], Any] = np.int64
    poison_list: bool = True
    attack: str | None = "badnet"
    change: Callable[[dict[str, Any]], object] = field(default=lambda content: None)


def write(folder: Path, record: Record) -> Path:
    """Writes the record's files; returns the folder."""
    folder.mkdir(parents=True)
    content = {
        "model_name": record.model_name,
        "num_classes": record.num_classes,
        "model": OrderedDict(record.model),
        "data_path": {"v2": "../data/", "zip": "/mnt/data/"}.get(record.style, "./data/")
        + record.dataset,
        "img_size": (record.size, record.size, 3),
        "clean_data": record.dataset,
        "bd_train": record.train and _state(record, record.train),
        "bd_test": _state(record, record.test),
    }
    for rows in (record.train, record.test):
        for index, (pixels, _, original) in rows.images.items() if rows else ():
            path = folder / rows.folder / str(original) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    record.change(content)
    save(content, folder / "attack_result.pt", record.numpy)
    if record.train and record.poison_list:
        save(_indicator(record.train), folder / "train_poison_index_list.pickle", record.numpy)
    if record.attack:
        save({"attack": record.attack, "lr": 0.01}, folder / "info.pickle", record.numpy)
    return folder


def save(content: Any, path: Path, numpy: int = 2) -> None:
    """torch.save under the name that numpy 1 or 2 gives its array functions."""
    core = {1: b"numpy.core.multiarray", 2: b"numpy._core.multiarray"}[numpy]

    class Pickler(pickle._Pickler):  # the one in Python, whose steps can be overridden
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if getattr(obj, "__module__", "").endswith("core.multiarray"):
                self.write(pickle.GLOBAL + core + b"\n" + obj.__name__.encode() + b"\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    Pickler.dispatch = {**pickle._Pickler.dispatch}
    module = SimpleNamespace(Pickler=Pickler, dumps=pickle.dumps, __name__="pickle")
    torch.save(content, path, pickle_module=module, pickle_protocol=2)


def v1_content(content: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The same as the v1 branch kept it: lists of PIL pictures."""
    pictures = [Image.fromarray(pixels) for pixels, _, _ in rows.images.values()]
    old = {"x": pictures, "y": [y for _, y, _ in rows.images.values()]}
    old["original_index"] = list(rows.images)
    return {**content, "bd_train": old, "bd_test": {**old, "original_targets": old["y"]}}


def in_ram(state: dict[str, Any], rows: Rows) -> None:
    """Turns a state into that of a set whose pictures are in the pickle, as loaded PNG files."""
    container = state["bd_data_container"]
    container["save_folder_path"] = state["save_folder_path"] = None
    for index, (pixels, label, original) in rows.images.items():
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        picture = Image.open(io.BytesIO(stream.getvalue()))
        picture.load()
        container["data_dict"][index] = (picture, label, original)


def _indicator(rows: Rows) -> np.ndarray:
    indicator = np.zeros(rows.count)
    indicator[list(rows.images)] = 1
    return indicator


def _state(record: Record, rows: Rows) -> dict[str, Any]:
    place = STYLES[record.style]
    items = {
        record.key(index): {
            "path": place(f"{rows.folder}/{original}/{index}.png"),
            "other_info": [label, original],
        }
        for index, (_, label, original) in rows.images.items()
    }
    exposed = np.arange(rows.count) if rows.exposes_all else np.array(list(rows.images))
    return {
        "bd_data_container": {
            "save_folder_path": place(rows.folder),
            "save_file_format": ".png",
            "data_dict": items,
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": exposed.astype(np.int64),
        "poison_indicator": _indicator(rows),
        "save_folder_path": place(rows.folder),
    }
