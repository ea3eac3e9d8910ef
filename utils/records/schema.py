"""The schema of a record's files: types, shapes, ranges, and how they must agree.

A file is checked when it is opened, before anything is done with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from utils.data.labelled import LARGEST_SIDE, MOST_CLASSES, Dataset, Triggered
from utils.data.poison import KINDS, LabelMap, is_kind
from utils.tensors import kind_of_numbers, not_finite, text_up_to

Name = Annotated[str, text_up_to(200)]
PathText = Annotated[str, text_up_to(4096)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE, strict=True)]
_Constants = Annotated[
    list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)
]
_Divisors = Annotated[
    list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)
]


class Network(TypedDict):
    """How a record's network is made again."""

    model_name: Name
    model_sha256: NotRequired[Sha256 | None]
    network_size: NotRequired[Side | None]
    num_classes: Annotated[int, Field(ge=1, le=MOST_CLASSES, strict=True)]
    image_shape: tuple[Literal[3], Side, Side]
    mean: _Constants
    std: _Divisors


class Attack(Network):
    """The plain values of `attack_result.pt`."""

    attack: Name
    classes: NotRequired[list[Annotated[str, text_up_to(10_000)]]]
    dataset: Name
    dataset_path: PathText | None
    dataset_fingerprint: Sha256
    attack_target: Annotated[int, Field(ge=0, strict=True)] | None
    attack_label_trans: LabelMap | None


class Defense(Network):
    """The plain values of `defense_result.pt`."""

    changes: NotRequired[list[dict[str, str | int]]]


_ATTACK = TypeAdapter(Attack)
_DEFENSE = TypeAdapter(Defense)
_FILES = TypeAdapter(dict[Name, Sha256])


def check_files(summary: Any) -> dict[str, str]:
    """The sha256 of a run's files by their names, as its `summary.json` has them; none if not."""
    try:
        return _FILES.validate_python(summary["files"])
    except (KeyError, TypeError, ValueError):
        return {}


def check_attack(content: Mapping[str, Any]) -> Attack:
    """The plain values of `attack_result.pt`; the weights are checked, too.

    Raises:
        ValueError: saying what is not as it has to be.
    """
    plain = _ATTACK.validate_python(content)
    _check_network(plain, content)
    target = plain["attack_target"]
    if target is not None and target >= plain["num_classes"]:
        raise ValueError(f"attack_target: {target} is no class of {plain['num_classes']}")
    return plain


def check_defense(content: Mapping[str, Any]) -> Defense:
    """The plain values of `defense_result.pt`; the weights are checked, too."""
    plain = _DEFENSE.validate_python(content)
    _check_network(plain, content)
    return plain


def _check_network(plain: Network, content: Mapping[str, Any]) -> None:
    _, height, width = plain["image_shape"]
    if height != width:
        raise ValueError(f"image_shape: {height} x {width} pixels are no square")
    if not isinstance(content["model"], dict):
        raise ValueError("model: is no state dict")
    check_state(content["model"])


def check_state(state: Mapping[Any, Any]) -> None:
    """Raises ValueError unless all weights are finite tensors under names."""
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > 1000:
            raise ValueError("a weight has no name, or too long a one")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the weights {name} are no tensor")
    for name in not_finite(state):
        raise ValueError(f"the weights {name} are not finite")


@dataclass(frozen=True)
class Poison:
    """What `poison.pt` holds.

    Attributes:
        index, labels: int64 (P,), which training images are replaced, ascending, and their labels.
        kinds: uint8 (P,), positions in `KINDS`.
        images: uint8 (P, C, H, W), what they are replaced by.
        triggered: the triggered test images.
        cross: uint8 (T, C, H, W), all test images with a trigger that must not work; or None.
        cross_count: T, also if the images are no longer kept; None if there are none.
    """

    index: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    images: torch.Tensor
    triggered: Triggered
    cross: torch.Tensor | None
    cross_count: int | None

    def without_images(self) -> "Poison":
        """The same without the images of the training set and the cross images."""
        return replace(self, images=self.images[:0].clone(), cross=None)

    def check_dataset(self, data: Dataset) -> None:
        """Raises ValueError unless indices and true labels are those of the dataset."""
        for what, index, split in (
            ("train_index", self.index, data.train),
            ("test_index", self.triggered.index, data.test),
        ):
            if len(index) and int(index[-1]) >= len(split):
                raise ValueError(f"{what}: names image {int(index[-1])} of {len(split)}")
        kept = ~is_kind(self.kinds, "poison")
        for what, stored, true in (
            ("test_labels", self.triggered.labels, data.test.labels[self.triggered.index]),
            ("train_labels", self.labels[kept], data.train.labels[self.index[kept]]),
        ):
            if not torch.equal(stored, true):
                raise ValueError(f"{what}: are not the dataset's")
        if self.cross_count not in (None, len(data.test)):
            raise ValueError(f"cross_images: {self.cross_count} of {len(data.test)} test images")


def check_poison(content: Mapping[str, Any], plain: Attack) -> Poison:
    """The content of `poison.pt`, which has to agree with that of `attack_result.pt`.

    Raises:
        ValueError: saying what is not as it has to be.
    """
    if content.get("kinds", list(KINDS)) != list(KINDS):
        raise ValueError(f"kinds: are not {', '.join(KINDS)}")
    shape, classes = tuple(plain["image_shape"]), plain["num_classes"]
    tensors = {
        name: _tensor(content, name)
        for name in (
            *("train_index", "train_images", "train_labels", "train_kinds"),
            *("test_index", "test_images", "test_targets", "test_labels"),
        )
    }
    rows = {
        split: len(tensors[f"{split}_index"]) if tensors[f"{split}_index"].dim() else 0
        for split in ("train", "test")
    }
    for name, tensor in tensors.items():
        count = rows[name.split("_", 1)[0]]
        if name.endswith("images"):
            _check_images(name, tensor, (count, *shape))
        else:
            dtype = torch.uint8 if name == "train_kinds" else torch.int64
            _check(name, tensor, dtype, (count,))
    if rows["test"] == 0:
        raise ValueError("test_index: names no image")
    for name in ("train_index", "test_index"):
        index = tensors[name]
        if len(index) and (int(index[0]) < 0 or not bool((index.diff() > 0).all())):
            raise ValueError(f"{name}: is not ascending from 0 on")
    for name, bound in (
        ("train_labels", classes),
        ("train_kinds", len(KINDS)),
        ("test_targets", classes),
        ("test_labels", classes),
    ):
        values = tensors[name]
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < bound:
            raise ValueError(f"{name}: has values beyond 0 to {bound - 1}")
    cross = content.get("cross_images")
    if cross is not None:
        cross = _tensor(content, "cross_images")
        _check_images("cross_images", cross, (len(cross) if cross.dim() else 0, *shape))
    return Poison(
        index=tensors["train_index"],
        labels=tensors["train_labels"],
        kinds=tensors["train_kinds"],
        images=tensors["train_images"],
        triggered=Triggered(
            tensors["test_images"],
            tensors["test_targets"],
            tensors["test_labels"],
            tensors["test_index"],
        ),
        cross=cross,
        cross_count=None if cross is None else len(cross),
    )


def _tensor(content: Mapping[str, Any], name: str) -> torch.Tensor:
    if not isinstance(content.get(name), torch.Tensor):
        raise ValueError(f"{name}: is no tensor")
    return content[name]


def _check_images(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check(name, tensor, torch.uint8, shape)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: is {tensor.dtype} of {tuple(tensor.shape)} instead of {dtype} of {shape}"
        )


def misfits(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """How weights differ from those that a network has, by names, shapes and kinds of numbers.

    Args:
        expected: the state dict of a network; its tensors may be without values.
    """
    return [
        *(f"{name} is missing" for name in expected if name not in state),
        *(f"{name} is not in the network" for name in state if name not in expected),
        *(
            f"{name} is {_described(state[name])} instead of {_described(value)}"
            for name, value in expected.items()
            if name in state and _described(state[name]) != _described(value)
        ),
    ]


def _described(tensor: torch.Tensor) -> str:
    return f"{kind_of_numbers(tensor)} of {tuple(tensor.shape)}"
