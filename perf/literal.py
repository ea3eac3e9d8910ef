"""Plain implementations: SAU as published, and the usual way to train on poisoned images.

Only `perf/speed.py` uses them, to compare. `round_of_sau` does all that the published procedure
does: clean predictions of both models again in each inner step, gradients of all weights, all
images in every step, three passes for ACC, ASR and RA. `PlainEpoch` is the recipe of most
repositories: poisoned images as PNG files, PIL and torchvision transforms in a DataLoader.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Files
from torchvision import transforms

from defense.sau import Config, jensen_shannon, unlearning_loss
from utils.data.labelled import Dataset, Triggered
from utils.data.poison import PoisonedSet
from utils.perturb import initial_perturbation, project


def perturbation(
    model: nn.Module,
    reference: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
) -> torch.Tensor:
    """The whole inner problem: (N, C, H, W) float -> delta, likewise."""
    delta = initial_perturbation(config.pgd_init, config.trigger_norm, config.norm_type, images)
    for _ in range(config.adv_steps):
        delta = delta.detach().requires_grad_()
        with torch.no_grad():
            clean, ref_clean = model(images).argmax(1), reference(images).argmax(1)
        logits, ref_logits = model(images + delta), reference(images + delta)
        fooled, ref_fooled = logits.argmax(1) != clean, ref_logits.argmax(1) != ref_clean
        shared = fooled & ref_fooled & (logits.argmax(1) == ref_logits.argmax(1))
        if bool(shared.all()):
            break
        adversarial = F.cross_entropy(logits, labels, reduction="none")[~fooled].sum()
        adversarial += F.cross_entropy(ref_logits, labels, reduction="none")[~ref_fooled].sum()
        divergence = jensen_shannon(logits, ref_logits)[~shared].sum() / len(images)
        loss = config.beta_2 * divergence - config.beta_1 * adversarial / (2 * len(images))
        loss.backward()
        assert delta.grad is not None
        moved = delta.detach() - config.adv_lr * delta.grad.sign()
        delta = project(moved, config.trigger_norm, config.norm_type)
    return delta.detach()


def round_of_sau(
    model: nn.Module,
    reference: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
) -> None:
    """One pass over the clean subset; trains the model in place.

    Args:
        model, reference: in eval mode; the reference's weights take gradients too, as published.
        images: (N, C, H, W) float in [0, 1].
    """
    for index in torch.randperm(len(images)).split(config.batch_size):
        x, y = images[index], labels[index]
        delta = perturbation(model, reference, x, y, config)
        logits, adv_logits = model(torch.cat([x, x + delta])).chunk(2)
        with torch.no_grad():
            ref_logits, ref_adv_logits = reference(torch.cat([x, x + delta])).chunk(2)
        losses = unlearning_loss(logits, adv_logits, ref_logits, ref_adv_logits, y, config)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()


def plain_network(network: nn.Module) -> nn.Module:
    """A copy with the library's usual memory order."""
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


@torch.no_grad()
def three_passes(model: nn.Module, data: Dataset, triggered: Triggered, batch: int = 256) -> None:
    """ACC, ASR and RA, each with a pass of its own."""
    device = next(model.parameters()).device
    model.eval()
    for images, labels in (
        (data.test.images, data.test.labels),
        (triggered.images, triggered.targets),
        (triggered.images, triggered.labels),
    ):
        hits = 0
        for part, wanted in zip(images.split(batch), labels.split(batch), strict=True):
            predictions = model(part.to(device).float() / 255).argmax(1)
            hits += int((predictions == wanted.to(device)).sum())


class PngFiles(Files[tuple[torch.Tensor, int]]):
    """Images, of which some are read from PNG files, through a transform."""

    def __init__(
        self,
        images: np.ndarray,
        labels: list[int],
        files: dict[int, Path],
        transform: transforms.Compose,
    ) -> None:
        self._images = images
        self._labels = labels
        self._files = files
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self._files.get(index)
        if file is None:
            image = Image.fromarray(self._images[index])
        else:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        return self._transform(image), self._labels[index]


class PlainEpoch:
    """An epoch of the usual recipe, and its evaluation.

    Args:
        folder: where the PNG files of poisoned and triggered images go.
        count: training images that take part, from the first.
    """

    def __init__(
        self,
        data: Dataset,
        poisoned: PoisonedSet,
        triggered: Triggered,
        folder: Path,
        batch_size: int,
        count: int,
        workers: int = 2,
    ) -> None:
        size = data.image_shape[1]
        plain = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        crop = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()]
        augmented = transforms.Compose([*crop, *plain])
        replaced = {int(i): row for row, i in enumerate(poisoned.index) if int(i) < count}
        labels = data.train.labels[:count].tolist()
        for index, row in replaced.items():
            labels[index] = int(poisoned.labels[row])
        train = PngFiles(
            _hwc(data.train.images[:count]),
            labels,
            _write(poisoned.images, replaced, folder / "train"),
            augmented,
        )
        self._train = DataLoader(
            train, batch_size, shuffle=True, drop_last=True, num_workers=workers
        )
        still = transforms.Compose(plain)
        clean = PngFiles(_hwc(data.test.images), data.test.labels.tolist(), {}, still)
        rows = {row: row for row in range(len(triggered.images))}
        files = _write(triggered.images, rows, folder / "test")
        backdoor, robust = (
            PngFiles(_hwc(triggered.images), wanted.tolist(), files, still)
            for wanted in (triggered.targets, triggered.labels)
        )
        self._tests = [
            DataLoader(part, batch_size, num_workers=workers) for part in (clean, backdoor, robust)
        ]

    def train(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """One epoch; the bare network takes normalized images."""
        device = next(network.parameters()).device
        network.train()
        for images, labels in self._train:
            optimizer.zero_grad()
            F.cross_entropy(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> list[int]:
        """Hits of ACC, ASR and RA."""
        device = next(network.parameters()).device
        network.eval()
        hits = [0, 0, 0]
        for i, loader in enumerate(self._tests):
            for images, labels in loader:
                hits[i] += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
        return hits


def _hwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _write(images: torch.Tensor, rows: dict[int, int], folder: Path) -> dict[int, Path]:
    """PNG files of images[row] by index."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = _hwc(images)
    files = {index: folder / f"{index}.png" for index in rows}
    for index, row in rows.items():
        Image.fromarray(pixels[row]).save(files[index])
    return files
