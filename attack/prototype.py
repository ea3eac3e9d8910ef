"""The pipeline that every attack script runs; run by itself it trains a clean model.

    python attack/prototype.py --save_folder_name clean_demo

An attack gives its configuration and a function that makes its trigger. The pipeline loads the
data, poisons it, trains a model, scores it after each epoch, and writes the record.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import Classifier, build_model, check_model, prepare
from utils import config as configuration
from utils import pipeline, plot, poison, record
from utils.data import Dataset, DatasetName, Triggered, as_float, load_dataset
from utils.errors import UserError
from utils.evaluate import predict
from utils.metrics import Scores
from utils.runtime import (
    Precision,
    generator,
    log_to,
    logger,
    pick_device,
    pick_precision,
    run_script,
    seed_everything,
)
from utils.train import Schedule, train_classifier


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(configuration.Config):
    """The training recipe."""

    save_folder_name: Annotated[str | None, Field(description="name of the record to write")]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    overwrite: Annotated[bool, Field(description="replace a record of that name")]
    dataset: Annotated[
        DatasetName, Field(description="training and test images; picks the recipe of that name")
    ]
    dataset_path: Annotated[
        str | None, Field(description="folder of the images or downloads; null for data/")
    ]
    image_size: Annotated[int, Field(ge=8, le=1024, description="side of the images in pixels")]
    model: Annotated[str, Field(description="preactresnet18 or a torchvision classifier")]
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
    random_seed: Annotated[int, Field(ge=0, description="seed of everything drawn")]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]
    eval_every: Annotated[int, Field(ge=1, description="epochs between two evaluations")]


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TrainingConfig):
    """What all backdoor attacks have in common."""

    pratio: Annotated[float, Field(gt=0, le=1, description="poisoned images / all training images")]
    attack_target: Annotated[
        int, Field(ge=0, description="label that triggered images shall get (all2one)")
    ]
    attack_label_trans: Annotated[
        poison.LabelMap, Field(description="target for all images, or y -> (y + 1) mod classes")
    ]


C = TypeVar("C", bound=AttackConfig)
MakeTrigger = Callable[[C, tuple[int, int, int]], poison.Trigger]


def run(config_class: type[C], make_trigger: MakeTrigger[C]) -> None:
    """Runs an attack script: flags -> record.

    Args:
        config_class: the attack's configuration; its module's name is the attack's name.
        make_trigger: from the configuration and (C, H, W) to the trigger.
    """
    module = sys.modules[config_class.__module__]

    def main() -> None:
        config = config_class.from_command_line(sys.argv[1:], module.__doc__ or "")
        train_backdoored(config, Path(str(module.__file__)).stem, make_trigger)

    run_script(main)


def train_backdoored(
    config: TrainingConfig,
    name: str,
    make_trigger: Callable[[Any, tuple[int, int, int]], poison.Trigger] | None,
) -> record.RunFolder:
    """Trains a model, backdoored unless `make_trigger` is None, and writes its record.

    Returns:
        The record's folder.

    Raises:
        UserError: if the configuration does not fit the data or the record exists.
    """
    started = time.monotonic()
    if config.save_folder_name is None:
        raise UserError("--save_folder_name: a value is needed; give the record a name")
    folder = record.attack_folder(config.save_folder_name, _path(config.record_path))
    folder.refuse_existing(config.overwrite)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    data = load_dataset(config.dataset, _path(config.dataset_path), config.image_size)
    check_model(config.model, len(data.classes), config.image_size)
    poisoned, triggered = _poison(config, data, make_trigger)
    if config.batch_size > len(data.train):
        raise UserError(
            f"--batch_size: {config.batch_size} is more than the {len(data.train)} training "
            "images; give fewer"
        )
    seed_everything(config.random_seed)
    model = build_model(config.model, len(data.classes), data.mean, data.std)
    prepare(model, device, precision)

    folder.start(config.dump())
    with log_to(folder.log):
        logger.info("%s on %s: %s, %s, %s", name, data.name, config.model, device, precision)
        if triggered is not None:
            logger.info(
                "%d of %d training images are poisoned", len(poisoned.index), len(data.train)
            )
        score = pipeline.scorer(data.test, triggered, device)
        watch = pipeline.Watch(folder, "epoch", score, config.eval_every)
        train_classifier(
            model,
            poisoned,
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.wd,
            schedule=config.lr_scheduler,
            crop_padding=config.crop_padding,
            flip=config.flip,
            order=generator(config.random_seed, "order"),
            augmentation=generator(config.random_seed, "augmentation", device),
            loop=watch.start(config.epochs),
        )
        assert watch.scores is not None  # the last epoch is always scored
        facts = {
            "attack": name,
            "model_name": config.model,
            "dataset_path": str(Path(config.dataset_path).resolve())
            if config.dataset_path
            else None,
            "attack_target": getattr(config, "attack_target", None),
            "attack_label_trans": getattr(config, "attack_label_trans", None),
        }
        record.save_attack(folder, model, data, poisoned, triggered, facts)
        pictures = [
            pipeline.save_figure(
                folder, "curves.png", plot.curves(watch.metrics, "epoch", f"{name} on {data.name}")
            )
        ]
        if triggered is not None:
            pictures.append(_draw_trigger(folder, model, data, triggered, name, device))
        warnings = _warnings(watch.scores, len(data.classes))
        folder.write_summary(
            {
                "attack": name,
                **watch.scores.counts(),
                "seed": config.random_seed,
                "dataset": data.name,
                "model": config.model,
                "epochs": config.epochs,
                **{key: facts[key] for key in ("attack_target", "attack_label_trans")},
                "pratio": getattr(config, "pratio", None),
                "train_images": len(data.train),
                "poisoned_images": len(poisoned.index),
                "warnings": warnings,
                **pipeline.run_facts(started, device, precision),
                "files": record.file_hashes(folder, "attack_result.pt", "poison.pt"),
            }
        )
        for warning in warnings:
            logger.warning("warning: %s", warning)
        for rate_name, rate in watch.scores.rates().items():
            logger.info("%-3s %8s  (%d of %d)", rate_name.upper(), rate, rate.hits, rate.total)
        pipeline.log_paths(folder, pictures)
    return folder


def _poison(
    config: TrainingConfig,
    data: Dataset,
    make_trigger: Callable[[Any, tuple[int, int, int]], poison.Trigger] | None,
) -> tuple[poison.PoisonedSet, Triggered | None]:
    """The training set, and the triggered test images unless the model is to be clean."""
    if make_trigger is None:
        return poison.unpoisoned(data.train), None
    assert isinstance(config, AttackConfig)
    if config.attack_target >= len(data.classes):
        raise UserError(
            f"--attack_target: {config.attack_target} is no class of {data.name}; give 0 to "
            f"{len(data.classes) - 1}"
        )
    trigger = make_trigger(config, data.image_shape)
    labels = (config.attack_label_trans, config.attack_target)
    poisoned = poison.poison_training_set(
        data, trigger, config.pratio, *labels, generator(config.random_seed, "poisoned indices")
    )
    return poisoned, poison.triggered_test_set(data, trigger, *labels)


def _draw_trigger(
    folder: record.RunFolder,
    model: Classifier,
    data: Dataset,
    triggered: Triggered,
    name: str,
    device: torch.device,
) -> Path:
    """trigger.png: eight triggered test images beside the clean ones, with what the model says."""
    chosen = torch.linspace(0, len(triggered.index) - 1, 8).long()
    clean = data.test.images[triggered.index[chosen]]
    changed = triggered.images[chosen]
    predictions = [
        [data.classes[p] for p in predict(model, images, device).tolist()]
        for images in (clean, changed)
    ]
    figure = pipeline.difference_grid(
        as_float(clean),
        as_float(changed),
        ("clean", "triggered"),
        (predictions[0], predictions[1]),
        f"{name} on {data.name}: images, and the class that the model gives them",
    )
    return pipeline.save_figure(folder, "trigger.png", figure)


def _warnings(scores: Scores, num_classes: int) -> list[str]:
    found = []
    if scores.asr is not None and scores.asr.value < 0.5:
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


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def main() -> None:
    train_backdoored(
        TrainingConfig.from_command_line(sys.argv[1:], __doc__), "prototype", make_trigger=None
    )


if __name__ == "__main__":
    run_script(main)
