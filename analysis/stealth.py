"""Stealth: how visible the trigger is, in PSNR, SSIM and changes of pixels.

Wang, Bovik, Sheikh, Simoncelli. *Image Quality Assessment: From Error Visibility to Structural
Similarity.* IEEE TIP 2004.

Triggered test images are compared with the clean ones that they come from.

    PSNR   10 log10(1 / mean squared difference), in dB, of pixels in [0, 1]; infinite if equal
    SSIM   Gaussian windows of 11 pixels (sigma 1.5), borders mirrored; K1 = 0.01, K2 = 0.03
    L_inf, L2, L0   largest change, Euclidean norm, share of the pixels that change in any channel

    python analysis/stealth.py --result_file badnet_demo

LPIPS is not offered: its weights would have to be downloaded.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import AnalysisConfig, Results, run
from analysis.subject import Subject
from utils.data.batches import as_float
from utils.data.labelled import examples
from utils.training import ending

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig):
    images: Annotated[int, Field(ge=1, le=12, description="test images that are shown")]

    needs_trigger = True


def psnr(clean: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB.

    Shape:
        (N, C, H, W), (N, C, H, W) float in [0, 1] -> (N,) float; infinite for equal images.
    """
    errors = (clean.double() - changed.double()).square().flatten(1).mean(1)
    return -10 * errors.log10()


def ssim(clean: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image: the mean over channels and all places.

    The images are mirrored at their borders. Common implementations skip windows that reach over a
    border instead; then a trigger in the corner of a small image would not count. Variances are
    those of the Gaussian weights, as in the paper.

    Shape:
        (N, C, H, W), (N, C, H, W) float in [0, 1], H and W at least 6 -> (N,) float in [-1, 1]; 1
        for equal images.
    """
    places = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-places.square() / (2 * 1.5**2))
    window = torch.outer(weights, weights) / weights.sum() ** 2

    def mean(images: torch.Tensor) -> torch.Tensor:
        padded = F.pad(images.flatten(0, 1).unsqueeze(1), (5, 5, 5, 5), mode="reflect")
        return F.conv2d(padded, window.view(1, 1, 11, 11))

    x, y = clean.double(), changed.double()
    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.view(*clean.shape[:2], -1).mean(dim=(1, 2))


def changes(clean: torch.Tensor, changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """L_inf, L2 and L0 of each image; see the head of this file.

    Shape:
        (N, C, H, W), (N, C, H, W) float in [0, 1] -> (N,) float each.
    """
    difference = (clean.double() - changed.double()).abs()
    flat = difference.flatten(1)
    is_changed = (difference > 0).any(1).double()
    return {
        "l_inf": flat.amax(1),
        "l2": flat.square().sum(1).sqrt(),
        "l0": is_changed.flatten(1).mean(1),
    }


def look(subject: Subject, config: Config, results: Results) -> None:
    """Measures all triggered test images.

    Tables: `stealth` (measure; mean, median, worst: the most visible image). Headline of the
    attack: means. Equal images have no PSNR and are not in its mean.
    """
    triggered, data = subject.triggered, subject.data
    parts: dict[str, list[torch.Tensor]] = {}
    for rows in torch.arange(len(triggered.index)).split(256):
        clean = as_float(data.test.images[triggered.index[rows]])
        changed = as_float(triggered.images[rows])
        measures = {"psnr": psnr(clean, changed), "ssim": ssim(clean, changed)}
        for name, numbers in (measures | changes(clean, changed)).items():
            parts.setdefault(name, []).append(numbers)
    values = {name: torch.cat(chunks) for name, chunks in parts.items()}
    equal = int(values["psnr"].isinf().sum())
    if equal:
        results.warn(f"{equal} of {len(triggered.index)} triggered images equal their clean ones")
    values["psnr"] = values["psnr"][values["psnr"].isfinite()]
    table: list[dict[str, Any]] = [
        {
            "measure": name,
            "mean": float(numbers.mean()),
            "median": float(numbers.quantile(0.5)) if len(numbers) else math.nan,
            "worst": worst(name, numbers),
        }
        for name, numbers in values.items()
    ]
    results.tables["stealth"] = table
    means = {str(row["measure"]): row["mean"] for row in table}
    attack = subject.attack.attack if subject.attack is not None else "trigger"
    results.headline[attack] = dict(means)
    results.conclude(
        f"{attack}: PSNR {means['psnr']:.1f} dB, SSIM {means['ssim']:.4f}, "
        f"{100 * means['l0']:.1f} % of pixels change, by up to {means['l_inf']:.3f}"
    )
    shown = examples(triggered, data, config.images)
    results.figures["stealth"] = lambda: draw(*shown)


def worst(name: str, numbers: torch.Tensor) -> float:
    """Of the most visible image: the smallest PSNR or SSIM, the largest change."""
    if len(numbers) == 0:
        return math.nan
    return float(numbers.min() if name in ("psnr", "ssim") else numbers.max())


def draw(clean: torch.Tensor, changed: torch.Tensor) -> "Figure":
    """stealth.png: clean and triggered images with PSNR and SSIM, and the difference."""
    from utils import plot

    measures = zip(psnr(clean, changed).tolist(), ssim(clean, changed).tolist(), strict=True)
    captions = [f"{p:.1f} dB\nSSIM {s:.3f}" for p, s in measures]
    rows = {"clean": clean, "triggered": changed}
    return plot.image_grid(
        rows | ending.difference(clean, changed),
        {"triggered": captions},
        "How visible the trigger is",
    )


if __name__ == "__main__":
    run(Config, look)
