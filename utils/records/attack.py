"""Records: the plain data that an attack writes into its folder, and that a defense reads."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from models import Classifier, build_model, check_model, is_user_file
from utils.data.archives import nothing_written
from utils.data.datasets import BUILT_IN, DatasetName, load_dataset
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import KINDS, PoisonedSet, is_kind, unpoisoned
from utils.errors import UserError
from utils.files import CONFIG_FILE, MARK, as_path, file_sha256
from utils.records import backdoorbench, schema
from utils.records.checkpoint import digest
from utils.records.contents import (
    ATTACK_RESULT,
    POISON,
    SUMMARY,
    incomplete_copy,
    said_of_replaced,
)
from utils.records.folders import RunFolder
from utils.records.hashes import checked_hashes, unchanged
from utils.records.network import checked_model, make_model, model_state
from utils.tensors import explained, load_tensors

_EXPECTED = "a record of this program"


def save_attack(
    folder: RunFolder,
    model: Classifier,
    data: Dataset,
    poisoned: PoisonedSet,
    triggered: Triggered | None,
    cross: Labelled | None,
    facts: Mapping[str, Any],
) -> None:
    """Writes `attack_result.pt` and, for a backdoored model, `poison.pt`.

    Args:
        cross: all test images with a trigger that must not work, if the attack has one.
        facts: `attack`, `model_name`, `model_sha256` (of a user's file, or None), `network_size`
            (as for `build_model`), `dataset_path` (text or None), `attack_target`,
            `attack_label_trans` (both None for a clean model).
    """
    if triggered is not None:
        folder.write_tensors(
            POISON,
            {
                "train_index": poisoned.index,
                "train_images": poisoned.images,
                "train_labels": poisoned.labels,
                "train_kinds": poisoned.kinds,
                "kinds": list(KINDS),
                "test_index": triggered.index,
                "test_images": triggered.images,
                "test_targets": triggered.targets,
                "test_labels": triggered.labels,
                **({} if cross is None else {"cross_images": cross.images}),
            },
        )
    folder.write_tensors(
        ATTACK_RESULT,
        {
            "model": model_state(model),
            "num_classes": len(data.classes),
            "classes": list(data.classes),
            "image_shape": list(data.image_shape),
            "mean": list(data.mean),
            "std": list(data.std),
            "dataset": data.name,
            "dataset_fingerprint": data.fingerprint(),
            **facts,
        },
    )


@dataclass(frozen=True, kw_only=True)
class AttackRecord(ABC):
    """An attack's record of any format, checked against itself.

    Attributes:
        folder: where it is.
        sha256: of `attack_result.pt`.
        triggers_sha256: of the triggered images and their labels, if they are in files that nothing
            else vouches for (those of BackdoorBench); else None.
        attack: name of the attack; "prototype" for a clean model.
        triggered: the triggered test images; None for a clean model.
        poison_index: which training images are poison; None if the record does not say it.
    """

    folder: Path
    sha256: str
    attack: str
    model_name: str
    state: dict[str, torch.Tensor]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str
    dataset_path: str | None
    attack_target: int | None
    attack_label_trans: str | None
    triggered: Triggered | None
    poison_index: torch.Tensor | None
    model_sha256: str | None = None
    network_size: int | None = None
    triggers_sha256: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What a summary says of the record that a run read."""
        triggers = {} if self.triggers_sha256 is None else {"triggers_sha256": self.triggers_sha256}
        return {"attack_sha256": self.sha256, **triggers}

    def require_triggers(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Raises UserError if a finished run had other triggered images than the record has now.

        Args:
            summary, folder: of the run.
        """
        if summary.get("triggers_sha256", self.triggers_sha256) != self.triggers_sha256:
            raise UserError(
                f"{folder}: was run with other triggered images than {self.folder} has now; put "
                "those back, or run it again with --overwrite"
            )

    def check_model(self, given: str | None) -> str:
        """The name to build the model by.

        Args:
            given: the user's `--model`; a file is run only if it is given here.

        Raises:
            UserError: if that is not the record's, or has to be given and is not.
        """
        return checked_model(self.model_name, self.model_sha256, given)

    def build(self, given: str | None = None) -> Classifier:
        """The record's model, in eval mode, on the CPU.

        Args:
            given: as for `check_model`.

        Raises:
            UserError: if the weights do not fit the architecture, or as `check_model` says.
        """
        return make_model(
            self.check_model(given),
            self.state,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            image_size=self.image_shape[1],
            network_size=self.network_size,
            where=self.folder,
        )

    def load_dataset(self, path: str | None = None) -> Dataset:
        """The dataset that the model was trained on, checked.

        Args:
            path: where it is now; None for the place in the record, where nothing is written.
        """
        may_write = bool(path) or not self.dataset_path
        path = path or (None if self.dataset in BUILT_IN else self.dataset_path)
        is_folder = self.dataset == "folder"  # of others some archive may be anywhere
        if not may_write and is_folder and not Path(str(path)).is_dir():
            raise UserError(
                f"{self.folder}: was made with the images in {path}, which is no folder now; give "
                "the one that has them with --dataset_path"
            )
        with contextlib.nullcontext() if may_write else nothing_written():
            data = load_dataset(self.dataset, as_path(path or None), self.image_shape[1])
        self.check_dataset(data)
        return data

    def check_dataset(self, data: Dataset) -> None:
        """Raises UserError unless the dataset is the one that the model was trained on."""
        if data.image_shape != self.image_shape or len(data.classes) != self.num_classes:
            raise UserError(
                f"{self.folder}: made with {self.num_classes} classes of {self.image_shape} "
                "images, but the dataset "
                f"has {len(data.classes)} of {data.image_shape}; give its own with --dataset_path"
            )
        self.check_content(data)

    def check_shared(self, data: Dataset, what: str, other: str = "the record") -> None:
        """Checks that it is of the dataset that another record was made with.

        Args:
            data: that of the other record.
            what, other: what a message calls this record, and that one.

        Raises:
            UserError: if it is not.
        """
        advice = "give one of the same dataset"
        if self.dataset != data.name:
            raise UserError(
                f"{what} was trained on {self.dataset}, and {other} on {data.name}; {advice}"
            )
        try:
            self.check_dataset(data)
        except UserError:  # its advice is for a dataset that was moved
            raise UserError(
                f"{what} was trained on other images or classes than {other}; {advice}"
            ) from None

    @abstractmethod
    def check_content(self, data: Dataset) -> None:
        """Raises UserError unless images and labels are those that the record was made with."""

    @abstractmethod
    def poisoned_set(self, data: Dataset) -> PoisonedSet:
        """The training set with the images that the attack replaced; not for a clean model."""

    @abstractmethod
    def cross_images(self, data: Dataset) -> torch.Tensor | None:
        """uint8: all test images with a trigger that must not work; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class _RecordOfOurs(AttackRecord):
    """A record that an attack script wrote."""

    dataset_fingerprint: str
    plain: schema.Attack
    poison: schema.Poison | None
    poison_sha256: str | None

    def check_content(self, data: Dataset) -> None:
        if data.fingerprint() != self.dataset_fingerprint:
            raise UserError(
                f"{self.folder}: the images or labels of {self.dataset} are not those that it "
                "was made with; "
                "give the same files with --dataset_path, or run the attack again"
            )
        if self.poison is not None:
            with explained(self.folder / POISON, _EXPECTED):
                self.poison.check_dataset(data)

    def poisoned_set(self, data: Dataset) -> PoisonedSet:
        poison = self._poison()
        return PoisonedSet(data.train, poison.index, poison.images, poison.labels, poison.kinds)

    def cross_images(self, data: Dataset) -> torch.Tensor | None:
        return None if self.poison is None else self._poison().cross

    def _poison(self) -> schema.Poison:
        """The poisoned images, as they were when the record was opened; not kept in memory."""
        path = self.folder / POISON
        with unchanged(path, self.poison_sha256):
            return _read_poison(path, self.plain)


@dataclass(frozen=True, kw_only=True)
class _BackdoorBench(AttackRecord):
    """A record of BackdoorBench."""

    source: backdoorbench.AttackResult

    def check_content(self, data: Dataset) -> None:
        backdoorbench.check_dataset(self.source, data)

    def poisoned_set(self, data: Dataset) -> PoisonedSet:
        train = self.source.train
        if train is None:
            return unpoisoned(data.train)
        other = "cover" if self.source.is_poison_only else "cross"
        kinds = torch.full((len(train.index),), KINDS.index(other), dtype=torch.uint8)
        kinds[self.source.is_poison] = KINDS.index("poison")
        return PoisonedSet(data.train, train.index, train.images(), train.labels, kinds)

    def cross_images(self, data: Dataset) -> torch.Tensor | None:
        return backdoorbench.read_cross(self.source, data.test.labels)


def load_attack(folder: Path) -> AttackRecord:
    """Reads a finished attack's record, ours or BackdoorBench's.

    Raises:
        UserError: if the run is not finished, or a file was changed or damaged.
    """
    return _load_backdoorbench(folder) if is_backdoorbench(folder) else _load_ours(folder)


def is_backdoorbench(folder: Path) -> bool:
    """Whether a folder is read as one of BackdoorBench: it has a result, but none of our files."""
    ours = (CONFIG_FILE, SUMMARY, POISON, MARK)
    return (folder / ATTACK_RESULT).exists() and not any((folder / f).exists() for f in ours)


def _load_backdoorbench(folder: Path) -> AttackRecord:
    source = backdoorbench.read(folder)
    if source.dataset not in get_args(DatasetName):
        raise UserError(
            f"{folder}: made with {source.dataset}, which is not among the datasets here "
            f"({', '.join(get_args(DatasetName))})"
        )
    if is_user_file(source.model_name):
        raise UserError(
            f"{folder}: its network is a file, {source.model_name}, and no record makes us run one"
        )
    try:
        size, network_size = source.image_shape[1], backdoorbench.network_size(source)
        check_model(source.model_name, source.num_classes, size, network_size)
        network = build_model(
            source.model_name, source.num_classes, image_size=size, network_size=network_size
        ).network
    except UserError as error:
        raise UserError(f"{folder}: {str(error).removeprefix('--model: ')}") from None
    try:
        schema.check_state(source.state)
        state = backdoorbench.fit_state(source.state, network.state_dict())
    except ValueError as error:
        raise UserError(f"{folder}: its weights do not fit {source.model_name} ({error})") from None
    test = source.test
    triggered = Triggered(test.images(), test.labels, test.originals, test.index)
    target, label_map = source.label_map()
    return _BackdoorBench(
        folder=folder,
        sha256=file_sha256(folder / ATTACK_RESULT),
        attack=source.attack,
        model_name=source.model_name,
        state=state,
        network_size=network_size,
        num_classes=source.num_classes,
        image_shape=source.image_shape,
        mean=source.mean,
        std=source.std,
        dataset=source.dataset,
        dataset_path=None,
        attack_target=target,
        attack_label_trans=label_map,
        triggered=triggered,
        poison_index=None if source.train is None else source.train.index[source.is_poison],
        triggers_sha256=digest([triggered.images, triggered.labels, triggered.index]),
        source=source,
    )


def _load_ours(folder: Path) -> AttackRecord:
    result, poison = folder / ATTACK_RESULT, folder / POISON
    home = folder.resolve().parent
    if home.name in ("defense", "analysis") and (home.parent / ATTACK_RESULT).exists():
        raise UserError(
            f"{folder}: is a result in the {home.name}/ of a record, and no record itself; give "
            f"{home.parent}"
        )
    if not (folder / SUMMARY).exists():
        if result.exists() and not (folder / CONFIG_FILE).exists():  # which is written first
            raise incomplete_copy(folder)
        raise UserError(
            f"{folder}: has no summary.json, so its attack did not finish, or it is no record"
            f"{said_of_replaced(folder)}; run the attack again, or give another folder"
        )
    hashes = checked_hashes(folder, (ATTACK_RESULT, POISON))
    with explained(result, _EXPECTED):
        content = load_tensors(result)
        plain = schema.check_attack(content)
    stored = _read_poison(poison, plain) if POISON in hashes else None
    return _RecordOfOurs(
        folder=folder,
        sha256=hashes[ATTACK_RESULT],
        attack=plain["attack"],
        model_name=plain["model_name"],
        model_sha256=plain.get("model_sha256"),
        network_size=plain.get("network_size"),
        state=content["model"],
        num_classes=plain["num_classes"],
        image_shape=plain["image_shape"],
        mean=tuple(plain["mean"]),
        std=tuple(plain["std"]),
        dataset=plain["dataset"],
        dataset_path=plain["dataset_path"],
        dataset_fingerprint=plain["dataset_fingerprint"],
        attack_target=plain["attack_target"],
        attack_label_trans=plain["attack_label_trans"],
        triggered=None if stored is None else stored.triggered,
        poison_index=None if stored is None else stored.index[is_kind(stored.kinds, "poison")],
        plain=plain,
        poison=None if stored is None else stored.without_images(),
        poison_sha256=hashes.get(POISON),
    )


def _read_poison(path: Path, plain: schema.Attack) -> schema.Poison:
    with explained(path, _EXPECTED):
        return schema.check_poison(load_tensors(path), plain)
