"""The clean models that an inspection compares with: those that are named, and those it trains."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from torch import nn

from analysis.base import BEFORE
from analysis.subject import RecordConfig, Subject, load_clean
from attack.prototype import train
from attack.recipe import TrainingConfig, clean_plan
from models import prepare
from utils.config import OF_ONE_RUN
from utils.errors import UserError
from utils.files import CONFIG_FILE, as_path
from utils.plain import read_yaml
from utils.process import distributed
from utils.records import places
from utils.records.attack import AttackRecord
from utils.records.lock import Lock
from utils.records.recipe import recipe_sha256


def clean_records(
    subject: Subject, config: RecordConfig, named: Sequence[str]
) -> dict[str, AttackRecord]:
    """Some records of clean models, by their short names.

    Args:
        named: names or folders of records.

    Raises:
        UserError: if two of them, or one of them and another model here, share a name, or if they
            are the same model, which would count twice.
    """
    taken = {purified.name for purified in subject.purified} | {BEFORE}
    records: dict[str, AttackRecord] = {}
    of_content: dict[str, str] = {}
    for name in dict.fromkeys(named):
        record = load_clean(name, "--clean_records", config.record_path, subject.data)
        short = record.folder.name
        if short in records or short in taken:
            raise UserError(
                f"--clean_records: {name}: another model here is called {short}, too; rename the "
                "record, or leave one out"
            )
        if subject.attack is not None and record.sha256 == subject.attack.sha256:
            raise UserError(
                f"--clean_records: {name} is the model that is inspected; give other ones"
            )
        twin = of_content.setdefault(record.sha256, name)
        if twin != name:
            raise UserError(
                f"--clean_records: {name} is the same model as {twin}, and would count twice; "
                "leave one out"
            )
        records[short] = record
    return records


def built(record: AttackRecord, subject: Subject, config: RecordConfig) -> nn.Module:
    """The model of a clean record, in eval mode, on the subject's device."""
    model = record.build(config.model if record.model_sha256 else None)
    return prepare(model, subject.device, subject.precision)


def train_clean(subject: Subject, config: RecordConfig, count: int) -> list[str]:
    """Trains clean models by the recipe of the record, if that was not done before.

    Args:
        count: how many there shall be.

    Returns:
        The names of their records, which begin with `clean-`.
    """
    names = []
    for number in range(count):
        recipe = clean_recipe(subject, config, number)
        values = {**asdict(recipe), "save_folder_name": None}
        # A folder of images, or a user's file, may have had another content.
        values |= {"content": [subject.data.fingerprint(), subject.model_sha256]}
        name = f"clean-{recipe_sha256(values)[:8]}-s{recipe.random_seed}"
        folder = places.attack_folder(name, as_path(config.record_path))
        with distributed.main_alone() as is_mine:
            if is_mine and not folder.is_done:  # perhaps another inspection is training it
                Lock(folder.path).wait(name)
        try:
            if not distributed.from_main(folder.is_done):
                begun = folder.checkpoint.exists()
                train(replace(recipe, save_folder_name=name, resume=begun), "prototype", clean_plan)
        finally:
            folder.release()
        names.append(name)
    return names


def clean_recipe(subject: Subject, config: RecordConfig, number: int) -> TrainingConfig:
    """How a clean model is trained: as the record's model, with another seed."""
    recorded = {}
    if subject.attack is not None and (subject.attack.folder / CONFIG_FILE).exists():
        recorded = read_yaml(subject.attack.folder / CONFIG_FILE)
    not_of_recipe = {"save_folder_name", "dataset", *OF_ONE_RUN}
    names = {field.name for field in fields(TrainingConfig)} - not_of_recipe
    values = {name: value for name, value in recorded.items() if name in names}
    model = config.model if subject.model_sha256 else subject.model_name
    values |= {
        "record_path": config.record_path,
        "model": model,
        "image_size": subject.data.image_shape[1],
        "random_seed": 1000 + number,
        "device": config.device,
        "precision": config.precision,
    }
    if config.dataset_path is not None:
        values["dataset_path"] = config.dataset_path
    return TrainingConfig.load(subject.data.name, **values)
