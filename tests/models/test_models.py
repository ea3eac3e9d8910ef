"""The classifiers, and the layout in which weights are exchanged."""

import copy
import hashlib
import re
import urllib.error
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torchvision.models._api as torchvision_api
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from models import (
    Classifier,
    Normalize,
    Resize,
    build_model,
    check_model,
    load_pretrained,
    model_identity,
    model_names,
    prepare,
    pretrained_size,
)
from models.preactresnet import PreActBlock, PreActResNet, preactresnet18, preactresnet18_half
from utils.errors import UserError

State = dict[str, torch.Tensor]


def randomize(network: nn.Module) -> nn.Module:
    """Weights, and BatchNorm's statistics, that leave no term of the forward at 0 or 1."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=source) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=source) * 0.3)
    return network.double()


def batch_norm(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    mean, var = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
    scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return scaled * state[f"{prefix}.weight"].view(1, -1, 1, 1) + state[f"{prefix}.bias"].view(
        1, -1, 1, 1
    )


def block(x: torch.Tensor, state: State, prefix: str, stride: int) -> torch.Tensor:
    """a = relu(bn1(x)); conv2(relu(bn2(conv1(a)))), plus x, or the projection of a."""
    a = batch_norm(x, state, f"{prefix}bn1").clamp(min=0)
    main = F.conv2d(a, state[f"{prefix}conv1.weight"], stride=stride, padding=1)
    main = batch_norm(main, state, f"{prefix}bn2").clamp(min=0)
    main = F.conv2d(main, state[f"{prefix}conv2.weight"], padding=1)
    projection = state.get(f"{prefix}shortcut.0.weight")
    return main + (x if projection is None else F.conv2d(a, projection, stride=stride))


def test_preactresnet18_has_the_published_size() -> None:
    """11,171,146 parameters for 10 classes; 90 more classes add 90 * (512 + 1) = 46,170."""
    with torch.device("meta"):
        ten, hundred = preactresnet18(10), preactresnet18(100)
    assert len(ten.state_dict()) == 102
    assert sum(weight.numel() for weight in ten.parameters()) == 11_171_146
    assert sum(weight.numel() for weight in hundred.parameters()) == 11_217_316


def test_half_of_the_channels_is_a_quarter_of_the_weights() -> None:
    """Every size of a weight is a half but for 3 colours, kernels' sides and the 10 classes."""
    half, whole = preactresnet18_half(10).state_dict(), preactresnet18(10).state_dict()
    assert sum(weight.numel() for weight in preactresnet18_half(10).parameters()) == 2_796_202
    assert list(half) == list(whole)
    for name, value in half.items():
        assert list(value.shape) == [n // 2 if n >= 64 else n for n in whole[name].shape], name


def test_preactresnet18_keeps_the_order_of_the_exchanged_state() -> None:
    """A block is bn1, conv1, bn2, conv2, and the projection where the stride or width changes."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    inside = [f"bn1.{name}" for name in norm] + ["conv1.weight"]
    inside += [f"bn2.{name}" for name in norm] + ["conv2.weight"]
    expected = ["conv1.weight"]
    for stage in (1, 2, 3, 4):
        expected += [f"layer{stage}.0.{name}" for name in inside]
        expected += [f"layer{stage}.0.shortcut.0.weight"] if stage > 1 else []
        expected += [f"layer{stage}.1.{name}" for name in inside]
    expected += ["linear.weight", "linear.bias"]
    with torch.device("meta"):
        state = preactresnet18(10).state_dict()
    assert list(state) == expected
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer2.0.conv1.weight"].shape == (128, 64, 3, 3)
    assert state["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
    assert state["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["linear.weight"].shape == (10, 512)


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (6, 2), (4, 2)])
def test_a_block_computes_what_its_layout_says(width: int, stride: int) -> None:
    """Odd sides, so that the two strided convolutions have to round alike: 7 -> 4."""
    network = randomize(PreActBlock(4, width, stride)).eval()
    images = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        found = network(images)
    assert found.shape[2] == -(-7 // stride)
    torch.testing.assert_close(
        found, block(images, network.state_dict(), "", stride), rtol=1e-10, atol=1e-10
    )


def test_the_network_computes_what_its_layout_says() -> None:
    """One block a stage but two in the second; no BatchNorm or ReLU follows the last one."""
    network = randomize(PreActResNet((1, 2, 1, 1), 5)).eval()
    state = network.state_dict()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features = F.conv2d(images, state["conv1.weight"], padding=1)
    for prefix, stride in (
        ("layer1.0.", 1),
        ("layer2.0.", 2),
        ("layer2.1.", 1),
        ("layer3.0.", 2),
        ("layer4.0.", 2),
    ):
        features = block(features, state, prefix, stride)
    assert features.shape == (2, 512, 1, 1)
    assert features.min() < 0
    expected = features[:, :, 0, 0] @ state["linear.weight"].T + state["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def test_features_are_averaged_over_the_whole_image() -> None:
    """Of a 16 x 16 image 2 x 2 features are left; the linear layer sees their mean."""
    network = randomize(PreActResNet((1, 1, 1, 1), 5)).eval()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        features = network.layer4(
            network.layer3(network.layer2(network.layer1(network.conv1(images))))
        )
        assert features.shape == (1, 512, 2, 2)
        torch.testing.assert_close(network(images), network.linear(features.sum(dim=(2, 3)) / 4))


def test_normalization_is_by_channel() -> None:
    """(0.5 - 0.25) / 0.5 = 0.5, (0.5 - 0.5) / 0.1 = 0, (0.5 - 1) / 2 = -0.25."""
    normalize = Normalize((0.25, 0.5, 1.0), (0.5, 0.1, 2.0))
    found = normalize(torch.full((2, 3, 4, 4), 0.5))
    expected = torch.tensor([0.5, 0.0, -0.25]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(found, expected)


def test_normalization_is_the_first_layer_and_no_part_of_the_state(tiny_model: Classifier) -> None:
    assert list(Normalize((0.5,), (0.5,)).state_dict()) == []
    assert all(key.startswith("network.") for key in tiny_model.state_dict())
    images = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    tiny_model.eval()
    torch.testing.assert_close(tiny_model(images), tiny_model.network((images - mean) / std))


def test_normalization_goes_where_the_model_goes(tiny_model: Classifier) -> None:
    assert tiny_model.double()(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert tiny_model.to("meta").normalize.mean.device.type == "meta"


def test_reduced_precision_still_gives_float32_logits(tiny_model: Classifier) -> None:
    """bfloat16 has 8 bits: the logits differ from float32's, by a percent or so of their size."""
    images = torch.rand(4, 3, 8, 8)
    tiny_model.eval()
    with torch.no_grad():
        exact = tiny_model(images)
        prepare(tiny_model, torch.device("cpu"), "bf16")
        rough = tiny_model(images)
    assert tiny_model.precision == "bf16"
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


def test_prepare_keeps_the_model_and_its_values(tiny_model: Classifier) -> None:
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    prepared = prepare(tiny_model, torch.device("cpu"), "fp32")
    assert prepared is tiny_model
    weight = prepared.state_dict()["network.conv.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key])


class Volume(nn.Module):
    """Takes an image for a volume of one channel; weights and a buffer are 5-D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv3d(1, 4, 3), nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(1, 1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(images.unsqueeze(1) * self.scale).mean((2, 3, 4)))


def test_prepare_takes_weights_that_are_no_images() -> None:
    model = Classifier(Volume(), (0.5,) * 3, (0.25,) * 3)
    images = torch.rand(2, 3, 8, 8)
    expected = model(images)
    found = prepare(model, torch.device("cpu"), "fp32")
    torch.testing.assert_close(found(images), expected)


def test_weights_are_set_by_the_seed(tiny_model: Classifier) -> None:
    def first_weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_model("tiny", 3).parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_a_model_without_constants_takes_pixels_as_they_are(tiny_model: Classifier) -> None:
    model = build_model("tiny", 3).eval()
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model(images), model.network(images))


@pytest.mark.parametrize(
    "name", ["preactresnet18", "vgg19_bn", "resnet18", "googlenet", "inception_v3"]
)
def test_every_kind_of_network_gives_logits(name: str) -> None:
    """In train mode, where auxiliary heads of two of them would make the output a tuple.

    The meta device computes shapes alone.
    """
    with torch.device("meta"):
        model = build_model(name, 7).train()
        logits = model(torch.empty(2, 3, 96, 96))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UserError) as caught:
        build_model("resnet19", 10)
    assert "resnet19 is unknown" in str(caught.value)
    assert "give file.py:function, or one of resnet1" in str(caught.value)  # the nearest first
    assert re.search(r", and \d\d more$", str(caught.value))


def test_model_names_are_ours_and_torchvisions() -> None:
    names = model_names()
    assert names == sorted(set(names))
    assert {
        "preactresnet18",
        "preactresnet18_half",
        "tiny",
        "vgg16",
        "densenet121",
        "vit_b_16",
    } <= set(names)
    assert not any(name.startswith(("fcn", "fasterrcnn", "raft", "quantized")) for name in names)


# --- image sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "able"),
    [("vgg19_bn", 16, "32 or 48"), ("vit_b_16", 28, "16 or 32 or 48 or 64"), ("alexnet", 32, "64")],
)
def test_a_size_that_a_network_cannot_take_is_said_with_those_that_it_can(
    name: str, size: int, able: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_model(name, 10, size)
    assert f"{name} cannot take images of {size} x {size}" in str(caught.value)
    assert f"give --image_size {able}" in str(caught.value)


@pytest.mark.parametrize("size", [32, 64])
def test_vit_has_a_position_for_each_patch_of_the_image(size: int) -> None:
    """Patches of 16 pixels: 2 x 2 of 32, 4 x 4 of 64, and the class token."""
    check_model("vit_b_16", 10, size)
    with torch.device("meta"):
        network = build_model("vit_b_16", 10, image_size=size).network
    assert network.state_dict()["encoder.pos_embedding"].shape == (1, (size // 16) ** 2 + 1, 768)


def test_a_network_may_resize_first_and_holds_nothing_for_it() -> None:
    """The keys are those in which pre-trained ViTs are exchanged: all begin with 1."""
    with torch.device("meta"):
        model = build_model("vit_b_16", 10, image_size=32, network_size=224)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert all(key.startswith("1.") for key in model.network.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert Resize(16)(images).shape == (2, 3, 16, 16)
    assert torch.equal(Resize(8)(images), images)
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., 0, 0] = 1
    assert Resize(1)(corner) > 0  # each pixel counts, also where a side gets shorter


# --- torchvision's weights ----------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> State:
    """In the place of the download: a ResNet-18 for 1,000 classes whose numbers are all 0.25."""
    state = resnet18().state_dict()
    for value in state.values():
        value.fill_(0.25)
    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", lambda *_, **__: state)
    return state


def test_pretrained_weights_fill_all_but_the_head(trained: State) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", 10)
    assert "IMAGENET1K_V1" in load_pretrained(model.network, "resnet18")
    for key, value in model.network.state_dict().items():
        if key.startswith("fc."):
            assert not (value == 0.25).any()
        else:
            assert torch.equal(value, trained[key]), key


def test_pretrained_weights_go_behind_the_layer_that_resizes(trained: State) -> None:
    model = build_model("resnet18", 10, network_size=64)
    load_pretrained(model.network, "resnet18")
    assert (model.network.state_dict()["1.conv1.weight"] == 0.25).all()


@pytest.mark.parametrize(
    ("name", "image_size", "size"),
    [
        ("resnet18", 32, None),
        ("vgg19_bn", 16, 224),  # takes 32 pixels or more
        ("vgg19_bn", 32, None),
        ("vit_b_16", 32, 224),
        ("vit_b_16", 224, None),
        ("vit_b_16", 256, 224),  # exactly the size that it was trained at
    ],
)
def test_pretrained_networks_resize_where_they_need_to(
    name: str, image_size: int, size: int | None
) -> None:
    assert pretrained_size(name, image_size) == size


def test_a_network_without_trained_weights_is_said() -> None:
    for name in ("preactresnet18", "my_net.py:build"):
        with pytest.raises(UserError, match=f"no trained weights of {name}; drop the flag"):
            pretrained_size(name, 32)


def test_without_a_network_the_weights_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_pretrained(build_model("resnet18", 10).network, "resnet18")
    text = str(caught.value)
    assert "no route to host" in text
    assert "resnet18-f37072fd.pth" in text
    assert str(tmp_path / "checkpoints") in text
    assert len(text.splitlines()) == 1


# --- the user's own file ------------------------------------------------------------------------

OWN = """
import sys
from dataclasses import dataclass

from torch import nn


@dataclass
class Sizes:
    classes: int


def build(num_classes, image_size):
    sizes = Sizes(num_classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, sizes.classes))


def wrong(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8**2, 5))


def text(num_classes, image_size):
    return "a network"


def broken(num_classes):
    return None


def leaves(num_classes, image_size):
    sys.exit(3)


def frozen(num_classes, image_size):
    return build(num_classes, image_size).requires_grad_(False)


def uncopyable(num_classes, image_size):
    network = build(num_classes, image_size)
    network.numbers = (number for number in range(3))
    return network


number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my net.py"
    path.write_text(OWN, encoding="utf-8")
    return path


def test_a_user_s_constructor_is_called(own: Path) -> None:
    check_model(f"{own}:build", 4, 12)
    model = build_model(f"{own}:build", 4, image_size=12)
    assert model(torch.rand(2, 3, 12, 12)).shape == (2, 4)
    assert list(model.network.state_dict()) == ["1.weight", "1.bias"]
    assert copy.deepcopy(model)(torch.rand(2, 3, 12, 12)).shape == (2, 4)


def test_a_user_s_file_is_known_by_its_name_and_content(own: Path) -> None:
    name, sha256 = model_identity(f"{own}:build")
    assert name == "my net.py:build"
    assert sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    assert model_identity("resnet18") == ("resnet18", None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("{own}:wrong", r"gives \(2, 5\) for a batch of two .*; logits of \(2, 4\) are needed"),
        ("{own}:text", "gave str; it has to return an nn.Module"),
        ("{own}:broken", "failed with num_classes=4, image_size=8 .TypeError: "),
        ("{own}:leaves", "failed with num_classes=4, image_size=8 .SystemExit: 3"),
        ("{own}:frozen", "has no weight with requires_grad"),
        (
            "{own}:uncopyable",
            "cannot be copied by copy.deepcopy, as defenses do .TypeError: .*generator",
        ),
        ("{own}:missing", "has no function missing"),
        ("{own}:number", "has no function number"),
        ("nowhere.py:build", "nowhere.py cannot be read"),
        ("{own}", "is unknown.*give file.py:function, or one of"),
    ],
)
def test_a_user_s_file_that_does_not_fit_is_told_in_one_line(
    own: Path, name: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        check_model(name.format(own=own), 4, 8)
    assert len(str(caught.value).splitlines()) == 1


def test_a_user_s_file_with_an_error_in_it_is_told_in_one_line(own: Path) -> None:
    own.write_text("def build(:\n", encoding="utf-8")
    with pytest.raises(UserError, match="SyntaxError") as caught:
        check_model(f"{own}:build", 4, 8)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_a_number_of_classes_that_is_none_is_refused(number: object) -> None:
    with pytest.raises(UserError, match=r"num_classes: .* is not allowed; give int >= 1"):
        build_model("tiny", number)  # type: ignore[arg-type]


def test_images_that_a_vit_cannot_cut_are_told() -> None:
    with pytest.raises(UserError, match=r"vit_b_16 cannot be made for images of 20 pixels"):
        build_model("vit_b_16", 3, image_size=20)
