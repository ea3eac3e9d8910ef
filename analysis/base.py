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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field

import analysis
from analysis.subject import (
    Controlled,
    Defended,
    RecordConfig,
    Subject,
    load_clean,
    open_subject,
)
from utils.config import Group
from utils.errors import NothingToDo, UserError, counted, listed
from utils.metrics import has_collapsed
from utils.process import distributed
from utils.process.device import run_conditions
from utils.process.script import file_log, logger, run_script
from utils.process.seeds import deterministic, seed_everything
from utils.records import folders, places
from utils.records.checkpoint import Origin
from utils.records.contents import summary_of
from utils.records.named import dataset_of_record, named_record
from utils.records.recipe import require_method
from utils.training import ending
from utils.training.evaluate import predict
from utils.training.findings import Findings
from utils.training.guard import run_soundly

if TYPE_CHECKING:
    from utils.plot import Figure

BEFORE, CLEAN, EXACT = places.BEFORE, places.CLEAN, places.EXACT


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(RecordConfig):
    """What every analysis has.

    Attributes:
        needs_trigger: whether it makes no sense for a record without triggered images.
        needs_poison: whether it makes no sense for one without poisoned training images.
        needs_defenses: whether it makes no sense without the result of a defense.
    """

    save_folder_name: Annotated[
        str | None,
        Field(description="name of the result's folder; null for the analysis's name"),
        Group.RECORD,
    ]

    needs_trigger: ClassVar[bool] = False
    needs_poison: ClassVar[bool] = False
    needs_defenses: ClassVar[bool] = False

    def check(self, subject: Subject) -> None:
        """Refuses values that do not fit what is looked at, before anything is written.

        Raises:
            UserError: if there is one.
        """


T = TypeVar("T")


@dataclass
class Results(Findings):
    """What an analysis gives, in addition to facts, warnings, pictures and tables.

    Attributes:
        figures: by the name of the file, functions that draw it.
        headline: by the name of a model (a defense's result, `BEFORE`, `CLEAN`), few numbers by
            name, which leaderboards show; None is a number that does not exist.
        conclusion: what the numbers say, a sentence each.
        models: sha256 of the models that are compared with the record's, by name.
        collapsed: names of models that have collapsed, whose ASR says nothing.
        done: JSON of the steps that were done, by name.
        keep: called with `done` after each step.
    """

    figures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    headline: dict[str, dict[str, Any]] = field(default_factory=dict)
    conclusion: list[str] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    collapsed: set[str] = field(default_factory=set)
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

    def tell_collapse(self, name: str, acc: object, before: object, how: str = "") -> bool:
        """Says of a model that has lost more than half of its ACC that it has.

        Args:
            name: of the model.
            acc: its ACC; what is no number, as in a foreign summary, is not compared.
            before: that of the record's model.
            how: it was changed, for the message.

        Returns:
            Whether it has collapsed; then nothing of a backdoor follows from its ASR.
        """
        if not isinstance(acc, int | float) or not isinstance(before, int | float):
            return False
        if not has_collapsed(acc, before):
            return False
        text = (
            f"{name}: has collapsed{how} (ACC {percent(before)} -> {percent(acc)}), so its ASR "
            "says nothing of a backdoor"
        )
        self.collapsed.add(name)
        self.warn(text)
        self.conclude(text)
        return True

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
    folder = places.analysis_folder(source, config.save_folder_name or name)
    try:
        record = folders.RunFolder(source)
        folder.claim(config.overwrite, config.resume, record, config.dump())
    except NothingToDo:
        check_current(folder, name, subject or open_subject(config), config)
        raise
    if subject is None:
        subject = open_subject(config)
    lacking = what_lacks(config, subject)
    if lacking:
        raise UserError(f"{source}: {lacking}")
    config.check(subject)
    if not isinstance(config, Defended):  # the subject may be that of several analyses
        subject = replace(subject, purified=())
    with folder.replacing():
        return write(config, name, look, subject, folder, started)


def what_lacks(config: AnalysisConfig | type[AnalysisConfig], subject: Subject) -> str:
    """Why an analysis makes no sense for a record, and what to do; "" if it does."""
    if config.needs_trigger and (subject.attack is None or subject.attack.triggered is None):
        return "has no triggered images, which this analysis needs; give the record of an attack"
    if config.needs_poison and not subject.has_poison:
        return (
            "has no poisoned training images, which this analysis needs; give the record of an "
            "attack of this program"
        )
    if config.needs_defenses and not subject.purified:
        return (
            "has no finished result of a defense, which this analysis looks at; run a defense "
            "first, e.g. defense/sau.py"
        )
    return ""


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
    models = models_of(subject, config)
    titles = {CLEAN: f"the {CLEAN}", BEFORE: "the model" if attack is None else "the record"}
    files = {titles.get(name, name): sha256 for name, sha256 in models.items()}
    origin = Origin(
        method=name,
        files={**files, **inputs},
        tensors={f"the images and labels of {data.name}": data.tensors()},
        conditions=run_conditions(subject.device, subject.precision),
    )
    title = _title(subject)
    with file_log() as open_log, deterministic(config.deterministic):
        checkpoint = folder.start(config.dump(), config.resume, subject.model_sha256, origin)
        open_log(folder.log, append=checkpoint is not None)
        earlier = 0.0 if checkpoint is None else float(checkpoint["seconds"])

        def keep(done: dict[str, str]) -> None:
            seconds = time.monotonic() - started + earlier
            folder.write_checkpoint({"loop": {"done": done}, "rows": [], "seconds": seconds})

        results = Results(keep=keep, done=_done_before(checkpoint), models=models)
        others = listed([p.name for p in subject.purified]) or "none"
        logger.info("%s of %s; defenses: %s", name, title, others)
        logger.info("%s, %s, %s", subject.model_name, subject.device, subject.precision)
        if results.done:
            logger.info("done before: %s", counted(len(results.done), "step"))
        for warning in subject.warnings:
            results.warn(warning)
        tell_doubts(subject, results)
        with run_soundly(subject.model):
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
            facts={"analysis": name, **_facts(subject, config, results)},
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


def _title(subject: Subject) -> str:
    """What is looked at, as logs and figures name it."""
    data, attack = subject.data, subject.attack
    if attack is None:
        return f"a model on {data.name}"
    return f"{attack.attack} on {data.name}{ending.target_title(vars(attack), data)}"


def _facts(subject: Subject, config: AnalysisConfig, results: Results) -> dict[str, Any]:
    """The first entries of an analysis' summary."""
    attack = subject.attack
    return {
        "attack": None if attack is None else attack.attack,
        "attack_target": None if attack is None else attack.attack_target,
        "attack_label_trans": None if attack is None else attack.attack_label_trans,
        **({"attack_sha256": None} if attack is None else attack.identity),
        "dataset": subject.data.name,
        "model": subject.model_name,
        "seed": config.random_seed,
        "defenses": [p.name for p in subject.purified],
        "models": results.models,
        "headline": results.headline,
        "conclusion": results.conclusion,
    }


def tell_doubts(subject: Subject, results: Results) -> None:
    """Says where a look at a backdoor says little: after a failed attack, or a collapse."""
    if subject.attack is not None and subject.scores.attack_failed:
        results.warn(
            f"the attack had failed (ASR {subject.scores.asr}), so this says little of a backdoor "
            "and of defenses against it"
        )
    for purified in subject.purified:
        before, after = (purified.summary.get(when) for when in ("before", "after"))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            results.tell_collapse(purified.name, after.get("acc"), before.get("acc"))


def models_of(subject: Subject, config: RecordConfig) -> dict[str, str]:
    """sha256 of the subject's models that an analysis looks at, by name."""
    purified = subject.purified if isinstance(config, Defended) else ()
    hashes = {result.name: result.sha256 for result in purified}
    if subject.sha256 is not None:
        hashes[BEFORE] = subject.sha256
    if subject.clean_sha256 is not None and isinstance(config, Controlled):
        hashes[CLEAN] = subject.clean_sha256
    return hashes


def check_current(
    folder: folders.RunFolder, name: str, subject: Subject, config: RecordConfig
) -> None:
    """That a finished analysis is the one of this name, of the models that are there now.

    Raises:
        UserError: if it is another one, or if a model has changed, or is not in it.
    """
    summary = summary_of(folder.path)
    models = summary.get("models")
    require_method(folder.path, summary.get("analysis", name), name)
    if not isinstance(models, dict):
        raise UserError(f"{folder.path}: does not say what it was made with; give --overwrite")
    if subject.attack is not None:
        subject.attack.require_triggers(summary, folder.path)
    now = models_of(subject, config)
    for name in getattr(config, "clean_records", ()):
        record = load_clean(name, "--clean_records", config.record_path, subject.data)
        now[record.folder.name] = record.sha256
    changed = [name for name, sha256 in now.items() if models.get(name, sha256) != sha256]
    if changed:
        raise UserError(
            f"{folder.path}: was made with another {listed(changed)} than is there now; give "
            "--overwrite"
        )
    lacking = [name for name in now if name not in models]
    if lacking:
        raise UserError(f"{folder.path}: was made without {listed(lacking)}; give --overwrite")


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
