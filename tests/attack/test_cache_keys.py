"""What attacks keep between runs has another name if something changes that it depends on.

If an entry of its key is missing, a run with another value reads what the first value made.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import utils.data.images
from attack import inputaware, lc, lf, ssba, trojannn
from attack.recipe import AttackConfig
from attack.setting import Setting
from models import Classifier
from utils.data.labelled import Dataset, Labelled
from utils.records.partial import Partial
from utils.training.watch import Watch

CPU = torch.device("cpu")
TRAINED = ("clean-model", "mask", "ssba-encoder")  # to make it, nothing else is read

# Flags that change nothing that is kept.
RECORD = {"save_folder_name", "record_path", "overwrite", "resume", "checkpoint_every"}
WATCHING = {"eval_every"}
DATA = {"dataset", "dataset_path", "image_size"}  # the name depends on the images themselves
WHERE = {"device", "precision", "deterministic"}  # the setting says what device and precision are
POISONING = {"pratio", "attack_label_trans"}  # decide which images get the finished trigger
NOWHERE = RECORD | WATCHING | DATA | WHERE | POISONING

CLASSIFIER = {"model", "pretrained", "lr", "lr_scheduler", "sgd_momentum", "wd"}
BATCHES = {"batch_size", "crop_padding", "flip"}

# By attack and kind, flags that act only after that is made, or on something else.
WITHOUT_PART = {
    "lc": {
        "lc-hard-images": {"epochs", "patch_amplitude"},
        "clean-model": {"epochs", "patch_amplitude", "adv_step", "adv_steps", "attack_target"},
    },
    "lf": {
        "lf-pattern": set(),
        "clean-model": {
            *("strength", "attack_target"),
            *("search_images", "search_passes", "search_steps", "search_rate"),
        },
    },
    "trojannn": {
        "trojan-patch": {"epochs", "attack_target", "apply"},
        "clean-model": {
            *("epochs", "attack_target", "apply", "neurons", "neuron_choice", "feature_target"),
            *("iterations", "step_size", "start", "reach", "normalize"),
        },
    },
    "ssba": {
        "ssba-encoder": CLASSIFIER | BATCHES | {"epochs", "attack_target", "min_bit_accuracy"},
    },
    "inputaware": {
        "mask": {
            *(CLASSIFIER | {"epochs", "attack_target", "truncate"}),
            *("lr_G", "accumulate_generator_grad"),
        },
    },
}

Prepare = Callable[[Any, Setting], object]
MODEL = {"model": "tiny", "batch_size": 6}
ATTACKS: dict[str, tuple[AttackConfig, Prepare]] = {
    "lc": (lc.Config.load("cifar10", surrogate="adversarial", **MODEL), lc.prepare),
    "lf": (lf.Config.load("cifar10", search=True, **MODEL), lf.prepare),
    "trojannn": (trojannn.Config.load("cifar10", **MODEL), trojannn.prepare),
    "ssba": (ssba.Config.load("cifar10", **MODEL), ssba.prepare),
    "inputaware": (
        inputaware.Config.load("cifar10", pratio=0.25, **MODEL),
        lambda config, setting: inputaware.InputAware(config, setting).before_training(),
    ),
}
OTHER_WORDS: dict[str, Any] = {
    "model": "preactresnet18",
    "lr_scheduler": "constant",
    "surrogate": "plain",
    "neuron_choice": "random",
    "clean_epochs": 3,
    "min_change": 0.03,
    "strength": (9.0,),
    "apply": "wrap",
    "dataset": "cifar100",
    "device": "cuda",
    "precision": "bf16",
    "attack_label_trans": "all2all",
}


def another(name: str, value: Any) -> Any:
    """Another value of a flag."""
    if name in OTHER_WORDS:
        return OTHER_WORDS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if isinstance(value, float) else "elsewhere"


class Asked(Exception):
    """Comes instead of a training."""


@pytest.fixture
def names(tiny_model: Classifier, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """From a way to prepare, its configuration and setting to the files that it wants, by kind."""
    wanted: dict[str, str] = {}

    def cached(
        self: Setting, kind: str, key: Any, compute: Callable[[], Any], version: int = 1
    ) -> Any:
        wanted[kind] = self._name(kind, key, version)
        if kind in TRAINED:
            raise Asked
        return compute()

    def of(prepare: Prepare, config: AttackConfig, setting: Setting) -> dict[str, str]:
        wanted.clear()
        with pytest.raises(Asked):
            prepare(config, setting)
        return dict(wanted)

    monkeypatch.setattr(Setting, "cached", cached)
    monkeypatch.setattr(trojannn, "bare_model", lambda *_: tiny_model)  # also of no real network
    return of


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_flag_that_has_a_part_in_it_changes_its_name(
    attack: str, names: Callable[..., dict[str, str]], tiny_data: Dataset
) -> None:
    """`search` decides whether anything is kept at all; the other flags are tried in turn."""
    config, prepare = ATTACKS[attack]
    setting = Setting(tiny_data, CPU, "fp32")
    before = names(prepare, config, setting)
    assert before == names(prepare, config, setting)
    assert before.keys() == WITHOUT_PART[attack].keys()
    flags = {field.name for field in dataclasses.fields(config)} - {"search"}
    changing: dict[str, set[str]] = {kind: set() for kind in before}
    for name in flags:
        value = another(name, getattr(config, name))
        assert value != getattr(config, name), name
        after = names(prepare, dataclasses.replace(config, **{name: value}), setting)
        for kind in before:
            if after[kind] != before[kind]:
                changing[kind].add(name)
    assert changing == {
        kind: flags - NOWHERE - without for kind, without in WITHOUT_PART[attack].items()
    }


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_data_and_another_precision_of_the_classifier_change_its_name(
    attack: str, names: Callable[..., dict[str, str]], tiny_data: Dataset
) -> None:
    """One pixel of the training images. Networks of the attack are computed in fp32 in any case."""
    config, prepare = ATTACKS[attack]
    setting = Setting(tiny_data, CPU, "fp32")
    before = names(prepare, config, setting)
    images = tiny_data.train.images.clone()
    images[3, 0, 0, 0] += 1
    data = dataclasses.replace(tiny_data, train=Labelled(images, tiny_data.train.labels))
    after = names(prepare, config, dataclasses.replace(setting, data=data))
    assert before.keys() == after.keys()
    assert not any(before[kind] == after[kind] for kind in before)
    after = names(prepare, config, dataclasses.replace(setting, precision="bf16"))
    for kind in before:
        assert (before[kind] == after[kind]) == (kind in ("mask", "ssba-encoder"))


@pytest.mark.parametrize("constant", ["mean", "std"])
def test_a_mask_is_of_images_normalized_alike(
    constant: str, names: Callable[..., dict[str, str]], tiny_data: Dataset
) -> None:
    config, prepare = ATTACKS["inputaware"]
    data = dataclasses.replace(tiny_data, **{constant: (0.6, 0.6, 0.6)})
    before, after = (names(prepare, config, Setting(d, CPU, "fp32")) for d in (tiny_data, data))
    assert before["mask"] != after["mask"]


def test_what_another_version_of_the_code_trained_is_not_read_and_not_gone_on_with(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version has a file of its own, and a checkpoint of its own."""
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    checkpoints: list[Path] = []

    def partial(path: Path) -> Partial:
        checkpoints.append(path)
        return Partial(path)

    monkeypatch.setattr("attack.setting.Partial", partial)
    setting = Setting(tiny_data, CPU, "fp32")
    made = iter([torch.tensor(1), torch.tensor(2)])

    def train(watch: Watch) -> dict[str, torch.Tensor]:
        watch.start()
        watch.end()
        return {"v": next(made)}

    for version in (1, 2, 2, 1):
        assert int(setting.trained("x", {"a": 1}, train, version=version)["v"]) == version
    assert len(set(checkpoints)) == 2
