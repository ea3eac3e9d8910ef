"""The pipeline of attacks that poison data: a trigger, images that get it, ordinary training."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from attack.prototype import run_plan
from attack.recipe import AttackConfig, Plan, supervised
from attack.setting import Setting
from utils.data import poison
from utils.data.labelled import Triggered
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Step

C = TypeVar("C", bound=AttackConfig)


Choose = Callable[[C, torch.Tensor, int, torch.Generator], poison.Choice]


class PoisonedPlan(Plan):
    """Ordinary training on a poisoned set.

    Args:
        training: the set to train on.
        step: how a batch's loss is made.
        triggered: the triggered test images.
    """

    def __init__(self, training: poison.PoisonedSet, step: Step, triggered: Triggered) -> None:
        super().__init__(training, step)
        self._triggered = triggered

    def triggered(self) -> Triggered:
        return self._triggered


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
        prepare: makes what the trigger needs, if this takes long; keeps it with `Setting.cached`.
    """

    def plan(config: C, setting: Setting) -> Plan:
        data = setting.data
        # Before what takes long, because it refuses ratios and targets that do not fit.
        rng = generator(config.random_seed, "poisoned indices")
        choice = choose(config, data.train.labels, len(data.classes), rng)
        choice.check(len(data.train), len(data.classes))
        wanted = poison.poison_count(len(data.train), config.pratio)
        poisoned_images = int(poison.is_kind(choice.kinds, "poison").sum())
        if poisoned_images < wanted:
            ratio = f"ratio {poisoned_images / len(data.train):.4f} of the training set"
            setting.warn(
                f"{wanted} poisoned images wanted, but class {data.named(config.attack_target)} "
                f"has {poisoned_images}; all of them are poisoned ({ratio})"
                if choose is clean_label
                else f"{wanted} poisoned images wanted, but the attack chose {poisoned_images} "
                f"({ratio})"
            )
        extra = () if prepare is None else (prepare(config, setting),)
        trigger = make_trigger(config, data.image_shape, *extra)
        triggers = (
            trigger if isinstance(trigger, poison.Triggers) else poison.Triggers(trigger, trigger)
        )
        poisoned = poison.replace_images(data.train, choice, triggers.train)
        triggered = poison.triggered_test_set(
            data, triggers.test, config.attack_label_trans, config.attack_target
        )
        return PoisonedPlan(poisoned, supervised(config, setting), triggered)

    run_plan(config_class, plan)
