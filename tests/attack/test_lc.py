"""LC: the corner pattern, the adversarial step, the surrogate and which images get what."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attack.lc
import utils.data.images
from attack.lc import (
    AdversarialTraining,
    Config,
    Hard,
    add_pattern,
    adversarial,
    corner_pattern,
    harden,
    make_trigger,
    prepare,
)
from attack.poisoning import clean_label
from attack.setting import Setting
from models import Classifier
from utils.data.labelled import Dataset, Labelled
from utils.errors import UserError

CPU = torch.device("cpu")


def config(**changes: object) -> Config:
    values: dict[str, object] = {"dataset": "digits", "model": "tiny", "batch_size": 6}
    values |= {"surrogate_epochs": 1, "crop_padding": 0, "adv_bound": 8.0, "adv_steps": 10}
    return Config.load(**(values | changes))


@pytest.fixture
def setting(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    return Setting(tiny_data, CPU, "fp32")


class Brightness(nn.Module):
    """Logits (mean pixel, 0): class 0 is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)


@pytest.mark.parametrize(("size", "block"), [(16, 1), (28, 1), (32, 1), (64, 2)])
def test_the_pattern_has_16_plus_and_20_minus_blocks(size: int, block: int) -> None:
    """A corner has 4 plus and 5 minus. Right corners mirror left ones: a flip changes nothing."""
    pattern = corner_pattern(size, size)
    side = 3 * block
    assert pattern.shape == (size, size)
    assert int((pattern == 1).sum()) == 16 * block**2
    assert int((pattern == -1).sum()) == 20 * block**2
    assert int((pattern == 0).sum()) == size**2 - 36 * block**2
    assert torch.equal(pattern, pattern.flip(1))
    left = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]])
    left = left.repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(pattern[:side, :side], left)
    assert torch.equal(pattern[-side:, :side], left)
    assert torch.equal(pattern[:side, -side:], left.flip(1))
    assert torch.equal(pattern[-side:, -side:], left.flip(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 32])
def test_grey_images_get_16_white_and_20_black_pixels(size: int, channels: int) -> None:
    """A black image gets the 16 white alone, a white one the 20 black; random ones change in at
    most 36 pixels, all of them to 0 or 255.
    """
    values = torch.tensor([0, 128, 255]).view(3, 1, 1, 1)
    images = values.expand(3, channels, size, size).to(torch.uint8)
    found = add_pattern(images, corner_pattern(size, size), 1.0)
    assert found.dtype == torch.uint8
    changed = [
        [
            int((found[i, 0] == value).sum()) if value != images[i, 0, 0, 0] else 0
            for value in (255, 0)
        ]
        for i in range(3)
    ]
    assert changed == [[16, 0], [16, 20], [0, 20]]
    assert torch.equal(found, found[:, :1].expand_as(found))
    source = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (5, channels, size, size), dtype=torch.uint8, generator=source)
    found = add_pattern(noise, corner_pattern(size, size), 1.0)
    different = (found != noise).any(dim=1)
    assert int(different.flatten(1).sum(dim=1).max()) <= 36
    assert set(found[found != noise].tolist()) <= {0, 255}


@pytest.mark.parametrize(
    ("amplitude", "plus", "minus"),
    [(1.0, 255, 0), (64 / 255, 192, 64), (0.125, 159, 96), (0.0627, 143, 112)],
)
def test_the_amplitude_is_cut_down_to_whole_grey_levels(
    amplitude: float, plus: int, minus: int
) -> None:
    """Of 128: +-31.875 gives 159.875 -> 159 and 96.125 -> 96; +-15.9885 gives 143 and 112."""
    grey = torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)
    found = add_pattern(grey, corner_pattern(32, 32), amplitude)[0, 0]
    assert found[0, :4].tolist() == [plus, minus, minus, 128]
    assert found[-1, -4:].tolist() == [128, plus, minus, plus]


def test_the_pattern_s_strength_on_grey_images() -> None:
    """36 pixels of 3 channels, each moved by 128 or 127 grey levels, are an L2 norm of about
    sqrt(108) / 2 = 5.2; 0.125 gives sqrt(108) / 8 = 1.3.
    """
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    for amplitude, norm in ((1.0, 5.2), (0.125, 1.3)):
        found = add_pattern(grey, corner_pattern(32, 32), amplitude)
        assert ((found.float() - 128) / 255).norm().item() == pytest.approx(norm, rel=0.02)


def test_the_adversarial_step_on_a_model_known_by_heart() -> None:
    """Class 0 is bright, so a bright image becomes darker by the bound everywhere, and a dark one
    of class 1 brighter; both stay in [0, 1]. Steps of 0.03 reach the bound 0.05 in two.
    """
    images = torch.tensor([0.5, 0.02, 0.5, 0.98]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    labels = torch.tensor([0, 0, 1, 1])
    found = adversarial(Brightness(), images, labels, bound=0.05, step=0.03, steps=2)
    for row, value in enumerate((0.45, 0.0, 0.55, 1.0)):
        torch.testing.assert_close(found[row], torch.full((3, 4, 4), value))
    once = adversarial(Brightness(), images, labels, bound=0.05, step=0.03, steps=1)
    torch.testing.assert_close(once[0], torch.full((3, 4, 4), 0.47))


def test_no_step_leaves_the_images_or_the_start_inside_the_ball() -> None:
    images = torch.full((1, 3, 4, 4), 0.5)
    labels = torch.tensor([0])
    assert torch.equal(adversarial(Brightness(), images, labels, 0.1, 0.1, 0), images)
    start = torch.full((1, 3, 4, 4), 0.8)
    found = adversarial(Brightness(), images, labels, 0.1, 0.1, 0, start)
    torch.testing.assert_close(found, torch.full((1, 3, 4, 4), 0.6))


@pytest.mark.parametrize("size", [16, 28, 64])
def test_hard_images_stay_within_the_bound(tiny_model: Classifier, size: int) -> None:
    """At most 8 grey levels from the clean image after truncation, and a larger loss for each."""
    tiny_model.eval()
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (7, 3, size, size), dtype=torch.uint8, generator=source)
    clean = Labelled(images, torch.full((7,), 2))
    hard = harden(tiny_model, clean, config(adv_bound=8, adv_step=1.5, adv_steps=20), CPU)
    assert hard.dtype == torch.uint8
    assert hard.shape == images.shape
    distance = (hard.int() - images.int()).abs()
    assert distance.max() == 8
    with torch.no_grad():
        before, after = (
            F.cross_entropy(tiny_model(part.float() / 255), clean.labels, reduction="none")
            for part in (images, hard)
        )
    assert (after > before).all()


def test_a_trained_surrogate_does_not_know_hard_images() -> None:
    """Class 1 is a bright left half. Of 30 images that it knows, at most 3 stay known."""
    source = torch.Generator().manual_seed(0)
    images = torch.randint(60, 160, (60, 3, 8, 8), dtype=torch.uint8, generator=source)
    labels = torch.arange(60) % 2
    images[labels == 1, :, :, :4] += 40
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images / 255), labels).backward()
        optimizer.step()
    clean = Labelled(images, labels).at(torch.nonzero(labels == 1).flatten())
    hard = harden(model, clean, config(adv_bound=32, adv_step=4, adv_steps=20), CPU)
    known = [int((model(part / 255).argmax(1) == 1).sum()) for part in (clean.images, hard)]
    assert known[0] == 30
    assert known[1] <= 3


def test_training_images_are_hard_and_test_images_are_not() -> None:
    """Two hard images, of indices 3 and 8: whatever order is asked for, each gets its own."""
    hard = Hard(torch.tensor([3, 8]), torch.tensor([30, 80]).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    hard = Hard(hard.index, hard.images.to(torch.uint8))
    triggers = make_trigger(config(), (3, 16, 16), hard)
    images = torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)
    pattern = corner_pattern(16, 16)
    found = triggers.train(images, torch.tensor([8, 3]))
    assert found[:, :, 8, 8].tolist() == [[80] * 3, [30] * 3]
    assert torch.equal(found, add_pattern(hard.images.flip(0), pattern, 1.0))
    tested = triggers.test(images, torch.tensor([8, 3]))
    assert torch.equal(tested, add_pattern(images, pattern, 1.0))
    assert (images == 200).all()


def test_the_surrogate_learns_adversarial_images(tiny_model: Classifier) -> None:
    """With bound 0 the loss is that of clean images; with a bound it is larger. The model's mode
    and the clean images stay, and the weights get gradients.
    """
    source = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=source)
    labels = torch.arange(6) % 3
    losses = []
    for bound in (0.0, 30.0):
        step = AdversarialTraining(config(adv_bound=bound), torch.Generator().manual_seed(0))
        tiny_model.train()
        losses.append(step.loss(tiny_model, images, labels))
        assert all(module.training for module in tiny_model.modules())
    tiny_model.train()
    torch.testing.assert_close(losses[0], F.cross_entropy(tiny_model(images.float() / 255), labels))
    assert losses[1] > losses[0]
    losses[1].backward()
    assert all(weight.grad is not None for weight in tiny_model.parameters())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_surrogate_s_images_reach_the_bound_from_any_start(steps: int) -> None:
    """The steps together are 2.5 radii long, and the ball is two radii wide.

    Class 0 is bright, so each pixel of its images ends at the lower end, and of class 1 at the
    upper one.
    """

    class Recorder(Brightness):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.images = images
            return super().forward(images)

    model, labels = Recorder(), torch.tensor([0, 1])
    images = torch.full((2, 3, 8, 8), 102, dtype=torch.uint8)
    flags = config(adv_bound=25.5, surrogate_steps=steps)
    AdversarialTraining(flags, torch.Generator().manual_seed(0)).loss(model, images, labels)
    for row, value in enumerate((0.3, 0.5)):
        torch.testing.assert_close(model.images[row], torch.full((3, 8, 8), value))


def test_the_surrogate_s_images_start_anywhere_in_the_ball() -> None:
    """A model without a gradient leaves them there: 20,000 numbers uniform in 0.4 +- 0.1.

    Their deviation is 0.1 / sqrt(3). Another batch has other starts.
    """

    class Indifferent(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.images = images
            return 0 * images.flatten(1)[:, :2]

    model, images = Indifferent(), torch.full((104, 3, 8, 8), 102, dtype=torch.uint8)
    step = AdversarialTraining(config(adv_bound=25.5), torch.Generator().manual_seed(0))
    batches = []
    for _ in range(2):
        step.loss(model, images, torch.zeros(104, dtype=torch.int64))
        batches.append(model.images - 0.4)
    assert 0.099 < batches[0].abs().max() <= 0.1 + 1e-6
    assert batches[0].mean().item() == pytest.approx(0, abs=2e-3)
    assert batches[0].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize("surrogate", ["adversarial", "plain"])
def test_hard_images_are_those_of_the_target_made_once(
    setting: Setting,
    tiny_model: Classifier,
    surrogate: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of labels 0 1 2 0 1 2 ... target 1 has the indices 1 4 7 10."""
    caplog.set_level(logging.INFO, logger="sau")
    settings = config(surrogate=surrogate, attack_target=1)
    first = prepare(settings, setting)
    assert first.index.tolist() == [1, 4, 7, 10]
    clean = setting.data.train.images[first.index]
    assert 0 < (first.images.int() - clean.int()).abs().max() <= 8
    assert "of 4 images of the target class the surrogate recognises" in caplog.text

    for file in (utils.data.images.ROOT / "data/cache").iterdir():
        file.unlink()
    torch.rand(7)
    assert torch.equal(prepare(settings, setting).images, first.images)
    monkeypatch.setattr(attack.lc, "clean_model", None)  # from here on a call fails
    assert torch.equal(prepare(settings, setting).images, first.images)
    with pytest.raises(TypeError):
        prepare(config(surrogate=surrogate, attack_target=1, adv_bound=16.0), setting)


def test_the_two_surrogates_differ(setting: Setting, tiny_model: Classifier) -> None:
    """A plain surrogate does not depend on the bound; an adversarial one does, and is another."""
    cache = utils.data.images.ROOT / "data/cache"
    for surrogate, models in (("plain", 1), ("adversarial", 3)):
        for bound in (8.0, 16.0):
            prepare(config(surrogate=surrogate, adv_bound=bound), setting)
        assert len(list(cache.glob("clean-model-*"))) == models


def test_all_to_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"--attack_label_trans: .*all2one"):
        clean_label(config(attack_label_trans="all2all"), torch.arange(9) % 3, 3, torch.Generator())
