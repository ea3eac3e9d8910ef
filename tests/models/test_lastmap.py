"""The last map of features of networks of all kinds."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import Classifier, build_model
from models.lastmap import last_map
from tests.networks import hooks
from utils.errors import UserError

Head = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("preactresnet18", "layer4"),
        ("resnet18", "layer4"),
        ("vgg11", "features"),  # not its pooling to 7 x 7, whatever comes in
        ("mobilenet_v3_small", "features"),  # its blocks pool, too, to weigh their channels
        ("densenet121", "features"),  # a function pools
        ("convnext_tiny", "features"),  # blocks work on (N, H, W, C), a norm follows the pooling
        ("squeezenet1_1", "classifier.2"),  # it pools logits
        ("swin_t", "permute"),
        ("tiny", "bn"),  # of a function, F.relu
    ],
)
def test_the_last_map_is_what_global_pooling_reads(model: str, size: int, name: str) -> None:
    """Also if it is a single pixel: ResNet18's `layer4` at 32."""
    network = build_model(model, 4, image_size=size).eval()
    assert last_map(network, (3, size, size)) == name


class Net(nn.Module):
    """Two convolutions, of which the first weighs its channels, and any head."""

    def __init__(self, head: Head, tokens: bool = False) -> None:
        super().__init__()
        self.patches, self.weigh = nn.Conv2d(3, 5, 2, stride=2), nn.AdaptiveAvgPool2d(1)
        self.map, self.relu, self.head = nn.Conv2d(5, 5, 1), nn.ReLU(), head
        self.tokens = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.patches(images)
        features = self.relu(features * self.weigh(features).flatten(1)[:, :, None, None])
        if self.tokens:
            return self.map(features).flatten(2).permute(0, 2, 1)[:, 0]
        return self.head(
            self.relu(self.map(features)) if self.head is early else self.map(features)
        )


def early(features: torch.Tensor) -> torch.Tensor:
    return features.mean((2, 3))


@pytest.mark.parametrize(
    "head",
    [
        early,  # of what a layer gives that is used twice
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(-1).mean(-1),
        lambda x: x.flatten(2).mean(-1),
        lambda x: x.amax(dim=(2, 3), keepdim=True).flatten(1),
        lambda x: x.flatten(1),
        lambda x: x.reshape(len(x), -1),
        lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
        lambda x: F.dropout(F.avg_pool2d(x, x.shape[2:]), training=False)[:, :].flatten(1),
        lambda x: F.layer_norm(F.adaptive_max_pool2d(x, 1), (1, 1)).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 3).flatten(1),
        lambda x: F.max_pool2d(x.relu(), x.shape[2:]).flatten(1),
        lambda x: F.max_pool2d(x.relu(), 2).flatten(1),
        lambda x: F.avg_pool2d(x.clamp(min=1e-6) ** 3, x.shape[2:]).pow(1 / 3).flatten(1),  # GeM
        lambda x: F.hardswish(
            F.conv2d(F.adaptive_avg_pool2d(x, 1), torch.ones(7, 5, 1, 1))
        ).flatten(1),
        lambda x: torch.cat(
            [F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], dim=1
        ).flatten(1),
        lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1),
        lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
        lambda x: x.permute(dims=(0, 2, 3, 1)).mean(1).mean(1),
        lambda x: x.movedim(1, -1).amax((1, 2), keepdim=True).flatten(1),
        lambda x: torch.transpose(x, 1, 3).relu().contiguous().flatten(1),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (5,)).mean(dim=(1, 2)),
        lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).mean((2, 3)),
        lambda x: x.mean((1, 2)).mean() * x.mean((2, 3)),
        lambda x: F.adaptive_avg_pool2d(x, 1).permute(0, 2, 3, 1)[:, 0, 0],
    ],
)
def test_any_way_to_pool_or_to_flatten_is_seen(head: Head) -> None:
    network = Net(head).train()
    network.map.eval()
    assert last_map(network, (3, 8, 8)) == "map"
    assert last_map(Classifier(network, (0.5,), (0.5,)), (3, 8, 4)) == "map"
    assert network.patches.training
    assert not network.map.training
    assert hooks(network) == 0


@pytest.mark.parametrize("keepdim", [False, True])
def test_channels_at_the_end_that_are_of_no_map_are_refused(keepdim: bool) -> None:
    """A linear layer made them, which gives (N, H, W, D)."""
    network = Net(
        lambda x: (
            F.linear(x.permute(0, 2, 3, 1), torch.ones(6, 5))
            .mean((1, 2), keepdim=keepdim)
            .flatten(1)
        )
    )
    with pytest.raises(UserError, match=r"^[^\n]*map of features[^\n]*has none[^\n]*$"):
        last_map(network, (3, 8, 8))


class Branches(nn.Module):
    """Two maps of one shape, of which the first is pooled; the second comes before or behind."""

    def __init__(self, is_behind: bool) -> None:
        super().__init__()
        self.pooled, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.is_behind = is_behind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.pooled(images)
        if self.is_behind:
            features = features.relu()  # of no layer
            pooled = features.mean((2, 3))
            self.other(images)
            return pooled
        self.other(images)
        return features.mean((2, 3))


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_map_beside_that_is_not_pooled_does_not_count(is_behind: bool) -> None:
    assert last_map(Branches(is_behind), (3, 8, 8)) == "pooled"


class Auxiliary(Branches):
    """Keeps logits of the other map beside those that it gives."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled, other = (x(images).mean((2, 3)) for x in (self.pooled, self.other))
        self.kept = torch.cat([pooled, other], dim=1) if self.is_behind else other
        return pooled


@pytest.mark.parametrize("joins", [False, True])
def test_a_map_of_which_the_logits_are_not_made_does_not_count(joins: bool) -> None:
    network = Auxiliary(joins)
    assert last_map(network, (3, 8, 8)) == "pooled"
    with torch.no_grad():
        assert last_map(network, (3, 8, 8)) == "pooled"


class Gated(Branches):
    """The pooled second map times a function of the pooled first one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        gate = self.pooled(images).mean((2, 3))
        return self.other(images).mean((2, 3)) * gate.sigmoid()


def test_what_is_done_with_pooled_features_does_not_count() -> None:
    assert last_map(Gated(is_behind=False), (3, 8, 8)) == "other"


class Joined(nn.Module):
    """Two maps, pooled and joined; perhaps only to weigh the channels of a third one."""

    def __init__(self, weighs: bool, flattens_first: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2)
        self.three = nn.Conv2d(3, 8, 8)
        self.weighs, self.start = weighs, 2 - flattens_first

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = [x.mean((2, 3), keepdim=True) for x in (self.one(images), self.two(images))]
        weights = torch.cat([x.flatten(self.start) if self.start == 1 else x for x in pooled], 1)
        if self.weighs:
            return (weights.view(-1, 8, 1, 1) * self.three(images)).flatten(1)
        return weights.flatten(1)


@pytest.mark.parametrize("flattens_first", [False, True])
def test_several_maps_that_are_joined_are_refused(flattens_first: bool) -> None:
    """One of them would be half of what the logits read."""
    with pytest.raises(UserError, match=r"^this network joins features of several maps[^\n]*$"):
        last_map(Joined(False, flattens_first), (3, 8, 8))
    assert last_map(Joined(True, flattens_first), (3, 8, 8)) == "three"


Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Paired(nn.Module):
    """Two maps, pooled, and what is made of both."""

    def __init__(self, end: Pair) -> None:
        super().__init__()
        self.one, self.two, self.end = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2), end

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.end(self.one(images).mean((2, 3)), self.two(images).mean((2, 3)))


@pytest.mark.parametrize(
    "end",
    [
        lambda one, two: torch.cat([one, two, torch.ones(len(one), 3)], dim=1),
        lambda one, two: torch.cat(tensors=[one.relu(), two], dim=1),
        lambda one, two: torch.cat([F.linear(one, torch.ones(5, 4)), two], dim=1),
        lambda one, two: torch.cat([F.normalize(one), F.normalize(two)], dim=1),
        lambda one, two: torch.stack([one, two.relu()], dim=1).mean(1),
        lambda one, two: F.linear(one + two, torch.ones(5, 4)),
        lambda one, two: torch.maximum(one, two.tanh()),
    ],
)
def test_what_comes_between_pooling_and_joining_changes_nothing(end: Pair) -> None:
    with pytest.raises(UserError, match=r"^this network joins features of several maps[^\n]*$"):
        last_map(Paired(end), (3, 8, 8))


@pytest.mark.parametrize(
    "end",
    [
        lambda one, two: two * one.sigmoid(),
        lambda one, two: one.sigmoid() * two,
        lambda one, two: torch.cat([two, two.relu(), torch.ones(len(two), 1)], dim=1),
        lambda one, two: two + F.linear(two.relu(), torch.ones(4, 4)),
    ],
)
def test_what_weighs_the_features_of_one_map_is_no_second_one(end: Pair) -> None:
    assert last_map(Paired(end), (3, 8, 8)) == "two"


def test_a_network_without_a_last_map_is_refused_in_a_line() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    for network in (Net(early, tokens=True), flat):
        with pytest.raises(UserError, match=r"^[^\n]*map of features[^\n]*has none[^\n]*$"):
            last_map(network, (3, 8, 8))
        assert hooks(network) == 0


def test_the_last_part_with_more_pixels_may_be_asked_for() -> None:
    """For pictures of a map; ResNet18's last map has a single pixel at 32."""
    network = build_model("resnet18", 4)
    assert last_map(network, (3, 32, 32), least_pixels=2) == "layer3"
    assert last_map(network, (3, 64, 64), least_pixels=2) == "layer4"
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 8))
    parts = nn.Sequential(nn.Conv2d(3, 3, 1), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert last_map(parts, (3, 8, 8)) == "1"
    assert last_map(parts, (3, 8, 8), least_pixels=2) == "0"  # "1.0" is inside a part
    with pytest.raises(UserError, match="has none"):
        last_map(network, (3, 8, 8), least_pixels=100)
