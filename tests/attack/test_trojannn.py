"""TrojanNN: the disc, the neurons, the inversion and the three ways to place the patch."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import utils.data.images
from attack.setting import Setting
from attack.trojannn import (
    Config,
    disc,
    invert,
    make_trigger,
    neurons_of,
    penultimate,
    place,
    prepare,
    strongest,
)
from models import Classifier
from utils.data.labelled import Dataset, Labelled
from utils.errors import UserError

CPU = torch.device("cpu")


def config(**changes: object) -> Config:
    values: dict[str, object] = {"dataset": "digits", "model": "tiny", "batch_size": 6}
    values |= {"clean_epochs": 1, "iterations": 30, "crop_padding": 0}
    return Config.load(**(values | changes))


@pytest.fixture
def setting(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    return Setting(tiny_data, CPU, "fp32")


@pytest.mark.parametrize(("size", "pixels"), [(16, 21), (28, 54), (32, 76), (64, 292)])
def test_the_disc_has_seven_percent_of_the_pixels(size: int, pixels: int) -> None:
    """Its area is pi 0.15^2 = 7.07 % of the image: 18.1, 55.4, 72.4, 289.5 pixels; the counts are
    those of pixel centres inside.
    """
    mask = disc(size, size)
    assert mask.shape == (size, size)
    assert int(mask.sum()) == pixels
    assert pixels == pytest.approx(math.pi * 0.15**2 * size**2, abs=4)


def test_the_disc_is_in_the_lower_right() -> None:
    """At 32 pixels the centre is 23.04 and the radius 4.8: centres 18.5 to 27.5, rows 18 to 27."""
    mask = disc(32, 32)
    inside = torch.nonzero(mask)
    assert inside.min(dim=0).values.tolist() == [18, 18]
    assert inside.max(dim=0).values.tolist() == [27, 27]
    assert torch.equal(mask, mask.T)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("paste", [255, 200, 44, 178]), ("clip", [255, 255, 255, 255]), ("wrap", [254, 144, 43, 128])],
)
def test_what_each_mode_makes_of_a_sum(how: str, expected: list[int]) -> None:
    """Pixels 255 200 255 206 and patch 255 200 44 178: sums 510 400 299 384; minus 256 they are
    254 144 43 128.
    """
    images = torch.tensor([255, 200, 255, 206], dtype=torch.uint8).view(1, 1, 1, 4)
    patch = torch.tensor([255, 200, 44, 178], dtype=torch.uint8).view(1, 1, 4)
    found = place(images, patch, torch.ones(1, 4, dtype=torch.bool), how)  # type: ignore[arg-type]
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == expected


def test_sums_that_wrap_are_modulo_256() -> None:
    """1 + 255 = 256 -> 0, 100 + 200 = 300 -> 44, 255 + 255 = 510 -> 254."""
    images = torch.tensor([1, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    patch = torch.tensor([255, 200, 255], dtype=torch.uint8).view(1, 1, 3)
    found = place(images, patch, torch.ones(1, 3, dtype=torch.bool), "wrap")
    assert found.flatten().tolist() == [0, 44, 254]


def test_a_white_patch_that_wraps_is_nearly_invisible() -> None:
    """x + 255 modulo 256 is x - 1, and 255 where x is 0."""
    images = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    white = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    found = place(images, white, torch.ones(16, 16, dtype=torch.bool), "wrap")
    assert found.flatten().tolist() == [255, *range(255)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("how", ["paste", "clip", "wrap"])
def test_pixels_outside_the_disc_stay(how: str, size: int, channels: int) -> None:
    """On constant 0, 128, 255 and random images; the patch's values outside are ignored."""
    source = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, channels, size, size), dtype=torch.uint8, generator=source)
    for row, value in enumerate((0, 128, 255)):
        images[row] = value
    before = images.clone()
    patch = torch.full((channels, size, size), 100, dtype=torch.uint8)
    trigger = make_trigger(config(apply=how), (channels, size, size), patch)
    found = trigger(images, torch.arange(4))
    mask = disc(size, size)
    assert found.dtype == torch.uint8
    assert torch.equal(images, before)
    assert torch.equal(found[:, :, ~mask], images[:, :, ~mask])
    inside = {"paste": [100, 100, 100], "clip": [100, 228, 255], "wrap": [100, 228, 99]}[how]
    for row, value in enumerate(inside):
        assert (found[row][:, mask] == value).all()
    if how == "paste":
        assert (found[:, :, mask] == 100).all()


def test_the_strongest_neurons_have_the_largest_sums_of_weights() -> None:
    """Columns sum to 3, 0.5, 7 and 4 in magnitude."""
    weight = torch.tensor([[1.0, 0.5, -3.0, 4.0], [-2.0, 0.0, 4.0, 0.0]])
    assert strongest(weight, 2).tolist() == [2, 3]
    assert strongest(weight, 4).tolist() == [2, 3, 0, 1]


def test_features_are_what_the_last_linear_layer_reads(tiny_model: Classifier) -> None:
    tiny_model.eval()
    network = tiny_model.network
    images = torch.rand(2, 3, 8, 8)
    name, layer = neurons_of(network, (3, 8, 8))
    assert name == "linear"
    features = penultimate(network, images, name)
    assert features.shape == (2, 4)
    assert torch.equal(layer(features), network(images))
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_more_neurons_than_features_are_refused_before_training(setting: Setting) -> None:
    with pytest.raises(UserError, match=r"--neurons: 513, but .* has 512 features; give that or"):
        prepare(Config.load("cifar10", neurons=513), setting)


def test_a_network_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model: .* no linear layer"):
        neurons_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (3, 8, 8))


def test_a_layer_that_is_not_called_has_no_neurons() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    network[1].register_module("idle", nn.Linear(2, 2))
    assert neurons_of(network, (3, 2, 2)) == ("1", network[1])


def test_the_chosen_features_grow(tiny_model: Classifier) -> None:
    """The cost of the kept patch is never above that of the start; here it is strictly below."""
    tiny_model.eval()
    mask = disc(8, 8).float().expand(3, -1, -1)
    neurons = torch.tensor([2, 0])
    patch, before, after = invert(tiny_model, neurons, mask, config())
    assert ((after - 100).square().sum() < (before - 100).square().sum()).item()
    assert after.sum() > before.sum()
    assert patch.shape == (3, 8, 8)
    assert (patch[mask == 0] == 0).all()
    assert patch.min() >= 0
    assert patch.max() <= 1
    found = penultimate(tiny_model.network, tiny_model.normalize(patch[None]), "linear")[0, neurons]
    torch.testing.assert_close(found, after)
    start = penultimate(tiny_model.network, tiny_model.normalize(0.5 * mask[None]), "linear")[
        0, neurons
    ]
    torch.testing.assert_close(start, before)


@pytest.mark.parametrize("iterations", [2, 3, 4, 5])
def test_the_best_patch_is_kept(iterations: int) -> None:
    """The feature is the mean of the disc: 0.5, 0.6, 0.7, then 0.8 and 0.7 in turn; 0.72 is wanted.

    Whichever step is the last one, the patch is that of 0.7.
    """
    mask = disc(8, 8).float().expand(3, -1, -1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 1, bias=False), nn.Linear(1, 2))
    network[1].weight.data = mask.reshape(1, -1) / mask.sum()
    model = Classifier(network, (0.5,) * 3, (0.5,) * 3).eval()
    flags = config(feature_target=0.72, iterations=iterations, normalize=False)
    patch, before, after = invert(model, torch.tensor([0]), mask, flags)
    torch.testing.assert_close(patch, 0.7 * mask)
    assert before.item() == pytest.approx(0.5)
    assert after.item() == pytest.approx(0.7)


def test_the_published_steps_leave_four_values(tiny_model: Classifier) -> None:
    """From 1, steps of 0.1 within 0.3 of the start and within [0, 1]: 1, 0.9, 0.8 or 0.7."""
    tiny_model.eval()
    mask = disc(8, 8).float().expand(3, -1, -1)
    settings = config(start=1.0, reach=0.3, normalize=False)
    patch, _, _ = invert(tiny_model, torch.tensor([1, 3]), mask, settings)
    inside = patch[mask == 1] * 10
    assert set(inside.round().int().tolist()) <= {7, 8, 9, 10}
    torch.testing.assert_close(inside, inside.round())
    assert (patch[mask == 0] == 0).all()


def test_another_version_of_the_code_reads_no_earlier_file(setting: Setting) -> None:
    made = iter([torch.tensor(1), torch.tensor(2)])
    for version in (1, 2, 2, 1):
        found = setting.cached("x", {"a": 1}, lambda: {"v": next(made)}, version)
        assert int(found["v"]) == version
    assert len(list((utils.data.images.ROOT / "data/cache").iterdir())) == 2


def test_what_another_kind_of_device_made_is_not_read(setting: Setting) -> None:
    """Its numbers are others; a run would depend on which device ran first."""
    made = iter([torch.tensor(1), torch.tensor(2)])
    for kind, expected in (("cpu", 1), ("cuda", 2), ("cpu", 1)):
        there = replace(setting, device=torch.device(kind))
        assert int(there.cached("x", {}, lambda: {"v": next(made)})["v"]) == expected


def test_what_was_made_of_another_image_is_not_read(setting: Setting) -> None:
    """The fingerprint of a record looks at each second one of 1000 images."""
    images = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    before = Dataset(
        "d", Labelled(images, torch.arange(1000) % 2), setting.data.test, ("a", "b"), (0.5,), (0.5,)
    )
    changed = images.clone()
    changed[999, 0, 1, 1] = 1
    after = replace(before, train=replace(before.train, images=changed))
    assert before.fingerprint() == after.fingerprint()
    others = [after, replace(before, classes=("a", "c")), replace(before, mean=(0.4,))]
    made = iter(range(10))
    read = [
        int(
            replace(setting, data=data).cached("x", {}, lambda: {"v": torch.tensor(next(made))})[
                "v"
            ]
        )
        for data in (before, *others, before, *others)
    ]
    assert read == [0, 1, 2, 3] * 2


def test_the_images_are_read_once_for_the_names_of_caches(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("attack.setting.digest", lambda tensors: calls.append(1) or "0")
    for kind in ("x", "y"):
        setting.cached(kind, {}, lambda: {"v": torch.tensor(0)})
    assert calls == [1]


def test_the_patch_is_grey_levels_inside_the_disc(
    setting: Setting, tiny_model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values 0.7, 0.8, 0.9 and 1 are cut down to 178, 204, 229 and 255."""
    values = torch.tensor([0.7, 0.8, 0.9, 1.0])
    monkeypatch.setattr(
        "attack.trojannn.invert", lambda *_: (values.view(1, 2, 2), torch.zeros(2), torch.ones(2))
    )
    assert prepare(config(), setting).flatten().tolist() == [178, 204, 229, 255]


@pytest.mark.parametrize("choice", ["trained", "random"])
def test_the_patch_depends_on_the_seed_alone(
    setting: Setting, tiny_model: Classifier, choice: str
) -> None:
    """Model and patch are made once, then read from the cache; a global draw changes nothing."""
    first = prepare(config(neuron_choice=choice), setting)
    facts = dict(setting.facts)
    cached = sorted((utils.data.images.ROOT / "data/cache").iterdir())
    assert [file.name.rpartition("-")[0] for file in cached] == ["clean-model", "trojan-patch"]
    torch.rand(7)
    setting.facts.clear()
    assert torch.equal(first, prepare(config(neuron_choice=choice), setting))
    assert setting.facts == facts
    assert sorted(cached[0].parent.iterdir()) == cached
    cached[1].unlink()
    assert torch.equal(first, prepare(config(neuron_choice=choice), setting))
    for file in cached:
        file.unlink()
    assert torch.equal(first, prepare(config(neuron_choice=choice), setting))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 8, 8)
    assert (first[:, ~disc(8, 8)] == 0).all()
    assert not torch.equal(first, prepare(config(random_seed=1), setting))
