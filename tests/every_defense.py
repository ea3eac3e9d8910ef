"""Every defense, in a configuration that takes no time and still changes a small network.

What a defense has is read off its `Config`, so that a new one needs no word here. One that would do
nothing within a few passes gets values of its own in `SPECIAL`.
"""

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

from torch import nn

import defense
from defense.base import DefenseConfig
from models.parts import bare

MOST = 3  # passes, epochs, steps and the like, where the shipped value is more

# By field. Thresholds are such that something exceeds them, and what can be drawn is drawn.
VALUES: dict[str, Any] = {
    "batch_size": 16,
    "eval_every": 1,
    "nb_iter": 9,
    "inversion_rounds": 2,
    "identity_epochs": 2,
    "mask_epochs": 2,
    "generator_epochs": 2,
    "u": 0.5,
    "mad_threshold": 0.0,
    "acc_ratio": 1.0,  # networks without training choose nothing
    "pruning_number": 0.9,
    "pgd_init": "random",
    "crop_padding": 2,
    "flip": True,
}

# By the name of a defense; they go over those above.
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"batch_size": 24, "n_rounds": 2} for name in ("bti_dbf", "pam")},  # of many phases
    "ibau": {"portion": 0.25},  # an image of a small batch, not none
    "ims": {"lmd": 0.0, "lr": 0.2},
}


def module(name: str) -> ModuleType:
    """The module of a defense."""
    return importlib.import_module(f"defense.{name}")


def fields(config: type[DefenseConfig] | DefenseConfig) -> list[str]:
    """The names of a configuration's values."""
    return [field.name for field in dataclasses.fields(config)]


def of_the_method(config: DefenseConfig) -> dict[str, Any]:
    """The values beside those that every defense has, which say where and how it runs."""
    of_all = fields(DefenseConfig)
    return {name: getattr(config, name) for name in fields(config) if name not in of_all}


def last_convolution(model: nn.Module) -> str:
    """The name of a network's last Conv2d."""
    modules = bare(model).named_modules()
    return [name for name, part in modules if isinstance(part, nn.Conv2d)][-1]


def shortened(name: str, model: nn.Module, **changes: Any) -> DefenseConfig:
    """The configuration of a defense for the digits, with few passes.

    Args:
        model: the network that it is for.
        changes: more values; those of fields that the defense lacks are ignored.
    """
    return _shortened(name, last_convolution(model), tuple(changes.items()))


@functools.cache  # reading the YAML files takes longer than many a defense
def _shortened(name: str, last: str, changes: tuple[tuple[str, Any], ...]) -> DefenseConfig:
    config = module(name).Config.load("digits")
    counts = {
        field: min(value, MOST)
        for field, value in of_the_method(config).items()
        if type(value) is int  # a bool is no count
    }
    layer = {"target_layer_name": last, "attention_layers": (last,)}
    values = {**counts, **VALUES, **layer, **SPECIAL.get(name, {}), **dict(changes)}
    known = {field: value for field, value in values.items() if field in fields(config)}
    return module(name).Config.load("digits", **known)


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and changes by id: each defense once, or once for each way in which it chooses."""
    ways = {
        "selection": ("val", "fixed"),
        "stop": ("rounds", "auto"),
        "pairs": ("order", "direct"),
    }
    ids: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in defense.names():
        flags = [flag for flag in ways if flag in fields(module(name).Config)]
        ids |= {f"{name}-{way}": (name, {flag: way}) for flag in flags for way in ways[flag]}
        ids |= {} if flags else {name: (name, {})}
    return ids
