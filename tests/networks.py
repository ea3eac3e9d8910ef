"""Small networks that several test modules share; most are in double precision."""

import torch
from torch import nn

from models import Classifier
from models.fast.batchnorm import BatchNorm2d

# Flags of fine-tuning on `problem`: three rounds of three batches (5, 5 and 2 images).
TUNING = {"n_rounds": 3, "batch_size": 5, "lr": 0.05, "wd": 0.01, "crop_padding": 1}


class ConvNet(nn.Module):
    """conv1, bn1, relu, conv2, bn2, relu, mean over the pixels, linear.

    Shape:
        (N, 3, H, W) float -> (N, classes) float logits.
    """

    def __init__(self, classes: int, widths: tuple[int, int]) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.linear = nn.Linear(second, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.bn1(self.conv1(images)).relu()
        features = self.bn2(self.conv2(features)).relu()
        return self.linear(features.mean(dim=(2, 3)))


def conv_net(seed: int = 0, classes: int = 4, widths: tuple[int, int] = (6, 8)) -> ConvNet:
    """In eval mode; scales, shifts and statistics are not those of a fresh BatchNorm."""
    torch.manual_seed(seed)
    network = ConvNet(classes, widths).double()
    for norm in (network.bn1, network.bn2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.3, 0.7)
    network.linear.weight.data *= 4
    return network.eval()


class Norms(nn.Module):
    """Layers of which two are BatchNorm2d with weights, and one of these keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
        self.a = BatchNorm2d(3, track_running_stats=False)
        self.flat = nn.BatchNorm1d(3)
        self.group = nn.GroupNorm(1, 3)


class Scalar(nn.Module):
    """One weight, so that a training step is arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.ones(len(images), 3, dtype=torch.float64)


class Forked(nn.Module):
    """Its last part has two linear layers, and its last block two convolutions; one is called."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = {name: nn.Conv2d(3, 4, 3) for name in ("idle", "used")}
        self.block = nn.ModuleDict(convolutions)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 3) for name in ("idle", "used")})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.heads["used"](self.block["used"](images).relu().mean((2, 3)))


def classifier(network: nn.Module) -> Classifier:
    """Normalization to (x - 0.5) / 0.25 before a network of double precision."""
    return Classifier(network, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).double().eval()


def problem(
    seed: int = 0, count: int = 12, classes: int = 4, side: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images (N, 3, side, side) in [0, 1], float64, and random labels."""
    torch.manual_seed(1000 + seed)
    images = torch.rand(count, 3, side, side, dtype=torch.float64)
    return images, torch.randint(0, classes, (count,))


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as it is now."""
    return {name: value.clone() for name, value in state.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two state dicts do not hold the same bits."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def hooks(model: nn.Module) -> int:
    """How many hooks its modules have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
