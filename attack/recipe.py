"""The recipe of a training run: its flags, its network, SGD, and what an attack changes in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from attack.setting import Setting
from models import (
    Classifier,
    build_model,
    load_pretrained,
    model_identity,
    pretrained_size,
)
from models import prepare as prepare_model
from utils import config as configuration
from utils.config import Group
from utils.data import poison
from utils.data.datasets import DatasetName
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.metrics import Scores
from utils.process import distributed
from utils.process.device import Precision
from utils.process.script import logger
from utils.process.seeds import generator, seed_everything
from utils.records.network import model_state
from utils.training.evaluate import evaluate
from utils.training.guard import run_soundly
from utils.training.loop import Loop, Step
from utils.training.sgd import Schedule, Supervised, train_classifier
from utils.training.watch import Watch
from utils.values import OrName


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(configuration.Config):
    """The training recipe."""

    yaml_folder = "prototype"

    save_folder_name: Annotated[
        str | None, Field(description="name of the record to write"), Group.RECORD
    ]
    record_path: Annotated[
        str | None, Field(description="folder of all records; null for record/ of the checkout")
    ]
    overwrite: Annotated[bool, Field(description="replace a record of that name")]
    resume: Annotated[bool, Field(description="go on with an interrupted run")]
    checkpoint_every: Annotated[
        float, Field(ge=0, description="seconds between two checkpoints to resume from")
    ]
    dataset: Annotated[
        DatasetName,
        Field(description="training and test images; picks the recipe of that name"),
        Group.DATA,
    ]
    dataset_path: Annotated[
        str | None, Field(description="folder of the images or downloads; null for data/")
    ]
    image_size: Annotated[int, Field(ge=8, le=1024, description="side of the images in pixels")]
    model: Annotated[
        str,
        Field(description="preactresnet18, a torchvision classifier, or your own file.py:function"),
        Group.NETWORK,
    ]
    pretrained: Annotated[bool, Field(description="start from torchvision's weights")]
    epochs: Annotated[int, Field(ge=1, description="passes over the training set"), Group.TRAINING]
    batch_size: Annotated[int, Field(ge=2, description="images per step")]
    lr: Annotated[float, Field(gt=0, description="peak learning rate of SGD")]
    lr_scheduler: Annotated[Schedule, Field(description="how the learning rate changes")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    wd: Annotated[float, Field(ge=0, description="weight decay of SGD")]
    crop_padding: Annotated[
        int, Field(ge=0, le=64, description="pixels added around an image before its random crop")
    ]
    flip: Annotated[bool, Field(description="mirror images at random")]
    random_seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="seed of everything drawn"), Group.RUNNING
    ]
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")]
    precision: Annotated[Precision, Field(description="auto is bf16 where the hardware has it")]
    deterministic: Annotated[
        bool, Field(description="the same bits every time on a GPU too; may be slower")
    ]
    eval_every: Annotated[
        int, Field(ge=1, description="epochs between two evaluations"), Group.TRAINING
    ]


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TrainingConfig):
    """What all backdoor attacks have in common."""

    yaml_folder = "prototype"
    flags_title = "This attack"

    pratio: Annotated[
        float,
        Field(gt=0, le=1, description="poisoned images / all training images"),
        Group.POISONING,
    ]
    attack_target: Annotated[
        int,
        Field(ge=0, description="label, or class, that triggered images shall get (all2one)"),
        OrName,
    ]
    attack_label_trans: Annotated[
        poison.LabelMap, Field(description="target for all images, or y -> (y + 1) mod classes")
    ]


class Plan:
    """What a run does to training and to test images: nothing, unless an attack says otherwise.

    Args:
        training: the set to train on.
        step: how a batch's loss is made.

    Attributes:
        drop_last: whether an epoch skips a last batch that is not full.
        whole: whether the step needs the batch as a whole, also with several processes.
    """

    drop_last = True
    whole = False

    def __init__(self, training: poison.PoisonedSet, step: Step) -> None:
        self.training, self.step = training, step

    def triggered(self) -> Triggered | None:
        """The triggered test images, as they are now; None for a clean model."""
        return None

    def cross(self) -> Labelled | None:
        """Test images whose trigger must not work, with their true labels."""
        return None

    def exported(self) -> poison.PoisonedSet:
        """The poisoned training images for the record."""
        return self.training


def clean_plan(config: TrainingConfig, setting: Setting) -> Plan:
    """Ordinary training on the images as they are."""
    return Plan(poison.unpoisoned(setting.data.train), supervised(config, setting))


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
        variant: everything that `step` depends on in addition to the recipe.
    """
    data = setting.data

    def compute(watch: Watch) -> dict[str, torch.Tensor]:
        seed_everything(config.random_seed)
        model = new_model(config, data)
        prepare_model(model, setting.device, setting.precision)
        logger.info("training a clean %s for the trigger, %d epochs", config.model, epochs)
        plan = clean_plan(config, setting)
        plan.step = step or plan.step
        train_by_recipe(replace(config, epochs=epochs), model, plan, watch.start())
        watch.finish(model)
        return model_state(model)

    key = recipe(config, setting) | dict(variant or {}) | {"epochs": epochs}

    def score(model: nn.Module) -> Scores:
        return evaluate(model, data.test, None, setting.device)

    state = setting.trained("clean-model", key, compute, score)
    model = bare_model(config, data)
    model.network.load_state_dict(state)
    model = prepare_model(model, setting.device, setting.precision)
    model.eval()
    model.requires_grad_(False)
    return model


def learned_little(scores: Scores, num_classes: int) -> bool:
    """Whether ACC is under one and a half times what guessing reaches."""
    return scores.acc.value < 1.5 / num_classes


def recipe(config: TrainingConfig, setting: Setting) -> dict[str, Any]:
    """All that a trained model depends on, except data and epochs; for `Setting.cached`."""
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


def network_size(config: TrainingConfig) -> int | None:
    """The side to which the network itself resizes images; None if it takes them as they are."""
    return pretrained_size(config.model, config.image_size) if config.pretrained else None


def bare_model(config: TrainingConfig, data: Dataset) -> Classifier:
    """The configured architecture for the data, with new weights from the global generator."""
    return build_model(
        config.model,
        len(data.classes),
        data.mean,
        data.std,
        image_size=config.image_size,
        network_size=network_size(config),
    )


def new_model(config: TrainingConfig, data: Dataset) -> Classifier:
    """A model as training starts with it; its new weights are from the global generator."""
    model = bare_model(config, data)
    if config.pretrained:
        logger.info("starting from %s", load_pretrained(model.network, config.model))
    return model


def try_sharing(config: TrainingConfig, data: Dataset, device: torch.device) -> None:
    """Raises UserError if there are several processes, which cannot train such a network as one."""
    if distributed.processes() == 1:
        return
    with torch.random.fork_rng(devices=[]):  # new weights are drawn, which nobody sees
        model = bare_model(config, data)
        with run_soundly(model):
            distributed.try_sharing(model, torch.zeros(2, *data.image_shape), device)


def train_by_recipe(config: TrainingConfig, model: Classifier, plan: Plan, loop: Loop) -> None:
    """Trains the model as flags and plan say; in place."""
    with run_soundly(model):
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


def supervised(config: TrainingConfig, setting: Setting) -> Supervised:
    """The step of ordinary training."""
    rng = generator(config.random_seed, "augmentation", setting.device)
    return Supervised(config.crop_padding, config.flip, rng)
