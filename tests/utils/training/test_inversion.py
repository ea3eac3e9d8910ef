"""The generator, the mask and their losses by hand; what the inversion keeps and says."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from models.parts import learning_weights
from models.unet import UNet
from tests.networks import conv_net, copied, differing, problem
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.inversion import GeneratorLoss, Inversion, generator_loss, mask_loss
from utils.training.loop import Loop


@dataclass(frozen=True)
class Flags:
    inversion_rounds: int = 2
    identity_epochs: int = 1
    mask_epochs: int = 2
    generator_epochs: int = 2
    generator_width: int = 4
    mask_lr: float = 0.05
    generator_lr: float = 1e-3
    image_bound: float = 10.0
    feature_bound: float = 100.0
    generated_ratio: float = 0.1
    batch_size: int = 5
    random_seed: int = 3


# the U-Net


@pytest.mark.parametrize("side", [(1, 1), (2, 3), (7, 7), (16, 16), (9, 20)])
def test_a_generated_image_has_the_size_of_its_image(side: tuple[int, int]) -> None:
    for channels in (1, 3):
        images = torch.rand(2, channels, *side)
        assert UNet(channels)(images).shape == images.shape


def test_the_u_net_has_four_sizes_of_doubling_width() -> None:
    """32, 64, 128 and 256 channels on the way down; the way up takes both."""
    network = UNet(3)
    assert [block[0].out_channels for block in network.down] == [32, 64, 128, 256]
    assert [(b[0].in_channels, b[0].out_channels) for b in network.up] == [
        *((256 + 128, 128), (128 + 64, 64), (64 + 32, 32)),
    ]
    assert network.last.out_channels == 3


def test_a_generated_image_depends_on_its_image_alone() -> None:
    torch.manual_seed(0)
    network, images = UNet(3).double(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([network(image.unsqueeze(0)) for image in images])
    assert torch.allclose(network(images), alone, rtol=0, atol=1e-12)


def test_each_size_reaches_the_output() -> None:
    """Without a way round, the weights of every block have a gradient."""
    network = UNet(3)
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


# the losses


class TwoFeatures(nn.Module):
    """The features are the image's two channels; the logits are their means."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(2, 2, 1, bias=False)
        nn.init.dirac_(self.map.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.map(images).mean(dim=(2, 3))


def test_the_loss_of_a_mask_by_hand() -> None:
    """f = (2, 0), m = (0.75, 0.5), label 0: m f = (1.5, 0), (1 - m) f = (0.5, 0).

    ln(1 + e^-1.5) - ln(1 + e^-0.5) = 0.201413 - 0.474077. Its gradient for the first m is
    -2 s(-1.5) - 2 s(-0.5), s the logistic function: a benign feature has a larger mask.
    """
    images = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    mask = torch.tensor([0.75, 0.5]).view(2, 1, 1).expand(2, 2, 2).clone().requires_grad_()
    loss = mask_loss(TwoFeatures(), "map", images, torch.tensor([0]), mask)
    assert loss.item() == pytest.approx(0.201413 - 0.474077, abs=1e-6)
    loss.backward()
    expected = -2 / (1 + math.exp(1.5)) - 2 / (1 + math.exp(0.5))
    assert mask.grad[0].sum().item() == pytest.approx(expected, abs=1e-6)
    assert mask.grad[1].abs().max() == 0


def losses_of(generated: float, **flags: Any) -> GeneratorLoss:
    """x = 0 and G(x) = `generated`; features (1, 1) and (4, 5), mask (1, 0.5)."""
    images = torch.zeros(2, 3, 2, 2)
    features, other = (torch.tensor(f).view(1, 2, 1, 1) for f in ([1.0, 1.0], [4.0, 5.0]))
    mask = torch.tensor([1.0, 0.5]).view(2, 1, 1)
    changed = torch.full_like(images, generated)
    target_loss = flags.pop("target_loss", None)
    return generator_loss(
        images,
        changed,
        features.expand(2, -1, -1, -1),
        other.expand(2, -1, -1, -1),
        mask,
        Flags(**flags),
        target_loss,
    )


def loss_of(generated: float, **flags: Any) -> torch.Tensor:
    return losses_of(generated, **flags).loss


def test_the_loss_of_the_generator_by_hand() -> None:
    """m f changes by (3, 2): 13 / 2 = 6.5. (1 - m) f by (0, 2): 4 / 2 = 2. 0.065 - 2 = -1.935."""
    assert float(loss_of(0.1)) == pytest.approx(-1.935, abs=1e-6)
    assert float(losses_of(0.1).change) == pytest.approx(0.01)
    assert not losses_of(0.1).is_identity_only
    assert float(loss_of(0.1, target_loss=torch.tensor(0.7))) == pytest.approx(-1.235, abs=1e-6)


@pytest.mark.parametrize("flags", [{"image_bound": 0.0399}, {"feature_bound": 6.49}])
def test_beyond_a_limit_the_loss_is_the_change_of_the_image(flags: dict[str, float]) -> None:
    """0.2 in each pixel: 0.04. The label's loss is not there either."""
    assert float(loss_of(0.2, **flags)) == pytest.approx(0.04, abs=1e-6)
    assert float(loss_of(0.2, target_loss=torch.tensor(9.0), **flags)) == pytest.approx(0.04)
    assert losses_of(0.2, **flags).is_identity_only


def test_the_limits_themselves_are_kept() -> None:
    assert float(loss_of(0.5, image_bound=0.25, feature_bound=6.5)) == pytest.approx(-1.935)


# the inversion


def inverted(times: int = 2, **flags: Any) -> tuple[Inversion, Loop, list[tuple[str, int]]]:
    rounds: list[tuple[str, int]] = []
    loop = Loop(lambda number, total, losses, state: rounds.append((loop.phase, number)))
    network = conv_net()
    inversion = Inversion(network, *problem(), Flags(**flags), loop)
    for number in range(1, times + 1):
        inversion.invert(network, number)
    return inversion, loop, rounds


def test_the_phases_in_their_order() -> None:
    _, _, rounds = inverted()
    phases = ("mask 1", "trigger 1", "mask 2", "trigger 2")
    assert rounds == [("identity", 1), *((phase, n) for phase in phases for n in (1, 2))]


def test_the_model_stays_as_it_is() -> None:
    network = conv_net().train()
    network.bn1.eval()
    network.conv1.weight.requires_grad_(False)
    before = copied(network.state_dict())
    Inversion(network, *problem(), Flags(), Loop()).invert(network, 1)
    assert differing(network.state_dict(), before) == []
    assert network.bn2.training
    assert not network.bn1.training
    assert [w.requires_grad for w in network.parameters()].count(False) == 1
    assert all(weight.grad is None for weight in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.slow
def test_the_identity_is_learned_first() -> None:
    """After 100 passes the change is less than a quarter of that by a fresh generator."""
    images = problem()[0]
    changes = []
    for epochs in (0, 100):
        inversion, _, _ = inverted(0, identity_epochs=epochs, generated_ratio=1.0)
        changes.append(float((inversion.mixed(images) - images).square().mean()))
    assert changes[1] < changes[0] / 4


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 1), (0.1, 2), (0.25, 4), (0.3, 4), (1.0, 12)])
def test_so_many_images_of_a_batch_are_generated(ratio: float, count: int) -> None:
    """int(12 r) + 1 of 12; all of them at most."""
    inversion, _, _ = inverted(0, generated_ratio=ratio)
    images = problem()[0]
    mixed = inversion.mixed(images)
    assert not mixed.requires_grad
    assert [torch.equal(a, b) for a, b in zip(mixed, images, strict=True)] == [
        *[False] * count,
        *[True] * (12 - count),
    ]


def test_the_share_of_a_batch_is_exact() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point; 29 + 1 images are generated."""
    inversion, _, _ = inverted(0, generated_ratio=0.29)
    images = problem(count=100)[0]
    kept = [torch.equal(a, b) for a, b in zip(inversion.mixed(images), images, strict=True)]
    assert kept == [False] * 30 + [True] * 70


def test_the_detected_label_is_said_once() -> None:
    """A network that takes everything for class 2."""
    network = conv_net()
    network.linear.bias.data[2] = 1e3
    loop = Loop()
    Inversion(network, *problem(), Flags(), loop).invert(network, 1)
    assert loop.findings.facts == {"identity_only": [0.0], "targets": [2], "target_share": 1.0}
    assert loop.findings.warnings == []
    network.linear.bias.data[1] = 1e6
    other = Inversion(network, *problem(), Flags(), Loop())
    other.invert(network, 2)
    assert other._loop.findings.facts == {"identity_only": [0.0]}


def test_where_all_steps_learn_the_identity_no_label_is_stated() -> None:
    """With a bound of 0 all six do, in each of two inversions."""
    inversion, loop, _ = inverted(image_bound=0.0)
    assert loop.findings.facts == {"identity_only": [1.0, 1.0]}
    assert inversion._target is not None
    first, second = loop.findings.warnings
    assert first.startswith("inversion 1 hardly searched a trigger: 6 of 6 steps")
    assert second.startswith("inversion 2 ")
    assert "\n" not in first


def test_a_search_of_more_than_a_tenth_of_the_steps_is_one() -> None:
    inversion, loop, _ = inverted(0)
    assert inversion._say_searched(1, 100, 89)
    assert loop.findings.warnings == []
    assert not inversion._say_searched(2, 100, 90)
    assert loop.findings.facts["identity_only"] == [0.89, 0.9]


def test_without_a_pass_for_the_trigger_no_label_is_stated() -> None:
    _, loop, _ = inverted(1, generator_epochs=0)
    assert loop.findings.facts == {"identity_only": [1.0]}
    assert loop.findings.warnings == [
        "--generator_epochs is 0, so no trigger is searched; give at least 1"
    ]


def test_a_little_noise_is_added_to_the_images_whose_label_is_detected() -> None:
    """Of deviation 0.03, as published; batches of five."""
    inversion, images = inverted(0)[0], problem()[0]
    seen: list[torch.Tensor] = []
    inversion._generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inversion._detect(conv_net(), is_searched=True)
    rng = generator(3, "noise of the detection")
    for batch, x in zip(images.split(5), seen, strict=True):
        noise = torch.randn(batch.shape, generator=rng, dtype=batch.dtype)
        assert torch.allclose(x, batch + 0.03 * noise, rtol=0, atol=1e-12)


def test_the_picture_is_that_of_the_last_time() -> None:
    inversion, loop, _ = inverted(1)
    assert loop.findings.pictures == {}
    inversion.invert(conv_net(), 2)
    picture = loop.findings.pictures["generated"]
    images = problem()[0][:8]
    assert picture.is_compared
    assert torch.equal(picture.rows["clean"], images.float())
    shown = inversion._generator(images).clamp(0, 1).float()
    assert torch.equal(picture.rows["generated"], shown.detach())


def test_the_trigger_changes_the_other_features() -> None:
    """Where the limits allow it, more than an image that the generator leaves alone does."""
    network, images = conv_net(), problem()[0]
    changes = []
    for epochs in (0, 8):
        inversion, _, _ = inverted(1, generator_epochs=epochs, generated_ratio=1.0)
        with torch.no_grad():
            clean, other = (network(x) for x in (images, inversion.mixed(images)))
        changes.append(float((clean - other).square().mean()))
    assert changes[1] > changes[0]


def test_a_network_without_a_map_is_refused_before_a_phase_begins() -> None:
    network, loop = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(), Loop()
    with pytest.raises(UserError, match=r"^[^\n]*map of features[^\n]*$"):
        Inversion(network, *problem(), Flags(), loop)
    assert loop.phase == ""


def test_a_network_that_learns_nothing_is_refused() -> None:
    network = conv_net().requires_grad_(False)
    with pytest.raises(UserError, match="requires_grad"):
        learning_weights(network)
    network.bn1.weight.requires_grad_(True)
    assert learning_weights(network) == [network.bn1.weight]
