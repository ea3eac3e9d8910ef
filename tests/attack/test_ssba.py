"""SSBA: the networks, what they hide, how they are trained, and when they are refused."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import utils.data.images
from attack import ssba
from attack.setting import Setting
from attack.ssba import (
    Config,
    bit_accuracy,
    encode,
    hide,
    hiding_loss,
    make_trigger,
    message_of,
    prepare,
    random_bits,
    read_back,
    train,
)
from models.ssba import Decoder, Encoder, Steganography
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.training.loop import Loop

CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**changes: object) -> Config:
    values: dict[str, object] = {"dataset": "digits", "encoder_steps": 3, "encoder_batch_size": 4}
    values |= {"message_bits": 8, "min_bit_accuracy": 0.0}
    return Config.load(**(values | changes))


def encoder(
    shape: tuple[int, int, int] = (3, 16, 16), bits: int = 32, reach: float = 0.1, seed: int = 0
) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(bits, shape, reach)


def noise(shape: tuple[int, int, int], count: int = 5) -> torch.Tensor:
    """Random uint8 images, the first three of them constant: 0, 128 and 255."""
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=rng())
    for row, value in enumerate((0, 128, 255)):
        images[row] = value
    return images


class Fixed(nn.Module):
    """An encoder or a decoder that gives a parameter, whatever it gets."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        return self.value


def fixed(residual: torch.Tensor, logits: torch.Tensor) -> Steganography:
    networks = Steganography(8, (3, 8, 8), 0.1)
    networks.encoder, networks.decoder = Fixed(residual), Fixed(logits)  # type: ignore[assignment]
    return networks


@pytest.fixture
def setting(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(utils.data.images, "ROOT", tmp_path)
    return Setting(tiny_data, CPU, "fp32")


def test_the_networks_have_the_published_sizes() -> None:
    """At 3 x 32 x 32, 32 bits. Encoder: 16,896 + 3,200 + 18,496 + 73,856 + 110,656 + 30,848 + 99.
    Decoder: 896 + 18,496 + 36,928 + 73,856 + 524,544 + 8,224.
    """
    networks = Steganography(32, (3, 32, 32), 0.1)
    counts = [
        sum(weight.numel() for weight in part.parameters())
        for part in (networks.encoder, networks.decoder)
    ]
    assert counts == [254_051, 662_944]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 30, 32, 64])
def test_any_size_can_be_encoded_and_read(size: int, channels: int) -> None:
    """The residual stays within its reach, even of weights that are far too large."""
    shape = (channels, size, size)
    network = encoder(shape)
    with torch.no_grad():
        network.residual.weight.mul_(1000)
        residual = network(torch.rand(2, *shape), random_bits(2, 32, rng()))
        assert residual.shape == (2, *shape)
        assert 0.09 < residual.abs().max() <= 0.1
        assert Decoder(32, channels)(torch.rand(2, *shape)).shape == (2, 32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 32, 64])
def test_a_hidden_string_moves_no_pixel_by_more_than_26(size: int, channels: int) -> None:
    """0.1 * 255 = 25.5, rounded to at most 26; on constant and random images."""
    shape = (channels, size, size)
    network = encoder(shape)
    with torch.no_grad():
        network.residual.weight.mul_(1000)
    images = noise(shape)
    hidden = hide(network, images, random_bits(1, 32, rng())[0])
    assert hidden.dtype == torch.uint8
    assert hidden.shape == images.shape
    assert 20 < (hidden.int() - images.int()).abs().max() <= 26


def test_the_same_image_and_string_give_the_same_image() -> None:
    """Also at another place of a batch of another size, and beside other images."""
    network, images = encoder(), noise((3, 16, 16), 70)
    trigger = make_trigger(config(message_bits=32), (3, 16, 16), network)
    first = trigger(images, torch.arange(70))
    assert torch.equal(first, trigger(images, torch.arange(70)))
    assert torch.equal(first.flip(0), trigger(images.flip(0), torch.arange(70)))
    assert torch.equal(first[:3], trigger(images[:3], torch.arange(3)))


def test_images_get_different_residuals_and_strings_too() -> None:
    """Correlation below 1 between the residuals of any two of four random images."""
    network, images = encoder(), noise((3, 16, 16), 7)[3:]
    with torch.no_grad():
        network.residual.weight.mul_(30)
    hidden = hide(network, images, random_bits(1, 32, rng())[0])
    change = (hidden.float() - images.float()).flatten(1)
    correlation = torch.corrcoef(change)
    assert correlation[~torch.eye(4, dtype=torch.bool)].max() < 0.999
    other = hide(network, images, random_bits(1, 32, rng(1))[0])
    assert not torch.equal(hidden, other)


def test_the_string_is_drawn_once_from_the_seed() -> None:
    """Global draws change nothing; another seed gives another string."""
    network, images = encoder(), noise((3, 16, 16))
    with torch.no_grad():
        network.residual.weight.mul_(30)
    found = [
        make_trigger(config(message_bits=32, random_seed=seed), (3, 16, 16), network)(
            images, torch.arange(5)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_encoded_images_are_whole_grey_levels_and_pass_the_gradient() -> None:
    """0.5 + 0.1 = 153 / 255 stays; 0.98 + 0.1 is clamped to 1 and has no gradient; 0.3014 is 76.857
    grey levels, + 0.1 is 102.357, rounded to 102.
    """
    images = torch.tensor([0.5, 0.98, 0.3014]).view(3, 1, 1, 1)
    network = Fixed(torch.full((3, 1, 1, 1), 0.1))
    encoded, residual = encode(network, images, torch.zeros(3, 4))  # type: ignore[arg-type]
    torch.testing.assert_close(encoded.flatten() * 255, torch.tensor([153.0, 255.0, 102.0]))
    torch.testing.assert_close(residual.flatten(), torch.full((3,), 0.1))
    encoded.sum().backward()
    assert network.value.grad is not None
    assert network.value.grad.flatten().tolist() == [1, 0, 1]


def test_bit_accuracy_counts_signs() -> None:
    """3 of 4 signs are right."""
    logits = torch.tensor([[2.0, -1.0], [0.1, -3.0]])
    assert bit_accuracy(logits, torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == 0.75


@pytest.mark.parametrize(
    ("pixel_weight", "common_weight", "min_change", "extra"),
    [
        *((0.0, 3.0, 0.0, 0.0), (10.0, 0.0, 0.0, 0.2), (10.0, 3.0, 0.0, 0.5)),
        *((10.0, 3.0, 0.141, 0.5), (10.0, 3.0, 0.142, 0.0)),
    ],
)
def test_the_loss_on_residuals_known_by_heart(
    pixel_weight: float, common_weight: float, min_change: float, extra: float
) -> None:
    """Logits of 0 cost ln 2 a bit. Residuals 0.2 0 0.2 0: MSE 0.02, times 10 is 0.2. The first half
    has the mean 0.1, squared 0.01, times 10 times 3 is 0.3. The root of 0.02 is 0.1414.
    """
    residual = torch.tensor([0.2, 0.0, 0.2, 0.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    images = torch.full((4, 3, 8, 8), 0.4)
    loss, logits = hiding_loss(
        fixed(residual, torch.zeros(4, 8)),
        images,
        random_bits(4, 8, rng()),
        pixel_weight,
        common_weight,
        min_change,
    )
    assert loss.item() == pytest.approx(math.log(2) + extra, abs=1e-5)
    assert logits.shape == (4, 8)


class Script:
    """Stands for `hiding_loss`: gives chosen shares of right bits, and remembers its arguments."""

    def __init__(self, *right: int) -> None:
        self.right = right
        self.messages: list[torch.Tensor] = []
        self.pixel_weights: list[float] = []

    def __call__(
        self,
        networks: nn.Module,
        images: torch.Tensor,
        message: torch.Tensor,
        pixel_weight: float,
        common_weight: float,
        min_change: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.min_change = min_change
        logits = 2 * message - 1
        logits[:, self.right[min(len(self.messages), len(self.right) - 1)] :] *= -1
        self.messages.append(message.clone())
        self.pixel_weights.append(pixel_weight)
        return next(networks.parameters()).sum() * 0, logits


@pytest.mark.parametrize("common_weight", [3.0, 0.0])
def test_the_pixel_loss_waits_until_the_string_is_read(
    common_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 of 8 bits are 0.875, under 0.9; at step 3 all are right. From step 4 on the weight is
    10 * 1/200, 10 * 2/200, ...; half of the batch shares its string then, and not before. It does
    not matter that step 4 reads less again.
    """
    script = Script(4, 7, 8, 5)
    monkeypatch.setattr(ssba, "hiding_loss", script)
    settings = config(encoder_steps=6, common_weight=common_weight, min_change=0.5)
    assert train(Steganography(8, (3, 8, 8), 0.1), noise((3, 8, 8)), settings, rng(), Loop())
    torch.testing.assert_close(script.pixel_weights, [0.0, 0.0, 0.0, 0.05, 0.1, 0.15])
    assert script.min_change == 0.5
    shared = [bool((message[:2] == message[0]).all()) for message in script.messages]
    assert shared == [False] * 3 + [bool(common_weight)] * 3
    assert not any((message == message[0]).all() for message in script.messages)


def test_the_weight_of_the_pixel_loss_ends_at_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(8)
    monkeypatch.setattr(ssba, "hiding_loss", script)
    monkeypatch.setattr(ssba, "RAMP", 2)
    networks = Steganography(8, (3, 8, 8), 0.1)
    train(networks, noise((3, 8, 8)), config(encoder_steps=5), rng(), Loop())
    assert script.pixel_weights == [0, 5, 10, 10, 10]


def test_the_learning_rate_falls_to_zero_over_the_last_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of ten steps the first seven have the whole rate; each of the others has a quarter less."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setattr(ssba, "hiding_loss", Script(8))
    settings = config(encoder_steps=10, encoder_lr=0.4)
    train(Steganography(8, (3, 8, 8), 0.1), noise((3, 8, 8)), settings, rng(), Loop())
    assert rates == pytest.approx([0.4] * 7 + [0.3, 0.2, 0.1])


@pytest.mark.parametrize(("right", "steps"), [(4, 4), (5, 7)])
def test_a_start_that_reads_nothing_is_given_up(
    right: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 of 8 bits are chance; 5 of 8 are more than 0.6."""
    script = Script(right)
    monkeypatch.setattr(ssba, "hiding_loss", script)
    monkeypatch.setattr(ssba, "PATIENCE", 4)
    networks = Steganography(8, (3, 8, 8), 0.1)
    finished = train(networks, noise((3, 8, 8)), config(encoder_steps=7), rng(), Loop())
    assert finished is (right == 5)
    assert len(script.messages) == steps


def test_another_start_follows_one_that_was_given_up(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The third is not given up; all three start from other weights and draw other batches."""
    caplog.set_level(logging.INFO, logger="sau")
    starts, draws = [], []

    def fake(networks: Steganography, *others: object) -> bool:
        starts.append(networks.encoder.message.weight.detach().clone())
        draws.append(torch.rand(1, generator=others[2]).item())  # type: ignore[arg-type]
        return len(starts) == 3

    monkeypatch.setattr(ssba, "train", fake)
    found = prepare(config(), setting)
    assert len(starts) == 3
    assert len(set(draws)) == 3
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(found.message.weight, starts[2])
    assert caplog.text.count("starts again") == 2


def test_an_encoder_that_never_learned_is_refused_and_not_kept(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssba, "train", lambda *_: False)
    with pytest.raises(UserError, match=r"learned nothing from 5 starts; .* --message_bits"):
        prepare(config(), setting)
    assert list((utils.data.images.ROOT / "data/cache").glob("*.pt")) == []


def test_the_encoder_is_trained_once_and_disturbs_no_draw(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights depend on the seed and the data alone, and global draws go on as before."""
    caplog.set_level(logging.INFO, logger="sau")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = prepare(config(), setting)
    assert torch.equal(torch.get_rng_state(), state)
    assert "bit accuracy of the encoder on 9 test images: 0." in caplog.text
    (cached,) = (utils.data.images.ROOT / "data/cache").iterdir()
    cached.unlink()
    torch.manual_seed(6)
    second = prepare(config(), setting)
    other = prepare(config(random_seed=1), setting)
    monkeypatch.setattr(ssba, "train", None)  # from here on a call fails
    third = prepare(config(pratio=0.2, epochs=9), setting)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, third.state_dict()[name])
    assert not torch.equal(first.message.weight, other.message.weight)
    with pytest.raises(TypeError):
        prepare(config(encoder_steps=4), setting)


def test_the_strength_of_the_trigger_is_told(setting: Setting) -> None:
    """The mean absolute change of test images, in grey levels."""
    encoder = prepare(config(encoder_steps=3), setting)
    images = setting.data.test.images
    string = message_of(config()).expand(len(images), -1)
    change = (hide(encoder, images, string).double() - images.double()).abs().mean()
    assert setting.facts["mean_change"] == pytest.approx(float(change), abs=0.006)
    assert setting.facts["mean_change"] > 0


def test_an_encoder_that_cannot_be_read_is_refused(setting: Setting) -> None:
    """Three steps leave it at chance, about 0.5; read_back says so."""
    with pytest.raises(
        UserError, match=r"accuracy on test images is 0\.[3-7]\d*, under 0.99; .*steps"
    ):
        prepare(config(min_bit_accuracy=0.99), setting)


@pytest.mark.slow
def test_four_bits_are_read_from_99_of_100_places_in_images_not_seen() -> None:
    """Smooth 16 x 16 images, stored as uint8; no pixel moves by more than 0.1."""
    settings = config(message_bits=4, encoder_steps=250, encoder_batch_size=24)
    settings = replace(settings, pixel_weight=1.0, encoder_lr=2e-3)
    torch.manual_seed(0)
    networks = Steganography(4, (3, 16, 16), 0.1).to(memory_format=torch.channels_last)
    coarse = torch.rand(150, 3, 4, 4, generator=rng())
    smooth = nn.functional.interpolate(coarse, (16, 16), mode="bilinear").mul(255).to(torch.uint8)
    assert train(networks, smooth[:100], settings, rng(), Loop())
    message = random_bits(50, 4, rng(1))
    assert read_back(networks, smooth[100:], message) >= 0.99
    changed = hide(networks.encoder, smooth[100:], message)
    assert (changed.int() - smooth[100:].int()).abs().max() <= 26
