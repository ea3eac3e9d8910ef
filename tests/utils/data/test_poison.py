"""Label maps, the choice of poisoned images, and the poisoned sets."""

import re
from typing import Any

import pytest
import torch

from utils.data.labelled import Dataset, Labelled
from utils.data.poison import (
    KINDS,
    Choice,
    LabelMap,
    PoisonedSet,
    Trigger,
    apply_trigger,
    clean_label,
    dirty_label,
    map_labels,
    replace_images,
    require_effect,
    triggered_test_set,
    unpoisoned,
)
from utils.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def select(count: int, pratio: float, generator: torch.Generator) -> torch.Tensor:
    """The dirty-label choice among images of ten classes."""
    return dirty_label(torch.arange(count) % 10, pratio, "all2one", 0, 10, generator).index


def poison(
    data: Dataset, trigger: Trigger, pratio: float, label_map: LabelMap, target: int
) -> PoisonedSet:
    choice = dirty_label(data.train.labels, pratio, label_map, target, len(data.classes), rng())
    return replace_images(data.train, choice, trigger)


def stamp(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A trigger that writes 250 into the last pixel, and the image's index into the first."""
    stamped = images.clone()
    stamped[:, :, -1, -1] = 250
    stamped[:, :, 0, 0] = (index % 251).to(torch.uint8).unsqueeze(1)
    return stamped


@pytest.mark.parametrize(
    ("label_map", "expected"), [("all2one", [1, 1, 1, 1]), ("all2all", [1, 2, 0, 1])]
)
def test_label_maps(label_map: LabelMap, expected: list[int]) -> None:
    """Of three classes, the last one's successor is 0 again."""
    labels = torch.tensor([0, 1, 2, 0])
    mapped = map_labels(labels, label_map, target=1, num_classes=3)
    assert mapped.tolist() == expected
    assert mapped.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("count", "pratio", "chosen"),
    [(50000, 0.1, 5000), (1437, 0.1, 144), (10, 0.24, 2), (10, 1.0, 10), (3, 0.2, 1)],
)
def test_pratio_is_a_share_of_all_training_images(count: int, pratio: float, chosen: int) -> None:
    """143.7 becomes 144, 2.4 becomes 2, 0.6 becomes 1."""
    index = select(count, pratio, rng())
    assert len(index) == chosen
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(set(index.tolist()))
    assert index.min() >= 0
    assert index.max() < count


def test_the_chosen_images_depend_on_the_generator_alone() -> None:
    first, again, other = (select(1000, 0.1, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_ratio_that_poisons_nothing_is_refused() -> None:
    """0.0001 of 1,000 is 0.1 images; one image is 0.001."""
    with pytest.raises(UserError, match=r"--pratio: 0.0001 of 1000 .* at least 0.001"):
        select(1000, 0.0001, rng())


def test_poisoning_replaces_the_chosen_images_and_labels(tiny_data: Dataset) -> None:
    """Half of 12 images. The trigger is told the images' places in the training set."""
    poisoned = poison(tiny_data, stamp, 0.5, "all2one", 2)
    assert len(poisoned) == 12
    assert len(poisoned.index) == 6
    assert torch.equal(
        poisoned.images, stamp(tiny_data.train.images[poisoned.index], poisoned.index)
    )
    assert poisoned.images.dtype == torch.uint8
    assert poisoned.labels.tolist() == [2] * 6
    assert [KINDS[kind] for kind in poisoned.kinds] == ["poison"] * 6
    assert poisoned.clean is tiny_data.train


def test_rows_of_a_poisoned_set_have_the_attacker_s_changes() -> None:
    """Of four grey images, 1 and 3 are replaced; rows are asked for in any order, and twice."""
    grey = torch.full((4, 1, 1, 1), 9, dtype=torch.uint8)
    replaced = torch.tensor([100, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    poisoned = PoisonedSet(
        Labelled(grey, torch.arange(4)),
        torch.tensor([1, 3]),
        replaced,
        torch.tensor([0, 7]),
        torch.zeros(2, dtype=torch.uint8),
    )
    rows = poisoned.at(torch.tensor([3, 0, 1, 3, 2]))
    assert rows.images.flatten().tolist() == [200, 9, 100, 200, 9]
    assert rows.labels.tolist() == [7, 0, 0, 7, 2]
    assert grey.eq(9).all()


def test_images_of_the_target_class_may_be_poisoned_too(tiny_data: Dataset) -> None:
    """At ratio 1 all 12 images are, of every class."""
    poisoned = poison(tiny_data, stamp, 1.0, "all2one", 2)
    assert poisoned.index.tolist() == list(range(12))


def test_all_to_all_gives_each_chosen_image_the_next_label(tiny_data: Dataset) -> None:
    """Image i has the label i mod 3, hence gets (i + 1) mod 3."""
    poisoned = poison(tiny_data, stamp, 0.5, "all2all", 0)
    assert poisoned.labels.tolist() == [(i + 1) % 3 for i in poisoned.index.tolist()]


def test_the_same_images_are_chosen_whatever_the_trigger_and_the_labels(tiny_data: Dataset) -> None:
    white = poison(tiny_data, lambda images, _: torch.full_like(images, 255), 0.5, "all2all", 0)
    stamped = poison(tiny_data, stamp, 0.5, "all2one", 1)
    assert torch.equal(white.index, stamped.index)


def test_poisoning_leaves_the_clean_set_alone(tiny_data: Dataset) -> None:
    before = tiny_data.fingerprint()
    poison(tiny_data, stamp, 0.5, "all2one", 2)
    triggered_test_set(tiny_data, stamp, "all2one", 2)
    assert tiny_data.fingerprint() == before


def test_all_to_one_tests_images_of_other_classes_only(tiny_data: Dataset) -> None:
    """Labels are 0 1 2 0 1 2 0 1 2; without the target 1 six images are left."""
    triggered = triggered_test_set(tiny_data, stamp, "all2one", 1)
    assert triggered.index.tolist() == [0, 2, 3, 5, 6, 8]
    assert triggered.labels.tolist() == [0, 2, 0, 2, 0, 2]
    assert triggered.targets.tolist() == [1] * 6
    assert torch.equal(
        triggered.images, stamp(tiny_data.test.images[triggered.index], triggered.index)
    )


def test_all_to_all_tests_every_image(tiny_data: Dataset) -> None:
    triggered = triggered_test_set(tiny_data, stamp, "all2all", 1)
    assert triggered.index.tolist() == list(range(9))
    assert triggered.targets.tolist() == [1, 2, 0] * 3
    assert triggered.labels.tolist() == [0, 1, 2] * 3


def test_a_test_set_of_the_target_alone_is_refused(tiny_data: Dataset) -> None:
    only_target = Dataset(
        "tiny",
        tiny_data.train,
        Labelled(tiny_data.test.images[:2], torch.tensor([2, 2])),
        tiny_data.classes,
        tiny_data.mean,
        tiny_data.std,
    )
    with pytest.raises(UserError, match=r"--attack_target: .* label 2"):
        triggered_test_set(only_target, stamp, "all2one", 2)


def test_a_trigger_gets_every_image_of_a_large_set_once() -> None:
    """2,500 one-pixel images are more than two portions; each carries its own index modulo 251."""
    images = torch.full((2507, 1, 1, 1), 255, dtype=torch.uint8)
    index = torch.arange(2500) + 7
    found = apply_trigger(
        lambda part, places: (places % 251).to(torch.uint8).view(-1, 1, 1, 1), images, index
    )
    assert found.flatten().tolist() == [(i + 7) % 251 for i in range(2500)]
    assert (images == 255).all()


def test_a_trigger_gets_the_images_at_the_indices() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    found = apply_trigger(lambda part, _: part + 100, images, torch.tensor([3, 7]))
    assert found.flatten().tolist() == [103, 107]


def test_a_trigger_that_changes_nothing_is_refused() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    choice = Choice(torch.arange(3), torch.zeros(3).long(), torch.zeros(3).to(torch.uint8))
    with pytest.raises(UserError, match="changes no pixel"):
        replace_images(Labelled(images, torch.arange(3)), choice, lambda part, _: part)
    data = Dataset("c", *[Labelled(images, torch.arange(3))] * 2, ("a", "b", "c"), (0.0,), (1.0,))
    with pytest.raises(UserError, match="changes no pixel"):
        triggered_test_set(data, lambda part, _: part, "all2one", 0)


def test_a_trigger_may_leave_some_images_as_they_are() -> None:
    """White images stay white under a white trigger; one black image is enough."""
    images = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8)
    images[1] = 0
    found = apply_trigger(lambda part, _: torch.full_like(part, 255), images, torch.arange(3))
    assert (found == 255).all()
    require_effect(lambda part, _: torch.full_like(part, 255), images, torch.arange(3))


def test_a_clean_set_as_a_poisoned_one_has_no_poison(tiny_data: Dataset) -> None:
    clean = unpoisoned(tiny_data.train)
    assert len(clean) == 12
    assert clean.images.shape == (0, 3, 8, 8)
    assert len(clean.index) == len(clean.labels) == len(clean.kinds) == 0


def test_clean_label_poisons_the_target_class_and_keeps_its_labels() -> None:
    """0.2 of 20 images are 4 of the 5 that have the label 3 of 0 to 3."""
    labels = torch.arange(20) % 4
    choice = clean_label(labels, 0.2, 3, rng())
    assert len(choice.index) == 4
    assert len(set(choice.index.tolist())) == 4
    assert labels[choice.index].tolist() == choice.labels.tolist() == [3] * 4
    assert choice.index.tolist() == sorted(choice.index.tolist())


def test_a_class_that_is_too_small_gives_all_it_has() -> None:
    """0.5 of 20 are 10 images, but the class has 5."""
    choice = clean_label(torch.arange(20) % 4, 0.5, 1, rng())
    assert choice.index.tolist() == [1, 5, 9, 13, 17]


def test_clean_label_needs_a_class_with_images() -> None:
    with pytest.raises(UserError, match="class 7 has no training image"):
        clean_label(torch.arange(20) % 4, 0.1, 7, rng())


def test_clean_label_depends_on_the_generator_alone_and_all_of_it_is_poison() -> None:
    labels = torch.arange(200) % 2
    first = clean_label(labels, 0.1, 1, rng())
    torch.manual_seed(5)
    assert torch.equal(first.index, clean_label(labels, 0.1, 1, rng()).index)
    assert not torch.equal(first.index, clean_label(labels, 0.1, 1, rng(1)).index)
    assert first.kinds.dtype == torch.uint8
    assert first.kinds.tolist() == [KINDS.index("poison")] * 20


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda images: images.float() / 255, "float32 of (4, 3, 8, 8)"),
        (lambda images: images.to(torch.int16) + 40, "int16 of (4, 3, 8, 8)"),
        (lambda images: images[:, :1], "uint8 of (4, 1, 8, 8)"),
        (lambda images: images[:, :, 1:], "uint8 of (4, 3, 7, 8)"),
        (lambda images: images[:2], "uint8 of (2, 3, 8, 8)"),
        (lambda images: images.numpy(), "ndarray"),
    ],
)
def test_a_trigger_that_gives_something_else_than_images_is_refused(broken: Any, told: str) -> None:
    """`copy_` would cast it, or spread it, and every such image would look changed."""
    images, index = torch.full((4, 3, 8, 8), 9, dtype=torch.uint8), torch.arange(4)
    message = f"the attack's trigger gives {told}, not uint8 of (4, 3, 8, 8), which"
    for use in (apply_trigger, require_effect):
        with pytest.raises(UserError, match=re.escape(message)):
            use(lambda given, _: broken(given), images, index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": [0, 2, 2]}, "index is not ascending; give each image once"),
        ({"index": [2, 1, 3]}, "index is not ascending; give each image once"),
        ({"index": [0, 1, 5]}, "index has 0 to 5; give 0 to 4"),
        ({"index": [-1, 1, 2]}, "index has -1 to 2; give 0 to 4"),
        ({"labels": [0, 1, 3]}, "labels has 0 to 3; give 0 to 2"),
        ({"labels": [0, 1]}, "labels is int64 of (2,); give int64 of (3,)"),
        ({"kinds": [0, 1, 3]}, "kinds has 0 to 3; give 0 to 2"),
        ({"kinds": [[0, 1, 2]]}, "kinds is uint8 of (1, 3); give uint8 of (3,)"),
    ],
)
def test_a_choice_that_no_record_can_have_is_refused(changes: Any, message: str) -> None:
    """Of five images and three classes."""
    good = {"index": [0, 3, 4], "labels": [0, 1, 2], "kinds": [0, 1, 2]}
    kinds = {"index": torch.int64, "labels": torch.int64, "kinds": torch.uint8}

    def choice(values: Any) -> Choice:
        return Choice(**{name: torch.tensor(values[name], dtype=kinds[name]) for name in good})

    choice(good).check(5, 3)
    with pytest.raises(UserError, match=re.escape(f"the attack's choice: {message}")):
        choice(good | changes).check(5, 3)
    with pytest.raises(UserError, match="labels is float32 of"):
        Choice(torch.arange(2), torch.zeros(2), torch.zeros(2).byte()).check(5, 3)
