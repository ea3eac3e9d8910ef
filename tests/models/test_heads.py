"""Heads of networks: the linear layers that end them, as far as they are called."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.heads import head, last_linear, layer_or_last, require_use
from tests.networks import classifier, conv_net
from utils.errors import UserError

SHAPE = (3, 8, 8)


@pytest.mark.parametrize(
    ("model", "network_size", "name", "features", "last"),
    [
        ("preactresnet18", None, "linear", 512, "linear"),
        ("resnet18", None, "fc", 512, "fc"),
        ("vgg19_bn", None, "classifier.0", 25_088, "classifier.6"),
        ("convnext_tiny", None, "classifier.2", 768, "classifier.2"),
        ("vit_b_16", 224, "1.heads.head", 768, "1.heads.head"),
        ("resnet18", 64, "1.fc", 512, "1.fc"),
    ],
)
@pytest.mark.parametrize("is_around", [False, True])
def test_the_head_begins_with_the_layer_that_takes_the_features(
    model: str, network_size: int | None, name: str, features: int, last: str, is_around: bool
) -> None:
    """VGG's features are 512 x 7 x 7 = 25,088; its other two linear layers come later."""
    with torch.device("meta"):
        network = build_model(model, 10, network_size=network_size)
        outer = nn.Sequential(network.network) if is_around else network
    prefix = "0." if is_around else ""
    found, module = head(outer, (3, 32, 32))
    assert found == prefix + name
    assert module is network.network.get_submodule(name)
    assert module.in_features == features
    assert last_linear(outer, (3, 32, 32), "--flag", "")[0] == prefix + last


class Own(nn.Module):
    """Squeeze and excitation, registered after the head; an idle layer; several linear layers.

    Args:
        has_block: whether squeeze and excitation is a part of its own.
        gives: `fc2`, or which other thing the logits are.
    """

    def __init__(self, has_block: bool = True, gives: str = "fc2") -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2)
        squeeze = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid())
        self.squeeze = nn.Sequential(squeeze) if has_block else squeeze
        self.idle, self.gives, self.last = nn.Linear(6, 2), gives, nn.Conv2d(4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images)
        x = x * self.squeeze(x.mean((2, 3)))[..., None, None]
        if self.gives == "last":
            return self.last(x).mean((2, 3))
        if self.gives == "places":
            return self.fc2(self.fc1(x.permute(0, 2, 3, 1))).mean((1, 2))
        logits = self.fc2(self.fc1(x.mean((2, 3))).relu())
        return logits.log_softmax(1) if self.gives == "log" else logits


@pytest.mark.parametrize("has_block", [False, True])
@pytest.mark.parametrize("gives", ["fc2", "log", "places"])
@pytest.mark.parametrize("is_around", [False, True])
def test_what_is_called_last_counts_and_not_what_is_registered_last(
    has_block: bool, gives: str, is_around: bool
) -> None:
    network = Own(has_block, gives)
    model = nn.Sequential(network) if is_around else network
    prefix = "0." if is_around else ""
    assert head(model, SHAPE) == (f"{prefix}fc2", network.fc2)
    assert last_linear(model, SHAPE, "--flag", "") == (f"{prefix}fc2", network.fc2)


class Ended(nn.Module):
    """Its last part has all linear layers, and squeeze and excitation among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 3), nn.Module()
        self.end.pool, self.end.squeeze = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)
        self.end.first, self.end.relu, self.end.last = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        end, x = self.end, self.conv(images)
        x = end.pool(x * end.squeeze(x.mean((2, 3)))[..., None, None])
        return end.last(end.relu(end.first(x.flatten(1))))


def test_a_head_begins_behind_the_last_map() -> None:
    network = Ended()
    assert head(network, SHAPE) == ("end.first", network.end.first)


def test_the_heads_of_plain_modules() -> None:
    """Parts without weights may come after the head."""
    stack = nn.Sequential(nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 3))
    # The first network of many tutorials; the last part is a sequence, and taken as one.
    network = nn.Sequential(nn.Flatten(), stack, nn.Dropout())
    assert head(network, SHAPE) == ("1.2", stack[2])  # the sequence alone has layers
    network = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), nn.Linear(5, 3))
    assert head(network, SHAPE) == ("1", network[1])
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 3))
    assert head(network, SHAPE) == ("3", network[3])  # both have an output per class
    linear = nn.Linear(8, 3)
    assert head(linear, (8,)) == ("", linear)


class Ends(nn.Module):
    """What gives features, and one of many ends.

    Args:
        end: from the layers, the map and its mean (N, 4) to logits.
    """

    def __init__(self, end: Callable[["Ends", torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.one = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 1)
        self.many, self.gate, self.last = nn.Linear(4, 6), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
        self.fc2, self.one2, self.on_logits = nn.Linear(4, 2), nn.Linear(4, 1), nn.Linear(2, 2)
        self.end = end

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images)
        return self.end(self, x, x.mean((2, 3)))


def logistic(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    logit = of.one(features)
    return torch.cat([torch.zeros_like(logit), logit], 1)


def maxout(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return of.many(features).view(-1, 2, 3).amax(2)


def with_temperature(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return of.fc(features) / of.one(features).exp()


def calibrated(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    logits = of.fc(features)
    return logits + of.on_logits(logits.relu())


def shown_twice(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return (of.fc(features) + of.fc(x.amax((2, 3)))) / 2


def with_idle_call(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    logits = of.fc(features).relu_()
    of.many(features)
    return logits


def cosine(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return F.linear(F.normalize(features), F.normalize(of.fc.weight))


def excited(of: Ends, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The gate has an output per class, of which there are four here."""
    return of.last(x * of.gate(features)[..., None, None]).mean((2, 3))


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (logistic, "one"),
        (maxout, "many"),
        (with_temperature, "fc"),
        (with_idle_call, "fc"),
        (calibrated, "fc"),
        (shown_twice, "fc"),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_the_last_linear_layer_may_give_other_numbers_than_one_per_class(
    end: Callable[..., torch.Tensor], name: str, learns: bool
) -> None:
    network = Ends(end).requires_grad_(learns)
    layer = network.get_submodule(name)
    assert head(network, SHAPE) == (name, layer)
    assert last_linear(network, SHAPE, "--flag", "") == (name, layer)
    assert layer_or_last(network, None, "--flag", SHAPE) == (name, layer)
    assert all(weight.requires_grad == learns for weight in network.parameters())


@pytest.mark.parametrize(
    ("end", "names"),
    [
        (lambda of, x, f: (of.fc(f) + of.fc2(f)) / 2, "fc, fc2"),  # a distilled DeiT
        (lambda of, x, f: torch.stack([of.fc(f), of.fc2(f)]).mean(0), "fc, fc2"),
        (lambda of, x, f: of.fc(f) + of.fc2(x.amax((2, 3))), "fc, fc2"),
        (lambda of, x, f: of.fc(f) + of.on_logits(of.many(f)[:, :2]), "fc, on_logits"),
        (lambda of, x, f: torch.cat([of.one(f), of.one2(f)], 1), "one, one2"),
    ],
)
def test_one_of_several_heads_is_never_taken(end: Callable[..., torch.Tensor], names: str) -> None:
    """The backdoor would stay in the other one."""
    network = Ends(end)
    several = rf"several linear layers of this network give its logits \({names}\)[^\n]*; "
    with pytest.raises(UserError, match=rf"^{several}give another method or network$"):
        head(network, SHAPE)
    with pytest.raises(UserError, match=rf"^--flag: {several}do$"):
        last_linear(network, SHAPE, "--flag", "do")
    with pytest.raises(UserError, match=rf"^--flag: {several}name a layer$"):
        layer_or_last(network, None, "--flag", SHAPE)
    assert layer_or_last(network, "fc", "--flag", SHAPE) == ("fc", network.fc)


def test_a_temperature_is_not_the_first_layer_of_a_head() -> None:
    """Its layer is beside the head, in the same part, and called before it."""

    class End(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.first, self.fc = nn.Linear(192, 1), nn.Linear(192, 4), nn.Linear(4, 3)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            scale = self.one(features).exp()
            return self.fc(self.first(features).relu()) / scale

    end = End()
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), end)
    assert head(network, SHAPE) == ("2.first", end.first)


def test_a_linear_layer_may_lend_its_weight_without_a_call() -> None:
    """It has no features then that could be read."""
    network = Ends(cosine)
    assert layer_or_last(network, None, "--flag", SHAPE) == ("fc", network.fc)
    with pytest.raises(UserError, match="no linear layer"):
        head(network, SHAPE)
    network = Own(gives="last")  # has an idle layer with an output per class
    with pytest.raises(UserError, match=r"^--flag: .* no linear layer .*; name a layer$"):
        layer_or_last(network, None, "--flag", SHAPE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made_of", [nn.Sequential, nn.Module])
def test_a_part_that_is_a_script_is_refused_in_a_line(made_of: type[nn.Module]) -> None:
    script = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    network = nn.Sequential(script) if made_of is nn.Sequential else script
    with pytest.raises(UserError, match=r"^the (layer 0|network) was made by torch.jit.script"):
        head(network, SHAPE)


@pytest.mark.parametrize(
    "network",
    [
        Own(gives="last"),
        Ends(excited),
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1)),
    ],
)
def test_a_network_whose_logits_no_linear_layer_gives_is_refused_in_a_line(
    network: nn.Module,
) -> None:
    with pytest.raises(UserError, match=r"^this network has no linear layer that gives[^\n]*$"):
        head(network, SHAPE)
    with pytest.raises(UserError, match=r"^--flag: this network has no linear layer[^\n]*; do$"):
        last_linear(network, SHAPE, "--flag", "do")


def test_looking_for_the_head_leaves_the_network_as_it_was() -> None:
    model = classifier(conv_net()).train()
    assert head(model, SHAPE) == ("linear", model.network.linear)
    assert model.training
    assert model.network.bn1.num_batches_tracked == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_by_its_name_or_the_last_linear_one() -> None:
    network = conv_net()
    assert layer_or_last(network, "bn2", "--flag", SHAPE) == ("bn2", network.bn2)
    assert layer_or_last(network, None, "--flag", SHAPE) == ("linear", network.linear)
    with pytest.raises(UserError, match=r"^--flag: bn3 is no layer"):
        layer_or_last(network, "bn3", "--flag", SHAPE)


def test_layers_without_use_are_refused_in_a_line() -> None:
    """One of several that has a use is enough."""
    network = Own()
    require_use(network, {"fc1": network.fc1, "idle": network.idle}, SHAPE, "--flag")
    assert network.fc1.weight.grad is None
    with torch.no_grad(), pytest.raises(UserError, match=r"^--flag: [^\n]*depend on idle[^\n]*$"):
        require_use(network, {"idle": network.idle}, SHAPE, "--flag")
