"""Input-Aware: its networks and losses, the mask phase, and the two-network training step."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attack.inputaware as inputaware
import utils.data.images
from attack.inputaware import Config, InputAware, density_loss, diversity_loss, paint, rms
from attack.setting import Setting
from models import Classifier, Normalize
from models.inputaware import PixelGenerator, threshold, widths_for
from utils.data.batches import as_float
from utils.data.labelled import Dataset, Labelled
from utils.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)


def setting(data: Dataset) -> Setting:
    return Setting(data, torch.device("cpu"), "fp32")


def config(**changes: Any) -> Config:
    """A quarter poisoned, no augmentation, one epoch of the mask network in batches of 6."""
    still = {"pratio": 0.25, "crop_padding": 0, "flip": False, "mask_epochs": 1, "batch_size": 6}
    return Config.load("cifar10", **(still | changes))


def control(data: Dataset, **changes: Any) -> InputAware:
    made = InputAware(config(**changes), setting(data))
    made.before_training()
    return made


def parameters(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def gradients(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "count"),
    [(3, 3, 32, 723273), (3, 1, 32, 722691), (3, 3, 64, 723273), (1, 1, 28, 42339)],
)
def test_published_networks(channels: int, outputs: int, size: int, count: int) -> None:
    widths = widths_for(size)
    assert widths is not None
    network = PixelGenerator(channels, outputs, widths, double_tanh=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "bottom"), [(16, 4), (28, 7), (32, 4), (64, 8)])
def test_the_networks_halve_and_double_the_image(size: int, channels: int, bottom: int) -> None:
    """16 and 28 pixels are halved twice, 32 and 64 three times."""
    widths = widths_for(size)
    assert widths is not None
    network = PixelGenerator(channels, channels, widths, double_tanh=True)
    sides = []
    for module in network:
        module.register_forward_hook(lambda _, inputs, output: sides.append(output.shape[2]))
    found = network(torch.randn(2, channels, size, size, generator=rng()))
    assert found.shape == (2, channels, size, size)
    assert min(sides) == bottom
    assert isinstance(network[-1], nn.BatchNorm2d)  # no ReLU at the end


@pytest.mark.parametrize("size", [30, 33, 10])
def test_sizes_that_cannot_be_halved_twice_are_refused(tiny_data: Dataset, size: int) -> None:
    images = torch.zeros(4, 3, size, size, dtype=torch.uint8)
    split = Labelled(images, torch.arange(4) % 3)
    data = Dataset("odd", split, split, tiny_data.classes, tiny_data.mean, tiny_data.std)
    with pytest.raises(UserError, match=f"--image_size: {size} is no multiple of 4; give one"):
        InputAware(config(), setting(data))


@pytest.mark.parametrize(("double", "low", "high"), [(False, 0.0, 1.0), (True, 0.1192, 0.8808)])
def test_outputs_lie_in_the_range_of_one_or_two_tanh(double: bool, low: float, high: float) -> None:
    """Twice: 0.5 + tanh(1) / 2 = 0.5 + 0.3808, which are 30 to 225 of 255."""
    network = PixelGenerator(1, 1, (16, 32), double)
    with torch.no_grad():
        network[-1].weight.fill_(100)
        found = network(torch.randn(4, 1, 16, 16, generator=rng()))
    assert found.min().item() == pytest.approx(low, abs=1e-3)
    assert found.max().item() == pytest.approx(high, abs=1e-3)


def test_the_threshold_is_a_soft_step() -> None:
    """tanh(20 m - 10) / 2 + 0.5: at 0.4 tanh(-2) = -0.964, at 0.3 tanh(-4) = -0.9993."""
    found = threshold(torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7]))
    torch.testing.assert_close(
        found, torch.tensor([0.0003, 0.0180, 0.5, 0.9820, 0.9997]), atol=5e-5, rtol=0
    )


# --- trigger and losses -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mask_says_where_the_pattern_is(channels: int) -> None:
    """The image where it is 0, the pattern where it is 1, their mean where it is a half."""
    images = torch.rand(2, channels, 8, 8, generator=rng())
    patterns = torch.rand(2, channels, 8, 8, generator=rng(1))
    masks = torch.tensor([0.0, 1.0, 0.5, 0.0]).repeat(2).expand(2, 1, 8, 8)
    painted = paint(images, patterns, masks)
    torch.testing.assert_close(painted[..., 0], images[..., 0])
    torch.testing.assert_close(painted[..., 1], patterns[..., 1])
    torch.testing.assert_close(painted[..., 2], (images[..., 2] + patterns[..., 2]) / 2)


def test_painting_pixels_is_painting_normalized_images() -> None:
    images, patterns = torch.rand(2, 2, 3, 8, 8, generator=rng())
    masks = torch.rand(2, 1, 8, 8, generator=rng(1))
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    published = paint(normalize(images), normalize(patterns), masks)
    torch.testing.assert_close(normalize(paint(images, patterns, masks)), published)


def test_losses_by_hand() -> None:
    """rms (3, 4) = sqrt(25 / 2) = 3.5355. Diversity: (2 / 0.5 + 1 / 1) / 2 = 2.5.

    Density 0.032: of 0, 0.032, 0.132, 0.532 the last two are 0.1 and 0.5 too much: 0.6 / 4.
    """
    assert rms(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(3.5355, abs=1e-4)
    still = torch.zeros(2, 1, 4, 4)
    inputs = torch.stack([torch.full((1, 4, 4), 2.0), torch.ones(1, 4, 4)])
    outputs = torch.stack([torch.full((1, 4, 4), 0.5), -torch.ones(1, 4, 4)])
    assert diversity_loss(inputs, still, outputs, still).item() == pytest.approx(2.5, abs=1e-5)
    masks = torch.tensor([0.0, 0.032, 0.132, 0.532])
    assert density_loss(masks, 0.032).item() == pytest.approx(0.15, abs=1e-6)


def test_equal_outputs_cost_a_lot_and_have_a_finite_gradient() -> None:
    """1 / 1e-7; the distance of two equal images has no direction."""
    outputs = torch.ones(1, 1, 4, 4, requires_grad=True)
    loss = diversity_loss(
        torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), outputs, outputs.detach()
    )
    assert loss.item() == pytest.approx(1e7)
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


# --- mask phase ---------------------------------------------------------------------------------


def test_the_mask_phase_says_every_epoch_and_leaves_a_fixed_network(
    tiny_data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sau"):
        attack = control(tiny_data, mask_epochs=3)
    lines = [record.message for record in caplog.records if "mask, epoch" in record.message]
    assert [line.split("  ")[0] for line in lines] == [f"mask, epoch {i}/3" for i in (1, 2, 3)]
    assert all("loss" in line and "area" in line for line in lines)
    assert not attack.mask.training
    assert not any(parameter.requires_grad for parameter in attack.mask.parameters())


def test_the_mask_phase_has_the_published_optimizer(
    tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam 0.01 with betas 0.5 and 0.9; a tenth after 10 epochs, a hundredth after 20."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *arguments: object) -> object:
        (group,) = self.param_groups
        assert group["betas"] == (0.5, 0.9)
        rates.append(group["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    control(tiny_data, mask_epochs=22, batch_size=12)
    assert rates == pytest.approx([1e-2] * 10 + [1e-3] * 10 + [1e-4] * 2)


def test_the_mask_phase_makes_masks_small(tiny_data: Dataset) -> None:
    """Masks begin at about a half, and without diversity nothing keeps them from shrinking."""
    images = as_float(tiny_data.train.images)
    before, after = (
        InputAware(config(), setting(tiny_data)),
        control(tiny_data, lambda_div=0.0, mask_epochs=6),
    )
    areas = []
    for attack in (before, after):
        attack.mask.train()
        with torch.no_grad():
            areas.append(
                threshold(attack.mask(Normalize(tiny_data.mean, tiny_data.std)(images))).mean()
            )
    assert 0.3 < areas[0] < 0.7
    assert areas[1] < 0.5 * areas[0]


def test_a_trained_mask_is_read_again(tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = control(tiny_data)
    monkeypatch.setattr(inputaware, "train_mask", lambda *_: pytest.fail("trained again"))
    again = control(tiny_data)
    assert torch.equal(parameters(first.mask), parameters(again.mask))
    images = as_float(tiny_data.test.images)
    assert torch.equal(
        first.trigger(images, torch.arange(9)), again.trigger(images, torch.arange(9))
    )


@pytest.mark.parametrize(
    "change", [{"mask_density": 0.1}, {"lr_M": 0.1}, {"double_tanh": False}, {"random_seed": 1}]
)
def test_another_mask_is_trained_for_other_values(
    tiny_data: Dataset, change: dict[str, Any]
) -> None:
    assert not torch.equal(
        parameters(control(tiny_data).mask), parameters(control(tiny_data, **change).mask)
    )


# --- training -----------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Keeps the images that a classifier is given."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return self.classifier(images)


def step(attack: InputAware, model: nn.Module, data: Dataset) -> torch.Tensor:
    """One step as the pipeline makes it, but for the classifier's own."""
    loss = attack.loss(model, data.train.images, data.train.labels)
    loss.backward()
    attack.update()
    return loss.detach()


@pytest.mark.parametrize(
    ("pratio", "counts"), [(0.1, (12, 12)), (0.01, (1, 1)), (0.75, (96, 32)), (1e-9, (0, 0))]
)
def test_as_many_cross_images_as_poisoned_ones(
    tiny_data: Dataset, pratio: float, counts: tuple[int, int]
) -> None:
    attack = InputAware(config(pratio=pratio), setting(tiny_data))
    assert attack.poisoned_per_batch(128) == counts


def test_a_batch_is_poisoned_cross_and_clean(tiny_data: Dataset, tiny_model: Classifier) -> None:
    """Of 12 images 3 are poisoned and 3 cross; labels 0 1 2 0 1 2 ..., the target is 1.

    Poisoned images carry their own trigger, cross images the trigger of the three images that a
    twin of the control draws too. The pattern network normalizes by each batch of three, as it does
    in training.
    """
    attack, twin = (control(tiny_data, attack_target=1, lambda_div=0.0) for _ in range(2))
    model, normalize = Recorder(tiny_model), Normalize(tiny_data.mean, tiny_data.std)
    images, labels = as_float(tiny_data.train.images), tiny_data.train.labels
    loss = attack.loss(model, tiny_data.train.images, labels)

    def painted(targets: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        inputs = normalize(sources)
        return paint(targets, twin.pattern(inputs), threshold(twin.mask(inputs)))

    torch.testing.assert_close(model.images[:3], painted(images[:3], images[:3]))
    torch.testing.assert_close(model.images[3:6], painted(images[3:6], twin._draw(3)))
    torch.testing.assert_close(model.images[6:], images[6:])
    expected = torch.cat([torch.tensor([1, 1, 1]), labels[3:]])
    torch.testing.assert_close(loss, F.cross_entropy(tiny_model(model.images), expected))


def test_other_images_are_drawn_anew(tiny_data: Dataset) -> None:
    """Each time different training images of their own order, none twice in a batch."""
    attack = InputAware(config(), setting(tiny_data))
    index = {
        tuple(image.flatten().tolist()): i
        for i, image in enumerate(as_float(tiny_data.train.images))
    }
    draws = [[index[tuple(image.flatten().tolist())] for image in attack._draw(5)] for _ in "ab"]
    assert draws[0] != draws[1]
    assert all(len(set(draw)) == 5 for draw in draws)


def test_only_the_pattern_network_learns(tiny_data: Dataset, tiny_model: Classifier) -> None:
    attack = control(tiny_data)
    pattern, mask = parameters(attack.pattern), parameters(attack.mask)
    step(attack, tiny_model, tiny_data)
    assert not torch.equal(parameters(attack.pattern), pattern)
    assert torch.equal(parameters(attack.mask), mask)
    assert not attack.mask.training


def test_unlike_patterns_are_worth_lambda_div(tiny_data: Dataset, tiny_model: Classifier) -> None:
    """With the same networks the loss is linear in it: from 1 to 3 it grows twice as much."""
    tiny_model.eval()
    networks, losses = control(tiny_data).state_dict(), []
    for weight in (0.0, 1.0, 3.0):
        attack = InputAware(config(lambda_div=weight), setting(tiny_data))
        attack.load_state_dict(networks)
        images, labels = tiny_data.train.images, tiny_data.train.labels
        losses.append(attack.loss(tiny_model, images, labels).item())
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


def test_gradients_pile_up_as_published_or_not(tiny_data: Dataset, tiny_model: Classifier) -> None:
    """With a learning rate of almost nothing both see the same networks, hence gradients g1, g2.

    Accumulated, the second step takes g1 + g2; otherwise g2, after which nothing is left.
    """
    piled, plain = (
        control(tiny_data, lr_G=1e-12, accumulate_generator_grad=flag) for flag in (True, False)
    )
    tiny_model.eval()
    single = []
    for _ in range(2):
        loss = plain.loss(tiny_model, tiny_data.train.images, tiny_data.train.labels)
        loss.backward()
        single.append(gradients(plain.pattern))
        plain.update()
        assert all(parameter.grad is None for parameter in plain.pattern.parameters())
        step(piled, tiny_model, tiny_data)
    assert not torch.allclose(single[0], single[1])
    torch.testing.assert_close(
        gradients(piled.pattern), single[0] + single[1], atol=1e-4, rtol=1e-3
    )


def test_a_batch_without_poison_is_clean_and_leaves_the_pattern_network_alone(
    tiny_data: Dataset, tiny_model: Classifier
) -> None:
    attack, model = control(tiny_data, pratio=1e-9), Recorder(tiny_model)
    before = parameters(attack.pattern)
    loss = step(attack, model, tiny_data)
    torch.testing.assert_close(model.images, as_float(tiny_data.train.images))
    torch.testing.assert_close(loss, F.cross_entropy(model(model.images), tiny_data.train.labels))
    assert torch.equal(parameters(attack.pattern), before)
    assert all(parameter.grad is None for parameter in attack.pattern.parameters())


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.01), (199, 0.01), (200, 0.001), (999, 1e-6)])
def test_the_pattern_network_s_rate_falls_at_200_300_400_and_500(
    tiny_data: Dataset, tiny_model: Classifier, epoch: int, rate: float
) -> None:
    """Twelve images in batches of six are two batches per epoch."""
    attack = control(tiny_data)
    attack.load_state_dict(attack.state_dict() | {"batches": 2 * epoch + 1})
    step(attack, tiny_model, tiny_data)
    assert attack.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_training_goes_on_from_a_saved_state(
    tiny_data: Dataset, tiny_model: Classifier, tmp_path: Path
) -> None:
    """Two steps, saved, and two more: the same as from the file; plain tensors and numbers."""
    attack = control(tiny_data)
    for _ in range(2):
        step(attack, tiny_model, tiny_data)
    torch.save({"attack": attack.state_dict(), "model": tiny_model.state_dict()}, tmp_path / "s.pt")
    expected = [step(attack, tiny_model, tiny_data) for _ in range(2)]
    again = InputAware(config(), setting(tiny_data))
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    again.before_training()
    again.load_state_dict(state["attack"])
    tiny_model.load_state_dict(state["model"])
    assert [step(again, tiny_model, tiny_data) for _ in range(2)] == expected
    assert torch.equal(parameters(again.pattern), parameters(attack.pattern))


# --- test images --------------------------------------------------------------------------------


def test_a_test_image_s_trigger_depends_on_the_image_alone(
    tiny_data: Dataset, tiny_model: Classifier
) -> None:
    """In eval mode no other image of the batch matters; training goes on in train mode after."""
    attack, images = control(tiny_data), as_float(tiny_data.test.images)
    step(attack, tiny_model, tiny_data)
    with torch.no_grad():
        everything = attack.trigger(images, torch.arange(9))
        alone = attack.trigger(images[4:5], torch.tensor([0]))
    torch.testing.assert_close(everything[4:5], alone)
    assert attack.pattern.training
    assert everything.min() >= 0
    assert everything.max() <= 1


def test_a_cross_image_carries_a_training_image_s_trigger(tiny_data: Dataset) -> None:
    """The same for an index every time; the trigger of some training image, on the test image."""
    attack, images = control(tiny_data), as_float(tiny_data.test.images)
    with torch.no_grad():
        found = attack.cross(images, torch.arange(9))
        assert torch.equal(found[3:5], attack.cross(images, torch.arange(9))[3:5])
        sources = Normalize(tiny_data.mean, tiny_data.std)(as_float(tiny_data.train.images))
        attack.pattern.eval()
        patterns, masks = attack.pattern(sources), threshold(attack.mask(sources))
        for image, crossed in zip(images, found, strict=True):
            every = paint(image.expand(12, -1, -1, -1), patterns, masks)
            assert (every - crossed).flatten(1).abs().amax(dim=1).min() < 1e-5
        own = attack.cross(as_float(tiny_data.train.images), torch.arange(12))
        assert (
            not torch.isclose(own, paint(as_float(tiny_data.train.images), patterns, masks))
            .all(dim=(1, 2, 3))
            .any()
        )


def test_the_networks_depend_on_the_seed_alone(tiny_data: Dataset) -> None:
    first = InputAware(config(), setting(tiny_data))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = InputAware(config(pratio=0.5), setting(tiny_data))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers are shifted
    assert torch.equal(parameters(first.pattern), parameters(again.pattern))
    other = InputAware(config(random_seed=1), setting(tiny_data))
    assert not torch.equal(parameters(first.pattern), parameters(other.pattern))
