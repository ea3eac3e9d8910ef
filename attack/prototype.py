"""The pipeline that every attack script runs; run by itself it trains a clean model.

    python attack/prototype.py --save_folder_name clean_demo

An attack gives its configuration and a function that makes its trigger. The pipeline loads the
data, poisons it, trains a model, scores it every `--eval_every` epochs, and writes the record.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.recipe import (
    AttackConfig,
    Plan,
    TrainingConfig,
    clean_plan,
    learned_little,
    network_size,
    new_model,
    train_by_recipe,
    try_sharing,
)
from attack.setting import Setting
from models import (
    check_model,
    model_identity,
)
from models import prepare as prepare_model
from utils.data import poison
from utils.data.datasets import load_dataset
from utils.data.labelled import Dataset
from utils.data.targets import check_target, tell_target, with_target
from utils.errors import NothingToDo, UserError, shown
from utils.files import absolute, as_path, read_object
from utils.metrics import Scores
from utils.process import distributed
from utils.process.device import pick_device, pick_precision, run_conditions
from utils.process.script import file_log, logger, run_script
from utils.process.seeds import deterministic, seed_everything
from utils.records import folders
from utils.records.attack import save_attack
from utils.records.checkpoint import Origin
from utils.records.contents import ATTACK_RESULT, POISON, SUMMARY, object_in
from utils.records.hashes import checked_hashes
from utils.records.places import attack_folder, free_folder
from utils.records.recipe import require_method
from utils.training import ending
from utils.training.sgd import require_batch
from utils.training.watch import Watch, scorer

MakePlan = Callable[[Any, Setting], Plan]


def train(config: TrainingConfig, name: str, make_plan: MakePlan) -> folders.RunFolder:
    """Trains a model as the plan says and writes its record.

    Returns:
        The record's folder.

    Raises:
        UserError: if the configuration does not fit the data or the record exists.
    """
    started = time.monotonic()
    try:
        folder = free_folder(
            config.save_folder_name,
            config.record_path,
            config.overwrite,
            config.resume,
            config.dump(),
        )
    except NothingToDo:
        _check_finished(config, name)
        raise
    with folder.replacing():
        return _train(config, name, make_plan, folder, started)


def _check_finished(config: TrainingConfig, name: str) -> None:
    """That a finished record has all of its files, and is of this attack and of these images.

    Images are compared only if they are now read elsewhere.

    Raises:
        UserError: if it is not.
    """
    folder = attack_folder(str(config.save_folder_name), as_path(config.record_path)).path
    checked_hashes(folder, (ATTACK_RESULT, POISON))
    summary = read_object(folder / SUMMARY)
    require_method(folder, summary.get("attack"), name, "the record")
    before = object_in(summary, "inputs").get("dataset")
    is_elsewhere = summary.get("dataset_path") != absolute(config.dataset_path)
    if before is None or config.dataset_path is None or not is_elsewhere:
        return
    data = load_dataset(config.dataset, as_path(config.dataset_path), config.image_size)
    if data.fingerprint() != before:
        raise UserError(
            f"--dataset_path: {folder} is finished, with other images than those in "
            f"{shown(config.dataset_path, 200)}; give the folder of those, or another "
            "--save_folder_name, or --overwrite to replace it"
        )


def _train(
    config: TrainingConfig,
    name: str,
    make_plan: MakePlan,
    folder: folders.RunFolder,
    started: float,
) -> folders.RunFolder:
    """As `train`, with the folder that was claimed."""
    with file_log() as open_log, deterministic(config.deterministic):
        device = pick_device(config.device)
        precision = pick_precision(config.precision, device)
        data = load_dataset(config.dataset, as_path(config.dataset_path), config.image_size)
        config = with_target(config, data)
        _check_fit(config, data)
        resized = network_size(config)
        setting = Setting(data, device, precision, config.checkpoint_every)
        check_model(config.model, len(data.classes), config.image_size, resized, setting.warn)
        try_sharing(config, data, device)
        if isinstance(config, AttackConfig):
            tell_target(config, data, setting.warn)
        plan = make_plan(config, setting)
        seed_everything(config.random_seed)
        model = new_model(config, data)
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
        score = scorer(data.test, plan.triggered, device, plan.cross)
        watch = Watch(
            folder, "epoch", score, config.eval_every, config.checkpoint_every, checkpoint
        )
        loop = watch.start()
        train_by_recipe(config, model, plan, loop)
        scores = watch.finish(model)
        if not distributed.is_main():
            return folder
        triggered, exported = plan.triggered(), plan.exported()
        facts = {
            "attack": name,
            "model_name": model_name,
            "model_sha256": model_sha256,
            "network_size": resized,
            "dataset_path": absolute(config.dataset_path),
            "attack_target": config.attack_target if isinstance(config, AttackConfig) else None,
            "attack_label_trans": config.attack_label_trans
            if isinstance(config, AttackConfig)
            else None,
        }
        save_attack(folder, model, data, exported, triggered, plan.cross(), facts)
        title = f"{name} on {data.name}{ending.target_title(facts, data)}"
        pictures = [ending.draw_curves(folder, watch.metrics, "epoch", title)]
        if triggered is not None:
            pictures.append(ending.draw_trigger(folder, model, data, triggered, title, device))
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
                "poisoned_images": int(poison.is_kind(exported.kinds, "poison").sum()),
                **({"preparation": setting.facts} if setting.facts else {}),
            },
            said=[*data.warnings, *setting.warnings],
            warnings=_warnings(scores, len(data.classes)),
            result=ending.table(scores),
            pictures=pictures,
            files=[ATTACK_RESULT, POISON],
            run=ending.run_facts(config, started - watch.earlier, device, precision, inputs),
        )
    return folder


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


def _check_fit(config: TrainingConfig, data: Dataset) -> None:
    if len(data.classes) < 2:
        raise UserError(
            f"--dataset {data.name}: there is one class, {data.classes[0]}; give two or more"
        )
    if isinstance(config, AttackConfig):
        check_target(config.attack_target, data)
        poison.test_images_to_trigger(data, config.attack_label_trans, config.attack_target)
    require_batch(len(data.train), config.batch_size)


def _warnings(scores: Scores, num_classes: int) -> list[str]:
    warnings = []
    if scores.attack_failed:
        warnings.append(
            f"the attack failed: ASR is {scores.asr}, under 50 %; train longer, or raise "
            "--pratio, before any defense"
        )
    if learned_little(scores, num_classes):
        warnings.append(
            f"the model learned little: ACC is {scores.acc} with {num_classes} classes; train "
            "longer"
        )
    return warnings


def main() -> None:
    """Trains a clean model."""
    train(TrainingConfig.from_command_line(sys.argv[1:], __doc__), "prototype", clean_plan)


if __name__ == "__main__":
    run_script(main)
