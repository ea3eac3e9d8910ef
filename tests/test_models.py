"""The classifiers, and the layout in which weights are exchanged."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import Classifier, Normalize, build_model, model_names, prepare
from models.preactresnet import PreActBlock, PreActResNet, preactresnet18
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
    for name in ("preactresnet18", "resnet18", "vgg19_bn"):
        assert name in str(caught.value)


def test_model_names_are_ours_and_torchvisions() -> None:
    names = model_names()
    assert names == sorted(set(names))
    assert {"preactresnet18", "vgg16", "densenet121", "vit_b_16"} <= set(names)
    assert not any(name.startswith(("fcn", "fasterrcnn", "raft", "quantized")) for name in names)
