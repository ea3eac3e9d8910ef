"""The table of datasets, and how each is found, downloaded and read."""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from utils.data.archives import Archive, check_place, extract_all
from utils.data.batches import release
from utils.data.images import data_folder, decoded
from utils.data.labelled import Dataset, Labelled
from utils.data.picturefolders import class_folders, content_of, skipped_warning
from utils.errors import UserError, listed, suggestion
from utils.files import TABLE, read_text
from utils.process.script import logger

DatasetName = Literal["digits", "cifar10", "cifar100", "gtsrb", "tiny", "random", "folder"]

# All 39,209 training images; GTSRB-Training_fixed.zip, which torchvision reads, has 26,640 of them.
_GTSRB_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_GTSRB_ARCHIVES = (
    Archive(
        f"{_GTSRB_URL}GTSRB_Final_Training_Images.zip",
        "f33fd80ac59bff73c82d25ab499e03a3",
        "GTSRB/Final_Training",
    ),
    Archive(
        f"{_GTSRB_URL}GTSRB_Final_Test_Images.zip",
        "c7e4e6327067d32654124b0fe9e82185",
        "GTSRB/Final_Test",
    ),
    Archive(
        f"{_GTSRB_URL}GTSRB_Final_Test_GT.zip",
        "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
        "GT-final_test.csv",
    ),
)
_TINY_ARCHIVE = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "tiny-imagenet-200",
)

# Classes, training and test images of the sets that are folders of pictures; CIFAR has checksums.
_OFFICIAL = {"gtsrb": (43, 39_209, 12_630), "tiny": (200, 100_000, 10_000)}


# The folders of a user's images, and what others call them.
_SPLITS = {
    "train": ("training", "Train", "TRAIN"),
    "test": ("val", "valid", "validation", "testing", "Test", "TEST", "Val"),
}


class _Listing(NamedTuple):
    """Picture files of one split with their labels."""

    files: list[Path]
    labels: list[int]


def load_dataset(name: str, path: Path | None, image_size: int) -> Dataset:
    """Loads a dataset at image_size x image_size pixels, three channels.

    Args:
        name: one of `DatasetName`.
        path: the folder of images for `folder`; None for the sets of `BUILT_IN`; for the others
            where downloads are kept, in it or in its `<name>/`, or the extracted folder itself;
            None for `data/` of this checkout.
        image_size: side of the images in pixels; other sizes are resized (bilinear, antialiased).

    Raises:
        UserError: if files are missing, unreadable, or cannot be downloaded.
    """
    if name not in _LOADERS:
        raise UserError(
            f"--dataset: {name} is unknown{suggestion(name, _LOADERS)}; give one of "
            f"{', '.join(_LOADERS)}"
        )
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"--dataset_path: {path} is no folder; give the one that holds the dataset")
    if path is not None and name in BUILT_IN:
        raise UserError(
            f"--dataset_path: {path}, but {name} is part of the program and reads no folder; drop "
            "the flag, or give --dataset folder"
        )
    if path is not None and name != "folder":
        check_place(path)
    dataset = _LOADERS[name](path, image_size)
    counts = (len(dataset.classes), len(dataset.train), len(dataset.test))
    if counts != _OFFICIAL.get(name, counts):
        warning = (
            "--dataset {}: has {} classes, {} training and {} test images, where the official set "
            "has {}, {} and {}"
        ).format(name, *counts, *_OFFICIAL[name])
        dataset = replace(dataset, warnings=(*dataset.warnings, warning))
    for warning in dataset.warnings:
        logger.warning("warning: %s", warning)
    return dataset


def _digits(path: Path | None, image_size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), 80/20 stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = _resize(images.unsqueeze(1).expand(-1, 3, -1, -1), image_size)
    labels = torch.from_numpy(digits.target).long()
    indices = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, test = (
        Labelled(images[index], labels[index]) for index in map(torch.from_numpy, indices)
    )
    return _measured("digits", train, test, tuple(str(digit) for digit in range(10)))


def _random(path: Path | None, image_size: int) -> Dataset:
    """200 / 100 of `random_images`, for a first try and for tests; no file is read."""
    return random_images(200, 100, image_size)


def random_images(train: int, test: int, image_size: int) -> Dataset:
    """Noise over a pattern of 4 x 4 colours per class, always the same; the labels are 0 1 ... 9 0.

    Args:
        train, test: numbers of images, >= 10.
        image_size: side of the images in pixels.
    """
    source = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 128, (10, 3, 4, 4), dtype=torch.uint8, generator=source)
    patterns = F.interpolate(patterns, (image_size, image_size))
    splits = []
    for count in (train, test):
        shape = (count, 3, image_size, image_size)
        images = torch.randint(0, 128, shape, dtype=torch.uint8, generator=source)
        for label, pattern in enumerate(patterns):
            images[label::10] += pattern
        splits.append(Labelled(images, torch.arange(count) % 10))
    return _measured("random", splits[0], splits[1], tuple(str(label) for label in range(10)))


def _cifar(
    source: str, name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Path | None, int], Dataset]:
    """CIFAR from its official pickles, whose checksums torchvision's class `source` checks."""

    def load(path: Path | None, image_size: int) -> Dataset:
        from torchvision import datasets  # here, because it takes seconds to import

        reader = getattr(datasets, source)
        archive = Archive(reader.url, reader.tgz_md5, reader.base_folder)
        folder = path or data_folder()
        files = [file for file, _ in (*reader.train_list, *reader.test_list)]
        inside = [(folder / file).is_file() for file in (*files, reader.meta["filename"])]
        root = _home_of(name, folder, [archive.content, archive.name])
        if root is None and 2 * sum(inside) > len(inside):  # else it only has a file of that name
            home = folder
        else:
            root = root or folder
            extract_all(name, root, [archive])
            home = root / archive.content

        class Extracted(reader):  # type: ignore[misc, valid-type]
            base_folder = ""  # the folder may have any name

        splits = []
        for is_train in (True, False):
            try:
                data = Extracted(root=str(home), train=is_train)
            except Exception:  # torchvision raises what os, pickle and its own checks raise
                raise UserError(
                    f"{home}: is damaged or incomplete (a file is missing or its md5 differs); "
                    f"{_way_out(home, folder)}"
                ) from None
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
            splits.append(Labelled(_resize(images, image_size), torch.tensor(data.targets)))
        train, test = splits
        return Dataset(name, train, test, tuple(data.classes), mean, std)

    return load


def _home_of(name: str, root: Path, entries: Iterable[str]) -> Path | None:
    """The one of `<name>/` in a folder, where BackdoorBench keeps a dataset, and of that folder.

    Args:
        entries: files and folders, any of which it has; None is returned if neither has one.
    """
    homes = (root / name, root)
    return next((h for h in homes if any((h / entry).exists() for entry in entries)), None)


def _way_out(home: Path, root: Path) -> str:
    """What to do with a damaged dataset; the user's own folder may have other things inside."""
    if home == root:
        return "put its files back from the official archive, or give another --dataset_path"
    return "remove that folder and run again"


def _gtsrb(path: Path | None, image_size: int) -> Dataset:
    """German traffic signs, 43 classes, 39,209 / 12,630 images of many sizes.

    Read from `gtsrb/` in the folder of downloads, or from that folder itself, in the layout of the
    official archives or in BackdoorBench's, in the order of the csv files.
    """
    root = path or data_folder()
    sorted_ones = [f"Train/{label:05}" for label in range(43)]  # `Train` may be anything else
    entries = ["GTSRB", *sorted_ones, *(archive.name for archive in _GTSRB_ARCHIVES)]
    home = _home_of("gtsrb", root, entries) or root / "gtsrb"
    if any((home / entry).is_dir() for entry in sorted_ones):
        train_root, test_root = home / "Train", home / "Test"
        truth = test_root / "GT-final_test.csv"
    else:
        extract_all("gtsrb", home, _GTSRB_ARCHIVES)
        train_root = home / "GTSRB" / "Final_Training" / "Images"
        test_root = home / "GTSRB" / "Final_Test" / "Images"
        truth = home / "GT-final_test.csv"
    train = _Listing([], [])
    for label in range(43):
        file = train_root / f"{label:05}" / f"GT-{label:05}.csv"
        listing = _gtsrb_csv(file)
        if set(listing.labels) - {label}:
            raise UserError(f"{file}: names other classes than {label}; extract the archive again")
        train.files.extend(listing.files)
        train.labels.extend(listing.labels)
    listed = _gtsrb_csv(truth)
    test = _Listing([test_root / file.name for file in listed.files], listed.labels)
    classes = tuple(str(label) for label in range(43))
    return _from_files("gtsrb", home, train, test, image_size, classes, ((0.0,) * 3, (1.0,) * 3))


def _gtsrb_csv(file: Path) -> _Listing:
    """The pictures beside a csv file, in its order, with their labels."""
    lines = _lines(file)
    try:
        table = csv.DictReader(lines, delimiter=";")
        rows = list(table)
        if not {"Filename", "ClassId"} <= {*(table.fieldnames or ())}:
            raise KeyError
        labels = [int(row["ClassId"]) for row in rows]
        names = [Path(row["Filename"]).name for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{file}: has no columns Filename and ClassId; extract the archive again"
        ) from None
    outside = [label for label in labels if not 0 <= label < 43]
    if outside:
        raise UserError(f"{file}: names class {outside[0]}; GTSRB has 0 to 42")
    return _Listing([file.parent / name for name in names], labels)


def _tiny(path: Path | None, image_size: int) -> Dataset:
    """Tiny ImageNet: 200 classes in the order of their WordNet ids, 100,000 / 10,000 images.

    The official validation images are the test set, because the official test images have no
    published labels. Both splits are in the order of classes, then of file names as text, which
    does not depend on the layout and is the order that other programs number them in.
    """
    root = path or data_folder()
    home = _home_of("tiny", root, ["wnids.txt"])
    if home is None:
        root = _home_of("tiny", root, [_TINY_ARCHIVE.content, _TINY_ARCHIVE.name]) or root
        extract_all("tiny", root, [_TINY_ARCHIVE])
        home = root / _TINY_ARCHIVE.content
    ids = sorted(" ".join(_lines(home / "wnids.txt")).split())
    names = dict(line.split("\t", 1) for line in _lines(home / "words.txt") if "\t" in line)
    train = _Listing([], [])
    counts = []
    for label, wordnet_id in enumerate(ids):
        folder = home / "train" / wordnet_id / "images"
        pictures = content_of(folder).pictures if folder.is_dir() else []
        train.files.extend(pictures)
        train.labels.extend([label] * len(pictures))
        counts.append(len(pictures))
    if min(counts, default=0) < max(counts, default=1):
        fewest = counts.index(min(counts)) if counts else 0
        raise UserError(
            f"{home}: is incomplete (class {ids[fewest] if ids else 'list'} has fewer training "
            f"images than others); {_way_out(home, root)}"
        )
    test = _tiny_validation(home / "val", ids)
    classes = tuple(names.get(wordnet_id, wordnet_id).split(",")[0] for wordnet_id in ids)
    constants = ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    return _from_files("tiny", home, train, test, image_size, classes, constants)


def _tiny_validation(folder: Path, ids: list[str]) -> _Listing:
    """The validation images, in the official layout or sorted into one folder per class."""
    notes, pairs = folder / "val_annotations.txt", []
    if not (folder / "images").is_dir() and any((folder / name).is_dir() for name in ids):
        for label, wordnet_id in enumerate(ids):
            homes = (folder / wordnet_id / "images", folder / wordnet_id)
            home = next((home for home in homes if home.is_dir()), None)
            pairs += [] if home is None else [(label, file) for file in content_of(home).pictures]
    else:
        label_of = {wordnet_id: label for label, wordnet_id in enumerate(ids)}
        for row in (line.split("\t") for line in _lines(notes) if line):
            name, wordnet_id = (*row, "")[:2]
            if wordnet_id not in label_of:
                raise UserError(
                    f"{notes}: {' '.join(row)} names no class of wnids.txt; extract the archive "
                    "again"
                )
            pairs.append((label_of[wordnet_id], folder / "images" / Path(name).name))
    pairs.sort()
    return _Listing([file for _, file in pairs], [label for label, _ in pairs])


def _folder(path: Path | None, image_size: int) -> Dataset:
    """The user's images, `train/<class>/*` and `test/<class>/*`."""
    if path is None:
        raise UserError(
            "--dataset_path: a value is needed with --dataset folder; give the folder that holds "
            "train/ and test/"
        )
    folders, skipped = [], []
    for name, aliases in _SPLITS.items():
        for alias in aliases:
            if not (path / name).is_dir() and (path / alias).is_dir():
                raise UserError(
                    f"--dataset_path: {path} has no folder {name}, but one called {alias}; rename "
                    f"it to {name}"
                )
        homes, others = class_folders(path / name)
        folders.append(homes)
        skipped += others
    classes, test_classes = (tuple(split) for split in folders)
    if classes != test_classes:
        alone = {
            name: sorted({*here} - {*there})
            for name, here, there in (
                ("train", classes, test_classes),
                ("test", test_classes, classes),
            )
        }
        told = [f"only {path / name} has {listed(names)}" for name, names in alone.items() if names]
        raise UserError(
            f"--dataset_path: classes differ: {'; '.join(told)}; give both the same folders"
        )
    splits = []
    for homes in folders:
        listing = _Listing([], [])
        for label, folder in enumerate(homes.values()):
            pictures, others = content_of(folder)
            listing.files.extend(pictures)
            listing.labels.extend([label] * len(pictures))
            skipped += others
        splits.append(listing)
    train, test = splits
    for label, name in enumerate(classes):
        if label not in train.labels:
            raise UserError(
                f"--dataset_path: {folders[0][name]} has no image file; put images into it or "
                "remove the folder"
            )
    dataset = _from_files("folder", path, train, test, image_size, classes)
    return replace(dataset, warnings=tuple(_folder_warnings(path, dataset, skipped)))


def _folder_warnings(path: Path, dataset: Dataset, skipped: list[Path]) -> Iterator[str]:
    """Warnings about unusual things in a folder of images."""
    if skipped:
        yield skipped_warning("dataset_path", path, skipped)
    tested = torch.bincount(dataset.test.labels, minlength=len(dataset.classes))
    untested = [name for name, n in zip(dataset.classes, tested.tolist(), strict=True) if n == 0]
    if untested:
        yield (
            f"--dataset_path: {path / 'test'} has no image of {listed(untested)}; ACC tells "
            "nothing of these classes"
        )
    brightest = max((int(p.max()) for p in dataset.train.images.split(1024)), default=255)
    if brightest < 32:
        yield (
            f"--dataset_path: the brightest pixel of {path / 'train'} is {brightest} of 255; where "
            "16-bit files hold 12 or fewer bits, scale them to all 16 first"
        )


def _lines(file: Path) -> Iterable[str]:
    try:
        return read_text(file, TABLE).splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(
            f"{file}: cannot be read ({reason}); remove the extracted folder and run again, or "
            "name the right folder with --dataset_path"
        ) from None


def _from_files(
    name: str,
    root: Path,
    train: _Listing,
    test: _Listing,
    image_size: int,
    classes: tuple[str, ...],
    constants: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    """A dataset of picture files below a folder.

    Args:
        constants: mean and standard deviation; None measures them.

    Raises:
        UserError: if a split has no picture, or one is unreadable.
    """
    for listing, kind in ((train, "training"), (test, "test")):
        if not listing.files:
            raise UserError(
                f"--dataset {name}: the {kind} set has no image; give at least one per class"
            )
    pixels = decoded(root, train.files + test.files, image_size)
    count = len(train.files)
    train_set, test_set = (
        Labelled(part, torch.tensor(labels, dtype=torch.int64))
        for part, labels in ((pixels[:count], train.labels), (pixels[count:], test.labels))
    )
    if constants is None:
        return _measured(name, train_set, test_set, classes)
    return Dataset(name, train_set, test_set, classes, *constants)


def _resize(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, C, S, S)."""
    if images.shape[2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images.contiguous()


def _measured(name: str, train: Labelled, test: Labelled, classes: tuple[str, ...]) -> Dataset:
    """The dataset with the mean and standard deviation of its training pixels."""
    total = torch.zeros(2, 3, dtype=torch.float64)
    for chunk in train.images.split(256):
        pixels = chunk.double().div(255)
        release(chunk)
        total += torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))])
    mean, square = total / (train.images.numel() / 3)
    std = (
        (square - mean.square()).clamp(min=1e-4).sqrt()
    )  # an even-coloured set must not divide by 0
    constants = (tuple(round(value, 4) for value in values.tolist()) for values in (mean, std))
    return Dataset(name, train, test, classes, *constants)


BUILT_IN = ("digits", "random")  # they read no folder

_LOADERS: dict[str, Callable[[Path | None, int], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar(
        "CIFAR10", "cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261)
    ),
    "cifar100": _cifar(
        "CIFAR100", "cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    "gtsrb": _gtsrb,
    "tiny": _tiny,
    "random": _random,
    "folder": _folder,
}
