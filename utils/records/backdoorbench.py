"""The record format of BackdoorBench: read without running anything in it, and written.

A record is a folder with `attack_result.pt`, a dictionary of weights and of the state of two
poisoned sets, and with one PNG file per poisoned image. The sets refer to a clean dataset by index,
and to their images by paths on the machine where the attack ran. Only the last three parts of a
path are used, below the folder that the record is in now.
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.data.batches import spread
from utils.data.labelled import LARGEST_SIDE, MOST_CLASSES, Dataset
from utils.errors import UserError, reason_of, shown
from utils.files import read_bytes
from utils.process.progress import Progress
from utils.process.script import logger
from utils.records.contents import ATTACK_RESULT, incomplete_copy
from utils.tensors import explained, load_plain, load_tensors

# The networks that both sides have, by their common name.
MODELS = (
    "preactresnet18",
    *("resnet18", "resnet34", "resnet50", "vgg16", "vgg19", "vgg16_bn", "vgg19_bn"),
    *("densenet121", "densenet161", "mobilenet_v2", "mobilenet_v3_large"),
    *("efficientnet_b0", "efficientnet_b3", "squeezenet1_0", "shufflenet_v2_x1_0"),
    *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "convnext_tiny"),
)

# Mean and standard deviation that BackdoorBench normalizes with, by its name of a dataset.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.5,) * 3, (0.5,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.0,) * 3, (1.0,) * 3),
    "celeba": ((0.0,) * 3, (1.0,) * 3),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Columns of attack_df.csv, in order.
METRICS = (
    *("epoch", "batch", "train_epoch_loss_avg_over_batch", "train_acc", "train_acc_clean_only"),
    *("train_asr_bd_only", "train_ra_bd_only", "clean_test_loss_avg_over_batch"),
    *("bd_test_loss_avg_over_batch", "test_acc", "test_asr", "test_ra"),
)

TRAIN, TEST, CROSS = "bd_train_dataset", "bd_test_dataset", "cross_test_dataset"
POISON_LIST = "train_poison_index_list.pickle"
INFO = "info.pickle"

_KEYS = (
    *("model_name", "num_classes", "model", "data_path", "img_size", "clean_data"),
    *("bd_train", "bd_test"),
)

_EXPECTED = "an attack result of BackdoorBench"
_CHUNK = 1024  # images that wait to be taken at once
_SAMPLE = 64  # images of a split that are compared with the clean ones


@dataclass(frozen=True)
class Replaced:
    """The images of one split that are replaced by other images.

    Attributes:
        count: images of the clean split.
        index: int64 (P,), which are replaced; ascending.
        labels: int64 (P,), the labels that they are given.
        originals: int64 (P,), their true labels.
        root: the record's folder.
        files: of the images, below root.
        image_shape: (C, H, W).
    """

    count: int
    index: torch.Tensor
    labels: torch.Tensor
    originals: torch.Tensor
    root: Path
    files: tuple[str, ...] = field(repr=False)
    image_shape: tuple[int, int, int]

    def images(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Reads the images of all rows, or of some: uint8 (P, C, H, W).

        Raises:
            UserError: for a file that is missing, leads out of the record, or is no RGB PNG of that
                size.
        """
        files = self.files if rows is None else [self.files[row] for row in rows]
        return _read_images(self.root, files, self.image_shape)


@dataclass(frozen=True)
class AttackResult:
    """A record, checked against itself; its images are read when asked for.

    Attributes:
        attack: the attack's name, "unknown" if the record does not say it.
        state: weights, without the prefix of a parallel run.
        mean, std: of BackdoorBench's normalization.
        train: None if the attack makes poison on the fly.
        is_poison: bool, for the rows of train: those that teach the backdoor.
        is_poison_only: whether the attack says which images it poisoned and controls no training.
        test: the triggered test images.
    """

    folder: Path
    attack: str
    model_name: str
    num_classes: int
    state: dict[str, torch.Tensor] = field(repr=False)
    dataset: str
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Replaced | None
    is_poison: torch.Tensor
    is_poison_only: bool
    test: Replaced

    def label_map(self) -> tuple[int | None, str | None]:
        """Target and "all2one", a target of 0 and "all2all" (y -> y + 1), or None twice."""
        targets, labels = self.test.labels, self.test.originals
        if len(targets.unique()) == 1:
            return int(targets[0]), "all2one"
        if torch.equal(targets, (labels + 1) % self.num_classes):
            return 0, "all2all"
        return None, None


def read_dataset_name(folder: Path) -> str:
    """The name of the dataset that a record was made with.

    Raises:
        UserError: if the folder holds no record of BackdoorBench.
    """
    with explained(folder / ATTACK_RESULT, _EXPECTED):
        return _text(_load(folder / ATTACK_RESULT), "clean_data")


def read(folder: Path) -> AttackResult:
    """Reads a record, without its images.

    Raises:
        UserError: if the folder holds no record of BackdoorBench, or one that keeps its images
            inside of `attack_result.pt`.
    """
    with explained(folder / ATTACK_RESULT, _EXPECTED):
        content = _load(folder / ATTACK_RESULT)
        num_classes, name = content["num_classes"], _text(content, "clean_data")
        model_name = _text(content, "model_name")
        if not _is_integer(num_classes) or num_classes < 1:
            raise ValueError(f"num_classes is {_typed(num_classes)}, no positive integer")
        num_classes = int(num_classes)
        shape = _image_shape(content["img_size"])
        if name not in NORMALIZATION:
            raise ValueError(f"{name} is no dataset of BackdoorBench")
        train = content["bd_train"]
        if train is not None:
            train = _replaced(folder, "bd_train", train, num_classes, shape)
        test = _replaced(folder, "bd_test", content["bd_test"], num_classes, shape)
        test = _without_target_class(test)
        state = _state(content["model"], num_classes)
        if num_classes > MOST_CLASSES:
            raise ValueError(f"num_classes is more than {MOST_CLASSES:,}")
    is_poison, is_poison_only = _told_apart(folder, train)
    mean, std = NORMALIZATION[name]
    return AttackResult(
        folder=folder,
        attack=_attack_name(folder),
        model_name=model_name,
        num_classes=num_classes,
        state=state,
        dataset=name,
        image_shape=shape,
        mean=mean,
        std=std,
        train=train,
        is_poison=is_poison,
        is_poison_only=is_poison_only,
        test=test,
    )


def read_cross(result: AttackResult, labels: torch.Tensor) -> torch.Tensor | None:
    """All test images with a trigger that must not work, which only some records have.

    Args:
        labels: int64 (N,), of the clean test set.

    Returns:
        uint8 (N, C, H, W); None if there are none, or not of every test image, which a line says.
    """
    files = [f"{CROSS}/{label}/{index}.png" for index, label in enumerate(labels.tolist())]
    lacking = [file for file in files if not (result.folder / file).is_file()]
    if lacking:
        if len(lacking) < len(files):
            logger.warning(
                "warning: %s: %d of its %d images are missing, e.g. %s; it is left out",
                result.folder / CROSS,
                len(lacking),
                len(files),
                lacking[0].removeprefix(f"{CROSS}/"),
            )
        return None
    return _read_images(result.folder, files, result.image_shape)


def network_size(result: AttackResult) -> int | None:
    """The side to which the network resizes its images first; None if it takes them as they are.

    Vision transformers are the second part of a sequence whose first part resizes to 224.
    """
    return 224 if result.state and all(name.startswith("1.") for name in result.state) else None


def fit_state(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict with the names and in the order of a network's own.

    Entries are matched by name. If names differ, they are matched by position, as BackdoorBench
    does, provided that all shapes agree.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    shapes = [tuple(value.shape) for value in expected.values()]
    if set(state) != set(expected) and [tuple(v.shape) for v in state.values()] == shapes:
        state = dict(zip(expected, state.values(), strict=True))
    for problem, names in (
        ("lack", [name for name in expected if name not in state]),
        ("have also", [name for name in state if name not in expected]),
    ):
        if names:
            raise ValueError(f"they {problem} {', '.join(names[:3])}, {len(names)} in all")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} is of {tuple(state[name].shape)}, the network's of {tuple(value.shape)}"
            )
    return {name: state[name] for name in expected}


def check_dataset(result: AttackResult, data: Dataset) -> None:
    """Whether the dataset is the one that the record's indices mean.

    Three tests for each split: the number of images; the true label of every replaced image; and,
    for up to 64 of them, whether a replaced image is more like the clean image of its index than
    like those of the other 63. "Like" is the correlation of pixels after the mean over all 64 is
    subtracted, which removes everything that a trigger adds to every image. In another order, each
    of them passes with probability 1/64; half must pass. (On photographs, nine of ten pass with any
    of our triggers.)

    The tests notice another number of images, other labels of replaced images, another order, and
    other images. They do not notice a change of fewer than half of the images that keeps labels, a
    change of pixels after which images are still alike (another way to resize), or a change of
    images that the record never replaced. If a trigger hides the whole image, only labels are
    compared.

    Raises:
        UserError: saying what differs.
    """
    for name, replaced, clean in (
        ("training", result.train, data.train),
        ("test", result.test, data.test),
    ):
        if replaced is None:
            continue
        _check_split(replaced, clean.images, clean.labels, f"{name} images", data.name)


def load_array(path: Path) -> np.ndarray:
    """One row of numbers that `torch.save` wrote.

    Raises:
        UserError: if the file holds anything else.
    """
    with explained(path, "a row of numbers"):
        array = load_plain(path, arrays=True)
        if not isinstance(array, np.ndarray) or array.ndim != 1:
            raise ValueError("it holds something else")
        return array


def _load(path: Path) -> dict[str, Any]:
    """The dictionary; it must have all eight keys."""
    try:
        content = load_tensors(path, arrays=True)
    except ValueError:
        _refuse_images_inside(path)
        raise
    if any(isinstance(content.get(key), dict) and "x" in content[key] for key in _KEYS[-2:]):
        _refuse(path, is_v1=True)
    if "dataset_fingerprint" in content:  # that of this program
        raise incomplete_copy(path.parent)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return content


def _refuse_images_inside(path: Path) -> None:
    """Refuses, by name, a file whose pickle names classes of PIL; looks without unpickling."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = (each for each in archive.infolist() if each.filename.endswith("data.pkl"))
        pickled = next(parts, None)
        if pickled is None:
            return  # what is wrong with it is known
        if pickled.file_size > path.stat().st_size:
            return  # compressed, which torch never does
        words = (value for _, value, _ in pickletools.genops(archive.read(pickled)))
        telling = {
            word if word == "bd_data_container" else "PIL"
            for word in words
            if isinstance(word, str) and word.startswith(("bd_data_container", "PIL."))
        }
    if "PIL" in telling:
        _refuse(path, is_v1="bd_data_container" not in telling)


def _refuse(path: Path, is_v1: bool) -> None:
    kind = "a record of BackdoorBench's v1 branch" if is_v1 else "an in-RAM record of BackdoorBench"
    raise UserError(
        f"{path}: is {kind}, with pictures as objects inside the file, which are not read; make "
        "the record again with a later branch, and with its images saved as files"
    )


def _text(content: Mapping[str, Any], key: str) -> str:
    if not isinstance(content[key], str):
        raise ValueError(f"{key} is no text")
    if not content[key].isprintable():
        raise ValueError(f"{key} has characters that cannot be printed")
    if not 1 <= len(content[key]) <= 200:
        raise ValueError(f"{key} has {len(content[key])} letters")
    return content[key]


def _image_shape(size: Any) -> tuple[int, int, int]:
    """(C, H, W) of a stored (H, W, C)."""
    if not isinstance(size, (tuple, list)) or not all(map(_is_integer, size)):
        raise ValueError("img_size is no (height, width, channels), three integers")
    size = tuple(map(int, size))
    if len(size) != 3 or size[0] != size[1] or not 1 <= size[0] <= LARGEST_SIDE or size[2] != 3:
        raise ValueError(
            f"img_size is {shown(size, 100)}; only square images of three channels and of up to "
            f"{LARGEST_SIDE} pixels a side are read"
        )
    return 3, size[0], size[1]


def _state(weights: Any, num_classes: int) -> dict[str, torch.Tensor]:
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError("model is no state dict")
    # Whoever builds a network of that many classes takes no more memory than the file did.
    if not any(getattr(value, "shape", ())[:1] == (num_classes,) for value in weights.values()):
        raise ValueError(f"no weights of its model are for {num_classes} classes")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _replaced(
    folder: Path, where: str, state: Any, num_classes: int, shape: tuple[int, int, int]
) -> Replaced:
    """A dataset state as its rows, each checked: index, labels and path say the same."""
    if not isinstance(state, dict):
        raise ValueError(f"{where} is no dictionary")
    container = state.get("bd_data_container")
    if not isinstance(container, dict) or not isinstance(container.get("data_dict"), dict):
        raise ValueError(f"{where} has no container of images")
    items = container["data_dict"]
    if any(not isinstance(item, dict) for item in items.values()):
        _refuse(folder / ATTACK_RESULT, is_v1=False)
    indicator = _row(where, state, "poison_indicator", np.float64)
    exposed = _row(where, state, "original_index_array", np.int64)
    if not ((indicator == 0) | (indicator == 1)).all():
        raise ValueError(f"poison_indicator of {where} has other values than 0 and 1")
    count = len(indicator)
    if len(exposed) and not 0 <= exposed.min() <= exposed.max() < count:
        raise ValueError(f"original_index_array of {where} names images beyond {count}")
    if len(np.unique(exposed)) != len(exposed):
        raise ValueError(f"original_index_array of {where} names an image twice")
    by_index = {_integer(where, key): item for key, item in items.items()}
    odd = sorted(set(np.flatnonzero(indicator).tolist()) ^ set(by_index))
    if odd:
        raise ValueError(
            f"poison_indicator and container of {where} differ, e.g. on image {odd[0]}"
        )
    if where == "bd_train" and len(exposed) < count:
        logger.info(
            "%s exposes %d of %d training images; what it leaves out counts as a clean image here",
            where,
            len(exposed),
            count,
        )
    index = sorted(exposed[indicator[exposed] == 1].tolist())
    labels, files = [], []
    for number in index:
        info = by_index[number].get("other_info")
        if not isinstance(info, (list, tuple)) or len(info) != 2:
            raise ValueError(f"image {number} of {where} has no two labels")
        pair = [_integer(where, label) for label in info]
        if not all(0 <= label < num_classes for label in pair):
            raise ValueError(f"labels {pair} of image {number} of {where} are no classes")
        labels.append(pair)
        files.append(_rebased(where, by_index[number].get("path"), number, pair[1]))
    pairs = torch.tensor(labels, dtype=torch.int64).view(-1, 2)
    return Replaced(
        count=count,
        index=torch.tensor(index, dtype=torch.int64),
        labels=pairs[:, 0].contiguous(),
        originals=pairs[:, 1].contiguous(),
        root=folder,
        files=tuple(files),
        image_shape=shape,
    )


def _row(where: str, state: Mapping[str, Any], key: str, dtype: type) -> np.ndarray:
    array = state.get(key)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{key} of {where} is no row of {np.dtype(dtype)}")
    return array


def _integer(where: str, value: Any) -> int:
    if not _is_integer(value):
        raise ValueError(
            f"{where} has {_typed(value)} in the place of an index or label, an integer"
        )
    return int(value)


def _is_integer(value: Any) -> bool:
    """Whether a value is a whole number, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _typed(value: Any) -> str:
    """A value with its type, for messages."""
    return f"{shown(value, 100)!r} ({type(value).__name__})"


def _rebased(where: str, stored: Any, index: int, original: int) -> str:
    """The last three parts of a stored path, whatever system and folder it comes from."""
    parts = stored.replace("\\", "/").split("/")[-3:] if isinstance(stored, str) else []
    fits = len(parts) == 3 and parts[1:] == [str(original), f"{index}.png"]
    if not fits or parts[0] in ("", ".", "..") or "\0" in parts[0]:
        raise ValueError(
            f"{where} has image {index} of class {original} at {shown(stored, 200)!r}; a path ends "
            f"in <folder>/{original}/{index}.png"
        )
    return "/".join(parts)


def _without_target_class(test: Replaced) -> Replaced:
    """Without images that already have the target class: they cannot show success."""
    rows = torch.nonzero(test.labels != test.originals).flatten()
    if len(rows) == 0:
        raise ValueError("bd_test has no image whose label the trigger shall change")
    if len(rows) < len(test.index):
        logger.info(
            "%d triggered images of the target class are skipped", len(test.index) - len(rows)
        )
    return Replaced(
        count=test.count,
        index=test.index[rows],
        labels=test.labels[rows],
        originals=test.originals[rows],
        root=test.root,
        files=tuple(test.files[row] for row in rows.tolist()),
        image_shape=test.image_shape,
    )


def _told_apart(folder: Path, train: Replaced | None) -> tuple[torch.Tensor, bool]:
    """Which replaced training images are poison, and whether the record lists them.

    A poison-only attack lists them in a file. Attacks that control training also keep cross
    samples: a replaced image that keeps its label is a cross sample, and one with another label is
    poison. If there is no list, this rule is used if there are cross test images, or if an image
    keeps a label that is not the one target. Otherwise all replaced images are poison, such as
    those of a clean-label attack, or those that all-to-one poison draws from the target class.
    """
    if train is None:
        return torch.zeros(0, dtype=torch.bool), False
    if (folder / POISON_LIST).exists():
        listed = torch.from_numpy(load_array(folder / POISON_LIST))
        if len(listed) != train.count:
            raise UserError(
                f"{folder / POISON_LIST}: has {len(listed)} entries, but the record is of "
                f"{train.count} training images"
            )
        is_poison = listed[train.index] == 1
        if int(is_poison.sum()) != int((listed != 0).sum()):
            raise UserError(
                f"{folder / POISON_LIST}: names images that {ATTACK_RESULT} does not have"
            )
        return is_poison, True
    changed = train.labels != train.originals
    targets, kept = train.labels[changed].unique(), train.labels[~changed]
    is_one_target = len(targets) == 1 and bool((kept == targets).all())
    if (folder / CROSS).is_dir() or (changed.any() and len(kept) > 0 and not is_one_target):
        return changed, False
    return torch.ones_like(changed), False


def _attack_name(folder: Path) -> str:
    """The attack's name in the run's arguments; it is only for titles, so it may be unknown."""
    try:
        name = load_tensors(folder / INFO).get("attack")
    except Exception:  # absent, or not of plain data
        return "unknown"
    if isinstance(name, str) and name.isprintable() and 1 <= len(name) <= 200:
        return name
    return "unknown"


def _read_images(
    root: Path, files: Sequence[str], image_shape: tuple[int, int, int]
) -> torch.Tensor:
    inside = root.resolve()

    def read_one(file: str) -> torch.Tensor:
        return _read_png(root / file, inside, image_shape)

    for file in files[:1]:
        read_one(file)  # of another size than stated, it is refused before memory for all is taken
    try:
        images = torch.empty(len(files), *image_shape, dtype=torch.uint8)
    except RuntimeError:
        raise UserError(
            f"{root}: its {len(files)} images of {image_shape} have no room in memory"
        ) from None
    with (
        ThreadPoolExecutor() as pool,
        Progress(len(files), "reading images", "image") as progress,
    ):
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            for row, pixels in enumerate(pool.map(read_one, part), start):
                images[row] = pixels
                progress.advance()
    return images


def _read_png(path: Path, inside: Path, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """An 8-bit RGB PNG of the expected size, as uint8 (C, H, W)."""
    _, height, width = image_shape
    try:
        if not path.resolve(strict=True).is_relative_to(inside):
            raise UserError(f"{path}: leads out of the record; put the image itself there")
        content = read_bytes(path)
        # Signature, then the length and name of the first chunk, then size, depth and colour type.
        header = struct.pack(">8s4x4sIIBB", b"\x89PNG\r\n\x1a\n", b"IHDR", width, height, 8, 2)
        if content[:8] + bytes(4) + content[12:26] != header:
            raise ValueError(f"it is no 8-bit RGB PNG of {width} x {height} pixels")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # what a damaged picture makes Pillow raise is anything
        raise UserError(
            f"{path}: cannot be read ({reason_of(error)}); restore the record's images"
        ) from None


def _check_split(
    replaced: Replaced, images: torch.Tensor, labels: torch.Tensor, what: str, name: str
) -> None:
    advice = "give the same files with --dataset_path"
    if replaced.count != len(labels):
        raise UserError(
            f"{replaced.root}: made with {replaced.count} {what}, but {name} has {len(labels)} "
            f"here; {advice}"
        )
    if len(replaced.index) == 0:
        return  # there is nothing to compare
    differ = torch.nonzero(labels[replaced.index] != replaced.originals).flatten()
    if len(differ):
        row = int(differ[0])
        number = int(replaced.index[row])
        raise UserError(
            f"{replaced.root}: {len(differ)} of {len(replaced.index)} {what} have another label in "
            f"{name} here, e.g. number {number}: {int(replaced.originals[row])} in the record, "
            f"{int(labels[number])} here; {advice}"
        )
    rows = spread(len(replaced.index), _SAMPLE)
    alike = _finds_its_own(replaced.images(rows.tolist()), images[replaced.index[rows]])
    if int(alike.sum()) * 2 < len(alike):
        number = int(replaced.index[rows[torch.nonzero(~alike)[0, 0]]])
        raise UserError(
            f"{replaced.root}: its {what} are not those of {name} here: {int((~alike).sum())} of "
            f"{len(alike)} are more like another image than like their own, e.g. number {number}; "
            f"{advice}"
        )


def _finds_its_own(changed: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Whether each changed image correlates with its own clean image more than with the others.

    Shape:
        (N, C, H, W) uint8 twice -> (N,) bool; empty if the changed images are all the same.
    """
    rows = []
    for images in (changed, clean):
        flat = images.flatten(1).double()
        centred = flat - flat.mean(dim=0)
        rows.append(centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-9))
    correlation = rows[0] @ rows[1].T
    diagonal = correlation.diagonal()
    return (diagonal >= correlation.max(dim=1).values - 1e-9)[rows[0].norm(dim=1) > 0.5]
