"""FP: the order and the levels by hand, and what is pruned stays pruned while the rest is tuned."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from defense import ft
from defense.fp import Config, pruning_order, purify
from models import Classifier, Resize
from models.preactresnet import PreActResNet
from tests.networks import TUNING, ConvNet, conv_net, differing, problem
from utils.errors import UserError
from utils.training.evaluate import head_features
from utils.training.loop import Loop
from utils.training.selection import hold_out


def config(**changes: Any) -> Config:
    """Three rounds of three batches (5, 5 and 2 images), momentum and decay; half is pruned."""
    values = {**TUNING, "selection": "fixed", "prune_ratio": 0.5, "random_seed": 3}
    return Config.load(**{**values, **changes})


# the order


def test_the_order_by_hand() -> None:
    """Means 0.5, -0.2, 0.1, 0.9 ascend as 1, 2, 0, 3; without their signs as 2, 1, 0, 3."""
    apart = torch.tensor([0.3, -0.4, 2.0, 0.0])
    means = torch.tensor([0.5, -0.2, 0.1, 0.9])
    assert pruning_order(torch.stack([means - apart, means + apart])).tolist() == [1, 2, 0, 3]
    assert pruning_order(means.bfloat16().unsqueeze(0)).dtype == torch.int64


def test_equal_features_stay_in_order() -> None:
    assert pruning_order(torch.zeros(3, 40)).tolist() == list(range(40))


def test_features_are_what_enters_the_head_in_eval_mode() -> None:
    """PreAct-ResNet's are the means of its last stage, which are negative, too."""
    torch.manual_seed(0)
    network = PreActResNet((1, 1, 1, 1), 3, (4, 4, 4, 6)).train()
    images, _ = problem()
    found = head_features(Classifier(network, (0.5,) * 3, (0.25,) * 3), images.float())
    assert network.training
    network.eval()
    x = network.conv1((images.float() - 0.5) / 0.25)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
    assert torch.allclose(found, x.mean((2, 3)), atol=1e-6)
    assert found.shape == (12, 6)
    assert bool((found < 0).any())


class Tokens(nn.Module):
    """A head that works on each place of an image, where it reads the three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(2).transpose(1, 2)).mean(1)


def test_a_head_that_works_on_places_gives_a_row_for_each() -> None:
    images = torch.rand(2, 3, 2, 2)
    expected = images.permute(0, 2, 3, 1).reshape(8, 3)
    assert torch.equal(head_features(Tokens(), images), expected)


def test_a_linear_layer_that_is_not_called_is_no_head() -> None:
    network = conv_net()
    expected = purify(network, *problem(), config()).state_dict()
    network.spare = nn.Linear(2, 2).double()
    found = purify(network, *problem(), config()).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# the levels


class Colours(nn.Module):
    """A head that reads the mean of each of three channels, and gives one logit for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.linear.weight.data = torch.diag(1 / torch.tensor([1.0, 2, 3]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.mean((2, 3)))


def coloured() -> tuple[torch.Tensor, torch.Tensor]:
    """15 images of three colours; channel c is 0.3 (1 + c) in those of class c, else 0.

    Its mean over the images is 0.1 (1 + c), so the order is 0, 1, 2.
    """
    labels = torch.arange(15) % 3
    images = torch.zeros(15, 3, 2, 2)
    images[torch.arange(15), labels] = 0.3 * (1 + labels.float()).view(-1, 1, 1)
    return images, labels


def test_the_levels_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Three features in steps of ceil(3 * 0.3) = 1: levels 0, 1, 2.

    Without channel 0 its images have logits 0, 0, 0 and go to class 0, which is right; without
    channel 1 too its images go there, which is wrong: accuracies 1, 1, 2/3.
    """
    network, loop = Colours(), Loop()
    tiny = {"n_rounds": 1, "lr": 1e-12, "crop_padding": 0, "flip": False}
    flags = Config.load(selection="val", once_prune_ratio=0.3, acc_ratio=0.3, **tiny)
    with caplog.at_level("INFO", "sau"):
        found = purify(network, *coloured(), flags, loop)
    assert "1 of 3 features pruned" in caplog.messages
    facts = loop.findings.facts
    assert facts["levels"] == [0, 1, 2]
    assert facts["held_out_accs"] == pytest.approx([1, 1, 2 / 3])
    assert facts["held_out_acc_before"] == 1
    assert facts["held_out_images"] == 3
    assert (facts["level"], facts["pruned"]) == (1, {"linear": [0]})
    assert found.linear.weight[:, 0].abs().max() == 0
    flags = Config.load(selection="val", once_prune_ratio=0.3, acc_ratio=0.4, **tiny)
    found = purify(network, *coloured(), flags)
    assert found.linear.weight[:, :2].abs().max() == 0
    assert torch.allclose(found.linear.weight[:, 2], network.linear.weight[:, 2])


@pytest.mark.parametrize(
    ("count", "share", "second"), [(512, 0.01, 6), (100, 0.07, 7), (9, 1e-11, 1)]
)
def test_the_step_is_rounded_up_but_for_rounding(count: int, share: float, second: int) -> None:
    """512 * 0.01 = 5.12 gives 6; 0.07 * 100 is a little over 7 in floating point, and gives 7."""
    loop = Loop()
    images, labels = torch.rand(12, 3, 2, 2), torch.arange(12) % 4
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, count), nn.ReLU(), nn.Linear(count, 4))
    flags = config(selection="val", once_prune_ratio=share, acc_ratio=1.0, n_rounds=1)
    purify(network, images, labels, flags, loop)
    assert loop.findings.facts["levels"] == list(range(0, count, second))


def test_the_order_is_of_the_images_that_are_not_held_out() -> None:
    """And with a fixed share of all: the first 6 of 12 each, which are not the same six.

    The features are pixels, which are random, so that half the images have other means.
    """
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    images, labels = problem(count=24, side=2)
    fit, _ = hold_out(labels, 0.5, 3)
    orders = [pruning_order(part.flatten(1)) for part in (images, images[fit])]
    assert {*orders[0][:6].tolist()} != {*orders[1][:6].tolist()}
    for order, selection in zip(orders, ("fixed", "val"), strict=True):
        loop = Loop()
        flags = config(selection=selection, val_ratio=0.5, acc_ratio=1.0, once_prune_ratio=0.5)
        purify(network, images, labels, flags, loop)
        assert loop.findings.facts["pruned"] == {"1": sorted(order[:6].tolist())}


def test_where_no_image_is_held_out_the_model_is_given_back() -> None:
    """One image per class: none is held out, and no level can be called good."""
    network, loop = conv_net(), Loop()
    images, labels = problem()[0][:4], torch.arange(4)
    found = purify(network, images, labels, config(selection="val"), loop)
    assert differing(found.state_dict(), network.state_dict()) == []
    assert "the model is given back" in loop.findings.warnings[0]


def test_where_no_held_out_label_is_right_the_model_is_given_back() -> None:
    """Every level would keep an accuracy of 0."""
    network, loop = Colours(), Loop()
    images, labels = coloured()
    found = purify(network, images, (labels + 1) % 3, config(selection="val"), loop)
    assert differing(found.state_dict(), network.state_dict()) == []
    assert "held-out accuracy is 0.00 % (3 images)" in loop.findings.warnings[0]


def test_where_all_images_are_held_out_it_is_told() -> None:
    images, labels = problem()[0], torch.arange(12) % 4
    with pytest.raises(UserError, match=r"--val_ratio: 0\.99 of 12 images"):
        purify(conv_net(), images, labels, config(selection="val", val_ratio=0.99))


def test_a_share_of_no_feature_is_warned_of() -> None:
    """Of 8 features 5 % is none; 0 is the user's wish."""
    said = (
        "--prune_ratio: 0.05 of 8 features is none, so the network is only fine-tuned; "
        "give at least 0.125"
    )
    for ratio, count in ((0.05, 1), (0.125, 0), (0.0, 0)):
        loop = Loop()
        purify(conv_net(), *problem(), config(selection="fixed", prune_ratio=ratio), loop)
        assert loop.findings.warnings == [said][:count]


# the tuning


def test_pruned_weights_stay_0_and_all_others_learn() -> None:
    """Against momentum and decay; four of eight features, which are those of the lowest means."""
    network = conv_net()
    images, labels = problem()
    found = purify(network, images, labels, config())
    pruned = pruning_order(head_features(network, images))[:4]
    others = [column for column in range(8) if column not in pruned.tolist()]
    assert torch.equal(found.linear.weight[:, pruned], torch.zeros(4, 4).double())
    moved = found.linear.weight != network.linear.weight
    assert bool(moved[:, others].all())
    assert "conv1.weight" in differing(found.state_dict(), network.state_dict())


def test_every_gradient_is_that_of_the_pruned_network() -> None:
    """One round is FT of a network whose columns were 0 before, the columns put back to 0.

    Without momentum and decay in one step, so that only the pruned columns could differ.
    """
    network = conv_net()
    images, labels = problem()
    flags = {"n_rounds": 1, "batch_size": 12, "sgd_momentum": 0.0, "wd": 0.0}
    found = purify(network, images, labels, config(**flags))
    start = copy.deepcopy(network)
    pruned = pruning_order(head_features(network, images))[:4]
    start.linear.weight.data[:, pruned] = 0
    flags_of_ft = ft.Config.load(**{**TUNING, **flags}, random_seed=3)
    expected = ft.purify(start, images, labels, flags_of_ft)
    expected.linear.weight.data[:, pruned] = 0
    assert differing(found.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize("schedule", ["cosine", "reduce_on_plateau"])
def test_without_pruning_it_is_fine_tuning_bit_for_bit(schedule: str) -> None:
    network = conv_net()
    found = purify(network, *problem(), config(prune_ratio=0.0, lr_scheduler=schedule))
    flags = ft.Config.load(**TUNING, lr_scheduler=schedule, random_seed=3)
    expected = ft.purify(network, *problem(), flags)
    assert differing(found.state_dict(), expected.state_dict()) == []


def test_the_head_behind_a_resize_is_pruned() -> None:
    network = nn.Sequential(Resize(8), ConvNet(4, (6, 8))).double()
    loop = Loop()
    purify(network, *problem(), config(), loop)
    assert list(loop.findings.facts["pruned"]) == ["1.linear"]
