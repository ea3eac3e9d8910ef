"""The pipeline that every defense script runs: record -> purify -> scores, files, pictures.

A defense gives its configuration and `purify(model, images, labels, config, loop)`. Dataset, model,
normalization and target come from the record. Test images and triggers are used for the report
alone.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import nn

from models import Classifier, prepare
from utils import config as configuration
from utils import distributed, folders, pipeline, plot, record
from utils.data import Dataset, Labelled, Triggered, as_float, keep_on
from utils.errors import UserError
from utils.evaluate import predict
from utils.metrics import FAILED_ASR, Scores, defense_effectiveness_rating
from utils.runtime import (
    Precision,
    deterministic,
    file_log,
    generator,
    logger,
    pick_device,
    pick_precision,
    run_script,
    seed_everything,
)


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(configuration.Config):
    """What all defenses have in common."""

    result_file: Annotated[
        str | None, Field(description="record, ours or BackdoorBench's: its name, or its folder")
    ]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    save_folder_name: Annotated[
        str | None, Field(description="name of the result's folder; null for the defense's name")
    ]
    overwrite: Annotated[bool, Field(description="replace this defense's earlier result")]
    resume: Annotated[bool, Field(description="go on with an interrupted run")]
    checkpoint_every: Annotated[
        float, Field(ge=0, description="seconds between two checkpoints to resume from")
    ]
    dataset: Annotated[str | None, Field(description="must be the record's, from which it is read")]
    model: Annotated[
        str | None,
        Field(description="must be the record's, from which it is read; needed for your own file"),
    ]
    dataset_path: Annotated[
        str | None, Field(description="where the images are now; null for the record's path")
    ]
    ratio: Annotated[float, Field(gt=0, le=1, description="clean subset / clean training set")]
    index: Annotated[
        str | None,
        Field(description="file of the clean subset's indices, one a line; null draws them"),
    ]
    n_rounds: Annotated[int, Field(ge=1, description="passes over the clean subset")]
    batch_size: Annotated[int, Field(ge=1, description="images a step")]
    random_seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="seed of everything drawn")]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]
    deterministic: Annotated[
        bool, Field(description="the same bits every time on a GPU too; may be slower")
    ]
    eval_every: Annotated[int, Field(ge=1, description="rounds between two evaluations")]


C = TypeVar("C", bound=DefenseConfig)
Purify = Callable[..., nn.Module]
Perturb = Callable[..., torch.Tensor]
Caption = Callable[[torch.Tensor], list[str]]


def run(config_class: type[C], purify: Purify, perturb: Perturb | None = None) -> None:
    """Runs a defense script: flags and a record -> a purified model beside it.

    Args:
        config_class: the defense's configuration; its module's name is the defense's name.
        purify: (model, images, labels, config, loop) -> model.
        perturb: (model, reference, images, labels, config) -> delta, for `perturbations.png`.
    """
    module = sys.modules[config_class.__module__]

    def main() -> None:
        config = config_class.from_command_line(
            sys.argv[1:], module.__doc__ or "", _dataset_of_record
        )
        defend(config, Path(str(module.__file__)).stem, purify, perturb)

    run_script(main)


def defend(
    config: C, name: str, purify: Purify, perturb: Perturb | None = None
) -> folders.RunFolder:
    """Purifies a record's model and writes the result beside it.

    Returns:
        The result's folder.

    Raises:
        UserError: if the record, the data and the configuration do not fit together.
    """
    started = time.monotonic()
    attack = record.load_attack(_record_folder(config.result_file, config.record_path))
    folder = folders.defense_folder(attack.folder, config.save_folder_name or name)
    folder.claim(config.overwrite, config.resume)
    if config.dataset not in (None, attack.dataset):
        raise UserError(
            f"--dataset: {config.dataset}, but the record says {attack.dataset}; leave the flag out"
        )
    attack.check_model(config.model)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    data = attack.load_dataset(config.dataset_path)
    index = clean_subset(len(data.train), config)
    clean = data.train.at(index)
    seed_everything(config.random_seed)
    backdoored = prepare(attack.build(config.model), device, precision)

    distributed.barrier()  # all have found the folder free before one writes into it
    checkpoint = folder.start(config.dump(), config.resume)
    folder.write_text("clean_index.txt", "".join(f"{number}\n" for number in index.tolist()))
    with file_log() as open_log, deterministic(config.deterministic):
        open_log(folder.log, append=checkpoint is not None)
        logger.info(
            "%s against %s on %s: %s, %s, %s",
            name,
            attack.attack,
            data.name,
            attack.model_name,
            device,
            precision,
        )
        logger.info("%d clean images of %d", len(index), len(data.train))
        warnings = _subset_warnings(clean, data)
        if attack.triggered is None:
            logger.info("the record has no triggered images: ACC alone is reported, no ASR or DER")
        score = pipeline.scorer(data.test, lambda: attack.triggered, device)
        before = score(backdoored)
        logger.info("before  %s", before)
        watch = pipeline.Watch(
            folder, "round", score, config.eval_every, config.checkpoint_every, checkpoint
        )
        loop = watch.start(config.n_rounds, before)
        model = purify(backdoored, keep_on(device, clean.images), clean.labels, config, loop)
        after = watch.scores
        assert after is not None  # the last round is always scored
        assert isinstance(model, Classifier)  # a copy of the model that was given
        if not distributed.is_main():
            return folder
        folder.write_tensors(
            "defense_result.pt",
            {
                "model": record.model_state(model),
                "model_name": attack.model_name,
                "model_sha256": attack.model_sha256,
                "network_size": attack.network_size,
                "num_classes": attack.num_classes,
                "image_shape": list(attack.image_shape),
                "mean": list(attack.mean),
                "std": list(attack.std),
                "defense": name,
                "attack_sha256": attack.sha256,
            },
        )
        title = f"{name} against {attack.attack} on {data.name}"
        pictures = [
            pipeline.save_figure(folder, "curves.png", plot.curves(watch.metrics, "round", title))
        ]

        def caption(images: torch.Tensor) -> list[str]:
            labels = [predict(network, images, device).tolist() for network in (backdoored, model)]
            names = data.classes
            return [f"{names[a]} | {names[b]}" for a, b in zip(*labels, strict=True)]

        if attack.triggered is not None:
            pictures.append(_draw_before_after(folder, caption, attack.triggered, data, title))
        if perturb is not None:

            def perturbed(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                x, y = images.to(device), labels.to(device)
                return perturb(backdoored, backdoored, x, y, config).cpu()

            pictures.append(_draw_perturbations(folder, caption, perturbed, clean, title))
        warnings += _result_warnings(before, after)
        der = defense_effectiveness_rating(before, after)
        folder.write_summary(
            {
                "defense": name,
                "attack": attack.attack,
                "before": before.counts(),
                "after": after.counts(),
                "der": der,
                "seed": config.random_seed,
                "dataset": attack.dataset,
                "model": attack.model_name,
                "clean_images": len(index),
                "rounds": config.n_rounds,
                "warnings": [*data.warnings, *warnings],
                **pipeline.run_facts(config, started - watch.earlier, device, precision),
                "attack_sha256": attack.sha256,
                "files": record.file_hashes(folder, "defense_result.pt", "clean_index.txt"),
            }
        )
        for warning in warnings:
            logger.warning("warning: %s", warning)
        logger.info("%s", comparison(before, after, der))
        pipeline.log_paths(folder, pictures)
    return folder


def clean_subset(count: int, config: DefenseConfig) -> torch.Tensor:
    """The defender's images: those of the file `index`, or round(ratio * count) drawn at random.

    They depend on the seed and the number of training images only.

    Returns:
        int64 indices into the clean training set, ascending.

    Raises:
        UserError: if there is none.
    """
    if config.index is not None:
        index = record.read_index(Path(config.index), count)
        if len(index) == 0:
            raise UserError(f"--index: {config.index} is empty; name at least one image")
        return index
    size = round(config.ratio * count)
    if size == 0:
        raise UserError(
            f"--ratio: {config.ratio:g} of {count} training images is none; give at least "
            f"{1 / count:.2g}"
        )
    return (
        torch.randperm(count, generator=generator(config.random_seed, "clean subset"))[:size]
        .sort()
        .values
    )


def comparison(before: Scores, after: Scores, der: float | None) -> str:
    """The table that ends a defense: rates before and after with their counts, and DER."""
    lines = [f"{'':4}{'before':>24}{'after':>24}"]
    for name, rate in before.rates().items():
        cells = (f"{r} ({r.hits}/{r.total})" for r in (rate, after.rates()[name]))
        lines.append(f"{name.upper():4}" + "".join(f"{cell:>24}" for cell in cells))
    if der is not None:
        lines.append(f"{'DER':4}{'':24}{f'{100 * der:.2f} %':>24}")
    return "\n".join(lines)


def _record_folder(result_file: str | None, record_path: str | None) -> Path:
    if result_file is None:
        raise UserError("--result_file: a value is needed; give the name of an attack's record")
    return folders.find_record(result_file, Path(record_path) if record_path else None)


def _dataset_of_record(values: Mapping[str, Any]) -> str | None:
    """The dataset whose YAML files apply; none without a record, which `--help` needs not."""
    if not values.get("result_file"):
        return None
    return record.recorded_dataset(_record_folder(values["result_file"], values.get("record_path")))


def _draw_before_after(
    folder: folders.RunFolder, caption: Caption, triggered: Triggered, data: Dataset, title: str
) -> Path:
    """before_after.png: clean and triggered test images, and both models' labels."""
    chosen = _spread(len(triggered.index))
    rows = {
        "clean": data.test.images[triggered.index[chosen]],
        "triggered": triggered.images[chosen],
    }
    figure = plot.image_grid(
        {name: as_float(images) for name, images in rows.items()},
        {name: caption(images) for name, images in rows.items()},
        f"{title}: test images; label before | after",
    )
    return pipeline.save_figure(folder, "before_after.png", figure)


def _draw_perturbations(
    folder: folders.RunFolder,
    caption: Caption,
    perturb: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: Labelled,
    title: str,
) -> Path:
    """perturbations.png: adversarial examples of the model before, and both models' labels."""
    chosen = clean.at(_spread(len(clean)))
    images = as_float(chosen.images)
    changed = images + perturb(images, chosen.labels)
    figure = pipeline.difference_grid(
        images,
        changed,
        ("clean", "adversarial"),
        (caption(images), caption(changed)),
        f"{title}: shared adversarial examples of the model before; label before | after",
    )
    return pipeline.save_figure(folder, "perturbations.png", figure)


def _spread(count: int) -> torch.Tensor:
    """Up to eight evenly spaced positions."""
    return torch.linspace(0, count - 1, min(8, count)).long()


def _subset_warnings(clean: Labelled, data: Dataset) -> list[str]:
    counts = torch.bincount(clean.labels, minlength=len(data.classes))
    lacking = [
        name for name, count in zip(data.classes, counts.tolist(), strict=True) if count == 0
    ]
    if not lacking:
        return []
    return [
        f"the clean subset lacks {len(lacking)} of {len(data.classes)} classes "
        f"({', '.join(lacking[:10])}); raise --ratio"
    ]


def _result_warnings(before: Scores, after: Scores) -> list[str]:
    found = []
    if before.asr is not None and before.asr.value < FAILED_ASR:
        found.append(
            f"the attack had failed before (ASR {before.asr}), so this says little of the defense"
        )
    if before.acc.value - after.acc.value > 0.1:
        found.append(
            f"the defense cost more than 10 points of ACC ({before.acc} -> {after.acc}); "
            "lower --lr or give more images"
        )
    return found
