"""Clean data as uint8 tensors, and batches of it as float images on the device."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from utils import distributed
from utils.errors import UserError, suggestion
from utils.runtime import ROOT, Progress, logger

DatasetName = Literal["digits", "cifar10", "cifar100", "folder"]

_IMAGE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".ppm",
    ".pgm",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
}


@dataclass(frozen=True)
class Labelled:
    """Images with their labels: uint8 (N, C, H, W) and int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: torch.Tensor) -> "Labelled":
        """The rows at int64 indices."""
        return Labelled(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Triggered:
    """Triggered images of one clean split.

    Attributes:
        images: uint8 (M, C, H, W), with the trigger.
        targets: int64 (M,), the labels that the attacker wants.
        labels: int64 (M,), the true labels.
        index: int64 (M,), the positions in the clean split.
    """

    images: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """A clean classification dataset in memory (or mapped from a cache file).

    Attributes:
        train, test: the two splits.
        classes: names by label.
        mean, std: per-channel constants of the network's normalization, pixel units in [0, 1].
    """

    name: str
    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """sha256 over all labels and about 500 evenly spaced images of each split.

        It tells whether a record's indices still mean the same images.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.numpy().tobytes())
            digest.update(split.images[:: max(1, len(split) // 500)].contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_dataset(name: str, path: Path | None, image_size: int) -> Dataset:
    """Loads a dataset at image_size x image_size pixels, three channels.

    Args:
        name: one of `DatasetName`.
        path: the folder of images for `folder`; where downloads are kept for the others, None for
            `data/` of this checkout.
        image_size: side of the images in pixels; other sizes are resized (bilinear, antialiased).

    Raises:
        UserError: if files are missing, unreadable, or cannot be downloaded.
    """
    if name not in _LOADERS:
        raise UserError(
            f"--dataset: {name} is unknown{suggestion(name, _LOADERS)}; give one of "
            f"{', '.join(_LOADERS)}"
        )
    dataset = _LOADERS[name](path, image_size)
    for split, kind in ((dataset.train, "training"), (dataset.test, "test")):
        if len(split) == 0:
            raise UserError(
                f"--dataset {name}: the {kind} set has no image; give at least one a class"
            )
    return dataset


def as_float(images: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Images as the network takes them: float in [0, 1]; from uint8, channels-last in memory.

    Shape:
        (N, C, H, W) uint8, or float already in [0, 1] -> (N, C, H, W) float, on the device.
    """
    if device is not None:
        images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.contiguous(memory_format=torch.channels_last).float().div_(255)
    return images


def truncated(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1] as uint8, fractions of a level cut off, as published triggers are.

    The little more is for whole levels: k / 255 * 255 may be below k in float32.
    """
    return (images * 255 + 1e-3).to(torch.uint8)


def augment(
    images: torch.Tensor,
    padding: int,
    flip: bool,
    generator: torch.Generator | None = None,
    is_part: bool = False,
) -> torch.Tensor:
    """Random crop after zero padding, and a horizontal flip with probability 1/2; per image.

    Args:
        images: (N, C, H, W), any dtype.
        padding: pixels on every side, >= 0.
        flip: whether to flip.
        generator: on the device of the images.
        is_part: whether the images are this process's part of a batch, whose images then move as
            they would in a single process.

    Returns:
        (N, C, H, W), channels-last in memory.
    """
    count, _, height, width = images.shape
    device = images.device

    def draw(high: int) -> torch.Tensor:
        rows = count * distributed.processes() if is_part else count
        drawn = torch.randint(high, (rows, 1), device=device, generator=generator)
        return distributed.own_rows(drawn) if is_part else drawn

    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=device)
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=device).view(-1, 1, 1)
    return padded[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def augment_affine(
    images: torch.Tensor,
    *,
    padding: int,
    crop_probability: float,
    degrees: float,
    rotation_probability: float,
    flip: bool,
    fill: torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random shift, rotation (nearest neighbour) and horizontal flip; all drawn per image.

    Args:
        images: (N, C, H, W) float.
        padding: largest shift, pixels.
        crop_probability, rotation_probability: of an image to be shifted, rotated, in [0, 1].
        degrees: largest rotation to either side.
        flip: whether to mirror with probability 1/2.
        fill: (C,) float, what comes in from outside.
        generator: on the device of the images.

    Returns:
        (N, C, H, W) float.
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        draws = torch.rand(count, device=images.device, generator=generator)
        return low + (high - low) * draws

    cropped = uniform(0, 1) < crop_probability
    shift = [
        (uniform(0, 2 * padding + 1).floor() - padding) * cropped * (2 / size)
        for size in (width, height)
    ]
    angle = uniform(-degrees, degrees).deg2rad() * (uniform(0, 1) < rotation_probability)
    mirror = 1 - 2 * ((uniform(0, 1) < 0.5) & flip).to(images.dtype)
    # Output to input coordinates: mirror, then rotate, then shift. Both axes reach from -1 to 1.
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    rows = [
        torch.stack([mirror * cos, -sin * aspect, shift[0]], dim=1),
        torch.stack([mirror * sin / aspect, cos, shift[1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    background = fill.view(1, -1, 1, 1)
    moved = F.grid_sample(
        images - background, grid.to(images.dtype), mode="nearest", align_corners=False
    )
    return moved + background


def keep_on(device: torch.device, images: torch.Tensor) -> torch.Tensor:
    """The images on the GPU if they take at most half of its free memory; else where they are."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.nbytes <= free // 2 else images


def _data_folder(path: Path | None) -> Path:
    return ROOT / "data" if path is None else path


def _digits(path: Path | None, image_size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), 80/20 stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = _resize(images.unsqueeze(1).expand(-1, 3, -1, -1), image_size)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    splits = [
        Labelled(images[index], labels[index])
        for index in (torch.from_numpy(train), torch.from_numpy(test))
    ]
    return _measured("digits", splits[0], splits[1], tuple(str(digit) for digit in range(10)))


def _cifar(
    source: str,
    name: str,
    archive: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[Path | None, int], Dataset]:
    def load(path: Path | None, image_size: int) -> Dataset:
        from torchvision import datasets  # here, because it takes seconds to import

        folder = _data_folder(path)
        splits = []
        for train in (True, False):
            try:
                data = getattr(datasets, source)(root=str(folder), train=train, download=True)
            except (
                Exception
            ) as error:  # torchvision raises what urllib, tarfile, pickle and md5 raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"--dataset {name}: not found in {folder} and the download failed ({reason}); "
                    f"put {archive} into that folder, or name the folder that has it with "
                    "--dataset_path"
                ) from None
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
            splits.append(Labelled(_resize(images, image_size), torch.tensor(data.targets)))
        return Dataset(name, splits[0], splits[1], tuple(data.classes), mean, std)

    return load


def _folder(path: Path | None, image_size: int) -> Dataset:
    """The user's images, `train/<class>/*` and `test/<class>/*`, decoded once into a cache."""
    if path is None:
        raise UserError(
            "--dataset_path: a value is needed with --dataset folder; give the folder that holds "
            "train/ and test/"
        )
    classes = _class_names(path / "train")
    test_classes = _class_names(path / "test")
    if classes != test_classes:
        raise UserError(
            f"--dataset_path: classes differ: {path / 'train'} has {', '.join(classes)}; "
            f"{path / 'test'} has {', '.join(test_classes)}; give both the same folders"
        )
    files: dict[str, list[Path]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for split in files:
        for label, name in enumerate(classes):
            found = sorted(
                f for f in (path / split / name).iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES
            )
            files[split] += found
            labels[split] += [label] * len(found)
    everything = files["train"] + files["test"]
    pixels = _decoded(path, everything, image_size)
    count = len(files["train"])
    train = Labelled(pixels[:count], torch.tensor(labels["train"], dtype=torch.int64))
    test = Labelled(pixels[count:], torch.tensor(labels["test"], dtype=torch.int64))
    for label, name in enumerate(classes):
        if label not in labels["train"]:
            raise UserError(
                f"--dataset_path: {path / 'train' / name} has no image file; put images into it or "
                "remove the folder"
            )
    return _measured("folder", train, test, classes)


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise UserError(f"--dataset_path: {folder} is not a folder; put one folder a class into it")
    names = tuple(
        sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    )
    if not names:
        raise UserError(
            f"--dataset_path: {folder} has no class folders; put one folder a class into it"
        )
    return names


def _decoded(root: Path, files: list[Path], image_size: int) -> torch.Tensor:
    """uint8 (N, 3, S, S), mapped from `data/cache/<key>.bin`, keyed by the files' content."""
    shape = (len(files), 3, image_size, image_size)
    digest = hashlib.sha256(f"pixels 1, {image_size}".encode())
    with ThreadPoolExecutor() as pool:
        with Progress(len(files), "looking for changes", "file") as progress:
            for file, content in zip(files, _ahead(pool, _file_digest, files), strict=True):
                digest.update(os.fsencode(file.relative_to(root)) + b"\0" + content)
                progress.advance()
        cache = ROOT / "data" / "cache" / f"{digest.hexdigest()[:32]}.bin"
        if not cache.exists() or cache.stat().st_size != int(np.prod(shape)):
            logger.info("decoding %d images of %s; kept in %s", len(files), root, cache)
            partial = cache.with_suffix(f".{os.getpid()}.tmp")
            try:
                cache.parent.mkdir(parents=True, exist_ok=True)
                with (
                    partial.open("wb") as out,
                    Progress(len(files), "decoding", "image") as progress,
                ):
                    for pixels in _ahead(pool, lambda file: read_image(file, image_size), files):
                        out.write(pixels.tobytes())
                        progress.advance()
                os.replace(partial, cache)
            except OSError as error:
                raise UserError(
                    f"{cache.parent}: cannot be written ({error.strerror}); make space or make it "
                    "writable"
                ) from None
            finally:
                partial.unlink(missing_ok=True)
    return torch.from_file(
        str(cache), shared=False, size=int(np.prod(shape)), dtype=torch.uint8
    ).view(shape)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable, items: list, window: int = 512
) -> Iterator:
    """pool.map in order, with at most `window` results waiting."""
    pending = [pool.submit(function, item) for item in items[:window]]
    pending.reverse()
    rest = iter(items[window:])
    while pending:
        yield pending.pop().result()
        for item in rest:
            pending.insert(0, pool.submit(function, item))
            break


def _file_digest(file: Path) -> bytes:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); repair or remove it") from None


def read_image(file: Path, image_size: int) -> np.ndarray:
    """One picture file as uint8 (3, S, S), squashed where it is not square.

    Raises:
        UserError: if the file is missing or no picture.
    """
    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode.startswith(
                ("I", "F")
            ):  # 16-bit grey: RGB conversion would clip, not scale
                image = Image.fromarray(
                    (np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)
                )
            image = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({error}); repair or remove it") from None


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
        total += torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))])
    mean, square = total / (train.images.numel() / 3)
    std = (
        (square - mean.square()).clamp(min=1e-4).sqrt()
    )  # an even-coloured set must not divide by 0
    as_tuple = [tuple(round(value, 4) for value in values.tolist()) for values in (mean, std)]
    return Dataset(name, train, test, classes, as_tuple[0], as_tuple[1])


_LOADERS: dict[str, Callable[[Path | None, int], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar(
        "CIFAR10",
        "cifar10",
        "cifar-10-python.tar.gz",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
    ),
    "cifar100": _cifar(
        "CIFAR100",
        "cifar100",
        "cifar-100-python.tar.gz",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "folder": _folder,
}
