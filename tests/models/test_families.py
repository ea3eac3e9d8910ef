"""Every dataset with every family of networks: an epoch of training, a round of SAU."""

import copy
import dataclasses
from typing import get_args

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer

from defense.sau import Config, purify, shared_perturbation
from models import Classifier, build_model
from tests.miniatures import official
from utils.data.batches import as_float
from utils.data.datasets import BUILT_IN, DatasetName, load_dataset
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import unpoisoned
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import Supervised, train_classifier

FAMILIES = [
    "preactresnet18",
    "vgg19_bn",
    "resnet18",
    "vit_b_16",
    "convnext_tiny",
    "densenet161",
    "mobilenet_v3_large",
    "efficientnet_b3",
]
COUNT = 4  # images of each split


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """A few images of each dataset, by way of its own loader, at 32 pixels.

    Miniatures are of one colour, which leaves BatchNorm no variance: they get noise.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.data.images.ROOT", tmp_path_factory.mktemp("root"))
        for name in get_args(DatasetName):
            folder = tmp_path_factory.mktemp(name)
            if name == "folder":
                for split in ("train", "test"):
                    for label in ("cat", "dog"):
                        (folder / split / label).mkdir(parents=True)
                        for i in range(COUNT):
                            image = Image.new("RGB", (20, 24), (60 * i, 9, 99))
                            image.save(folder / split / label / f"{i}.png")
            elif name not in BUILT_IN:
                official(name, folder, patch)
            data = load_dataset(name, None if name in BUILT_IN else folder, 32)
            some = torch.arange(COUNT) * (len(data.train) // COUNT)
            noise = torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8)
            train = Labelled(noise, data.train.labels[some])
            found[name] = dataclasses.replace(data, train=train)
    return found


def settle(model: Classifier, images: torch.Tensor) -> None:
    """BatchNorm's statistics become those of the images: after one step they are still far off."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        model(as_float(images))


class Narrow(nn.Linear):
    """VGG's hidden layers of 4,096 are of 64."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        sizes = [64 if size == 4096 else size for size in (in_features, out_features)]
        super().__init__(*sizes, bias)


def short_model(family: str, num_classes: int, *constants: tuple[float, ...]) -> Classifier:
    """A network cut short for the time that it takes, and large weights that need no gradient."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if family == "vgg19_bn":
            patch.setattr(nn, "Linear", Narrow)
        model = build_model(family, num_classes, *constants, image_size=32)
    if isinstance(model.network, VisionTransformer):
        model.network.encoder.layers = model.network.encoder.layers[:2]
    for weight in model.parameters():
        weight.requires_grad_(weight.numel() <= 100_000)
    return model


PAIRS = [("cifar10", family) for family in FAMILIES]  # each network, and each other dataset
PAIRS += [(name, FAMILIES[0]) for name in get_args(DatasetName) if name != "cifar10"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_every_dataset_trains_and_purifies_every_family(
    datasets: dict[str, Dataset], name: str, family: str
) -> None:
    data = datasets[name]
    model = short_model(family, len(data.classes), data.mean, data.std)
    before = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    train_classifier(
        model,
        unpoisoned(data.train),
        Supervised(4, True, generator(0, "augmentation")),
        epochs=1,
        batch_size=COUNT,
        lr=1e-3,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="reduce_on_plateau",
        order=generator(0, "order"),
        loop=Loop(),
    )
    trained = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    settle(model, data.train.images)
    config = Config.load(name, n_rounds=1, batch_size=COUNT, adv_steps=1)
    purified = purify(model, data.train.images, data.train.labels, config)
    after = [weight for weight in purified.parameters() if weight.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(trained, after, strict=True))
    assert all(weight.isfinite().all() for weight in after)
    assert isinstance(purified, Classifier)
    assert not purified.training


@pytest.mark.parametrize(
    ("family", "kind", "is_there"),
    [
        ("vit_b_16", nn.BatchNorm2d, False),
        ("convnext_tiny", nn.BatchNorm2d, False),
        ("convnext_tiny", nn.LayerNorm, True),
        ("vgg19_bn", nn.Dropout, True),
    ],
)
def test_the_inner_loop_runs_in_eval_mode_whatever_the_layers(
    family: str, kind: type[nn.Module], is_there: bool
) -> None:
    """Given models in train mode, dropout and all, it repeats itself and gives their modes back."""
    model = short_model(family, 3)
    assert any(isinstance(module, kind) for module in model.modules()) == is_there
    settle(model, torch.rand(4, 3, 32, 32))
    reference = copy.deepcopy(model)
    model.train()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    config = Config.load(adv_steps=2, pgd_init="zero")
    first, second = (
        shared_perturbation(model, reference, images, labels, config) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(first, shared_perturbation(model, reference, images, labels, config))
