"""The record that flags name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from utils import config as configuration
from utils.config import Group
from utils.data.datasets import DatasetName
from utils.errors import UserError, shown
from utils.files import CONFIG_FILE, as_path, read_object
from utils.plain import read_yaml
from utils.process.device import Precision
from utils.records import backdoorbench
from utils.records.attack import AttackRecord, is_backdoorbench
from utils.records.contents import SUMMARY
from utils.records.places import find_record
from utils.tensors import explained


@dataclass(frozen=True, kw_only=True)
class OfRecord(configuration.Config):
    """The record that a script reads, and how the script runs."""

    result_file: Annotated[
        str | None,
        Field(description="record, ours or BackdoorBench's: its name, or its folder"),
        Group.RECORD,
    ]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    overwrite: Annotated[bool, Field(description="replace an earlier result of the same name")]
    resume: Annotated[bool, Field(description="go on with an interrupted run")]
    dataset: Annotated[
        str | None, Field(description="must be the record's, from which it is read"), Group.DATA
    ]
    dataset_path: Annotated[
        str | None, Field(description="where the images are now; null for the record's path")
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


def recorded_dataset(folder: Path) -> str | None:
    """The dataset that a record names, read before everything else; None if it names none."""
    if is_backdoorbench(folder):
        return backdoorbench.read_dataset_name(folder)
    for file, read in ((CONFIG_FILE, read_yaml), (SUMMARY, read_object)):
        path = folder / file
        with explained(path, "the summary of a run", "restore the file, or run the attack again"):
            name = read(path).get("dataset") if path.exists() else None
        if name in get_args(DatasetName):
            return str(name)
        if name is not None:
            raise UserError(
                f"{path}: the dataset {shown(str(name), 40)} is none of "
                f"{', '.join(get_args(DatasetName))}; restore the file, or run the attack again"
            )
    return None


def check_dataset(config: OfRecord, attack: AttackRecord) -> None:
    """Raises UserError unless the flag, and what the record's other files say, fit the record.

    Flags without a value are those of the dataset that `recorded_dataset` names.
    """
    if config.dataset not in (None, attack.dataset):
        raise UserError(
            f"--dataset: {config.dataset}, but the record says {attack.dataset}; leave the flag out"
        )
    # Of BackdoorBench's records it reads the very file that the record is from.
    named = None if is_backdoorbench(attack.folder) else recorded_dataset(attack.folder)
    if named not in (None, attack.dataset):
        raise UserError(
            f"{attack.folder}: config.yaml or summary.json says that the dataset is {named}, but "
            f"attack_result.pt says {attack.dataset}; restore the file, or run the attack again"
        )


def named_record(result_file: str | None, record_path: str | None) -> Path:
    """The folder of the record that these flags name.

    Raises:
        UserError: if there is none.
    """
    if result_file is None:
        raise UserError("--result_file: a value is needed; give the name of an attack's record")
    return find_record(result_file, as_path(record_path or None))


def dataset_of_record(values: Mapping[str, Any]) -> str | None:
    """The dataset whose YAML files apply; None without a record, because `--help` needs none.

    Args:
        values: of the flags `result_file` and `record_path`, among others.
    """
    if not values.get("result_file"):
        return None
    return recorded_dataset(named_record(values["result_file"], values.get("record_path")))
