"""What attacks that control training share: batch layout, partners, stored images, augmentation."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms

import attack.controlled as controlled
import utils.data.images
from attack.controlled import affine_augmentation, labels_of_batch, stored
from attack.setting import Setting
from attack.wanet import Config
from tests.processes import Recorder, random_data, train
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import KINDS, count_in_batch, first_of_batches, partners
from utils.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setting(data: Dataset) -> Setting:
    return Setting(data, torch.device("cpu"), "fp32")


def config(**changes: Any) -> Config:
    return Config.load("cifar10", **changes)


@pytest.mark.parametrize(
    ("ratio", "size", "count"),
    [
        (0.1, 128, 12),  # 12.8
        (0.05, 128, 6),  # 6.4
        (0.01, 128, 1),  # 1.28
        (0.1, 80, 8),  # the last batch of CIFAR-10
        (0.1, 10, 1),
        (0.29, 100, 29),  # in floating point 28.999999999999996
        (1.0, 7, 7),
    ],
)
def test_a_batch_has_the_whole_part_of_its_share(ratio: float, size: int, count: int) -> None:
    source = rng()
    before = source.get_state()
    assert count_in_batch(ratio, size, source) == count
    assert torch.equal(source.get_state(), before)  # nothing is drawn


def test_less_than_one_image_is_one_image_in_some_batches() -> None:
    """0.05 * 8 = 0.4: 2,000 batches have 800 +- 22 (one standard deviation)."""
    source = rng()
    counts = [count_in_batch(0.05, 8, source) for _ in range(2000)]
    assert set(counts) == {0, 1}
    assert abs(sum(counts) - 800) < 90
    again = rng()
    assert counts == [count_in_batch(0.05, 8, again) for _ in range(2000)]


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_partners_are_other_images_each_once(count: int) -> None:
    found = partners(count, rng())
    assert sorted(found.tolist()) == list(range(count))
    assert (found != torch.arange(count)).all()
    assert torch.equal(found, partners(count, rng()))


def test_a_single_image_is_its_own_partner() -> None:
    assert partners(1, rng()).tolist() == [0]


def mark(value: int) -> Any:
    return lambda images, indices: torch.full_like(images, value)


def test_the_first_of_each_batch_are_exported(tiny_data: Dataset) -> None:
    """Batches of 5, 5 and 2 from 12 images; a fifth of each is poison, as many are cross.

    Of five one, of two none (0.4 is cut). Image i has the label i mod 3, hence 0 and 5 get (i + 1)
    mod 3, that is 1 and 0; their neighbours 1 and 6 keep 1 and 0.
    """
    found = first_of_batches(
        tiny_data, 5, lambda size: (size // 5, size // 5), mark(255), mark(254), "all2all", 0
    )
    assert found.index.tolist() == [0, 1, 5, 6]
    assert [KINDS[kind] for kind in found.kinds] == ["poison", "cross"] * 2
    assert found.images[:, 0, 0, 0].tolist() == [255, 254, 255, 254]
    assert found.labels.tolist() == [1, 1, 0, 0]
    assert found.clean is tiny_data.train


def test_cifar_exports_as_many_as_published() -> None:
    """50,000 = 390 * 128 + 80: 390 * 12 + 8 = 4,688 poisoned and twice as many cross images."""
    labels = torch.zeros(50000, dtype=torch.int64)
    train = Labelled(torch.zeros(50000, 1, 1, 1, dtype=torch.uint8), labels)
    data = Dataset("many", train, train.at(torch.arange(3)), ("a", "b"), (0.5,), (0.5,))

    def counts(size: int) -> tuple[int, int]:
        poisoned = count_in_batch(0.1, size, rng())
        return poisoned, 2 * poisoned

    found = first_of_batches(data, 128, counts, mark(1), mark(2), "all2one", 1)
    assert [int((found.kinds == KINDS.index(kind)).sum()) for kind in ("poison", "cross")] == [
        4688,
        9376,
    ]


def test_an_export_may_hold_no_poison(tiny_data: Dataset) -> None:
    found = first_of_batches(tiny_data, 5, lambda size: (0, 0), mark(1), mark(2), "all2one", 1)
    assert len(found.index) == len(found.images) == len(found.labels) == 0


def test_only_the_poisoned_part_of_a_batch_gets_mapped_labels() -> None:
    labels = torch.tensor([2, 1, 0, 2])
    one = config(attack_target=1)
    assert labels_of_batch(one, labels, 2, 3).tolist() == [1, 1, 0, 2]
    assert labels_of_batch(one, labels, 0, 3).tolist() == [2, 1, 0, 2]
    everything = config(attack_label_trans="all2all")
    assert labels_of_batch(everything, labels, 3, 3).tolist() == [0, 2, 1, 2]


def test_stored_images_are_rounded(tiny_data: Dataset) -> None:
    """255 * 0.498 = 126.99, 255 * 0.5 = 127.5 whose even neighbour is 128; the rest is clamped."""
    images = torch.tensor([0.0, 0.498, 0.5, 1.0, -0.1, 1.2]).view(1, 1, 1, 6)
    assert stored(images, tiny_data, truncate=False).flatten().tolist() == [
        0,
        127,
        128,
        255,
        0,
        255,
    ]


def test_whole_grey_levels_survive_rounding(tiny_data: Dataset) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(stored(levels / 255, tiny_data, truncate=False), levels)


def test_truncation_darkens_by_at_most_one_level_as_published() -> None:
    """With CIFAR-10's constants some of the 256 levels come back from normalization a bit too low.

    The published way back is torchvision's Normalize with 1 / std, and then one with -mean. In
    NumPy's float32, k / 255 - mean, / std, / float32(1 / std), + mean and * 255 come out below k
    for 68, 40 and 48 levels. On the images of CIFAR-10 these are 15.2 % of all values.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    split = Labelled(levels, torch.zeros(1, dtype=torch.int64))
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    data = Dataset("c", split, split, ("a",), mean, std)
    found = stored(levels / 255, data, truncate=True)
    lost = levels.int() - found.int()
    assert set(lost.unique().tolist()) == {0, 1}
    assert lost.sum(dim=(0, 2, 3)).tolist() == [68, 40, 48]
    published = transforms.Compose(
        [
            transforms.Normalize(mean, std),
            transforms.Normalize([0.0] * 3, [1 / value for value in std]),
            transforms.Normalize([-value for value in mean], [1.0] * 3),
        ]
    )
    assert torch.equal(found, (published(levels / 255).clamp(0, 1) * 255).to(torch.uint8))
    assert stored(torch.full((1, 3, 1, 1), 126.9 / 255), data, True).unique().tolist() == [126]


def augmented(data: Dataset, images: torch.Tensor, **changes: Any) -> torch.Tensor:
    return affine_augmentation(config(**changes), setting(data))(images)


def test_published_probabilities_move_most_images(tiny_data: Dataset) -> None:
    """Not cropped, rotated or mirrored are 0.2 * 0.5 * 0.5 = 5 % of 400 images."""
    images = torch.rand(400, 3, 8, 8, generator=rng())
    moved = augmented(tiny_data, images)
    same = ((moved - images).abs() < 1e-6).flatten(1).all(dim=1).float().mean()
    assert 0.01 < same < 0.1
    assert torch.equal(moved, augmented(tiny_data, images))
    assert not torch.equal(moved, augmented(tiny_data, images, random_seed=1))


def test_without_probabilities_nothing_moves(tiny_data: Dataset) -> None:
    images = torch.rand(5, 3, 8, 8, generator=rng())
    still = augmented(tiny_data, images, crop_probability=0.0, rotation_probability=0.0, flip=False)
    torch.testing.assert_close(still, images)


def test_crops_shift_by_whole_pixels_up_to_the_padding(tiny_data: Dataset) -> None:
    """A white point on black: each of 5 x 5 places within two pixels comes up, and no other."""
    images = torch.tensor(tiny_data.mean).view(1, 3, 1, 1).repeat(500, 1, 8, 8)
    images[:, :, 4, 3] = 1
    draws = {"crop_probability": 1.0, "rotation_probability": 0.0, "flip": False}
    moved = augmented(tiny_data, images, crop_padding=2, **draws)
    places = {tuple(place) for place in torch.nonzero(moved[:, 0] > 0.9)[:, 1:].tolist()}
    assert places == {(row, column) for row in range(2, 7) for column in range(1, 6)}


def test_rotations_reach_ten_degrees_to_either_side(tiny_data: Dataset) -> None:
    """A point 20 pixels right of the middle of 65 goes up or down by up to 20 sin 10 = 3.5."""
    images = torch.tensor(tiny_data.mean).view(1, 3, 1, 1).repeat(300, 1, 65, 65)
    images[:, :, 31:34, 51:54] = 1
    draws = {"crop_probability": 0.0, "rotation_probability": 1.0, "flip": False}
    moved = augmented(tiny_data, images, random_rotation=10.0, **draws)[:, 0]
    weight = (moved - tiny_data.mean[0]).clamp(min=0)
    rows = torch.arange(65.0).view(1, -1, 1)
    height = (weight * rows).sum((1, 2)) / weight.sum((1, 2)) - 32
    assert 3.0 < height.max() < 4.2
    assert -4.2 < height.min() < -3.0
    assert abs(float(height.mean())) < 0.5
    assert 1.5 < height.std() < 2.5  # uniform: 3.5 / sqrt(3) = 2.0


@pytest.mark.parametrize("per_batch", [False, True])
def test_the_mean_comes_in_from_outside(tiny_data: Dataset, per_batch: bool) -> None:
    """0 in normalized space is the dataset's mean (0.5, 0.4, 0.3), so even such images stay."""
    images = torch.tensor(tiny_data.mean).view(1, 3, 1, 1).expand(40, 3, 8, 8)
    moved = augmented(tiny_data, images, crop_probability=1.0, augment_per_batch=per_batch)
    torch.testing.assert_close(moved, images)


def test_published_runs_move_the_images_of_a_batch_alike(tiny_data: Dataset) -> None:
    """Forty copies of one image: moved alike they are still copies, moved by themselves not."""
    images = torch.rand(1, 3, 8, 8, generator=rng()).expand(40, 3, 8, 8)
    draws = {"crop_probability": 1.0, "rotation_probability": 1.0}
    alike = augmented(tiny_data, images, augment_per_batch=True, **draws)
    assert alike.shape == images.shape
    assert not torch.equal(alike, images)
    assert (alike == alike[:1]).all()
    apart = augmented(tiny_data, images, augment_per_batch=False, **draws)
    assert len({tuple(image.flatten().tolist()) for image in apart}) > 30


class Brighter:
    """A control whose trigger brightens image i by i grey levels, whose cross blackens."""

    learns_trigger = True

    def __init__(self, config: Config, setting: Setting) -> None:
        self.trained = False

    def before_training(self) -> None:
        self.trained = True

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        return 1, 2

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())

    def update(self) -> None:
        pass

    def cross(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(images)

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return images + indices.view(-1, 1, 1, 1) / 255


def plan_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `run_controlled` hands on instead of running it: (configuration, setting) -> plan."""
    made: list[Any] = []
    monkeypatch.setattr(controlled, "run_plan", lambda config_class, plan: made.append(plan))
    controlled.run_controlled(Config, Brighter)
    return made[0]


def test_a_controlled_run_is_planned(tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training images stay clean; test images of the target 1 are skipped; all are cross.

    Test labels are 0 1 2 0 1 2 0 1 2. In batches of 5, 5 and 2 one image each is poison, and two,
    two and one are cross.
    """
    plan = plan_of(monkeypatch)(config(attack_target=1, batch_size=5), setting(tiny_data))
    assert plan.step.trained
    assert not plan.drop_last
    assert len(plan.training.index) == 0
    triggered, cross, exported = plan.triggered(), plan.cross(), plan.exported()
    assert triggered.index.tolist() == [0, 2, 3, 5, 6, 8]
    grown = triggered.images.int() - tiny_data.test.images[triggered.index].int()
    assert grown[:, 0, 0, 0].tolist() == [0, 2, 3, 5, 6, 8]
    assert len(cross.images) == 9
    assert cross.images.max() == 0
    assert torch.equal(cross.labels, tiny_data.test.labels)
    assert exported.index.tolist() == [0, 1, 2, 5, 6, 7, 10, 11]
    assert [KINDS[kind][0] for kind in exported.kinds] == list("pccpccpc")
    own = tiny_data.train.labels[exported.index].tolist()
    assert exported.labels.tolist() == [1, own[1], own[2], 1, own[4], own[5], 1, own[7]]


@pytest.mark.parametrize("learns", [True, False])
def test_a_trigger_that_never_changes_is_placed_once(
    learns: bool, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation asks for triggered and cross images."""
    monkeypatch.setattr(Brighter, "learns_trigger", learns)
    plan = plan_of(monkeypatch)(config(batch_size=5), setting(tiny_data))
    for images in (plan.triggered, plan.cross):
        assert (images() is images()) is not learns


def test_a_ratio_that_poisons_nothing_is_refused(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.01 of 12 is 0.12 images."""
    with pytest.raises(UserError, match=r"--pratio: 0.01 of 12 training images poisons none"):
        plan_of(monkeypatch)(config(pratio=0.01), setting(tiny_data))


def test_a_control_s_trigger_becomes_one_of_stored_images(tiny_data: Dataset) -> None:
    """Image i becomes brighter by i grey levels; more images than are given to it at once."""
    images = torch.full((600, 3, 2, 2), 7, dtype=torch.uint8)
    control = Brighter(config(), setting(tiny_data))
    trigger = controlled._as_trigger(control.trigger, setting(tiny_data), truncate=False)
    found = trigger(images, torch.arange(600) % 200)
    assert found.dtype == torch.uint8
    assert found[:, 0, 0, 0].tolist() == [7 + i % 200 for i in range(600)]


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["wanet", "inputaware", "bpp"])
def test_every_control_works_at_every_size(
    name: str, channels: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of training, then both triggers on stored images of that shape."""
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    source = torch.Generator().manual_seed(0)
    shape = (channels, size, size)
    images = torch.randint(0, 200, (12, *shape), dtype=torch.uint8, generator=source)
    split = Labelled(images, torch.arange(12) % 3)
    data = Dataset("c", split, split, ("a", "b", "c"), (0.5,) * channels, (0.25,) * channels)
    module = importlib.import_module(f"attack.{name}")
    kind = {"wanet": "WaNet", "inputaware": "InputAware", "bpp": "Bpp"}[name]
    short = {"mask_epochs": 1} if name == "inputaware" else {}
    settings = module.Config.load("cifar10", pratio=0.25, batch_size=12, **short)
    made = getattr(module, kind)(settings, setting(data))
    made.before_training()
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 3))
    loss = made.loss(model, images, split.labels)
    loss.backward()
    made.update()
    assert loss.isfinite()
    for apply in (made.trigger, made.cross):
        with torch.no_grad():
            changed = apply(images / 255, torch.arange(12))
        assert changed.shape == (12, *shape)
        assert 0 <= changed.min() <= changed.max() <= 1
        assert not torch.equal(stored(changed, data, truncate=False), images)


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("wanet", {"pratio": 0.25, "cross_ratio": 3.0}, None),
        ("wanet", {"pratio": 0.3, "cross_ratio": 3.0}, "--cross_ratio: cross samples are 70 % of"),
        ("wanet", {"pratio": 0.5}, "instead of 100 %, because --pratio 0.5 leaves no more"),
        ("bpp", {"pratio": 0.9, "neg_ratio": 0.1}, None),
        ("bpp", {"pratio": 1.0, "neg_ratio": 1.0}, "--neg_ratio: negative samples are 0 % of"),
        ("inputaware", {"pratio": 0.5}, None),
        ("inputaware", {"pratio": 0.6}, "--pratio: cross samples are 40 % of a batch instead of"),
    ],
)
def test_other_samples_that_have_no_room_are_told(
    tiny_data: Dataset, name: str, flags: dict[str, float], told: str | None
) -> None:
    module = importlib.import_module(f"attack.{name}")
    kind = {"wanet": "WaNet", "inputaware": "InputAware", "bpp": "Bpp"}[name]
    where = setting(tiny_data)
    getattr(module, kind)(module.Config.load("cifar10", **flags), where)
    assert len(where.warnings) == (told is not None)
    assert all(told in text for text in where.warnings if told)


def test_what_cannot_work_is_refused_before_training(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that is every test image's label; a trigger that changes nothing."""
    plans: list[Any] = []
    monkeypatch.setattr(controlled, "run_plan", lambda _, plan: plans.append(plan))
    control = Idle()
    controlled.run_controlled(Config, lambda *_: control)
    (plan,) = plans
    with pytest.raises(UserError, match="changes no pixel"):
        plan(config(batch_size=4), setting(tiny_data))
    assert control.trained == 1
    one = dataclasses.replace(tiny_data, test=tiny_data.test.at(torch.tensor([0, 3])))
    with pytest.raises(UserError, match=r"^--attack_target: every test image has label 0"):
        plan(config(batch_size=4), setting(one))
    assert control.trained == 1


class Idle:
    """A control whose triggers do nothing."""

    learns_trigger = False
    trained = 0

    def before_training(self) -> None:
        self.trained += 1

    def poisoned_per_batch(self, batch_size: int) -> tuple[int, int]:
        return 1, 1

    def trigger(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return images

    cross = trigger


@pytest.mark.parametrize(
    ("name", "kind"), [("wanet", "WaNet"), ("bpp", "Bpp"), ("inputaware", "InputAware")]
)
def test_a_last_batch_of_one_image_joins_the_one_before(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 images by 12 are three steps per epoch; a BatchNorm knows nothing of one image."""
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    data, module = random_data(), importlib.import_module(f"attack.{name}")
    changes = {"mask_epochs": 1} if name == "inputaware" else {}
    flags = module.Config.load("digits", batch_size=12, pratio=0.1, **changes)
    control = getattr(module, kind)(flags, setting(data))
    control.before_training()
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten())
    model, loop = nn.Sequential(*layers, nn.Linear(8, 4)), Recorder()
    train(model, data, control, loop, 12, epochs=2, drop_last=False, whole=True)
    assert len(loop.steps) == 2 * 3
