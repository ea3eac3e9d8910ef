"""The pipeline that every attack script runs; run by itself it trains a clean model.

    python attack/prototype.py --save_folder_name clean_demo

An attack gives its configuration and a function that makes its trigger. The pipeline loads the
data, poisons it, trains a model, scores it after each epoch, and writes the record.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import (
    Classifier,
    build_model,
    check_model,
    load_pretrained,
    model_identity,
    pretrained_size,
)
from models import prepare as prepare_model
from utils import config as configuration
from utils import distributed, folders, pipeline, plot, poison, record
from utils.data import Dataset, Labelled, Triggered, as_float
from utils.datasets import DatasetName, load_dataset
from utils.errors import UserError, shown, suggestion
from utils.evaluate import predict
from utils.files import prepare_folder
from utils.images import data_folder, no_cache
from utils.metrics import FAILED_ASR, Scores
from utils.records.checkpoint import Origin
from utils.runtime import (
    Precision,
    deterministic,
    file_log,
    generator,
    logger,
    pick_device,
    pick_precision,
    run_conditions,
    run_script,
    seed_everything,
)
from utils.tensors import explained, load_tensors
from utils.train import Loop, Schedule, Step, Supervised, largest_batch, train_classifier
from utils.training import ending
from utils.training.findings import Findings


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(configuration.Config):
    """The training recipe."""

    save_folder_name: Annotated[str | None, Field(description="name of the record to write")]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    overwrite: Annotated[bool, Field(description="replace a record of that name")]
    resume: Annotated[bool, Field(description="go on with an interrupted run")]
    checkpoint_every: Annotated[
        float, Field(ge=0, description="seconds between two checkpoints to resume from")
    ]
    dataset: Annotated[
        DatasetName, Field(description="training and test images; picks the recipe of that name")
    ]
    dataset_path: Annotated[
        str | None, Field(description="folder of the images or downloads; null for data/")
    ]
    image_size: Annotated[int, Field(ge=8, le=1024, description="side of the images in pixels")]
    model: Annotated[
        str,
        Field(description="preactresnet18, a torchvision classifier, or your own file.py:function"),
    ]
    pretrained: Annotated[bool, Field(description="start from torchvision's weights")]
    epochs: Annotated[int, Field(ge=1, description="passes over the training set")]
    batch_size: Annotated[int, Field(ge=2, description="images a step")]
    lr: Annotated[float, Field(gt=0, description="peak learning rate of SGD")]
    lr_scheduler: Annotated[Schedule, Field(description="how the learning rate changes")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    wd: Annotated[float, Field(ge=0, description="weight decay of SGD")]
    crop_padding: Annotated[
        int, Field(ge=0, le=64, description="zero pixels around an image before its random crop")
    ]
    flip: Annotated[bool, Field(description="mirror images at random")]
    random_seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="seed of everything drawn")]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]
    deterministic: Annotated[
        bool, Field(description="the same bits every time on a GPU too; may be slower")
    ]
    eval_every: Annotated[int, Field(ge=1, description="epochs between two evaluations")]


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TrainingConfig):
    """What all backdoor attacks have in common."""

    pratio: Annotated[float, Field(gt=0, le=1, description="poisoned images / all training images")]
    attack_target: Annotated[
        int,
        Field(ge=0, description="label, or class, that triggered images shall get (all2one)"),
        configuration.OrName,
    ]
    attack_label_trans: Annotated[
        poison.LabelMap, Field(description="target for all images, or y -> (y + 1) mod classes")
    ]


@dataclass(frozen=True)
class Setting:
    """What an attack may use beside its configuration to prepare its trigger.

    Attributes:
        findings: what the attack found while it prepared itself. Its facts stand in `summary.json`
            under `preparation`.
    """

    data: Dataset
    device: torch.device
    precision: str
    findings: Findings = field(default_factory=Findings)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain data that the attack wants in the summary."""
        return self.findings.facts

    @property
    def warnings(self) -> list[str]:
        """Lines for the summary; see `warn`."""
        return self.findings.warnings

    def warn(self, text: str) -> None:
        """Logs a warning now, and keeps it for the summary."""
        self.findings.warn(text)

    def cached(
        self,
        kind: str,
        key: Mapping[str, Any],
        compute: Callable[[], dict[str, torch.Tensor]],
        version: int = 1,
    ) -> dict[str, torch.Tensor]:
        """Tensors that take long to make: computed once, then read from `data/cache/`.

        Args:
            kind: what they are; part of the file's name.
            key: all that they depend on, beside the dataset and the code.
            version: to be raised with every change of the code that changes what it computes.

        Raises:
            UserError: if the cache cannot be written, before anything is computed; if what it holds
                is no file of tensors.
        """
        depends = {**key, "version": version, "data": self.data.fingerprint()}
        text = json.dumps(depends, sort_keys=True)
        cache = folders.RunFolder(data_folder() / "cache")
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"
        with distributed.main_alone() as is_mine:
            if is_mine and (cache.path / name).exists():
                logger.info("%s: read from %s", kind, cache.path / name)
            elif is_mine:
                try:
                    prepare_folder(cache.path)
                except OSError as error:
                    raise no_cache(cache.path, error) from None
                cache.write_tensors(name, compute())
        with explained(cache.path / name, "a file of the cache; remove it"):
            return load_tensors(cache.path / name)


@dataclass(frozen=True)
class Plan:
    """What an attack does to training and to test images.

    Attributes:
        training: the set to train on.
        step: how a batch's loss is made.
        triggered: the triggered test images, as they are now; None for a clean model.
        cross: images whose trigger must not fire, with their true labels; or None.
        exported: the poisoned training images for the record.
        drop_last: whether an epoch leaves out a last batch that is not full.
        whole: whether the step needs the batch as a whole, also with several processes.
    """

    training: poison.PoisonedSet
    step: Step
    triggered: Callable[[], Triggered | None]
    cross: Callable[[], Labelled | None]
    exported: Callable[[], poison.PoisonedSet]
    drop_last: bool = True
    whole: bool = False


C = TypeVar("C", bound=AttackConfig)
W = TypeVar("W", bound=configuration.Config)
Choose = Callable[[C, torch.Tensor, int, torch.Generator], poison.Choice]
MakePlan = Callable[[Any, Setting], Plan]


def dirty_label(
    config: AttackConfig, labels: torch.Tensor, num_classes: int, rng: torch.Generator
) -> poison.Choice:
    """Images of any class, with the mapped label."""
    return poison.dirty_label(
        labels, config.pratio, config.attack_label_trans, config.attack_target, num_classes, rng
    )


def clean_label(
    config: AttackConfig, labels: torch.Tensor, num_classes: int, rng: torch.Generator
) -> poison.Choice:
    """Images of the target class, labels kept."""
    if config.attack_label_trans != "all2one":
        raise UserError("--attack_label_trans: a clean-label attack has one target; give all2one")
    return poison.clean_label(labels, config.pratio, config.attack_target, rng)


def run(
    config_class: type[C],
    make_trigger: Callable[..., poison.Trigger | poison.Triggers],
    *,
    choose: Choose[C] = dirty_label,
    prepare: Callable[[C, Setting], Any] | None = None,
) -> None:
    """Runs the script of an attack that poisons data: flags -> record.

    Args:
        config_class: the attack's configuration; its module's name is the attack's name.
        make_trigger: (configuration, (C, H, W)) -> trigger; with `prepare`, its result is the third
            argument.
        choose: which training images are poisoned, and their labels.
        prepare: what the trigger needs and takes long to make; keeps it with `Setting.cached`.
    """

    def plan(config: C, setting: Setting) -> Plan:
        data = setting.data
        # Before what takes long, because it refuses ratios and targets that do not fit.
        rng = generator(config.random_seed, "poisoned indices")
        choice = choose(config, data.train.labels, len(data.classes), rng)
        wanted = poison.poison_count(len(data.train), config.pratio)
        poisoned_images = int((choice.kinds == poison.KINDS.index("poison")).sum())
        if poisoned_images < wanted:
            setting.warn(
                f"{wanted} poisoned images wanted, but class {data.named(config.attack_target)} "
                f"has {poisoned_images}; all of them are poisoned (ratio "
                f"{poisoned_images / len(data.train):.4f} of the training set)"
            )
        extra = () if prepare is None else (prepare(config, setting),)
        made = make_trigger(config, data.image_shape, *extra)
        triggers = made if isinstance(made, poison.Triggers) else poison.Triggers(made, made)
        poisoned = poison.replace_images(data.train, choice, triggers.train)
        triggered = poison.triggered_test_set(
            data, triggers.test, config.attack_label_trans, config.attack_target
        )
        return Plan(
            training=poisoned,
            step=_supervised(config, setting),
            triggered=lambda: triggered,
            cross=lambda: None,
            exported=lambda: poisoned,
        )

    run_plan(config_class, plan)


def train(config: TrainingConfig, name: str, make_plan: MakePlan) -> folders.RunFolder:
    """Trains a model as the plan says and writes its record.

    Returns:
        The record's folder.

    Raises:
        UserError: if the configuration does not fit the data or the record exists.
    """
    started = time.monotonic()
    folder = free_folder(
        config.save_folder_name, config.record_path, config.overwrite, config.resume
    )
    with file_log() as open_log, deterministic(config.deterministic):
        device = pick_device(config.device)
        precision = pick_precision(config.precision, device)
        data = load_dataset(config.dataset, as_path(config.dataset_path), config.image_size)
        config = with_target(config, data)
        _check_fit(config, data)
        network_size = _network_size(config)
        check_model(config.model, len(data.classes), config.image_size, network_size)
        setting = Setting(data, device, precision)
        if isinstance(config, AttackConfig):
            tell_target(config, data, setting.warn)
        plan = make_plan(config, setting)
        seed_everything(config.random_seed)
        model = _new_model(config, data)
        prepare_model(model, device, precision)

        distributed.barrier()  # all have come so far before one empties the folder
        model_name, model_sha256 = model_identity(config.model)
        inputs = ending.inputs_of(config, data, model_sha256)
        poisoned = plan.training
        origin = Origin(
            method=name,
            files=ending.files_of_flags(inputs),
            tensors={
                f"the images and labels of {data.name}": data.tensors(),
                "the poisoned images": [poisoned.index, poisoned.images, poisoned.labels],
            },
            conditions=run_conditions(device, precision),
        )
        checkpoint = folder.start(config.dump(), config.resume, model_sha256, origin)
        open_log(folder.log, append=checkpoint is not None)
        logger.info("%s on %s: %s, %s, %s", name, data.name, config.model, device, precision)
        if len(plan.training.index):
            logger.info(
                "%d of %d training images are replaced", len(plan.training.index), len(data.train)
            )
        score = pipeline.scorer(data.test, plan.triggered, device, plan.cross)
        watch = pipeline.Watch(
            folder, "epoch", score, config.eval_every, config.checkpoint_every, checkpoint
        )
        loop = watch.start()
        _train(config, model, plan, loop)
        scores = watch.finish(model)
        if not distributed.is_main():
            return folder
        triggered, exported = plan.triggered(), plan.exported()
        facts = {
            "attack": name,
            "model_name": model_name,
            "model_sha256": model_sha256,
            "network_size": network_size,
            "dataset_path": absolute(config.dataset_path),
            "attack_target": config.attack_target if isinstance(config, AttackConfig) else None,
            "attack_label_trans": config.attack_label_trans
            if isinstance(config, AttackConfig)
            else None,
        }
        record.save_attack(folder, model, data, exported, triggered, plan.cross(), facts)
        title = f"{name} on {data.name}{ending.target_title(facts, data)}"
        pictures = [
            ending.save_figure(folder, "curves.png", plot.curves(watch.metrics, "epoch", title))
        ]
        if triggered is not None:
            pictures.append(draw_trigger(folder, model, data, triggered, title, device))
        ending.finish_run(
            folder,
            loop.findings,
            facts={
                "attack": name,
                **scores.counts(),
                "seed": config.random_seed,
                "dataset": data.name,
                "dataset_path": facts["dataset_path"],
                "model": model_name,
                "epochs": config.epochs,
                **{key: facts[key] for key in ("attack_target", "attack_label_trans")},
                **ending.target_name(facts, data),
                "pratio": config.pratio if isinstance(config, AttackConfig) else None,
                "train_images": len(data.train),
                "image_size": data.image_shape[1],
                "poisoned_images": int((exported.kinds == poison.KINDS.index("poison")).sum()),
                **({"preparation": setting.facts} if setting.facts else {}),
            },
            said=[*data.warnings, *setting.warnings],
            warnings=_warnings(scores, len(data.classes)),
            result=ending.table(scores),
            pictures=pictures,
            files=["attack_result.pt", "poison.pt"],
            run=ending.run_facts(config, started - watch.earlier, device, precision, inputs),
        )
    return folder


def clean_model(
    config: TrainingConfig,
    setting: Setting,
    epochs: int,
    step: Step | None = None,
    variant: Mapping[str, Any] | None = None,
) -> Classifier:
    """A model of the configured architecture and recipe on clean data, trained once, then cached.

    Some attacks need one before they can make their trigger. It is in eval mode, and its weights
    need no gradient.

    Args:
        step: how a batch's loss is made; None for ordinary training.
        variant: all that `step` depends on beside the recipe.
    """
    data = setting.data

    def compute() -> dict[str, torch.Tensor]:
        seed_everything(config.random_seed)
        model = _new_model(config, data)
        prepare_model(model, setting.device, setting.precision)
        logger.info("training a clean %s for the trigger, %d epochs", config.model, epochs)
        watch = pipeline.Watch(
            None, "epoch", pipeline.scorer(data.test, lambda: None, setting.device), epochs
        )
        plan = _clean_plan(config, setting)
        plan = replace(plan, step=step or plan.step)
        _train(replace(config, epochs=epochs), model, plan, watch.start())
        watch.finish(model)
        return record.model_state(model)

    key = recipe(config, setting) | dict(variant or {}) | {"epochs": epochs}
    state = setting.cached("clean-model", key, compute)
    model = bare_model(config, data)
    model.network.load_state_dict(state)
    return prepare_model(model, setting.device, setting.precision).eval().requires_grad_(False)


def recipe(config: TrainingConfig, setting: Setting) -> dict[str, Any]:
    """What a model trained on given data depends on, epochs aside; for `Setting.cached`."""
    names = (
        "pretrained",
        "batch_size",
        "lr",
        "lr_scheduler",
        "sgd_momentum",
        "wd",
        "crop_padding",
        "flip",
        "random_seed",
    )
    model = {"model": model_identity(config.model), "precision": setting.precision}
    return model | {name: getattr(config, name) for name in names}


def run_plan(config_class: type[Any], make_plan: MakePlan) -> None:
    """Runs an attack script of any kind: flags -> record.

    Args:
        config_class: the attack's configuration; its module's name is the attack's name.
        make_plan: from the configuration and the setting to what the attack does.
    """
    module = sys.modules[config_class.__module__]

    def main() -> None:
        config = config_class.from_command_line(sys.argv[1:], module.__doc__ or "")
        train(config, Path(str(module.__file__)).stem, make_plan)

    run_script(main)


def _network_size(config: TrainingConfig) -> int | None:
    """The side to which the network itself resizes; None where it takes images as they are."""
    return pretrained_size(config.model, config.image_size) if config.pretrained else None


def bare_model(config: TrainingConfig, data: Dataset) -> Classifier:
    """The configured architecture for the data, with new weights from the global generator."""
    return build_model(
        config.model,
        len(data.classes),
        data.mean,
        data.std,
        image_size=config.image_size,
        network_size=_network_size(config),
    )


def _new_model(config: TrainingConfig, data: Dataset) -> Classifier:
    """A model as training starts with it; its new weights are from the global generator."""
    model = bare_model(config, data)
    if config.pretrained:
        logger.info("starting from %s", load_pretrained(model.network, config.model))
    return model


def _train(config: TrainingConfig, model: Classifier, plan: Plan, loop: Loop) -> None:
    train_classifier(
        model,
        plan.training,
        plan.step,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
        schedule=config.lr_scheduler,
        order=generator(config.random_seed, "order"),
        loop=loop,
        drop_last=plan.drop_last,
        whole=plan.whole,
    )


def _supervised(config: TrainingConfig, setting: Setting) -> Supervised:
    rng = generator(config.random_seed, "augmentation", setting.device)
    return Supervised(config.crop_padding, config.flip, rng)


def _clean_plan(config: TrainingConfig, setting: Setting) -> Plan:
    clean = poison.unpoisoned(setting.data.train)
    return Plan(clean, _supervised(config, setting), lambda: None, lambda: None, lambda: clean)


def free_folder(
    name: str | None, root: str | None, overwrite: bool, resume: bool = False
) -> folders.RunFolder:
    """The folder of a new record, or of one to go on with; this process alone may write it.

    Raises:
        UserError: if there is no name, or what stands there may not be replaced.
    """
    if name is None:
        raise UserError("--save_folder_name: a value is needed; give the record a name")
    folder = folders.attack_folder(name, as_path(root))
    folder.claim(overwrite, resume)
    return folder


def with_target(config: W, data: Dataset) -> W:
    """The configuration with the label of the target class, which may have been given by its name.

    Raises:
        UserError: if the dataset has no such class.
    """
    target = getattr(config, "attack_target", None)
    if not isinstance(target, str):
        return config
    if target not in data.classes:
        raise UserError(
            f"--attack_target: {shown(target, 100)} is no class of {data.name}"
            f"{suggestion(target, data.classes)}; give one of {data.listed()}"
        )
    return replace(config, attack_target=data.classes.index(target))  # type: ignore[call-arg]


def check_target(target: int, data: Dataset) -> None:
    """Raises UserError if the target is no class of the dataset."""
    if target >= len(data.classes):
        raise UserError(
            f"--attack_target: {target} is no class of {data.name}; give 0 to "
            f"{len(data.classes) - 1}, or a name: {data.listed()}"
        )


def tell_target(config: Any, data: Dataset, warn: Callable[[str], None]) -> None:
    """Logs number and name of the target; warns where another class has that number as its name."""
    target, other = config.attack_target, str(config.attack_target)
    if config.attack_label_trans == "all2all":
        logger.info("each class goes to the next one: %s to %s, ...", data.named(0), data.named(1))
        return
    logger.info("target: class %s", data.named(target))
    if other != data.classes[target] and other in data.classes:
        label = data.classes.index(other)
        warn(
            f"--attack_target {target} is the label of class {shown(data.classes[target], 40)}; "
            f"labels count from 0, and the class that is called {other} has label {label}"
        )


def _check_fit(config: TrainingConfig, data: Dataset) -> None:
    if len(data.classes) < 2:
        raise UserError(
            f"--dataset {data.name}: there is one class, {data.classes[0]}; give two or more"
        )
    if isinstance(config, AttackConfig):
        check_target(config.attack_target, data)
    if config.batch_size > len(data.train):
        raise UserError(
            f"--batch_size: {config.batch_size} is more than the {len(data.train)} training "
            f"images; give --batch_size {largest_batch(len(data.train))} or less"
        )


def draw_trigger(
    folder: folders.RunFolder,
    model: Classifier,
    data: Dataset,
    triggered: Triggered,
    title: str,
    device: torch.device,
) -> Path:
    """trigger.png: eight triggered test images beside the clean ones, with what the model says."""
    chosen = torch.linspace(0, len(triggered.index) - 1, 8).long()
    clean = data.test.images[triggered.index[chosen]]
    changed = triggered.images[chosen]
    predictions = [
        [data.named(p) for p in predict(model, images, device).tolist()]
        for images in (clean, changed)
    ]
    rows = {"clean": as_float(clean), "triggered": as_float(changed)}
    figure = plot.image_grid(
        rows | ending.difference(*rows.values()),
        dict(zip(rows, predictions, strict=True)),
        f"{title}: images, and the class that the model gives them",
    )
    return ending.save_figure(folder, "trigger.png", figure)


def _warnings(scores: Scores, num_classes: int) -> list[str]:
    found = []
    if scores.asr is not None and scores.asr.value < FAILED_ASR:
        found.append(
            f"the attack failed: ASR is {scores.asr}, under 50 %; train longer, or raise "
            "--pratio, before any defense"
        )
    if scores.acc.value < 1.5 / num_classes:
        found.append(
            f"the model learned little: ACC is {scores.acc} with {num_classes} classes; train "
            "longer"
        )
    return found


def as_path(text: str | None) -> Path | None:
    """A flag's path."""
    return None if text is None else Path(text)


def absolute(text: str | None) -> str | None:
    """A flag's path as a record keeps it."""
    return None if text is None else os.path.abspath(text)


def main() -> None:
    """Trains a clean model."""
    train(TrainingConfig.from_command_line(sys.argv[1:], __doc__), "prototype", _clean_plan)


if __name__ == "__main__":
    run_script(main)
