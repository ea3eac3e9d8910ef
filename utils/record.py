"""Records, as plain data; the only module that knows file names under `record/`."""

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, get_args

import pandas as pd
import torch
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from models import Classifier, build_model, check_model, is_user_file, model_identity
from utils import backdoorbench, distributed
from utils.config import parse_yaml, read_yaml
from utils.data import Dataset, Labelled, Triggered
from utils.datasets import DatasetName, load_dataset
from utils.errors import NothingToDo, UserError
from utils.files import not_written, remove_strays, replaced
from utils.poison import KINDS, PoisonedSet, unpoisoned
from utils.runtime import ROOT
from utils.tensors import explained, load_tensors, not_finite

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_EXPECTED = "a record of this program"
# Flags that say where a run writes, and when, but not what comes out.
FREE_TO_CHANGE = ("resume", "overwrite", "checkpoint_every", "record_path", "save_folder_name")
_LOCKS: dict[Path, IO[str]] = {}  # open files, for as long as this process lives


class RunFolder:
    """The folder that a run writes; every file appears whole or not at all.

    `summary.json` is written last, so its presence means that the run is done. A folder without it
    is what a failed run left, and may be written again. Of several processes the first one alone
    writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model_sha256: str | None = None

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").exists()

    def claim(self, overwrite: bool, resume: bool = False) -> None:
        """Keeps the folder for this process until it ends.

        Raises:
            UserError: if what stands here may not be replaced, or another process has the folder. A
                finished or interrupted run needs `overwrite`; a folder that no run wrote is never
                touched.
            NothingToDo: if the run that is to be resumed is finished, as when a process was killed
                after its last file.
        """
        if overwrite and resume:
            raise UserError("--resume: goes on with a run, which --overwrite deletes; give one")
        with writable(self.path):
            self._check_free(overwrite, resume)
        if distributed.is_main():
            self.lock()

    def _check_free(self, overwrite: bool, resume: bool) -> None:
        self._refuse_links()
        if self.path.exists() and not (self.path / "config.yaml").exists() and self._holds_files():
            raise UserError(
                f"{self.path} exists and is no record; give another name, or move it away"
            )
        if self.is_done and resume:
            raise NothingToDo(f"{self.path} is finished; nothing is left to do")
        if self.is_done and not overwrite:
            raise UserError(f"{self.path} exists; give --overwrite to replace it, or another name")
        if self._checkpoint.exists() and not (overwrite or resume):
            raise UserError(
                f"{self.path} is an interrupted run; give --resume to go on, or --overwrite to "
                "start anew"
            )

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def _refuse_links(self) -> None:
        """Raises UserError where a write would end elsewhere; anybody may have made the folder."""
        inside = self.path.iterdir() if self.path.is_dir() else ()
        for path in (self.path, *inside):
            _refuse_link(path)

    def lock(self) -> None:
        """Takes the lock beside the folder, which the system takes back when this process ends.

        Raises:
            UserError: if another process has it.
        """
        path = self.path.with_name(f".{self.path.name}.lock")
        if self.path in _LOCKS:
            return
        with writable(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644), "w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"{self.path}: another process is writing it; wait for it, or give another "
                        "name"
                    ) from None
                if os.fstat(file.fileno()).st_nlink:
                    break  # else the process before has just removed it
        atexit.register(_remove, path)
        _LOCKS[self.path] = file

    def _holds_files(self) -> bool:
        return not self.path.is_dir() or any(self.path.iterdir())

    def start(
        self, config: str, resume: bool = False, model_sha256: str | None = None
    ) -> dict[str, Any] | None:
        """Empties the folder and writes the resolved configuration into it.

        Args:
            resume: go on where the folder's run was interrupted, if it was.
            model_sha256: of the user's file that makes the network; None for any other.

        Returns:
            What `write_checkpoint` was given; None for a fresh run.

        Raises:
            UserError: if the folder cannot be written, or the run had another configuration or
                another content of that file.
        """
        self._model_sha256 = model_sha256
        if resume and distributed.from_main(self._checkpoint.exists()):
            return self._resumed(config)
        if not distributed.is_main():
            return None
        with writable(self.path):
            if self.path.exists():
                # First, so that a half-emptied folder does not pass for a finished run.
                (self.path / "summary.json").unlink(missing_ok=True)
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
        self.write_text("config.yaml", config)
        return None

    def _resumed(self, config: str) -> dict[str, Any]:
        before = read_yaml(self.path / "config.yaml")
        now = parse_yaml(config, "the configuration")
        differing = [  # a flag that did not exist when the run began has its default
            name
            for name in sorted(set(before) - set(FREE_TO_CHANGE))
            if before[name] != now.get(name)
        ]
        if differing:
            raise UserError(
                f"--resume: {self.path} was run with "
                + ", ".join(f"--{name} {before[name]}" for name in differing)
                + "; give the same"
            )
        remove_strays(self.path)
        with explained(self._checkpoint, "a checkpoint of this program"):
            content = dict(_CHECKPOINT.validate_python(load_tensors(self._checkpoint)))
        before_sha256 = content.pop("model_sha256", self._model_sha256)  # earlier ones had none
        if before_sha256 != self._model_sha256:
            raise UserError(
                f"--resume: {self.path} was run with another content of {now['model']}; give the "
                "file as it was, or --overwrite to start anew"
            )
        return content

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Keeps plain data and tensors from which the run can go on, in place of earlier ones."""
        content = {**content, "model_sha256": self._model_sha256}
        self.write_tensors(self._checkpoint.name, content)

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def write(self, name: str, writer: Callable[[Path], None]) -> Path:
        """Lets `writer` write a file under a temporary name, then gives it its own.

        Raises:
            UserError: if the disk is full or the folder is not writable; earlier files stay intact.
        """
        path = self.path / name
        if not distributed.is_main():
            return path
        try:
            with replaced(path) as partial:
                writer(partial)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise not_written(path, error) from None
        return path

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: _write_text(path, text))

    def write_tensors(self, name: str, content: Mapping[str, Any]) -> None:
        """Plain data and CPU tensors, which `torch.load(..., weights_only=True)` reads."""
        self.write(name, lambda path: _save(path, content))

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        self.write("metrics.csv", lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Says that the run is done."""
        self.write_text("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        self._checkpoint.unlink(missing_ok=True)


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises UserError, naming the path, if the system refuses something inside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make it writable") from None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be gone, or read-only by now
        path.unlink()


def attack_folder(name: str, root: Path | None) -> RunFolder:
    """The folder of an attack's record.

    Args:
        name: letters, digits, `_ . + -`; not a path.
        root: folder of all records; None for `record/` of this checkout.

    Raises:
        UserError: if the name could leave the folder of records.
    """
    return RunFolder((root or ROOT / "record") / _checked_name(name))


def defense_folder(record: Path, name: str) -> RunFolder:
    """The folder of a defense's result, inside the record that it read.

    Raises:
        UserError: if the name could leave that folder, or the folder is elsewhere.
    """
    _refuse_link(record / "defense")
    return RunFolder(record / "defense" / _checked_name(name))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link; give another name, or remove it")


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"--save_folder_name: {name} is not a name; give letters, digits, _ . + - and no "
            "folders"
        )
    return name


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
        cross: all test images with a trigger that must not fire, where the attack has one.
        facts: `attack`, `model_name`, `model_sha256` (of a user's file, or None), `network_size`
            (as for `build_model`), `dataset_path` (text or None), `attack_target`,
            `attack_label_trans` (both None for a clean model).
    """
    if triggered is not None:
        folder.write_tensors(
            "poison.pt",
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
        "attack_result.pt",
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


def model_state(model: Classifier) -> dict[str, torch.Tensor]:
    """The bare network's state dict on the CPU, in plain memory order."""
    return {
        key: value.detach().cpu().contiguous().clone()
        for key, value in model.network.state_dict().items()
    }


def file_hashes(folder: RunFolder, *names: str) -> dict[str, str]:
    """sha256 of those of the named files that exist, for `summary.json`."""
    found = [folder.path / name for name in names]
    return {path.name: _sha256(path) for path in found if path.exists()}


@dataclass(frozen=True, kw_only=True)
class AttackRecord(ABC):
    """An attack's record of any format, checked against itself.

    Attributes:
        folder: where it is.
        sha256: of `attack_result.pt`.
        attack: name of the attack; "prototype" for a clean model.
        triggered: the triggered test images; None for a clean model.
        poison_index: which training images are poison; None where the record has none.
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

    def check_model(self, given: str | None) -> str:
        """The name to build the model by.

        Args:
            given: the user's `--model`; a file is run only if it is given here.

        Raises:
            UserError: if that is not the record's, or has to be given and is not.
        """
        if not is_user_file(self.model_name):
            if given not in (None, self.model_name):
                raise UserError(
                    f"--model: {given}, but the record says {self.model_name}; leave the flag out"
                )
            return self.model_name
        if given is None:
            raise UserError(
                f"--model: the record's network is made by a file of yours, {self.model_name}, "
                "which is run only if you name it; give --model and its path"
            )
        name, sha256 = model_identity(given)
        if sha256 is None or name.rpartition(":")[2] != self.model_name.rpartition(":")[2]:
            raise UserError(
                f"--model: {given}, but the record says {self.model_name}; give that file"
            )
        if sha256 != self.model_sha256:
            raise UserError(
                f"--model: {given} is not the file that the record was made with, whose sha256 is "
                f"{self.model_sha256}; give that file"
            )
        return given

    def build(self, given: str | None = None) -> Classifier:
        """The record's model, in eval mode, on the CPU.

        Args:
            given: as for `check_model`.

        Raises:
            UserError: if the weights do not fit the architecture, or as `check_model` says.
        """
        model = build_model(
            self.check_model(given),
            self.num_classes,
            self.mean,
            self.std,
            image_size=self.image_shape[1],
            network_size=self.network_size,
        )
        try:
            model.network.load_state_dict(self.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.folder}: its weights do not fit {self.model_name} ({reason})"
            ) from None
        return model.eval()

    def load_dataset(self, path: str | None = None) -> Dataset:
        """The dataset that the model was trained on, checked.

        Args:
            path: where it is now; None for where it was.
        """
        path = path or self.dataset_path
        data = load_dataset(self.dataset, Path(path) if path else None, self.image_shape[1])
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

    @abstractmethod
    def check_content(self, data: Dataset) -> None:
        """Raises UserError unless images and labels are those that the record was made with."""

    @abstractmethod
    def poisoned_set(self, data: Dataset) -> PoisonedSet:
        """The training set with the images that the attack replaced; not for a clean model."""

    @abstractmethod
    def cross_images(self, data: Dataset) -> torch.Tensor | None:
        """uint8: all test images with a trigger that must not fire; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class _Own(AttackRecord):
    """A record that an attack script wrote."""

    dataset_fingerprint: str

    def check_content(self, data: Dataset) -> None:
        if data.fingerprint() != self.dataset_fingerprint:
            raise UserError(
                f"{self.folder}: the images or labels of {self.dataset} are not those that it "
                "was made with; "
                "give the same files with --dataset_path, or run the attack again"
            )

    def poisoned_set(self, data: Dataset) -> PoisonedSet:
        content = load_tensors(self.folder / "poison.pt")
        names = ("train_index", "train_images", "train_labels", "train_kinds")
        return PoisonedSet(data.train, *(content[name] for name in names))

    def cross_images(self, data: Dataset) -> torch.Tensor | None:
        return load_tensors(self.folder / "poison.pt").get("cross_images")


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


def existing_folder(name: str, root: Path | None, flag: str) -> Path | None:
    """The folder of a record's name, or an existing folder; None where there is neither.

    Raises:
        UserError: naming the flag, if the record is a link.
    """
    folder = (root or ROOT / "record") / name
    if NAME.fullmatch(name) and folder.is_dir():
        if folder.is_symlink():
            raise UserError(f"{flag}: {folder} is a link; give the folder that it leads to")
        return folder
    return Path(name) if Path(name).is_dir() else None


def find_record(name: str, root: Path | None) -> Path:
    """The folder of a `--result_file` value: a record's name, or an existing folder.

    Raises:
        UserError: if there is none, naming those that exist.
    """
    found = existing_folder(name, root, "--result_file")
    if found is not None:
        return found
    records = root or ROOT / "record"
    known = sorted(path.parent.name for path in records.glob("*/attack_result.pt"))
    raise UserError(
        f"--result_file: {name} is no record in {records}; "
        + (
            f"give one of {', '.join(known)}"
            if known
            else "run an attack first, e.g. attack/badnet.py"
        )
    )


def load_attack(folder: Path) -> AttackRecord:
    """Reads a finished attack's record, ours or BackdoorBench's.

    Raises:
        UserError: if the run is not finished, or a file was changed or damaged.
    """
    return _load_backdoorbench(folder) if is_backdoorbench(folder) else _load_own(folder)


def is_backdoorbench(folder: Path) -> bool:
    """Whether a folder is to be read as BackdoorBench's: a result without our own files."""
    own = ("config.yaml", "summary.json")
    return (folder / "attack_result.pt").exists() and not any((folder / f).exists() for f in own)


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
        _check_state(source.state)
        state = backdoorbench.fit_state(source.state, network.state_dict())
    except ValueError as error:
        raise UserError(f"{folder}: its weights do not fit {source.model_name} ({error})") from None
    test = source.test
    target, label_map = source.label_map()
    return _BackdoorBench(
        folder=folder,
        sha256=_sha256(folder / backdoorbench.RESULT),
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
        triggered=Triggered(test.images(), test.labels, test.originals, test.index),
        poison_index=None if source.train is None else source.train.index[source.is_poison],
        source=source,
    )


def _load_own(folder: Path) -> AttackRecord:
    result, poison = folder / "attack_result.pt", folder / "poison.pt"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        hashes = {path.name: _sha256(path) for path in (result, poison) if path.exists()}
    except FileNotFoundError:
        raise UserError(
            f"{folder}: has no summary.json, so its attack did not finish, or it is no record; run "
            "the attack again, or give another folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); run the attack again") from None
    files = summary.get("files") if isinstance(summary, dict) else None
    if not isinstance(files, dict):
        raise UserError(f"{folder}: its summary.json names no files; run the attack again")
    for name in sorted({*files, *hashes}):
        if hashes.get(name) != files.get(name):
            raise UserError(
                f"{folder / name}: is not the file that summary.json describes; run the attack "
                "again"
            )
    with explained(result, _EXPECTED):
        content = load_tensors(result)
        record = _Own(
            folder=folder,
            sha256=hashes[result.name],
            state=content["model"],
            triggered=None,
            poison_index=None,
            **_PLAIN.validate_python(content),
        )
        _check_state(record.state)
    if not poison.exists():
        return record
    with explained(poison, _EXPECTED):
        return _with_poison(record, load_tensors(poison))


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless all weights are finite tensors."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the weights {name} are no tensor")
    for name in not_finite(state):
        raise ValueError(f"the weights {name} are not finite")


class _Plain(TypedDict):
    """The plain values of `attack_result.pt`, as pydantic checks them."""

    attack: str
    model_name: str
    model_sha256: NotRequired[str | None]
    network_size: NotRequired[Annotated[int | None, Field(ge=1)]]
    num_classes: Annotated[int, Field(ge=1, strict=True)]
    image_shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dataset: str
    dataset_path: str | None
    dataset_fingerprint: str
    attack_target: int | None
    attack_label_trans: str | None


_PLAIN = TypeAdapter(_Plain)


class _Checkpoint(TypedDict):
    """What `RunFolder.write_checkpoint` is given, and the network's file that it adds."""

    loop: dict[str, Any]
    rows: list[dict[str, float | int]]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    model_sha256: NotRequired[str | None]


_CHECKPOINT = TypeAdapter(_Checkpoint)


def _with_poison(record: AttackRecord, content: Mapping[str, Any]) -> AttackRecord:
    """The record with what `poison.pt` holds.

    Raises:
        ValueError: if the tensors do not fit the record or each other.
    """
    triggered = Triggered(
        content["test_images"],
        content["test_targets"],
        content["test_labels"],
        content["test_index"],
    )
    kinds, index = content["train_kinds"], content["train_index"]
    if triggered.images.dtype != torch.uint8 or triggered.images.shape[1:] != record.image_shape:
        raise ValueError(f"test_images are no uint8 images of {record.image_shape}")
    rows = {len(triggered.images), len(triggered.index)}
    for name in ("test_targets", "test_labels"):
        labels = content[name]
        rows.add(len(labels))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < record.num_classes:
            raise ValueError(f"{name} are no classes of the model")
    if len(rows) != 1 or len(kinds) != len(index):
        raise ValueError("its tensors differ in length")
    return replace(record, triggered=triggered, poison_index=index[kinds == KINDS.index("poison")])


def recorded_dataset(folder: Path) -> str | None:
    """The dataset that a record names, read before all else; None where it names none."""
    if is_backdoorbench(folder):
        return backdoorbench.read_dataset_name(folder)
    path = folder / "config.yaml"
    return read_yaml(path).get("dataset") if path.exists() else None


def read_index(path: Path, count: int) -> torch.Tensor:
    """Indices of the clean subset, one integer a line.

    Returns:
        int64 (N,), ascending.

    Raises:
        UserError: for text that is no integer, a repeated index, or one outside 0..count-1.
    """
    try:
        numbers = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except OSError as error:
        raise UserError(
            f"--index: {path} cannot be read ({error.strerror}); give a text file"
        ) from None
    except ValueError as error:
        raise UserError(f"--index: {path} holds something else than integers ({error})") from None
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise UserError(
            f"--index: {path} names image {outside[0]}; the training set has 0 to {count - 1}"
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--index: {path} names an image twice; name each once")
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("wb") as file:  # given a path, torch would put its name into the file
        torch.save(dict(content), file)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
