"""Figures of runs and reports, and what all figures share; `utils/charts.py` has the analyses'.

Functions return matplotlib figures or images; nothing here touches the disk.

Names of classes, attacks, and the like may come from a stranger: each text passes `printable`.
"""

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlainFigure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter
from PIL import Image

from utils.errors import shown

# Distinguishable in grey by line style and marker, and for colour-blind readers by hue.
_RATES = {
    "acc": ("ACC", "#0072B2", "-", "o"),
    "asr": ("ASR", "#D55E00", "--", "s"),
    "ra": ("RA", "#009E73", "-.", "^"),
    "cross_acc": ("cross ACC", "#CC79A7", ":", "D"),
}
_LOSS_STYLES = ("-", "--", "-.", ":")
_BARS = {
    **{rate: (label, colour) for rate, (label, colour, *_) in _RATES.items()},
    "der": ("DER", "#CC79A7"),
}
# One for each of many things: hues that colour-blind readers tell apart, markers for grey.
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p", "h")
_NAME, LONGEST_TITLE = 32, 240  # characters of a line that fit
_CELL, _SIDE = 1.15, 1.1  # of an image in a grid, with and without the space around it, in inches
_LINE = 0.17  # height of a line of a grid's title, in inches
_WIDEST = 20  # characters under an image

# Fonts with letters of other scripts, as systems have them.
_OTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC"),
    *("Hiragino Sans GB", "Heiti TC", "Malgun Gothic", "Arial Unicode MS", "Noto Sans"),
)


class Figure(PlainFigure):
    """A figure that draws a box for each letter that its fonts do not have, without a warning."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """Saves the figure, as the method of matplotlib's that it replaces."""
        with self.any_letters():
            super().savefig(*args, **kwargs)

    @contextmanager
    def any_letters(self) -> Iterator[None]:
        """Inside, texts can be drawn and measured in all fonts that this machine has."""
        texts = [text for text in self.findobj(Text) if not text.get_text().isascii()]
        for text in texts:
            text.set_fontfamily(fonts())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from")
            yield


@cache
def fonts() -> list[str]:
    """matplotlib's own font, and those of other scripts that this machine has."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed)]


def curves(metrics: Sequence[Mapping[str, float]], step: str, title: str) -> Figure:
    """ACC, ASR, RA in percent beside the losses, by epoch or round.

    Args:
        metrics: a row per epoch or round: `step`, the rates in [0, 1] and losses, whose names start
            with "loss"; a row may lack a value.
        step: "epoch" or "round".
    """
    table = pd.DataFrame(metrics)
    losses = [str(name) for name in table if str(name).startswith("loss")]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    scores, loss_axis = figure.subplots(1, 2)
    for rate, (label, colour, style, marker) in _RATES.items():
        if rate in table:
            rows = table[[step, rate]].dropna()
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
        rows = table[[step, name]].dropna()
        label = printable(name.removeprefix("loss_") or name)
        lone = lone_points(rows[name])
        loss_axis.plot(
            *(rows[step], rows[name], style),
            marker="o" if lone else None,
            markevery=lone,
            clip_on=not lone,  # it may stand at the upper end
            ms=4,
            label=label,
        )
    loss_axis.set(xlabel=step, ylabel="mean loss")
    if loss_axis.dataLim.y0 >= 0:  # else the axis begins below the lowest loss
        loss_axis.set_ylim(bottom=0)
    for axis in (scores, loss_axis):
        axis.xaxis.set_major_locator(whole_numbers())
        if axis.lines:
            axis.legend(frameon=False)
        without_frame(axis)
    figure.suptitle(in_lines(title, 9, points=12), fontsize=12)
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
    sized = {name: captions_below(captions[name]) for name in captions}
    texts = {name: sized[name][0] for name in captions}
    lines = {
        name: 1 + max(t.count("\n") for t in texts[name]) if name in texts else 0 for name in rows
    }
    heights = {name: _CELL * (1.02 + 0.15 * count) for name, count in lines.items()}
    width = 0.75 + _CELL * count
    title = in_lines(title, width)
    top = 0.42 + _LINE * title.count("\n")
    height = top + 0.08 + sum(heights.values())
    figure = Figure(figsize=(width, height))
    # One axis in inches for all images, because an axis for each takes seconds.
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    axis.text(width / 2, (top - 0.02) / 2, title, fontsize=10, ha="center", va="center")
    for name, images in rows.items():
        axis.text(
            0.4, top + _SIDE / 2, printable(name), fontsize=9, rotation=90, ha="center", va="center"
        )
        for column in range(count):
            left = 0.65 + _CELL * column
            pixels = images[column].clamp(0, 1).permute(1, 2, 0).numpy()
            place = (left, left + _SIDE, top + _SIDE, top)
            axis.imshow(pixels, interpolation="nearest", extent=place, aspect="auto")
            if name in texts:
                text, middle, below = texts[name][column], left + _SIDE / 2, top + _SIDE + 0.05
                axis.text(middle, below, text, fontsize=sized[name][1], ha="center", va="top")
        top += heights[name]
    return figure


def captions_below(texts: Sequence[str]) -> tuple[list[str], float]:
    """The texts to draw under images, and their size in points, so that none touches the next one.

    "before | after" takes two lines where it is wide.
    """
    is_wide = any(len(text) > _WIDEST for text in texts)
    drawn = [printable(text.replace(" | ", " |\n", 1) if is_wide else text) for text in texts]
    widest = max((len(line) for text in drawn for line in text.split("\n")), default=0)
    return drawn, min(8, 8 * _WIDEST / max(1, widest))


def bars(values: Mapping[str, float], label: str, title: str) -> Figure:
    """Horizontal bars from the top down, each with its value.

    Args:
        values: name -> length of its bar.
        label: of the axis.
    """
    figure = Figure(figsize=(7.5, 0.9 + 0.38 * len(values)), layout="constrained")
    axis = figure.subplots()
    places = range(len(values))
    drawn = axis.barh(places, list(values.values()), color="#0072B2", height=0.65)
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.set_yticks(places, [printable(name) for name in values])
    axis.invert_yaxis()
    longest = max(values.values(), default=0)
    axis.set(xlabel=printable(label), xlim=(0, 1.12 * longest if longest > 0 else 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(in_lines(title, 7.5, points=8), fontsize=8)
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


def before_after(points: pd.DataFrame, seeds: Mapping[str, int], title: str) -> Figure:
    """A panel for each defense: what it does to ASR and ACC, an arrow for each attack.

    Args:
        points: one row per arrow: `defense`, `attack`, and in [0, 1] `asr_before`, `acc_before`,
            `asr`, `acc`; means over the seeds that the defense has.
        seeds: of each defense, how many at most.
    """
    attacks = sorted(set(points["attack"]))
    defenses = list(points.groupby("defense"))
    figure, axes = make_panels(len(defenses), 3, (4.0, 3.5), (1.9, 0.6), sharex=True, sharey=True)
    for axis, (name, rows) in zip(axes, defenses, strict=True):
        defense = str(name)
        for row in rows.to_dict("records"):
            hue, marker = look_of(attacks.index(row["attack"]))
            start = (100 * row["asr_before"], 100 * row["acc_before"])
            end = (100 * row["asr"], 100 * row["acc"])
            arrow = {"arrowstyle": "->", "color": hue, "lw": 1.1, "alpha": 0.7, "shrinkB": 5}
            axis.annotate("", end, start, arrowprops=arrow, zorder=4)
            axis.plot(*start, marker, mfc="white", mec=hue, ms=7, clip_on=False)
            axis.plot(*end, marker, color=hue, mec="white", ms=9, mew=0.6, clip_on=False, zorder=3)
        axis.set(xlabel="ASR, percent", ylabel="ACC, percent", xlim=(-3, 103))
        of = ", one seed" if seeds[defense] == 1 else f", up to {seeds[defense]} seeds"
        axis.set_title(printable(defense) + of, fontsize=10)
        axis.label_outer()
        without_frame(axis)
    for axis in axes[-3:]:  # the lowest ones, also over no panel
        axis.set_xlabel("ASR, percent")
        axis.tick_params(labelbottom=True)
    drawn = 100 * points[["acc", "acc_before"]].to_numpy(dtype=float)
    lowest, highest = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    axes[0].set_ylim(max(-3, lowest - 5), min(102, highest + 5))
    handles = [
        Line2D([], [], color="#777777", marker="o", ls="", ms=7, mfc=fill, label=label)
        for label, fill in (("before", "white"), ("after", "#777777"))
    ]
    for place, attack in enumerate(attacks):
        hue, marker = look_of(place)
        line = Line2D([], [], color=hue, marker=marker, ls="", ms=7, label=printable(attack))
        handles.append(line)
    name_beside(figure, handles, title)
    return figure


def heat_map(values: pd.DataFrame, title: str) -> Figure:
    """Rates of many pairs, each as a colour and as a number.

    The colours differ in lightness most of all, so that the figure is readable in grey, too.

    Args:
        values: rates in [0, 1], NaN where there is none: a row for each line of the figure.
    """
    lines, columns = values.shape
    names, headings = ([printable(str(name)) for name in axis] for axis in values.axes)
    below = 0.09 * max(map(len, headings))  # inches of the widest letters, at 45 degrees
    beside = max(below, 0.125 * max(map(len, names)))
    size = (1.2 + beside + 0.62 * columns, 1.0 + below + 0.34 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    percent = 100 * values.to_numpy(dtype=float)
    picture = axis.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for line, column in np.ndindex(lines, columns):
        value = percent[line, column]
        if not np.isnan(value):
            hue = "#000000" if value >= 50 else "#ffffff"
            number = axis.text(column, line, f"{value:.1f}", fontsize=8, color=hue)
            number.set(ha="center", va="center")
    axis.set_xticks(range(columns), headings)
    axis.set_yticks(range(lines), names)
    axis.tick_params(length=0, labelsize=9)
    axis.tick_params(axis="x", rotation=45)
    for label in axis.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axis.spines[:].set_visible(False)
    axis.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axis.set_yticks([line - 0.5 for line in range(1, lines)], minor=True)
    axis.grid(which="minor", color="#ffffff", linewidth=1)
    axis.tick_params(which="minor", length=0)
    figure.colorbar(picture, ax=axis, label="percent")
    entitle(figure, title)
    return figure


def curves_with_bands(panels: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """A panel for each attack: mean ACC, ASR and RA by round, from lowest to highest over seeds.

    Args:
        panels: name -> the rows of all seeds' metrics: `round` and rates in [0, 1]. Only those
            rounds are drawn that the largest number of seeds has scored.
    """
    figure, axes = make_panels(len(panels), 4, (2.5, 2.1), (0.6, 1), sharey=True)
    figure.set_figwidth(max(5.5, figure.get_figwidth()))
    handles: dict[str, Line2D] = {}
    for axis, (name, metrics) in zip(axes, panels.items(), strict=True):
        for rate, (label, colour, style, marker) in _RATES.items():
            if rate not in metrics or metrics[rate].isna().all():
                continue
            seeds = metrics[["round", rate]].dropna().groupby("round")[rate]
            in_all = seeds.count() == seeds.count().max()  # else the mean jumps between seeds
            mean, low, high = (
                100 * part[in_all] for part in (seeds.mean(), seeds.min(), seeds.max())
            )
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.2, lw=0)
            (handles[label],) = axis.plot(
                mean.index,
                mean,
                style,
                color=colour,
                marker=marker,
                markevery=max(1, len(mean) // 6),
                ms=4,
                label=label,
            )
        axis.set(ylim=(-3, 103))
        axis.set_title(printable(name), fontsize=9)
        axis.xaxis.set_major_locator(whole_numbers(4))
        without_frame(axis)
    for axis in axes[-4:]:
        axis.set_xlabel("round")
    figure.supylabel("percent", fontsize=9)
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False
    )
    entitle(figure, title)
    return figure


def variants(values: pd.DataFrame, deviations: pd.DataFrame, method: str, title: str) -> Figure:
    """Bars of a method and its variants, a panel for each metric.

    Args:
        values: means in [0, 1], one row per variant, from the top down; one column per metric.
        deviations: standard deviations, of the same shape; NaN draws none. If all are NaN, the
            title says that there is one seed.
        method: the row that is not a variant; hatched, if there is such a row.
    """
    figure = Figure(figsize=(10, 1.0 + 0.34 * len(values)), layout="constrained")
    panels = figure.subplots(1, len(values.columns), squeeze=False, sharey=True)[0]
    names = [printable(str(name)) for name in values.index]
    for axis, metric in zip(panels, values.columns, strict=True):
        label, colour = _BARS[metric]
        lengths, spread = 100 * values[metric].fillna(0), 100 * deviations[metric].fillna(0)
        drawn = axis.barh(range(len(names)), lengths, color=colour, height=0.66)
        if method in values.index:
            drawn[values.index.get_loc(method)].set(hatch="//", edgecolor="white")
        for place, (length, deviation) in enumerate(zip(lengths, spread, strict=True)):
            if deviation:
                axis.errorbar(length, place, xerr=deviation, color="black", lw=1, capsize=2)
            text = f"{length:.1f}" if values[metric].notna().iloc[place] else "none"
            axis.text(length + deviation + 2, place, text, va="center", fontsize=8)
        axis.set(xlim=(0, 125), xticks=(0, 50, 100), yticks=range(len(names)), yticklabels=names)
        axis.set_title(label, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    bars = "bars of one standard deviation" if deviations.notna().any(axis=None) else "one seed"
    entitle(figure, f"{title}: percent, {bars}")
    return figure


def cost(points: pd.DataFrame, title: str) -> Figure:
    """Seconds that a defense took against its DER, a point for each attack.

    Args:
        points: one row per point: `defense`, `seconds` > 0, `der` in [0, 1].
    """
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for place, (defense, rows) in enumerate(points.groupby("defense")):
        hue, marker = look_of(place)
        axis.plot(
            rows["seconds"],
            100 * rows["der"],
            marker,
            color=hue,
            mec="white",
            mew=0.6,
            ms=8,
            label=printable(str(defense)),
        )
    axis.set(
        xlabel="seconds of a run by the clock, other work on the machine included",
        ylabel="DER, percent",
    )
    least, most = 0.8 * points["seconds"].min(), 1.25 * points["seconds"].max()
    if most > 10 * least:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        steps = [step * 10.0**power for power in range(-3, 8) for step in (1, 2, 5)]
        axis.set_xticks([step for step in steps if least <= step <= most])
    axis.set_xlim(least, most)
    lowest = 100 * points["der"].min()
    axis.set_ylim(max(-3, lowest - 5), 102)
    without_frame(axis)
    name_beside(figure, axis.lines, title)
    return figure


def make_panels(
    count: int,
    most: int,
    size: tuple[float, float],
    beside: tuple[float, float],
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, line by line.

    Args:
        count: how many there are, >= 1.
        most: how many stand in a line, at most.
        size: width and height of a panel in inches.
        beside: width and height of what the figure has beside them.
        sharex: whether all panels have the same limits of the abscissa; likewise `sharey`.
    """
    columns = min(most, count)
    lines = -(-count // columns)
    figsize = beside[0] + size[0] * columns, beside[1] + size[1] * lines
    figure = Figure(figsize=figsize, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def entitle(figure: Figure, title: str) -> Text:
    """A title at the left, in as many lines as it needs."""
    text = in_lines(title, figure.get_figwidth())
    return figure.suptitle(text, fontsize=10, x=0.02, ha="left")


def in_lines(title: str, width: float, points: float = 10) -> str:
    """A title in as many lines as it needs.

    Args:
        width: of the figure, in inches.
        points: size of the letters.
    """
    lines = textwrap.wrap(shown(title, LONGEST_TITLE), int(110 * width / points))
    return "\n".join(printable(line, LONGEST_TITLE) for line in lines)


def name_beside(figure: Figure, lines: Sequence[Line2D], title: str) -> None:
    """A legend at the right of the panels, and a title; the figure grows until both have room."""
    legend = figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    heading = entitle(figure, title)
    with figure.any_letters():
        names, above = (part.get_window_extent().height / figure.dpi for part in (legend, heading))
    # The legend stands in the middle: what the title takes above it is free below it, too.
    figure.set_figheight(max(figure.get_figheight(), names + 2 * (above + 0.15)))


def lone_points(values: Sequence[float] | pd.Series) -> list[int]:
    """Places of the points of a line that has gaps at both of their sides.

    Only a marker shows such a point.
    """
    is_point = np.pad(np.isfinite(np.asarray(values, dtype=float)), 1)
    return np.flatnonzero(is_point[1:-1] & ~is_point[:-2] & ~is_point[2:]).tolist()


def whole_numbers(most: int = 10) -> MaxNLocator:
    """Ticks at whole numbers alone, also where an axis has only one of them.

    Args:
        most: about how many ticks.
    """
    return MaxNLocator(most, integer=True, min_n_ticks=1)


def look_of(place: int) -> tuple[str, str]:
    """Hue and marker of one of many things, by its number."""
    return _HUES[place % len(_HUES)], _MARKERS[place % len(_MARKERS)]


def without_frame(axis: Axes) -> None:
    """A faint grid, and no lines at the top and at the right."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def printable(text: str, limit: int = _NAME) -> str:
    """A text in one line, or in two if it has two, that matplotlib draws without changes.

    Otherwise matplotlib reads a formula between dollar signs, and a legend skips texts that begin
    with _.
    """
    lines = [shown(line, limit).replace("$", r"\$") for line in text.split("\n", 1)]
    return "\n".join(f" {line}" if line.startswith("_") else line for line in lines)
