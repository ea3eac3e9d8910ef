"""What analyses look at: a record, the results of its defenses, and clean models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from models import Classifier, Resize, prepare
from models.changes import changes_of
from utils.config import Group
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import PoisonedSet, is_kind
from utils.errors import UserError, listed, quoted, shown
from utils.files import CONFIG_FILE, as_path
from utils.metrics import Scores
from utils.plain import read_yaml
from utils.process.device import pick_device, pick_precision
from utils.process.script import logger
from utils.records import places
from utils.records.attack import AttackRecord, load_attack
from utils.records.contents import DEFENSE_RESULT, NAME, SUMMARY, said_of_replaced
from utils.records.defense import checked_result, load_defense
from utils.records.hashes import unchanged
from utils.records.named import OfRecord, check_dataset, named_record
from utils.training.findings import Findings
from utils.training.selection import drawn_share
from utils.training.watch import scorer
from utils.values import Distinct


@dataclass(frozen=True, kw_only=True)
class RecordConfig(OfRecord):
    """The record that is looked at, and how."""

    flags_title = "This analysis"


@dataclass(frozen=True, kw_only=True)
class Defended(RecordConfig):
    """Results of defenses on the record; an analysis without this base does not look at them."""

    defenses: Annotated[
        tuple[str, ...],
        Field(description="names of results in the record's defense/; none: all finished ones"),
        Distinct,
        Group.RECORD,
    ]


@dataclass(frozen=True, kw_only=True)
class Controlled(Defended):
    """A clean model. Its numbers show what an analysis finds in a model without a backdoor."""

    clean_record: Annotated[
        str | None,
        Field(description="record of a clean model of the same recipe, the control; null for none"),
        Group.RECORD,
    ]


@dataclass(frozen=True)
class Purified:
    """The result of a defense.

    Attributes:
        name: of its folder.
        summary: plain data of its `summary.json`.
        sha256: of `defense_result.pt`.
    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    sha256: str
    _model: str | None
    _device: torch.device
    _precision: str

    def load(self) -> Classifier:
        """The purified model, in eval mode, on the device.

        Raises:
            UserError: if by now the result is another one, or is being replaced.
        """
        with unchanged(self.folder / DEFENSE_RESULT, self.sha256):
            model = load_defense(self.folder, self._model)
        return prepare(model, self._device, self._precision)


@dataclass(frozen=True)
class Subject:
    """What analyses look at.

    Attributes:
        model: the record's, in eval mode, on the device.
        attack: the record; None for a model without one.
        purified: the results of defenses, by the names of their folders; none if the analysis does
            not look at them.
        clean: a clean model of the same recipe, as a control; None if none was named.
        sha256: of the file that the model is from.
    """

    data: Dataset
    device: torch.device
    precision: str
    model: Classifier
    model_name: str
    model_sha256: str | None = None
    attack: AttackRecord | None = None
    purified: tuple[Purified, ...] = ()
    clean: Classifier | None = None
    clean_sha256: str | None = None
    sha256: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def triggered(self) -> Triggered:
        """The triggered test images.

        Raises:
            UserError: if there are none.
        """
        if self.attack is None or self.attack.triggered is None:
            where = "the model" if self.attack is None else self.attack.folder
            raise UserError(
                f"{where}: has no triggered images, which this analysis needs; give the record of "
                "an attack"
            )
        return self.attack.triggered

    @property
    def has_poison(self) -> bool:
        """Whether the record stores poisoned training images."""
        index = None if self.attack is None else self.attack.poison_index
        return index is not None and len(index) > 0

    @cached_property
    def score(self) -> Callable[[nn.Module], Scores]:
        """From a model to its scores, as the summaries of attacks and defenses have them."""
        triggered = None if self.attack is None else self.attack.triggered
        return scorer(self.data.test, lambda: triggered, self.device)

    @cached_property
    def scores(self) -> Scores:
        """Those of the record's model."""
        return self.score(self.model)

    def before_and_purified(self) -> dict[str, Callable[[], Classifier]]:
        """Functions that load the record's model and the purified ones, by name."""
        return {places.BEFORE: lambda: self.model, **{p.name: p.load for p in self.purified}}

    def purified_and_clean(self) -> dict[str, Callable[[], Classifier]]:
        """Functions that load the purified models and, if there is one, the clean one, by name."""
        loaders = {purified.name: purified.load for purified in self.purified}
        clean = self.clean
        return loaders if clean is None else {**loaders, places.CLEAN: lambda: clean}

    def same_network(self, results: Findings, purified: Purified) -> Classifier | None:
        """A purified model, if its network has the same parts as the record's.

        If not, a warning says that it is skipped, and the result is None.
        """
        model = purified.load()
        if changes_of(model.network):
            results.warn(
                f"{purified.name}: skipped, since this defense has changed the architecture, and "
                "weights of two architectures cannot be compared"
            )
            return None
        return model

    def same_clean_network(self, results: Findings) -> Classifier | None:
        """The clean model, if its weights can take the place of the record's.

        Names and shapes must be the same, and also what the weights get: how images are normalized
        and resized. If not, a warning says that it is skipped, and the result is None.
        """
        if self.clean is None:
            return None
        own, other = _build_of(self.model), _build_of(self.clean)
        differing = [what for what in own if own[what] != other[what]]
        if differing:
            results.warn(
                f"the clean model is skipped, since it has {listed(differing)} than the record's "
                f"{self.model_name}"
            )
            return None
        return self.clean

    def poisoned_images(self, results: Findings) -> PoisonedSet:
        """The stored training images that shall teach the backdoor, with the attacker's labels.

        If the attack controls training, a warning says that the model has not seen them. It does if
        its record has images with a trigger that must not work, of the training or the test set.
        The record `has_poison`.
        """
        attack = self.attack
        assert attack is not None
        assert attack.poison_index is not None
        stored = attack.poisoned_set(self.data)
        has_cross = bool(is_kind(stored.kinds, "cross").any())
        if has_cross or attack.cross_images(self.data) is not None:
            results.warn(
                "the attack controls training: the stored poisoned images are made by its rule; "
                "the model has not seen them"
            )
        is_poison = torch.isin(stored.index, attack.poison_index)
        parts = (stored.index, stored.images, stored.labels, stored.kinds)
        return PoisonedSet(stored.clean, *(part[is_poison] for part in parts))

    def clean_draw(self, ratio: float, seed: int) -> torch.Tensor:
        """Positions of clean training images: those that a defense with this ratio and seed sees.

        Raises:
            UserError: if that is no image.
        """
        return drawn_share(self.data.train.labels, ratio, seed)

    def clean_images(self, ratio: float, seed: int) -> Labelled:
        """The images of `clean_draw`."""
        return self.data.train.at(self.clean_draw(ratio, seed))


def _build_of(model: Classifier) -> dict[str, Any]:
    """What a model's weights are made for, by the words for another one."""
    resizing = [part.size for part in model.network.modules() if isinstance(part, Resize)]
    return {
        "other shapes of weights": {key: value.shape for key, value in model.state_dict().items()},
        "another normalization": (model.normalize.mean.tolist(), model.normalize.std.tolist()),
        "another size of images in the network": resizing,
    }


def open_subject(config: RecordConfig) -> Subject:
    """Everything that the flags name, loaded and checked.

    Raises:
        UserError: if it does not fit together.
    """
    attack = load_attack(named_record(config.result_file, config.record_path))
    check_dataset(config, attack)
    attack.check_model(config.model)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    purified: tuple[Purified, ...] = ()
    if isinstance(config, Defended):
        purified = results_of(attack, config, device, precision)
    data = attack.load_dataset(config.dataset_path)
    clean_record = getattr(config, "clean_record", None)
    clean = None
    warnings: list[str] = []
    if clean_record is not None:
        clean = load_clean(clean_record, "--clean_record", config.record_path, data)
        if clean.model_name != attack.model_name:
            warnings.append(says_little("the clean model", clean.model_name, attack.model_name))
        elif other := trained_otherwise("the clean model", clean, attack):
            warnings.append(other)
    return Subject(
        data=data,
        device=device,
        precision=precision,
        model=prepare(attack.build(config.model), device, precision),
        model_name=attack.model_name,
        model_sha256=attack.model_sha256,
        attack=attack,
        purified=purified,
        clean=None
        if clean is None
        else prepare(clean.build(config.model if clean.model_sha256 else None), device, precision),
        clean_sha256=None if clean is None else clean.sha256,
        sha256=attack.sha256,
        warnings=tuple(warnings),
    )


def says_little(what: str, name: str, expected: str) -> str:
    """The warning about a clean model of another network than the record's."""
    return f"{what} is a {name}, not a {expected}: as a control it says little"


_HOW_TRAINED = (
    *("pretrained", "image_size", "epochs", "batch_size", "lr", "lr_scheduler", "sgd_momentum"),
    *("wd", "crop_padding", "flip"),
    *("crop_probability", "random_rotation", "rotation_probability", "augment_per_batch"),
)


def trained_otherwise(what: str, clean: AttackRecord, attack: AttackRecord) -> str:
    """The warning about a clean model that was trained otherwise; "" if nothing says so."""
    now, before = (_flags_of(record) for record in (clean, attack))
    differing = [
        f"{name} {quoted(now[name]) if name in now else 'of no kind'}, not {quoted(before[name])}"
        for name in _HOW_TRAINED
        if now and name in before and now.get(name) != before[name]
    ]
    if not differing:
        return ""
    return f"{what} was trained with {listed(differing)}: as a control it says less"


def _flags_of(record: AttackRecord) -> dict[str, Any]:
    """The configuration of a record; empty without one that can be read."""
    try:
        return read_yaml(record.folder / CONFIG_FILE)
    except UserError:
        return {}


def load_clean(name: str, flag: str, record_path: str | None, data: Dataset) -> AttackRecord:
    """The record of a clean model that was trained on a dataset.

    Args:
        flag: that named it, for messages.

    Raises:
        UserError: if there is none, or it is of another dataset, or of an attack.
    """
    folder = places.existing_folder(name, as_path(record_path), flag)
    if folder is None:
        called = f" --save_folder_name {name}" if NAME.fullmatch(name) else ", and give its name"
        raise UserError(
            f"{flag}: {shown(name, 100)} is no record; train a clean model first: "
            f"attack/prototype.py{called}"
        )
    record = load_attack(folder)
    if record.triggered is not None or record.attack_target is not None:
        raise UserError(
            f"{flag}: {name} is the record of an attack ({record.attack}); give one of "
            "attack/prototype.py"
        )
    record.check_shared(data, f"{flag}: {name}")
    return record


def results_of(
    attack: AttackRecord, config: Defended, device: torch.device, precision: str
) -> tuple[Purified, ...]:
    """The results of defenses that the flags name, or all finished ones, by name.

    Raises:
        UserError: if a named one does not exist, or one is damaged or of another attack.
    """
    home = attack.folder / "defense"
    finished = sorted(path.parent.name for path in home.glob(f"[!.]*/{SUMMARY}"))
    missing = [name for name in config.defenses if name not in finished]
    if missing:
        kept = "".join(said_of_replaced(home / name) for name in missing if NAME.fullmatch(name))
        raise UserError(
            f"--defenses: {listed(missing)}: no finished result in {home}{kept}; "
            + (f"give some of {listed(finished)}" if finished else "run a defense first")
        )
    begun = {path.parent.name for path in home.glob("[!.]*/config.yaml")} - {*finished}
    if begun and not config.defenses:
        logger.warning("warning: left out, because not finished: %s", listed(sorted(begun)))
    purified = []
    for name in config.defenses or finished:
        if name == places.BEFORE:
            raise UserError(
                f"{home / name}: its name is what tables call the model before the defense; "
                "rename the folder, or name other results with --defenses"
            )
        try:
            summary = checked_result(home / name, attack)
        except UserError as error:
            raise UserError(f"{error}, or name others with --defenses") from None
        sha256 = summary["files"][DEFENSE_RESULT]
        purified.append(
            Purified(name, home / name, summary, sha256, config.model, device, precision)
        )
    return tuple(purified)
