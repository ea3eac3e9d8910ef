"""The pipeline that every analysis script runs.

An analysis gives its configuration and `look(subject, config, results)`. The pipeline reads a
record, the results of its defenses and, if one is named, the record of a clean model. It writes
what the analysis puts into `results` to `record/<name>/analysis/<kind>/`: numbers as CSV and JSON,
pictures, and `summary.json` last. Work that takes long is done in steps; `--resume` goes on after
the last step that was done.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field
from torch import nn

import analysis
from models import Classifier, prepare
from models.changes import changes_of
from utils import config as configuration
from utils.config import Group
from utils.data.batches import as_float
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import PoisonedSet
from utils.errors import UserError, listed, shown
from utils.files import as_path, read_object
from utils.metrics import Scores
from utils.process import distributed
from utils.process.device import Precision, pick_device, pick_precision, run_conditions
from utils.process.script import file_log, logger, run_script
from utils.process.seeds import deterministic, generator, seed_everything
from utils.records import folders
from utils.records.attack import AttackRecord, dataset_of_record, load_attack, named_record
from utils.records.checkpoint import Origin
from utils.records.defense import load_defense
from utils.training import ending
from utils.training.evaluate import predict
from utils.training.findings import Findings
from utils.training.selection import drawn_by_class
from utils.training.watch import scorer

if TYPE_CHECKING:
    from utils.plot import Figure

BEFORE, CLEAN = "before", "clean model"  # names of models beside those of defenses


@dataclass(frozen=True, kw_only=True)
class RecordConfig(configuration.Config):
    """The record that is looked at, and how."""

    flags_title = "This analysis"

    result_file: Annotated[
        str | None,
        Field(description="record, ours or BackdoorBench's: its name, or its folder"),
        Group.RECORD,
    ]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    defenses: Annotated[
        tuple[str, ...],
        Field(description="names of results in the record's defense/; none: all finished ones"),
    ]
    overwrite: Annotated[bool, Field(description="replace an earlier result of this analysis")]
    resume: Annotated[bool, Field(description="go on with an interrupted run")]
    dataset: Annotated[
        str | None, Field(description="must be the record's, from which it is read"), Group.DATA
    ]
    dataset_path: Annotated[
        str | None,
        Field(description="where the images are now; null for the record's path"),
    ]
    model: Annotated[
        str | None,
        Field(description="must be the record's, from which it is read; needed for your own file"),
        Group.NETWORK,
    ]
    random_seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="seed of everything drawn"), Group.RUNNING
    ]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]
    deterministic: Annotated[
        bool, Field(description="the same bits every time on a GPU too; may be slower")
    ]


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(RecordConfig):
    """What every analysis has.

    Attributes:
        needs_trigger: whether it makes no sense for a record without triggered images.
        needs_defenses: whether it makes no sense without the result of a defense.
    """

    save_folder_name: Annotated[
        str | None,
        Field(description="name of the result's folder; null for the analysis's name"),
        Group.RECORD,
    ]

    needs_trigger: ClassVar[bool] = False
    needs_defenses: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Controlled(RecordConfig):
    """A clean model, whose numbers are what an analysis finds where no backdoor is."""

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
    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    _model: str | None
    _device: torch.device
    _precision: str

    def load(self) -> Classifier:
        """The purified model, in eval mode, on the device."""
        return prepare(load_defense(self.folder, self._model), self._device, self._precision)


@dataclass(frozen=True)
class Subject:
    """What analyses look at.

    Attributes:
        model: the record's, in eval mode, on the device.
        attack: the record; None for a model without one.
        purified: the results of defenses, by the names of their folders.
        clean: a clean model of the same recipe, as a control; None if none was named.
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

    @cached_property
    def score(self) -> Callable[[nn.Module], Scores]:
        """From a model to its scores, as the summaries of attacks and defenses have them."""
        triggered = None if self.attack is None else self.attack.triggered
        return scorer(self.data.test, lambda: triggered, self.device)

    @cached_property
    def scores(self) -> Scores:
        """Those of the record's model."""
        return self.score(self.model)

    def same_network(self, results: "Results", purified: Purified) -> Classifier | None:
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

    def poisoned_images(self, results: "Results") -> PoisonedSet:
        """The stored training images that shall teach the backdoor, with the attacker's labels.

        If the attack controls training, a warning says that the model has not seen them: such
        attacks are those that store images with a trigger that must not work.

        Raises:
            UserError: if the record has none.
        """
        attack = self.attack
        if attack is None or attack.poison_index is None or len(attack.poison_index) == 0:
            where = "the model" if attack is None else attack.folder
            raise UserError(
                f"{where}: has no poisoned training images, which this analysis needs; give the "
                "record of an attack of this program"
            )
        if attack.cross_images(self.data) is not None:
            results.warn(
                "the attack controls training: the stored poisoned images are made by its rule; "
                "the model has not seen them"
            )
        stored = attack.poisoned_set(self.data)
        is_poison = torch.isin(stored.index, attack.poison_index)
        parts = (stored.index, stored.images, stored.labels, stored.kinds)
        return PoisonedSet(stored.clean, *(part[is_poison] for part in parts))

    def clean_draw(self, ratio: float, seed: int) -> torch.Tensor:
        """Positions of clean training images: of each class the same share, at random.

        Raises:
            UserError: if that is no image.
        """
        labels = self.data.train.labels
        index = drawn_by_class(labels, ratio, generator(seed, "clean subset"))
        if len(index) == 0:
            raise UserError(
                f"--ratio: {ratio:g} of {len(labels)} training images is none; raise it"
            )
        return index

    def clean_images(self, ratio: float, seed: int) -> Labelled:
        """The images of `clean_draw`."""
        return self.data.train.at(self.clean_draw(ratio, seed))


T = TypeVar("T")


@dataclass
class Results(Findings):
    """What an analysis gives, in addition to facts, warnings, pictures and tables.

    Attributes:
        figures: by the name of the file, functions that draw it.
        headline: by the name of a model (a defense's result, `BEFORE`, `CLEAN`), few numbers by
            name, which leaderboards show; None is a number that does not exist.
        conclusion: what the numbers say, a sentence each.
        done: JSON of the steps that were done, by name.
        keep: called with `done` after each step.
    """

    figures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    headline: dict[str, dict[str, Any]] = field(default_factory=dict)
    conclusion: list[str] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    keep: Callable[[dict[str, str]], None] = field(default=lambda done: None)

    def step(self, name: str, compute: Callable[[], T]) -> T:
        """What a function gives, which is not called if an interrupted run has called it before.

        Args:
            name: of the step; no two steps share one.
            compute: gives data that JSON can hold.
        """
        if name not in self.done:
            started = time.monotonic()
            self.done[name] = json.dumps(compute())
            self.keep(self.done)
            logger.info("%s: %.1f s", name, time.monotonic() - started)
        value: T = json.loads(self.done[name])
        return value

    def conclude(self, sentence: str) -> None:
        """Adds a sentence to the conclusion."""
        self.conclusion.append(sentence)

    def drawn(self, names: Sequence[str], most: int = 8) -> list[str]:
        """The models that a figure has room for; a warning names the others."""
        if len(names) > most:
            others = listed(names[most:])
            self.warn(f"the figure has room for {most} models; not in it: {others}")
        return list(names[:most])

    def lack_of_control(self, clean: object, consequence: str) -> None:
        """Says what the conclusion lacks if there is no clean model."""
        if clean is None:
            self.warn(f"no --clean_record: {consequence}")


C = TypeVar("C", bound=AnalysisConfig)
C_contra = TypeVar("C_contra", bound=AnalysisConfig, contravariant=True)


class Look(Protocol[C_contra]):
    """The function that every analysis has."""

    def __call__(self, subject: Subject, config: C_contra, results: Results) -> None:
        """Puts what it sees into `results`; all models stay as they are."""


class Kind(NamedTuple):
    """An analysis: its name, its configuration and its function."""

    name: str
    config: type[AnalysisConfig]
    look: Look[Any]


def kinds() -> list[Kind]:
    """All analyses that look at a record."""
    modules = [(name, importlib.import_module(f"analysis.{name}")) for name in analysis.names()]
    return [Kind(name, module.Config, module.look) for name, module in modules]


def run(config_class: type[C], look: Look[C]) -> None:
    """Runs an analysis script: flags and a record -> a folder in the record.

    Args:
        config_class: the analysis's configuration; its module's name is the analysis's name.
        look: (subject, config, results) -> None.
    """
    module = sys.modules[config_class.__module__]

    def main() -> None:
        config = config_class.from_command_line(
            sys.argv[1:], module.__doc__ or "", dataset_of_record
        )
        analyse(config, Path(str(module.__file__)).stem, look)

    run_script(main)


def analyse(
    config: C, name: str, look: Look[C], subject: Subject | None = None
) -> folders.RunFolder:
    """Looks at a record, and writes what is seen into it.

    Args:
        name: of the analysis.
        subject: what was loaded before with the same flags; None loads it.

    Returns:
        The result's folder.

    Raises:
        UserError: if the record, the data and the configuration do not fit together.
    """
    started = time.monotonic()
    source = named_record(config.result_file, config.record_path)
    folder = folders.analysis_folder(source, config.save_folder_name or name)
    folder.claim(config.overwrite, config.resume, record=folders.RunFolder(source))
    if subject is None:
        subject = open_subject(config)
    if config.needs_trigger:
        _ = subject.triggered  # refuses
    if config.needs_defenses and not subject.purified:
        raise UserError(
            f"{source}: has no finished result of a defense, which this analysis compares with "
            "the model before; run a defense first, e.g. defense/sau.py"
        )
    return write(config, name, look, subject, folder, started)


def write(
    config: C,
    name: str,
    look: Look[C],
    subject: Subject,
    folder: folders.RunFolder,
    started: float,
) -> folders.RunFolder:
    """Runs an analysis and writes its folder, which is claimed.

    Args:
        started: by `time.monotonic`.
    """
    data, attack = subject.data, subject.attack
    seed_everything(config.random_seed)
    recipe = replace(config, dataset=None, model=None)
    inputs = ending.inputs_of(recipe, data, subject.model_sha256)
    distributed.barrier()
    hashes = {p.name: str(p.summary["files"]["defense_result.pt"]) for p in subject.purified}
    hashes |= {} if attack is None else {"the record": attack.sha256}
    hashes |= {} if subject.clean_sha256 is None else {"the clean model": subject.clean_sha256}
    origin = Origin(
        method=name,
        files={**hashes, **inputs},
        conditions=run_conditions(subject.device, subject.precision),
    )
    checkpoint = folder.start(config.dump(), config.resume, subject.model_sha256, origin)
    earlier = 0.0 if checkpoint is None else float(checkpoint["seconds"])

    def keep(done: dict[str, str]) -> None:
        seconds = time.monotonic() - started + earlier
        folder.write_checkpoint({"loop": {"done": done}, "rows": [], "seconds": seconds})

    results = Results(keep=keep, done=_done_before(checkpoint))
    what = "a model" if attack is None else attack.attack
    target = "" if attack is None else ending.target_title(vars(attack), data)
    title = f"{what} on {data.name}{target}"
    with file_log() as open_log, deterministic(config.deterministic):
        open_log(folder.log, append=checkpoint is not None)
        others = listed([p.name for p in subject.purified]) or "none"
        logger.info("%s of %s; defenses: %s", name, title, others)
        logger.info("%s, %s, %s", subject.model_name, subject.device, subject.precision)
        if results.done:
            logger.info("%d steps were done before", len(results.done))
        for warning in subject.warnings:
            results.warn(warning)
        look(subject, config, results)
        if not distributed.is_main():
            return folder

        def captions(images: torch.Tensor) -> list[str]:
            labels = predict(subject.model, images, subject.device).tolist()
            return [data.named(label) for label in labels]

        pictures = ending.draw_findings(folder, results, captions, title)
        for file, draw in results.figures.items():
            pictures.append(ending.save_figure(folder, f"{file}.png", draw()))
        ending.finish_run(
            folder,
            results,
            facts={
                "analysis": name,
                "attack": None if attack is None else attack.attack,
                "attack_target": None if attack is None else attack.attack_target,
                "attack_label_trans": None if attack is None else attack.attack_label_trans,
                "attack_sha256": None if attack is None else attack.sha256,
                "dataset": data.name,
                "model": subject.model_name,
                "seed": config.random_seed,
                "defenses": [p.name for p in subject.purified],
                "has_clean_model": subject.clean is not None,
                "headline": results.headline,
                "conclusion": results.conclusion,
            },
            said=data.warnings,
            warnings=[],
            result="\n".join(_said(results)),
            pictures=pictures,
            files=[],
            run=ending.run_facts(
                recipe, started - earlier, subject.device, subject.precision, inputs
            ),
        )
    return folder


def open_subject(config: RecordConfig) -> Subject:
    """Everything that the flags name, loaded and checked.

    Raises:
        UserError: if it does not fit together.
    """
    attack = load_attack(named_record(config.result_file, config.record_path))
    if config.dataset not in (None, attack.dataset):
        raise UserError(
            f"--dataset: {config.dataset}, but the record says {attack.dataset}; leave the flag out"
        )
    attack.check_model(config.model)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    purified = results_of(attack, config, device, precision)
    data = attack.load_dataset(config.dataset_path)
    clean_record = getattr(config, "clean_record", None)
    clean = None
    warnings: list[str] = []
    if clean_record is not None:
        clean = load_clean(clean_record, "--clean_record", config.record_path, data)
        if clean.model_name != attack.model_name:
            warnings.append(
                f"the clean model is a {clean.model_name}, not a {attack.model_name}: as a control "
                "it says little"
            )
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
        warnings=tuple(warnings),
    )


def load_clean(name: str, flag: str, record_path: str | None, data: Dataset) -> AttackRecord:
    """The record of a clean model that was trained on a dataset.

    Args:
        flag: that named it, for messages.

    Raises:
        UserError: if there is none, or it is of another dataset, or of an attack.
    """
    folder = folders.existing_folder(name, as_path(record_path), flag)
    if folder is None:
        raise UserError(
            f"{flag}: {name} is no record; train a clean model first: attack/prototype.py "
            f"--save_folder_name {shown(name, 60)}"
        )
    record = load_attack(folder)
    if record.triggered is not None or record.attack_target is not None:
        raise UserError(
            f"{flag}: {name} is the record of an attack ({record.attack}); give one of "
            "attack/prototype.py"
        )
    if record.dataset != data.name:
        raise UserError(
            f"{flag}: {name} was trained on {record.dataset}, and the record on {data.name}; give "
            "one of the same dataset"
        )
    record.check_dataset(data)
    return record


def results_of(
    attack: AttackRecord, config: RecordConfig, device: torch.device, precision: str
) -> tuple[Purified, ...]:
    """The results of defenses that the flags name, or all finished ones, by name.

    Raises:
        UserError: if a named one does not exist, or one is of another attack.
    """
    home = attack.folder / "defense"
    finished = sorted(path.parent.name for path in home.glob("*/summary.json"))
    missing = [name for name in config.defenses if name not in finished]
    if missing:
        raise UserError(
            f"--defenses: {listed(missing)}: no finished result in {home}; "
            + (f"give some of {listed(finished)}" if finished else "run a defense first")
        )
    purified = []
    for name in dict.fromkeys(config.defenses or finished):
        try:
            summary = read_object(home / name / "summary.json")
            hashes = summary["attack_sha256"], summary["files"]["defense_result.pt"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{home / name}: has no readable summary.json, so it is no result of a defense; "
                "run the defense again, or name others with --defenses"
            ) from None
        if hashes[0] != attack.sha256:
            raise UserError(
                f"{home / name}: is of another attack than the record that is there; run the "
                "defense again, or name others with --defenses"
            )
        purified.append(Purified(name, home / name, summary, config.model, device, precision))
    return tuple(purified)


def examples(triggered: Triggered, data: Dataset, count: int = 8) -> tuple[torch.Tensor, ...]:
    """Evenly spaced test images, clean and triggered.

    Returns:
        Two float tensors (count, C, H, W) in [0, 1].
    """
    total = len(triggered.index)
    chosen = torch.linspace(0, total - 1, min(count, total)).long()
    clean = data.test.images[triggered.index[chosen]]
    return as_float(clean), as_float(triggered.images[chosen])


def percent(value: float | None) -> str:
    """A rate as it is printed: '12.34 %'; '-' if there is none."""
    return "-" if value is None or value != value else f"{100 * value:.2f} %"


def _done_before(checkpoint: Mapping[str, Any] | None) -> dict[str, str]:
    """The steps that a checkpoint has.

    Raises:
        UserError: if it is of another kind.
    """
    done = {} if checkpoint is None else checkpoint["loop"].get("done")
    if not isinstance(done, dict) or not all(isinstance(text, str) for text in done.values()):
        raise UserError("--resume: the checkpoint is not of this run; give --overwrite")
    return dict(done)


def _said(results: Results) -> Sequence[str]:
    """The headline of each model, then the conclusion."""
    lines = []
    width = max((len(name) for name in results.headline), default=0)
    for name, numbers in results.headline.items():
        texts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers.items()
            if value is not None
        )
        lines.append(f"{name:{width}}  {'  '.join(texts)}".rstrip())
    return [*lines, *results.conclusion] or ["done"]
