"""A record from a model that was trained elsewhere, so that defenses can purify it.

    python interop/state_dict.py --state_dict my_model.pt --model resnet18 --save_folder_name theirs

The checkpoint is a state dict, `.pt`/`.pth` (tensors, plain data, NumPy's arrays and numbers;
nothing else is read) or `.safetensors`, bare or under one of the usual names (`state_dict`,
`model`, `ema`, ...; all of them in `utils/records/weights.py`). Prefixes that torch and training
frameworks put before names (`module.`, `_orig_mod.`, `model.`) do not count. Beside them, all names
and shapes have to be the network's. Nothing is trained.

ASR needs triggered test images, as picture files named after the test image that they come from:

    <bd_test_dir>/<true class>/<position in the test set>.png

with --attack_target (or --attack_label_trans all2all). The class is its name in the dataset. The
position counts from 0; in a folder of images, test images are sorted by class and then by file name
as text. Without triggered images the record has no ASR, and defenses report only ACC. If the model
was trained with another normalization than the dataset's usual one, give its --mean and --std.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.recipe import TrainingConfig, learned_little
from models import build_model, check_model, model_identity, prepare
from utils import config as configuration
from utils.config import Group
from utils.data import poison
from utils.data.datasets import DatasetName, load_dataset
from utils.data.images import decoded
from utils.data.labelled import Dataset, Triggered
from utils.data.picturefolders import Content, class_name, content_of, skipped_warning
from utils.data.targets import check_target, tell_target, with_target
from utils.errors import UserError
from utils.files import absolute, as_path
from utils.metrics import Scores
from utils.process.device import Precision, pick_device, pick_precision
from utils.process.script import file_log, logger, run_script
from utils.records import folders
from utils.records.attack import save_attack
from utils.records.checkpoint import digest
from utils.records.contents import ATTACK_RESULT, POISON
from utils.records.places import free_folder
from utils.records.weights import fill, read_state_dict
from utils.training import ending
from utils.training.ending import draw_trigger
from utils.training.evaluate import evaluate
from utils.training.findings import Findings
from utils.values import OrName


@dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    save_folder_name: Annotated[
        str | None, Field(description="name of the record to write"), Group.RECORD
    ]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    overwrite: Annotated[bool, Field(description="replace a record of that name")]
    dataset: Annotated[DatasetName, Field(description="what the model was trained on"), Group.DATA]
    dataset_path: Annotated[
        str | None, Field(description="folder of the images or downloads; null for data/")
    ]
    image_size: Annotated[
        int | None,
        Field(ge=8, le=1024, description="side of its images in pixels; null for the dataset's"),
    ]
    model: Annotated[
        str,
        Field(description="preactresnet18, a torchvision classifier, or your own file.py:function"),
        Group.NETWORK,
    ]
    state_dict: Annotated[
        str | None, Field(description="checkpoint of the model: .pt, .pth or .safetensors")
    ]
    mean: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(description="red,green,blue that its normalization subtracts; []: the dataset's"),
    ]
    std: Annotated[
        # 1/255 is that of a network for pixels of 0 to 255.
        tuple[Annotated[float, Field(ge=0.001, le=10)], ...],
        Field(description="red,green,blue that it divides by, pixels in [0, 1]; []: likewise"),
    ]
    bd_test_dir: Annotated[
        str | None,
        Field(description="folder of triggered test images; null for none"),
        Group.POISONING,
    ]
    attack_target: Annotated[
        int | None,
        Field(ge=0, description="label, or class, that triggered images get (all2one)"),
        OrName,
    ]
    attack_label_trans: Annotated[
        poison.LabelMap, Field(description="target for all images, or y -> (y + 1) mod classes")
    ]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ..."), Group.RUNNING]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]


def read_triggered(
    folder: Path, data: Dataset, config: Config, warn: Callable[[str], None]
) -> Triggered:
    """The triggered test images of `<true class>/<position in the test set>.png`.

    Images of the target class are skipped (all2one), and whatever is no picture in the folder of a
    class. Hidden files and folders do not count.

    Args:
        warn: gets a line about each kind of what is skipped.

    Raises:
        UserError: if a name is no position, or its test image is not of that class.
    """
    if not folder.is_dir():
        raise UserError(
            f"--bd_test_dir: {folder} is not a folder; put one folder per class into it"
        )
    files: dict[int, Path] = {}
    pictures, skipped = _pictures_below(folder)
    for file in pictures:
        position = int(file.stem) if file.stem.isdecimal() else -1
        if not 0 <= position < len(data.test):
            raise UserError(
                f"--bd_test_dir: {file} is not named after a test image; name it 0 to "
                f"{len(data.test) - 1}"
            )
        true_class = data.classes[int(data.test.labels[position])]
        if class_name(file.parent) != true_class:
            raise UserError(
                f"--bd_test_dir: {file} stands in class {file.parent.name}, but test image "
                f"{position} is of class {true_class}; move or rename it"
            )
        if position in files:
            raise UserError(f"--bd_test_dir: {file} and {files[position]} are the same test image")
        files[position] = file
    if skipped:
        warn(skipped_warning("bd_test_dir", folder, skipped))
    index = torch.tensor(sorted(files), dtype=torch.int64)
    if config.attack_label_trans == "all2one":
        index = index[data.test.labels[index] != config.attack_target]
    if len(index) == 0:
        raise UserError(
            f"--bd_test_dir: {folder} has no image of another class than the target; put "
            "<true class>/<position in the test set>.png into it"
        )
    if len(index) < len(files):
        warn(
            f"--bd_test_dir: {len(files) - len(index)} images of the target class are skipped; ASR "
            "counts images of other classes"
        )
    labels = data.test.labels[index]
    images = decoded(folder, [files[position] for position in index.tolist()], data.image_shape[1])
    targets = poison.map_labels(
        labels, config.attack_label_trans, config.attack_target or 0, len(data.classes)
    )
    return Triggered(images, targets, labels, index)


def _pictures_below(folder: Path) -> Content:
    """The pictures in the folders of classes, and what else is in the folder."""
    pictures: list[Path] = []
    skipped: list[Path] = []
    for inside in sorted(itertools.chain(*content_of(folder))):
        if inside.is_dir():
            content = content_of(inside)
            pictures += content.pictures
            skipped += content.others
        else:
            skipped.append(inside)
    return Content(pictures, skipped)


def _checkpoint_of(config: Config) -> Path:
    """The checkpoint to read.

    Raises:
        UserError: if it is not given, or if flags do not fit together.
    """
    if config.state_dict is None:
        raise UserError("--state_dict: a value is needed; give the model's checkpoint")
    maps_all = config.attack_label_trans == "all2all"
    if config.bd_test_dir is not None and config.attack_target is None and not maps_all:
        raise UserError("--attack_target: a value is needed with --bd_test_dir; give the label")
    for flag, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (0, 3):
            raise UserError(f"--{flag}: has {len(values)} numbers; give three, e.g. 0.5,0.5,0.5")
    return Path(config.state_dict)


def _inputs(
    config: Config, data: Dataset, model_sha256: str | None, triggered: Triggered | None
) -> dict[str, str]:
    """What is read, see `ending.inputs_of`; the triggered images count by their pixels."""
    contents = {}
    if triggered is not None:
        parts = (triggered.index, triggered.images, triggered.targets)
        contents = {"bd_test_dir": digest(parts)}
    return ending.inputs_of(config, data, model_sha256, **contents)


def import_model(config: Config) -> folders.RunFolder:
    """Writes the record of a model that was trained elsewhere.

    Returns:
        The record's folder.

    Raises:
        UserError: if checkpoint, network, data and flags do not fit together.
    """
    started = time.monotonic()
    folder = free_folder(config.save_folder_name, config.record_path, config.overwrite)
    checkpoint = _checkpoint_of(config)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    # The size has its home in the recipe of the dataset.
    size = config.image_size or TrainingConfig.load(config.dataset).image_size
    with folder.replacing(), file_log() as open_log:
        data = load_dataset(config.dataset, as_path(config.dataset_path), size)
        data = replace(data, mean=config.mean or data.mean, std=config.std or data.std)
        config = with_target(config, data)
        findings = Findings()
        if config.attack_target is not None:
            check_target(config.attack_target, data)
            tell_target(config, data, findings.warn)
        check_model(config.model, len(data.classes), size, warn=findings.warn)
        model = build_model(config.model, len(data.classes), data.mean, data.std, image_size=size)
        fill(model, read_state_dict(checkpoint), config.model)
        triggered = None
        if config.bd_test_dir is not None:
            triggered = read_triggered(Path(config.bd_test_dir), data, config, findings.warn)
        prepare(model, device, precision)

        # Before the folder is emptied, because the checkpoint may be that of the replaced record.
        model_name, model_sha256 = model_identity(config.model)
        inputs = _inputs(config, data, model_sha256, triggered)
        folder.start(config.dump())
        open_log(folder.log)
        logger.info("external model on %s: %s, %s, %s", data.name, model_name, device, precision)
        scores = evaluate(model, data.test, triggered, device)
        is_backdoored = triggered is not None or config.attack_target is not None
        facts = {
            "attack": "external",
            "model_name": model_name,
            "model_sha256": model_sha256,
            "network_size": None,
            "dataset_path": absolute(config.dataset_path),
            "attack_target": config.attack_target,
            "attack_label_trans": config.attack_label_trans if is_backdoored else None,
        }
        unknown = poison.unpoisoned(data.train)  # what the model was trained on stays its owner's
        save_attack(folder, model, data, unknown, triggered, None, facts)
        pictures = []
        title = f"external on {data.name}{ending.target_title(facts, data)}"
        if triggered is not None:
            pictures.append(draw_trigger(folder, model, data, triggered, title, device))
        result = ending.table(scores)
        if triggered is None:
            result += "\nno triggered images, so no ASR; give --bd_test_dir to have one"
        ending.finish_run(
            folder,
            findings,
            facts={
                "attack": "external",
                **scores.counts(),
                "dataset": data.name,
                "dataset_path": facts["dataset_path"],
                "model": model_name,
                **{key: facts[key] for key in ("attack_target", "attack_label_trans")},
                **ending.target_name(facts, data),
                "train_images": len(data.train),
                "image_size": data.image_shape[1],
            },
            said=data.warnings,
            warnings=_warnings(scores, len(data.classes)),
            result=result,
            pictures=pictures,
            files=[ATTACK_RESULT, POISON],
            run=ending.run_facts(config, started, device, precision, inputs),
        )
    return folder


def _warnings(scores: Scores, num_classes: int) -> list[str]:
    warnings = []
    if learned_little(scores, num_classes):
        warnings.append(
            f"ACC is only {scores.acc} with {num_classes} classes; check --mean, --std, "
            "--image_size, and that the classes are in the dataset's order"
        )
    if scores.attack_failed:
        warnings.append(
            f"ASR is only {scores.asr}; check --attack_target and the images of --bd_test_dir"
        )
    return warnings


def main() -> None:
    """Makes the record."""
    import_model(Config.from_command_line(sys.argv[1:], __doc__))


if __name__ == "__main__":
    run_script(main)
