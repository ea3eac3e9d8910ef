"""SIG: the stripes to the grey level, and images of the target class alone."""

import math
import runpy
from typing import Any

import pytest
import torch

from attack.poisoning import clean_label, run
from attack.setting import Setting
from attack.sig import Config, make_trigger
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import ROOT

SHAPES = [(channels, size, size) for channels in (1, 3) for size in (16, 28, 32, 64)]


def triggered(images: torch.Tensor, **overrides: object) -> torch.Tensor:
    config = Config.load("cifar10", **overrides)
    return make_trigger(config, tuple(images.shape[1:]))(images, torch.arange(len(images)))


def constant(value: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.full((2, *shape), value, dtype=torch.uint8)


def test_a_grey_image_at_32() -> None:
    """Floor of 128 + 40 sin(2 pi 6 j / 32): six cycles are three in each half of the image.

    At j = 3 the sine is sin(9 pi / 8) = -0.3827, hence floor(128 - 15.31) = 112. At j = 16 it is
    zero, which float64 has as -1e-15: a sum in float64 would be truncated to 127.
    """
    half = [128, 164, 156, 112, 88, 112, 156, 164, 128, 91, 99, 143, 168, 143, 99, 91]
    found = triggered(constant(128, (3, 32, 32)))
    assert found.dtype == torch.uint8
    assert found[0, 0, 0].tolist() == half + half


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image(shape: tuple[int, int, int], value: int) -> None:
    """Each column is floor(clip(c + S)), the same in every row and channel."""
    width = shape[2]
    cycles = 3 if width == 16 else 6
    waves = [round(40 * math.sin(2 * math.pi * cycles * j / width), 6) for j in range(width)]
    expected = [math.floor(min(max(value + wave, 0), 255)) for wave in waves]
    images = constant(value, shape)
    found = triggered(images)
    assert found.flatten(0, 2).unique(dim=0).tolist() == [expected]
    assert images.unique().tolist() == [value]
    assert (found.int() - value).abs().max() <= 40


@pytest.mark.parametrize(("width", "zeros"), [(16, 8), (28, 7), (32, 8), (64, 16)])
def test_columns_where_the_sine_is_zero_stay(width: int, zeros: int) -> None:
    """sin(2 pi f j / W) is zero where 2 f j / W is whole: 6 j / 16, 12 j / 28, 12 j / 32, ..."""
    found = triggered(constant(128, (1, width, width)))[0, 0, 0]
    assert torch.nonzero(found == 128).flatten().tolist() == list(range(0, width, zeros))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_images(shape: tuple[int, int, int]) -> None:
    images = torch.randint(
        0, 256, (20, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    change = triggered(images).int() - images.int()
    assert change.abs().max() <= 40
    stripes = triggered(constant(128, shape))[:1].int() - 128
    inside = (images.int() + stripes >= 0) & (images.int() + stripes <= 254)
    assert torch.equal(change[inside], stripes.expand_as(change)[inside])


def test_strength_at_32() -> None:
    """A sine has the mean square 40^2 / 2: sqrt(3072 / 2) * 40 / 255 = 6.148 without clipping.

    Truncation moves the stored values by half a grey level on average, hence the 0.02.
    """
    change = (triggered(constant(128, (3, 32, 32)))[0].double() - 128) / 255
    assert change.norm() == pytest.approx(6.148, abs=0.02)


def test_delta_and_frequency() -> None:
    """One cycle over 8 pixels: sin is 0, .7071, 1, .7071, 0, ...; 10 * .7071 = 7.07."""
    found = triggered(constant(100, (1, 8, 8)), delta=10.0, frequency=1)
    assert found[0, 0, 0].tolist() == [100, 107, 110, 107, 100, 92, 90, 92]


@pytest.mark.parametrize(("frequency", "width", "most"), [(16, 32, 15), (8, 16, 7), (14, 28, 13)])
def test_a_frequency_that_the_pixels_cannot_show_is_refused(
    frequency: int, width: int, most: int
) -> None:
    """At W / 2 cycles every column is a zero of the sine."""
    message = rf"^--frequency: {frequency} cycles .* {width} pixels; give at most {most}$"
    with pytest.raises(UserError, match=message):
        triggered(constant(128, (3, width, width)), frequency=frequency)
    assert triggered(constant(128, (3, width, width)), frequency=most).unique().numel() > 1


def test_the_script_poisons_the_target_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 images of ten classes, 5 % are five images of class 3, which keep their label."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("attack.poisoning.run", lambda *_, **options: calls.append(options))
    runpy.run_path(str(ROOT / "attack/sig.py"), run_name="__main__")
    choose = calls[0]["choose"]
    assert callable(choose)
    config = Config.load("cifar10", pratio=0.05, attack_target=3)
    labels = torch.arange(100) % 10
    first, again, other = (
        choose(config, labels, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert len(first.index) == 5
    assert labels[first.index].tolist() == first.labels.tolist() == [3] * 5
    assert first.index.tolist() == sorted(set(first.index.tolist()))
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.index, other.index)


def test_the_ratio_is_of_all_images_and_capped_by_the_class() -> None:
    """Of 100 images of ten classes, 10 % are the whole class; 20 % too."""
    labels = torch.arange(100) % 10
    rng = torch.Generator().manual_seed(0)
    whole = clean_label(Config.load("cifar10"), labels, 10, rng)
    assert whole.index.tolist() == list(range(0, 100, 10))
    capped = clean_label(Config.load("cifar10", pratio=0.2), labels, 10, rng)
    assert capped.index.tolist() == whole.index.tolist()


def test_a_capped_ratio_is_said_in_the_summary(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of 12 are 6 images, but the class has 4."""
    plans: list[Any] = []
    monkeypatch.setattr("attack.poisoning.run_plan", lambda _, plan: plans.append(plan))
    run(Config, make_trigger, choose=clean_label)
    setting = Setting(tiny_data, torch.device("cpu"), "fp32")
    plans[0](Config.load("cifar10", pratio=0.5, attack_target=1), setting)
    (warning,) = setting.warnings
    assert warning.startswith("6 poisoned images wanted, but class 1 (bee) has 4; ")
    plans[0](Config.load("cifar10", pratio=0.25), setting)
    assert setting.warnings == [warning]


def test_all_to_all_is_refused() -> None:
    config = Config.load("cifar10", attack_label_trans="all2all")
    with pytest.raises(UserError, match=r"^--attack_label_trans: .* give all2one$"):
        clean_label(config, torch.arange(10), 10, torch.Generator())
