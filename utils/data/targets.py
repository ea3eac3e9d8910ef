"""The target class of an attack: given by label or name, checked, and logged."""

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from utils import config as configuration
from utils.data.labelled import Dataset
from utils.errors import UserError, shown, suggestion
from utils.process.script import logger

W = TypeVar("W", bound=configuration.Config)


def with_target(config: W, data: Dataset) -> W:
    """The configuration with the label of the target class, which may have been given by its name.

    A plain number is a label, if there is one, and else a name. 007 is a name, and so is 1.0, which
    a YAML file has in quotes.

    Raises:
        UserError: if the dataset has no such class.
    """
    target = getattr(config, "attack_target", None)
    if isinstance(target, int) and target >= len(data.classes) and str(target) in data.classes:
        target = str(target)
    if not isinstance(target, str):
        return config
    target = unicodedata.normalize("NFC", target)  # as names of classes are
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
    """Logs number and name of the target; warns if another class has that number as its name."""
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
