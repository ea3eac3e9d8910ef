"""Does it pay to fuse BatchNorm, ReLU and the block's addition on a GPU? An experiment, not a part.

    python perf/fused.py --device cuda --epoch_images 50000 --images 2500        about six minutes
    python perf/fused.py --device cpu --epoch_images 64 --images 32 --batch_size 32 --repeats 1

PreAct-ResNet18 spends a quarter of a training step on an H200 in BatchNorm, each time followed by
ReLU and often preceded by an addition. Here `torch.compile` makes one kernel of each such piece,
forward and backward; convolutions stay cuDNN's, and CUDA graphs record both networks alike. Prints
seconds of an epoch and of a round of SAU in turns, with the ratio, the seconds of compiling, the
memory, and how far the losses of the first steps are apart. If an epoch on a GPU takes less than
0.8 of the time, `FusedBlock` belongs into `models/fast/`.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense import sau
from models import Classifier, build_model, prepare
from models.preactresnet import PreActBlock, PreActResNet
from perf.speed import Row, interleaved, our_epoch, rows_of
from utils.config import Parser
from utils.data.batches import as_float
from utils.data.labelled import Labelled
from utils.data.poison import PoisonedSet
from utils.errors import UserError
from utils.process.device import environment, pick_device, pick_precision
from utils.process.script import logger, run_script
from utils.process.seeds import generator

M = TypeVar("M", bound=nn.Module)
Pair = tuple[torch.Tensor, torch.Tensor | None]  # what a block returns: two terms of a sum


def _piece(
    branch: torch.Tensor, shortcut: torch.Tensor | None, norm: tuple, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance, weight, bias, momentum, eps = norm
    total = branch if shortcut is None else branch + shortcut
    normed = F.batch_norm(total, mean, variance, weight, bias, training, momentum, eps)
    return total, F.relu(normed)


@cache
def compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The piece as one kernel; made at the first call, because torch writes files."""
    return torch.compile(_piece, dynamic=False, fullgraph=True)


class FusedBlock(PreActBlock):
    """A `PreActBlock` whose addition waits for the next one's BatchNorm and ReLU."""

    does_the_same = True

    def activated(
        self, norm: nn.BatchNorm2d, branch: torch.Tensor, shortcut: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of both terms, and ReLU of its BatchNorm."""
        if self.training:
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        moments = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return compiled()(branch, shortcut, (*moments, norm.momentum, norm.eps), self.training)

    def forward(self, terms: Pair | torch.Tensor) -> Pair:  # type: ignore[override]
        first, second = terms if isinstance(terms, tuple) else (terms, None)
        features, activated = self.activated(self.bn1, first, second)
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        _, activated = self.activated(self.bn2, self.conv1(activated))
        return self.conv2(activated), shortcut


class FusedResNet(PreActResNet):
    """A `PreActResNet` of such blocks."""

    does_the_same = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        terms = self.layer1(self.conv1(images))
        branch, shortcut = self.layer4(self.layer3(self.layer2(terms)))
        return self.linear((branch + shortcut).mean(dim=(2, 3)))


def fuse(model: M) -> M:
    """The model itself; its network, a PreAct-ResNet, computes in fused pieces from now on."""
    for module in model.modules():
        if type(module) is PreActBlock:
            module.__class__ = FusedBlock
        elif type(module) is PreActResNet:
            module.__class__ = FusedResNet
    return model


def random_images(count: int, size: int) -> Labelled:
    """Images of noise with ten labels; what is measured here does not depend on what they show."""
    source = generator(0, "fused")
    images = torch.randint(0, 256, (count, 3, size, size), generator=source).to(torch.uint8)
    return Labelled(images, torch.randint(0, 10, (count,), generator=source))


def measure(
    images: int, epoch_images: int, batch_size: int, repeats: int, device: torch.device
) -> list[Row]:
    """Rows of an epoch and of a round of SAU, each plain and fused, and of the losses."""
    precision = pick_precision("auto", device)
    shown, clean = random_images(epoch_images, 32), random_images(images, 32)
    none = torch.empty(0, dtype=torch.int64)
    poisoned = PoisonedSet(shown, none, shown.images[:0], none, none)

    def fresh(is_fused: bool) -> Classifier:
        torch.manual_seed(0)
        model = prepare(build_model("preactresnet18", 10), device, precision)
        return fuse(model) if is_fused else model

    def epoch(is_fused: bool) -> Callable[[], Callable[[], object]]:
        return lambda: our_epoch(fresh(is_fused), poisoned, batch_size, device)

    def rounds(is_fused: bool) -> Callable[[], Callable[[], object]]:
        # A bound of 0 leaves every image unshared, so that each step works on all of them.
        config = sau.Config.load(n_rounds=1, trigger_norm=0.0, batch_size=batch_size)
        model = fresh(is_fused)
        return lambda: lambda: sau.purify(model, clean.images, clean.labels, config)

    started = time.perf_counter()
    gap = difference(fresh, clean, batch_size, device)
    compiling = time.perf_counter() - started
    rows = [
        Row("fused", "compiling, and ten steps of each", compiling),
        Row("fused", "losses of ten steps: largest relative difference", gap),
    ]
    for part, make in (("epoch", epoch), ("round", rounds)):
        variants = {"plain": make(False), "fused": make(True)}
        rows += rows_of(part, interleaved(variants, repeats, device), {})
    if device.type == "cuda":
        used = f"{torch.cuda.max_memory_allocated(device) >> 20} MiB at most"
        rows[-1] = replace(rows[-1], note=used)
    return rows


def difference(
    fresh: Callable[[bool], nn.Module], data: Labelled, batch_size: int, device: torch.device
) -> float:
    """The largest relative difference of the losses of ten steps in train mode, plain and fused."""
    losses: list[list[float]] = []
    for is_fused in (False, True):
        model = fresh(is_fused).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses.append([])
        for _ in range(10):
            logits = model(as_float(data.images[:batch_size], device))
            loss = F.cross_entropy(logits, data.labels[:batch_size].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    return max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))


def main() -> None:
    """Parses the flags and prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--images", type=int, default=2500, help="images of a round of SAU")
    parser.add_argument("--epoch_images", type=int, default=50_000, help="images of an epoch")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count, >= 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    for name in ("images", "epoch_images", "batch_size", "repeats"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}: {getattr(flags, name)} is not allowed; give 1 or more")
    device = pick_device(flags.device)
    # Each stage, batch and mode of BatchNorm is a kernel of its own.
    torch._dynamo.config.cache_size_limit = 256
    rows = measure(flags.images, flags.epoch_images, flags.batch_size, flags.repeats, device)
    logger.info("%s", environment(device, pick_precision("auto", device)))
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        logger.info("%-7s %-50s %10.3g %9s  %s", row.part, row.what, row.seconds, ratio, row.note)


if __name__ == "__main__":
    run_script(main)
