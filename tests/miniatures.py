"""Miniature copies of the public datasets, in their official layouts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image


def official(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of downloads with a miniature of any public dataset."""
    if name == "gtsrb":
        return official_gtsrb(folder)
    if name == "tiny":
        return official_tiny(folder)
    return official_cifar(folder, name, monkeypatch)


def official_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Miniature pickles in the official layout, two images per file, accepted in place of the real.

    Image number i of a split has the red plane i, green 100 + i, blue 200 + i, and the label i.
    """
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        name
    ]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder = folder / source.base_folder
    folder.mkdir(parents=True)
    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, [[file, None] for file in files])
        for number, file in enumerate(files):
            rows = [
                np.repeat(np.array([i, 100 + i, 200 + i], dtype=np.uint8), 1024)
                for i in (2 * number, 2 * number + 1)
            ]
            content: dict[str, Any] = {"data": np.stack(rows), key: [2 * number, 2 * number + 1]}
            (folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    names = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: names}))
    return folder.parent


def official_gtsrb(folder: Path, layout: str = "official", count: int = 1) -> Path:
    """`count` training images of each of the 43 classes, and four test images of classes 3 1 4 1.

    Training image i of class c is of the colour (c, 10 i, 0), test image i of (i, 0, 200); sizes
    vary. Layouts: "official", that of the archives, and "backdoorbench".
    """
    home = folder / "gtsrb"
    train, test, truth = {
        "official": ("GTSRB/Final_Training/Images", "GTSRB/Final_Test/Images", ""),
        "backdoorbench": ("Train", "Test", "Test"),
    }[layout]
    for label in range(43):
        below = home / train / f"{label:05}"
        below.mkdir(parents=True)
        rows = []
        for i in range(count):
            colour = (label, 10 * i, 0)
            Image.new("RGB", (20 + label, 30 + i), colour).save(below / f"00000_{i:05}.ppm")
            rows.append(f"00000_{i:05}.ppm;29;30;5;6;24;25;{label}")
        _write_gtsrb_csv(below / f"GT-{label:05}.csv", rows)
    (home / test).mkdir(parents=True)
    rows = []
    for i, label in enumerate((3, 1, 4, 1)):
        Image.new("RGB", (25, 40 + i), (i, 0, 200)).save(home / test / f"{i:05}.ppm")
        rows.append(f"{i:05}.ppm;25;40;5;5;20;20;{label}")
    _write_gtsrb_csv(home / truth / "GT-final_test.csv", rows)
    return folder


def _write_gtsrb_csv(path: Path, rows: list[str]) -> None:
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def official_tiny(
    folder: Path, classes: int = 200, count: int = 1, layout: str = "official"
) -> Path:
    """`count` training images per class, and test images val_9 to val_11 of the classes 7, 0 and 7.

    Training image i of class c is of the grey c; test image val_i of 100 + i. wnids.txt, whose
    order is not that of the names, lists the last class first. Layouts: "official", and "sorted"
    and "deeper", in which others keep the validation images: `val/<id>/` and `val/<id>/images/`.
    """
    home = folder / "tiny-imagenet-200"
    ids = [f"n{label:08}" for label in range(classes)]
    for label, wordnet_id in enumerate(ids):
        below = home / "train" / wordnet_id / "images"
        below.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), (label,) * 3).save(below / f"{wordnet_id}_{i}.JPEG")
        (below.parent / f"{wordnet_id}_boxes.txt").write_text("", encoding="utf-8")
    lines = []
    for i, label in ((9, 7), (10, 0), (11, 7)):
        places = {"official": "images", "sorted": ids[label], "deeper": f"{ids[label]}/images"}
        below = home / "val" / places[layout]
        below.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), 100 + i).save(below / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{ids[label]}\t0\t32\t44\t62\n")
    if layout != "sorted":  # who sorts them may keep this or not
        (home / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    (home / "wnids.txt").write_text("\n".join(reversed(ids)) + "\n", encoding="utf-8")
    words = "".join(f"{wordnet_id}\tname {i}, other\n" for i, wordnet_id in enumerate(ids[:8]))
    (home / "words.txt").write_text(words, encoding="utf-8")
    return folder
