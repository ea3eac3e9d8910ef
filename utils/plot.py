"""Every figure. Functions return matplotlib figures or images; nothing here touches the disk."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Distinguishable in grey by line style and marker, and for colour-blind readers by hue.
_RATES = {
    "acc": ("ACC", "#0072B2", "-", "o"),
    "asr": ("ASR", "#D55E00", "--", "s"),
    "ra": ("RA", "#009E73", "-.", "^"),
    "cross_acc": ("cross ACC", "#CC79A7", ":", "D"),
}
_LOSS_STYLES = ("-", "--", "-.", ":")


def curves(metrics: pd.DataFrame, step: str, title: str) -> Figure:
    """ACC, ASR, RA in percent beside the losses, by epoch or round.

    Args:
        metrics: a column named `step`, then the rates in [0, 1] and columns that start with "loss";
            cells without a value are skipped.
        step: "epoch" or "round".
    """
    losses = [str(name) for name in metrics if str(name).startswith("loss")]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    scores, loss_axis = figure.subplots(1, 2)
    for rate, (label, colour, style, marker) in _RATES.items():
        if rate in metrics:
            rows = metrics[[step, rate]].dropna()
            marks = max(1, len(rows) // 12)
            scores.plot(
                rows[step],
                100 * rows[rate],
                style,
                color=colour,
                marker=marker,
                markevery=marks,
                ms=4,
                label=label,
            )
    scores.set(xlabel=step, ylabel="percent", ylim=(-3, 103))
    for name, style in zip(losses, _LOSS_STYLES * len(losses), strict=False):
        rows = metrics[[step, name]].dropna()
        loss_axis.plot(rows[step], rows[name], style, label=name.removeprefix("loss_"))
    loss_axis.set(xlabel=step, ylabel="mean loss", ylim=(0, None))
    for axis in (scores, loss_axis):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def image_grid(
    rows: Mapping[str, torch.Tensor], captions: Mapping[str, Sequence[str]], title: str
) -> Figure:
    """Rows of images under a title, the row's name at its left, a caption under each image.

    Args:
        rows: name -> float (N, C, H, W); values outside [0, 1] are clipped for display.
        captions: name of a row -> N texts; a row without captions has none.
    """
    count = min(len(images) for images in rows.values())
    heights = [
        1.0 + 0.17 * (1 + max(t.count("\n") for t in captions[name])) if name in captions else 1.0
        for name in rows
    ]
    figure = Figure(figsize=(1.1 + 1.15 * count, 0.5 + 1.15 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for column, axis in enumerate(line):
            axis.imshow(
                images[column].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name in captions:
                axis.set_xlabel(captions[name][column], fontsize=8, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def bars(values: Mapping[str, float], label: str, title: str) -> Figure:
    """Horizontal bars from the top down, each with its value.

    Args:
        values: name -> length of its bar.
        label: of the axis.
    """
    figure = Figure(figsize=(7.5, 0.9 + 0.38 * len(values)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(list(values), list(values.values()), color="#0072B2", height=0.65)
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, 1.12 * max(values.values())))
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    return figure


def amplified(difference: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A signed difference around mid-grey, scaled so that its largest value is fully visible.

    Shape:
        (N, C, H, W) float in [-1, 1] -> the same in [0, 1], and the scale.
    """
    scale = 1 / max(float(difference.abs().max()), 1e-8)
    return 0.5 + 0.5 * scale * difference, scale


def strip(images: torch.Tensor, height: int = 96) -> Image.Image:
    """Images side by side on white, enlarged without smoothing to about `height` pixels.

    Shape:
        (N, C, H, W) float; values outside [0, 1] are clipped.
    """
    scale = max(1, round(height / images.shape[2]))
    pixels = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    gap = torch.ones(*pixels.shape[1:3], scale)
    parts = [part for image in pixels for part in (image, gap)][:-1]
    return Image.fromarray(torch.cat(parts, dim=2).mul(255).round().byte().permute(1, 2, 0).numpy())
