"""LF: the closed form against the published pattern's numbers, and the search on linear models."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from attack import lf
from attack.lf import (
    Config,
    closed_form,
    deepfool,
    dome,
    make_trigger,
    prepare,
    search_pattern,
    smoothing,
)
from attack.setting import Setting
from models import Classifier
from utils.data.labelled import Dataset
from utils.errors import UserError

SHAPES = [(channels, size, size) for channels in (1, 3) for size in (16, 28, 32, 64)]


def triggered(images: torch.Tensor, **overrides: object) -> torch.Tensor:
    config = Config.load("cifar10", **overrides)
    return make_trigger(config, tuple(images.shape[1:]))(images, torch.arange(len(images)))


def constant(value: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.full((2, *shape), value, dtype=torch.uint8)


# --- the closed form ----------------------------------------------------------------------------


def test_the_dome_at_32() -> None:
    """Its peak is off the centre, since a kernel of 30 taps has none."""
    found = dome(32)
    for place, value in (
        (0, 0.4456),
        (8, 0.8984),
        (13, 1),
        (20, 0.8582),
        (24, 0.6674),
        (31, 0.2822),
    ):
        assert found[place] == pytest.approx(value, abs=5e-5)
    assert int(found.argmax()) == 13


@pytest.mark.parametrize("size", [16, 28, 32, 64])
def test_the_dome_is_what_smoothing_only_scales(size: int) -> None:
    smoothed = smoothing(size) @ dome(size)
    assert torch.allclose(smoothed / smoothed.max(), dome(size), atol=1e-6)
    assert dome(size).min() > 0
    assert dome(size).max() == 1
    assert dome(size).min() < 0.5


@pytest.mark.parametrize(
    ("size", "taps", "sigma"), [(16, 15, 3.0), (24, 23, 4.5), (28, 30, 6.0), (64, 30, 6.0)]
)
def test_smoothing_is_a_gaussian_filter(size: int, taps: int, sigma: float) -> None:
    """out[i] = sum_j k[j] in[i + j - (taps - 1) // 2], zeros outside; 30 * 24 / 64 * 2 + 1 = 23."""
    kernel = [
        torch.exp(torch.tensor(-0.5 * ((j - (taps - 1) / 2) / sigma) ** 2)) for j in range(taps)
    ]
    signal = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = (taps - 1) // 2
    expected = [
        float(
            sum(
                kernel[j] / sum(kernel) * signal[i + j - before]
                for j in range(taps)
                if 0 <= i + j - before < size
            )
        )
        for i in range(size)
    ]
    assert (smoothing(size) @ signal).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("strength", "size", "largest", "length"),
    [
        ((18.9, 0, 51), 32, [18, 0, 51], 4.006),
        ((51, 5, 21), 32, [51, 5, 21], 4.05),
        ((41, 2, 51.2), 64, [41, 2, 51], 8.57),
    ],
)
def test_the_published_patterns(
    strength: tuple[float, ...], size: int, largest: list[int], length: float
) -> None:
    """CIFAR-10, GTSRB and Tiny ImageNet; L2 on the scale of [0, 1], as published but for 1 %."""
    found = closed_form(strength, (3, size, size))
    assert found.min() >= 0
    assert found.amax(dim=(1, 2)).tolist() == largest
    assert torch.equal(found, found.floor())
    assert float((found / 255).norm()) == pytest.approx(length, rel=0.01)


def test_cifar10_s_pattern_is_the_default() -> None:
    """A black image shows the pattern itself; its means are 9.9, 0 and 27.6."""
    found = triggered(constant(0, (3, 32, 32)))[0].float()
    assert torch.equal(found, closed_form((18.9, 0, 51), (3, 32, 32)))
    assert found.mean(dim=(1, 2)).tolist() == pytest.approx([9.9, 0, 27.6], abs=0.05)
    assert found[1].unique().tolist() == [0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image(shape: tuple[int, int, int], value: int) -> None:
    """c + L: at most 128 + 51 = 179 without clipping, and white stays white."""
    images = constant(value, shape)
    found = triggered(images)
    assert found.dtype == torch.uint8
    assert images.unique().tolist() == [value]
    pattern = triggered(constant(0, shape)).int()
    assert torch.equal(found.int(), (value + pattern).clamp(max=255))
    assert pattern.max() == 51
    assert len(pattern.unique()) > 20  # a dome, not a constant


@pytest.mark.parametrize("shape", SHAPES)
def test_random_images_never_get_darker(shape: tuple[int, int, int]) -> None:
    images = torch.randint(
        0, 256, (20, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    change = triggered(images).int() - images.int()
    assert change.min() >= 0
    assert change.max() <= 51
    assert torch.equal(triggered(images), triggered(images))


def test_strength() -> None:
    """One value is for all channels; a grey image gets the largest; digits are grey."""
    assert torch.equal(closed_form((30,), (3, 32, 32)), closed_form((30, 30, 30), (3, 32, 32)))
    assert torch.equal(closed_form((18.9, 0, 51), (1, 28, 28)), closed_form((51,), (1, 28, 28)))
    assert Config.load("digits").strength == (51,)
    with pytest.raises(UserError, match=r"^--strength: 2 values are given; give 1 or 3$"):
        triggered(constant(0, (3, 32, 32)), strength=(51, 21))
    with pytest.raises(UserError, match="strength"):
        Config.load("cifar10", strength=())


# --- the search ---------------------------------------------------------------------------------


class Linear(nn.Module):
    """logits = weights . image + bias."""

    def __init__(self, weights: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weights[0].numel(), len(weights))
        self.linear.weight.data = weights.flatten(1)
        self.linear.bias.data = bias

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))


def two_classes(size: int = 8, bias: float = 5.0) -> Linear:
    """Class 0, the target, is what is bright in the middle; other images are class 1.

    The second channel counts for nothing.
    """
    weights = torch.zeros(2, 3, size, size)
    weights[0, ::2, 2:6, 2:6] = 1
    return Linear(weights, torch.tensor([0.0, bias]))


def test_deepfool_needs_one_step_on_a_linear_model() -> None:
    """The gap w . x + b is closed along w: 1.02 |gap| w / |w|^2, from the other class only."""
    model = two_classes()
    image = torch.full((1, 3, 8, 8), 0.1)
    way = deepfool(model, image, label=1, target=0, steps=1)
    assert way is not None
    gap = 5 - 0.1 * 32
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, ::2, 2:6, 2:6] = 1.02 * gap / 32
    assert torch.allclose(way, expected, atol=1e-6)
    assert int(model(image + way).argmax()) == 0


def test_deepfool_gives_up() -> None:
    """A third class that stays ahead of the target, whatever is done against class 1."""
    weights = torch.zeros(3, 1, 2, 2)
    weights[0], weights[1] = 1, -1
    weights[2] = 2
    model = Linear(weights, torch.tensor([0.0, 1.0, 0.5]))
    assert deepfool(model, torch.zeros(1, 1, 2, 2), label=1, target=0, steps=7) is None


def search(model: nn.Module, images: torch.Tensor, **overrides: object) -> torch.Tensor:
    config = Config.load("cifar10", **overrides)
    return search_pattern(model.eval(), images, images, config)[0]


def random_images() -> torch.Tensor:
    return 0.25 * torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_search_finds_a_smooth_pattern_of_the_strength() -> None:
    """Between 0 and 51 / 255, bright in the middle of the channels that count, and it works."""
    model, images = two_classes(), random_images()
    before = model(images).argmax(1)
    pattern = search(model, images)
    assert pattern.shape == (3, 8, 8)
    assert not pattern.requires_grad
    assert pattern.min() == 0
    assert pattern.max() == pytest.approx(0.2)
    assert pattern[1].max() == 0
    assert int(pattern[0].argmax()) in (27, 28, 35, 36)
    steps = torch.cat([pattern.diff(dim=1).flatten(), pattern.diff(dim=2).flatten()])
    assert steps.abs().max() < 0.08
    assert (before == 1).all()
    assert (model(images + pattern).argmax(1) == 0).float().mean() >= 0.2


def test_images_that_are_already_fooled_teach_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black images are class 1. With a faint pattern they are class 2, and that is not the target.

    So the first image of the pass, which brings the pattern, is the only one that is led anywhere.
    """
    weights = torch.zeros(3, 3, 8, 8)
    weights[2] = 1 / 192
    model = Linear(weights, torch.tensor([-9.0, 0.02, 0.0]))
    led: list[int] = []

    def deepfool(_: nn.Module, image: torch.Tensor, label: int, *__: int) -> torch.Tensor:
        led.append(label)
        return torch.ones_like(image)

    monkeypatch.setattr(lf, "deepfool", deepfool)
    pattern = search(model, torch.zeros(20, 3, 8, 8), search_passes=1)
    assert model(pattern.unsqueeze(0)).argmax(1).tolist() == [2]
    assert led == [1]


def test_the_search_depends_on_its_seed_alone() -> None:
    model = two_classes(bias=20)  # so far that it takes all passes
    first, again, other = (
        search(model, random_images(), random_seed=seed, search_passes=1) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert other.shape == first.shape


def test_strength_bounds_the_searched_pattern() -> None:
    assert search(two_classes(), random_images(), strength=(25.5,)).max() == pytest.approx(0.1)


def test_images_of_the_target_teach_nothing() -> None:
    """All are class 0 already: the pattern stays zero, which `prepare` refuses."""
    assert search(two_classes(bias=-99), random_images()).abs().max() == 0


class Counting(Linear):
    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(images)


@pytest.mark.parametrize(("passes", "done"), [(3, 3), (50, 5)])
def test_the_search_ends_when_the_rate_is_steady(passes: int, done: int) -> None:
    """Nothing is ever changed: five equal rates are enough.

    Predictions: of images and held-out ones first, then in each pass of each image and of the
    held-out ones. All 20 images are the target's, so that no DeepFool call is among them.
    """
    model = Counting(torch.zeros(2, 3, 8, 8), torch.tensor([1.0, 0.0]))
    search(model, random_images(), search_passes=passes)
    assert model.calls == 2 + done * 21


def test_the_search_ends_when_the_pattern_works() -> None:
    """One pass, if its rate is enough."""
    model = two_classes()
    once = search(model, random_images(), search_passes=1)
    assert torch.equal(search(model, random_images(), search_passes=50), once)


def test_a_searched_pattern_is_added_in_whole_grey_levels() -> None:
    """floor(0.1 * 255) = 25 and floor(0.2 * 255) = 51 (in floats 51.000000759)."""
    searched = torch.full((3, 16, 16), 0.1)
    searched[0] = 0.2
    trigger = make_trigger(Config.load("cifar10"), (3, 16, 16), searched)
    found = trigger(constant(230, (3, 16, 16)), torch.arange(2))
    assert found[0, :, 0, 0].tolist() == [255, 255, 255]
    found = trigger(constant(100, (3, 16, 16)), torch.arange(2))
    assert found[0, :, 0, 0].tolist() == [151, 125, 125]


class Remembering(Setting):
    """Keeps the keys, and caches nothing."""

    def cached(
        self,
        kind: str,
        key: Mapping[str, Any],
        compute: Callable[[], dict[str, torch.Tensor]],
        version: int = 1,
    ) -> dict[str, torch.Tensor]:
        KEYS.append((kind, dict(key)))
        return compute()


KEYS: list[tuple[str, dict[str, Any]]] = []


def test_the_search_is_prepared_with_a_clean_model(
    tiny_data: Dataset, tiny_model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 images wanted, all 12 there are taken; three test images per class, under ten."""
    asked: list[int] = []
    seen: dict[str, torch.Tensor] = {}

    def clean(config: Config, setting: Setting, epochs: int) -> Classifier:
        asked.append(epochs)
        return tiny_model.eval()

    def found(
        model: nn.Module, images: torch.Tensor, held_out: torch.Tensor, config: Config
    ) -> tuple[torch.Tensor, list[float]]:
        seen.update(images=images, held_out=held_out)
        return images[0], [0.125, 0.25]

    monkeypatch.setattr(lf, "clean_model", clean)
    monkeypatch.setattr(lf, "search_pattern", found)
    setting = Remembering(tiny_data, torch.device("cpu"), "fp32")
    KEYS.clear()
    assert prepare(Config.load("cifar10"), setting) is None
    assert KEYS == []
    for changes in ({}, {"clean_epochs": 3}, {"strength": (9.0,)}, {"lr": 0.5}, {"pratio": 0.01}):
        pattern = prepare(Config.load("cifar10", search=True, **changes), setting)
        assert pattern is not None
        assert pattern.shape == (3, 8, 8)
    assert setting.facts["search"] == {"passes": 2, "changed_predictions": 0.25}
    assert asked == [100, 3, 100, 100, 100]
    assert [kind for kind, _ in KEYS] == ["lf-pattern"] * 5
    keys = [key for _, key in KEYS]
    assert all(key != keys[0] for key in keys[1:4])
    assert keys[4] == keys[0]  # the pattern does not depend on how many images will carry it
    assert seen["images"].shape == (12, 3, 8, 8)
    assert 0 <= seen["images"].min() <= seen["images"].max() <= 1
    labels = torch.arange(9) % 3
    order = torch.cat([torch.nonzero(labels == label).flatten() for label in range(3)])
    assert torch.equal(seen["held_out"], tiny_data.test.images[order].float() / 255)


def test_a_search_that_finds_nothing_is_refused_and_not_kept(
    tiny_data: Dataset, tiny_model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lf, "clean_model", lambda *_: tiny_model.eval())
    monkeypatch.setattr(lf, "search_pattern", lambda *_: (torch.zeros(3, 8, 8), [0.0]))
    setting = Remembering(tiny_data, torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match=r"^--search: .* --search_steps"):
        prepare(Config.load("cifar10", search=True), setting)


def test_a_search_of_strength_0_is_refused_before_its_model_is_trained(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lf, "clean_model", lambda *_: pytest.fail("trained"))
    setting = Remembering(tiny_data, torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match=r"^--strength: 0 leaves nothing of the pattern to search"):
        prepare(Config.load("cifar10", search=True, strength=(0.0,)), setting)
