"""How much each change for speed saves in SAU and in training, one change at a time.

    python attack/badnet.py --image_size 32 --save_folder_name badnet_32
    python perf/variants.py --result_file badnet_32

Each group has the program as it is, and variants without one thing or with another thing. Repeats
are interleaved. The figures and the decisions are in `perf/README.md`.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense import sau
from models import preactresnet
from perf.speed import Bench, at_precision, interleaved, load
from utils.config import Parser, check_least
from utils.data.batches import as_float
from utils.process.device import pick_device
from utils.process.script import logger, run_script
from utils.records import places

Group = dict[str, Callable[[], Callable[[], object]]]


def training(bench: Bench) -> Group:
    """A training step: layout, optimizer, compilation, precision."""
    images, labels = as_float(bench.clean.images, bench.device), bench.clean.labels.to(bench.device)

    def step(
        layout: torch.memory_format = torch.channels_last,
        fused: bool = True,
        compiled: bool = False,
        precision: str = bench.precision,
    ) -> Callable[[], Callable[[], object]]:
        model = at_precision(bench.model, precision, bench.device).train()
        model.to(memory_format=layout)
        batch = images.contiguous(memory_format=layout)
        if compiled:
            model.network.compile()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=fused)

        def call() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()

        return lambda: call

    group = {
        "training step": step(),
        "contiguous instead of channels-last": step(layout=torch.contiguous_format),
        "optimizer not fused": step(fused=False),
        "torch.compile": step(compiled=True),
    }
    other = "fp32" if bench.precision == "bf16" else "bf16"
    return group | {f"{other} instead of {bench.precision}": step(precision=other)}


def inference(bench: Bench) -> Group:
    """Scoring: batch size, inference mode, folded BatchNorm, compilation."""
    images = bench.data.test.images[:512]

    def passes(
        batch_size: int = 256,
        mode: Callable[[], Any] = torch.no_grad,
        change: Callable[[nn.Module], object] = lambda network: None,
    ) -> Callable[[], Callable[[], object]]:
        model = at_precision(bench.model, bench.precision, bench.device).eval()
        change(model.network)

        def call() -> None:
            with mode():
                for batch in images.split(batch_size):
                    model(as_float(batch, bench.device)).argmax(1)

        return lambda: call

    return {
        "512 images scored": passes(),
        "batches of 64": passes(64),
        "batches of 512": passes(512),
        "inference_mode instead of no_grad": passes(mode=torch.inference_mode),
        "BatchNorm folded where it can be": passes(change=fold),
        "torch.compile": passes(change=lambda network: network.compile()),
    }


def fold(network: nn.Module) -> None:
    """Folds the second BatchNorm of each block into the convolution before it; in place."""
    for block in network.modules():
        if isinstance(block, preactresnet.PreActBlock):
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.bn2)
            block.bn2 = nn.Identity()  # type: ignore[assignment]


def inner_loop(bench: Bench) -> Group:
    """The inner loop of SAU on a model that has changed: how much each change saves."""
    images, labels = as_float(bench.clean.images, bench.device), bench.clean.labels.to(bench.device)
    reference = at_precision(bench.model, bench.precision, bench.device).eval()
    model = sau.purify(reference, bench.clean.images, bench.clean.labels, bench.config).eval()
    with torch.no_grad():
        predictions = reference(images).argmax(1)

    def loop(
        ref_predictions: torch.Tensor | None = predictions, ref: nn.Module = reference
    ) -> Callable[[], Callable[[], object]]:
        def call() -> None:
            sau.shared_perturbation(
                model, ref, images, labels, bench.config, ref_predictions=ref_predictions
            )

        return lambda: call

    folded = copy.deepcopy(reference)
    fold(folded.network)
    return {
        "inner loop": loop(),
        "reference's predictions each time": loop(ref_predictions=None),
        "reference's BatchNorm folded": loop(ref=folded),
    }


PARTS: dict[str, Callable[[Bench], Group]] = {
    "training": training,
    "inference": inference,
    "inner_loop": inner_loop,
}


def main() -> None:
    """Measures the groups and prints seconds and ratios."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--result_file", required=True, help="record of a BadNets attack at 32 pixels"
    )
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="what to vary")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count, >= 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args()
    check_least(flags, repeats=1)
    folder = places.find_record(flags.result_file, flags.record_path)
    bench = load(folder, 64, 64, pick_device(flags.device), flags.repeats)
    for part in flags.parts:
        seconds = interleaved(PARTS[part](bench), bench.repeats, bench.device)
        ours = next(iter(seconds.values()))
        for name, took in seconds.items():
            logger.info("%-50s %8.3f s  %.2f times as long", name, took, took / ours)


if __name__ == "__main__":
    run_script(main)
