"""What a defense is given: clean images by class, a part of the poisoned set, or nothing."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import defense
from analysis.subject import Subject
from defense import anp, clp, ep, ft
from defense.base import HeldOut, Inverted, drawn_index, seen_images
from utils.data.labelled import Dataset
from utils.data.poison import PoisonedSet
from utils.errors import UserError
from utils.training.selection import hold_out

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 2)


def poisoned(data: Dataset) -> PoisonedSet:
    """Images 1, 4 and 7 are white and labelled 0."""
    return PoisonedSet(
        data.train,
        torch.tensor([1, 4, 7]),
        torch.full((3, 3, 8, 8), 255, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.uint8),
    )


def record(data: Dataset, has_poison: bool = True) -> Any:
    """The parts of an attack's record that are asked for."""
    index = torch.tensor([1, 4, 7]) if has_poison else None
    return SimpleNamespace(
        folder=Path("record/x"), poison_index=index, poisoned_set=lambda _: poisoned(data)
    )


def test_the_clean_subset_has_its_share_of_every_class() -> None:
    """A tenth of 50, 30 and 2 images: 5, 3, and the one that a class of two gives at least."""
    index = drawn_index(LABELS, ft.Config.load(ratio=0.1))
    assert LABELS[index].bincount().tolist() == [5, 3, 1]
    assert index.tolist() == sorted(set(index.tolist()))


def test_the_draw_depends_on_the_seed_and_not_on_the_method() -> None:
    first = drawn_index(LABELS, ft.Config.load(ratio=0.1))
    assert torch.equal(first, drawn_index(LABELS, anp.Config.load(ratio=0.1)))
    assert not torch.equal(first, drawn_index(LABELS, ft.Config.load(ratio=0.1, random_seed=1)))


def test_the_draw_of_a_seed_stays_what_it_was() -> None:
    """So that a run can be made again, and methods compared, by a later version."""
    index = drawn_index(torch.arange(100) % 2, ft.Config.load(ratio=0.05))
    assert index.tolist() == [2, 13, 44, 85]
    alone = drawn_index(torch.arange(10), ft.Config.load(ratio=0.3))
    assert alone.tolist() == [2, 3, 9]


@pytest.mark.parametrize("name", defense.names())
def test_a_first_try_has_images_enough(name: str) -> None:
    """On `random`, with 20 training images of each class; the inversions have few passes there."""
    config = importlib.import_module(f"defense.{name}").Config.load("random")
    labels = torch.arange(200) % 10
    if config.sees != "nothing":
        drawn = labels[drawn_index(labels, config)]
        assert drawn.bincount().tolist() == [10] * 10
    if isinstance(config, HeldOut):
        fit, held = hold_out(drawn, config.val_ratio, config.random_seed)
        assert set(drawn[fit].tolist()) == set(drawn[held].tolist()) == set(range(10))
    if isinstance(config, Inverted):
        passes = config.mask_epochs + config.generator_epochs
        assert config.identity_epochs + config.inversion_rounds * passes <= 40


def test_all_of_it_is_all_of_it() -> None:
    assert drawn_index(LABELS, ft.Config.load(ratio=1.0)).tolist() == list(range(82))


def test_a_share_that_is_no_image_is_refused() -> None:
    """0.6 % of 82 is half an image, rounded to none; 0.7 % is one, and then each class has one."""
    with pytest.raises(UserError, match=r"--ratio: 0.006 of 82 training images is none"):
        drawn_index(LABELS, ft.Config.load(ratio=0.006))
    assert len(drawn_index(LABELS, ft.Config.load(ratio=0.007))) == 3


@pytest.mark.parametrize("labels", [LABELS, torch.arange(10)])
@pytest.mark.parametrize("ratio", [0.001, 0.3, 1.0])
def test_analyses_look_at_the_images_that_a_defense_sees(
    labels: torch.Tensor, ratio: float
) -> None:
    """Also where each class has one image, and where the share is refused."""
    subject = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(labels=labels)))
    draws = [
        lambda: Subject.clean_draw(subject, ratio, 5),
        lambda: drawn_index(labels, ft.Config.load(ratio=ratio, random_seed=5)),
    ]
    if ratio == 0.001:
        for draw in draws:
            with pytest.raises(UserError, match=r"^--ratio: 0.001 of \d+ training images is none"):
                draw()
    else:
        assert torch.equal(*(draw() for draw in draws))


def test_classes_of_one_image_give_their_share_together() -> None:
    """Half of ten classes of one image each: five of them."""
    assert len(drawn_index(torch.arange(10), ft.Config.load(ratio=0.5))) == 5


def test_an_index_file_names_the_images(tmp_path: Path) -> None:
    path = tmp_path / "index.txt"
    path.write_text("7\n3\n")
    assert drawn_index(LABELS, ft.Config.load(index=str(path))).tolist() == [3, 7]
    path.write_text("")
    with pytest.raises(UserError, match="is empty; name at least one image"):
        drawn_index(LABELS, ft.Config.load(index=str(path)))


def test_most_defenses_are_given_clean_images(tiny_data: Dataset) -> None:
    config = ft.Config.load(ratio=0.5)
    given = seen_images(config, record(tiny_data), tiny_data)
    assert config.sees == "clean"
    assert torch.equal(given.images, tiny_data.train.images[given.index])
    assert torch.equal(given.labels, tiny_data.train.labels[given.index])


def test_ep_is_given_the_training_set_as_the_attacker_has_left_it(tiny_data: Dataset) -> None:
    """All twelve images: three are white and labelled 0, the others as they were."""
    config = ep.Config.load(ratio=1.0)
    given = seen_images(config, record(tiny_data), tiny_data)
    assert config.sees == "poisoned"
    white = (given.images == 255).flatten(1).all(1)
    assert given.index[white].tolist() == [1, 4, 7]
    assert given.labels[white].tolist() == [0, 0, 0]
    assert torch.equal(given.images[~white], tiny_data.train.images[~white])
    assert torch.equal(given.labels[~white], tiny_data.train.labels[~white])
    assert not (tiny_data.train.images == 255).flatten(1).all(1).any()  # the clean set is as it was


def test_ep_draws_by_the_labels_that_are_stored(tiny_data: Dataset) -> None:
    """Labels 0 1 2 0 1 2 ..., of which images 1, 4, 7 became 0: seven, one and four; a quarter."""
    given = seen_images(ep.Config.load(ratio=0.25), record(tiny_data), tiny_data)
    assert given.labels.bincount().tolist() == [2, 0, 1]


def test_the_control_of_ep_is_given_clean_images(tiny_data: Dataset) -> None:
    config = ep.Config.load(ratio=1.0, data="clean")
    given = seen_images(config, record(tiny_data, has_poison=False), tiny_data)
    assert config.sees == "clean"
    assert torch.equal(given.images, tiny_data.train.images)


def test_a_record_without_poison_is_refused_in_one_line(tiny_data: Dataset) -> None:
    with pytest.raises(UserError, match="has no poisoned training images") as caught:
        seen_images(ep.Config.load(), record(tiny_data, has_poison=False), tiny_data)
    assert len(str(caught.value).splitlines()) == 1
    assert "--data clean" in str(caught.value)


def test_clp_is_given_no_images(tiny_data: Dataset) -> None:
    """Their shape is all that it gets."""
    config = clp.Config.load()
    given = seen_images(config, record(tiny_data), tiny_data)
    assert config.sees == "nothing"
    assert tuple(given.images.shape) == (0, 3, 8, 8)
    assert tuple(given.labels.shape) == (0,)
    assert not {"ratio", "index", "batch_size"} & set(vars(config))
