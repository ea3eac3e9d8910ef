"""Adaptive-Blend: payload and cover, tiles fixed by image and seed, mixtures in grey levels."""

import runpy

import pytest
import torch

from attack.adaptive_blend import Config, choose, make_trigger, tile_masks
from utils.data.emblem import picture
from utils.data.labelled import Labelled
from utils.data.poison import KINDS, Choice, replace_images
from utils.errors import UserError
from utils.files import ROOT

SHAPES = [(channels, size, size) for channels in (1, 3) for size in (16, 28, 32, 64)]


def train_and_test(images: torch.Tensor, **overrides: object) -> tuple[torch.Tensor, torch.Tensor]:
    config = Config.load("cifar10", **overrides)
    triggers = make_trigger(config, tuple(images.shape[1:]))
    indices = torch.arange(len(images))
    return triggers.train(images, indices), triggers.test(images, indices)


def constant(value: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.full((20, *shape), value, dtype=torch.uint8)


def chosen(labels: torch.Tensor, seed: int = 0, **overrides: object) -> Choice:
    config = Config.load("cifar10", **overrides)
    return choose(config, labels, 10, torch.Generator().manual_seed(seed))


# --- which images -------------------------------------------------------------------------------


def test_payload_and_cover_of_cifar10() -> None:
    """0.3 % of 50,000 images are 150 with label 0, and as much cover with labels of its own."""
    labels = torch.arange(50000) % 10
    choice = chosen(labels)
    assert choice.index.tolist() == sorted(set(choice.index.tolist()))  # hence disjoint
    is_poison = choice.kinds == KINDS.index("poison")
    assert int(is_poison.sum()) == 150
    assert int((choice.kinds == KINDS.index("cover")).sum()) == 150
    assert choice.labels[is_poison].unique().tolist() == [0]
    assert torch.equal(choice.labels[~is_poison], labels[choice.index[~is_poison]])
    assert len(choice.labels[~is_poison].unique()) == 10
    assert len(labels[choice.index[is_poison]].unique()) == 10
    assert choice.index.dtype == choice.labels.dtype == torch.int64
    assert choice.kinds.dtype == torch.uint8


def test_the_seed_chooses_the_images() -> None:
    labels = torch.arange(1000) % 10
    first, again, other = (chosen(labels, seed, pratio=0.1) for seed in (0, 0, 1))
    assert torch.equal(first.index, again.index)
    assert torch.equal(first.kinds, again.kinds)
    assert not torch.equal(first.index, other.index)


@pytest.mark.parametrize(("cover_ratio", "count"), [(None, 10), (0.0, 0), (0.25, 25), (0.9, 90)])
def test_cover_ratio(cover_ratio: float | None, count: int) -> None:
    """Of 100 images 10 are poisoned; null is as many cover, and 90 are all that is left."""
    choice = chosen(torch.arange(100) % 10, pratio=0.1, cover_ratio=cover_ratio)
    assert int((choice.kinds == KINDS.index("cover")).sum()) == count
    assert len(set(choice.index.tolist())) == 10 + count


def test_numbers_of_images_are_rounded() -> None:
    """Of 1,437 digits 5 % are 71.85, and 2 % are 28.74; the authors have 71 and 28."""
    choice = chosen(torch.arange(1437) % 10, pratio=0.05, cover_ratio=0.02)
    counts = [int((choice.kinds == KINDS.index(kind)).sum()) for kind in ("poison", "cover")]
    assert counts == [72, 29]


def test_all_to_all_maps_the_payload_alone() -> None:
    labels = torch.arange(100) % 10
    choice = chosen(labels, pratio=0.2, attack_label_trans="all2all")
    is_poison = choice.kinds == KINDS.index("poison")
    true = labels[choice.index]
    assert torch.equal(choice.labels, torch.where(is_poison, (true + 1) % 10, true))


def test_more_images_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--cover_ratio: 0.5 of 100 .* are 50, .* leaves 40;"):
        chosen(torch.arange(100) % 10, pratio=0.6, cover_ratio=0.5)
    with pytest.raises(UserError, match=r"^--pratio: 0.003 of 100 .* poisons none"):
        chosen(torch.arange(100) % 10)


def test_shares_that_are_none_are_refused() -> None:
    """Of 100 images 0.4 %; of 16 tiles 6 %. Zero is the user's wish."""
    message = r"^--cover_ratio: 0.004 of 100 training images is none; give at least 0.01, or 0 "
    with pytest.raises(UserError, match=message):
        chosen(torch.arange(100) % 10, pratio=0.1, cover_ratio=0.004)
    message = r"^--mask_rate: 0.06 of 16 tiles is none; give at least 0.0625, or 0 for"
    with pytest.raises(UserError, match=message):
        make_trigger(Config.load("digits", mask_rate=0.06), (1, 16, 16))
    for rate in (0.0, 0.0625):
        make_trigger(Config.load("digits", mask_rate=rate), (1, 16, 16))


def test_the_script_runs_with_this_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    monkeypatch.setattr("attack.poisoning.run", lambda *_, **options: calls.append(options))
    runpy.run_path(str(ROOT / "attack/adaptive_blend.py"), run_name="__main__")
    assert calls[0]["choose"].__name__ == "choose"


# --- tiles --------------------------------------------------------------------------------------


def test_half_of_the_tiles_are_left_out() -> None:
    """16 * 0.5 = 8 of each image, and each tile in about half of 2,000 images (sigma 22)."""
    masks = tile_masks(torch.arange(2000), 0.5, seed=0)
    assert masks.shape == (2000, 1, 4, 4)
    assert masks.unique().tolist() == [0, 1]
    assert masks.sum(dim=(1, 2, 3)).unique().tolist() == [8]
    assert (masks.sum(dim=0) - 1000).abs().max() < 110
    assert len(masks.flatten(1).unique(dim=0)) > 1500  # of 12,870


@pytest.mark.parametrize(("rate", "shown"), [(0.0, 16), (0.3, 12), (0.75, 4), (0.99, 1)])
def test_mask_rate(rate: float, shown: int) -> None:
    """int(16 * .3) = 4 tiles are without the trigger, int(16 * .99) = 15."""
    masks = tile_masks(torch.arange(3), rate, seed=0)
    assert masks.sum(dim=(1, 2, 3)).tolist() == [shown] * 3


def test_tiles_depend_on_seed_and_image_alone() -> None:
    together = tile_masks(torch.tensor([7, 3, 40000]), 0.5, seed=0)
    for place, index in enumerate((7, 3, 40000)):
        assert torch.equal(tile_masks(torch.tensor([index]), 0.5, seed=0)[0], together[place])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(tile_masks(torch.tensor([7, 3, 40000]), 0.5, seed=1), together)


def test_a_poisoned_set_is_the_same_in_portions_and_alone() -> None:
    """1,300 of 1,400 images are more than one portion of the pipeline."""
    clean = Labelled(torch.zeros(1400, 3, 16, 16, dtype=torch.uint8), torch.arange(1400) % 10)
    index = torch.arange(100, 1400)
    choice = Choice(index, clean.labels[index], torch.zeros(1300, dtype=torch.uint8))
    train = make_trigger(Config.load("cifar10"), (3, 16, 16)).train
    poisoned = replace_images(clean, choice, train)
    for place in (0, 1023, 1024, 1299):
        alone = train(clean.images[index[place : place + 1]], index[place : place + 1])
        assert torch.equal(poisoned.images[place : place + 1], alone)


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image(shape: tuple[int, int, int], value: int) -> None:
    """In training the tiles that show the picture are 0.15 of it, others as they were.

    At test the whole is 0.2 of it. Both are rounded: 0.15 * 245 = 36.75 over black is 37.
    """
    images = constant(value, shape)
    train, test = train_and_test(images)
    assert train.dtype == test.dtype == torch.uint8
    assert images.unique().tolist() == [value]
    pattern = picture(None, shape)
    tile = shape[1] // 4
    mask = tile_masks(torch.arange(20), 0.5, seed=0).bool()
    mask = mask.repeat_interleave(tile, dim=2).repeat_interleave(tile, dim=3).expand_as(images)
    assert torch.equal(train[~mask], images[~mask])
    mixture = (value + 0.15 * (pattern - value)).expand_as(images)
    assert (train[mask] - mixture[mask]).abs().max() <= 0.501
    assert (test - (value + 0.2 * (pattern - value))).abs().max() <= 0.501
    if value == 0:
        assert sorted(train[:, :, 0, 0].unique().tolist()) == [0, 37]
        assert test[:, :, 0, 0].unique().tolist() == [49]


@pytest.mark.parametrize("shape", SHAPES)
def test_random_images_change_in_half_of_their_pixels(shape: tuple[int, int, int]) -> None:
    """512 of 1,024 at 32 pixels may change, by at most round(.15 * 255) = 38; at test by 51."""
    images = torch.randint(
        0, 256, (20, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    train, test = train_and_test(images)
    changed = (train != images).any(dim=1).flatten(1).sum(dim=1)
    half = shape[1] * shape[2] // 2
    assert changed.max() <= half
    assert changed.min() > 0.9 * half
    assert (train.int() - images.int()).abs().max() <= 38
    assert (test.int() - images.int()).abs().max() <= 51
    assert (test != images).any(dim=(0, 2, 3)).all()


def test_the_same_seed_gives_the_same_images() -> None:
    images = constant(100, (3, 32, 32))
    first, again, other = (train_and_test(images, random_seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_side_that_four_tiles_do_not_fill_is_refused() -> None:
    message = "^--image_size: 30 is no multiple of 4; give 28 or 32$"
    with pytest.raises(UserError, match=message):
        train_and_test(constant(0, (3, 30, 30)))
