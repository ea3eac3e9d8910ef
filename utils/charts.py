"""Figures of analyses: curves of many models, bars, matrices, points, and maps over images.

Like `utils.plot`, whose helpers it uses: functions return figures, and nothing touches the disk.
Every figure is readable in grey: models differ by marker and line style, and colours of areas by
lightness.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from utils.plot import (
    LONGEST_TITLE,
    Figure,
    captions_below,
    entitle,
    lone_points,
    look_of,
    make_panels,
    name_beside,
    printable,
    whole_numbers,
    without_frame,
)

_STYLES = ("-", "--", "-.", ":")
_SERIES = (("#0072B2", ""), ("#E69F00", "//"), ("#009E73", ".."), ("#CC79A7", "xx"))
_CONTROL = "#777777"
_FEW = 20  # classes whose names and numbers can be read in a matrix


def curves_of(
    panels: Mapping[str, pd.DataFrame],
    xlabel: str,
    title: str,
    *,
    ylabel: str = "percent",
    controls: Collection[str] = (),
    marks: Sequence[float] = (),
    ylim: tuple[float, float] | None = (-3, 103),
    log: bool = False,
    spaced: bool = False,
) -> Figure:
    """A panel for each quantity, in it a curve for each model.

    Args:
        panels: title of a panel -> a column for each model, the index is the abscissa; NaN is no
            point.
        controls: models that are drawn in grey.
        marks: abscissas of thin vertical lines.
        ylim: of all panels; None for what fits.
        log: whether the ordinate is logarithmic.
        spaced: whether the points of the abscissa stand at equal distances, whatever their values.
    """
    names = list(dict.fromkeys(str(name) for table in panels.values() for name in table))
    rivals = [name for name in names if name not in controls]
    figure, axes = make_panels(len(panels), 3, (3.3, 3.0), (1.6, 0.7))
    handles: dict[str, Line2D] = {}
    for axis, (heading, table) in zip(axes, panels.items(), strict=True):
        places = range(len(table)) if spaced else table.index
        spaced_marks = range(0, len(table), max(1, len(table) // 8))
        for name in table:
            if name in controls:
                hue, marker = _CONTROL, "x"
                style = _STYLES[1 + list(map(str, controls)).index(str(name)) % 3]
            else:
                place = rivals.index(str(name))
                hue, marker = look_of(place)
                style = _STYLES[place // 7 % len(_STYLES)]
            (handles[str(name)],) = axis.plot(
                places,
                table[name],
                style,
                color=hue,
                marker=marker,
                markevery=sorted({*spaced_marks, *lone_points(table[name])}),
                ms=5,
                lw=1.5,
                label=printable(str(name)),
            )
        for mark in marks:
            axis.axvline(mark, color="#bbbbbb", lw=0.8, zorder=0)
        if spaced:
            axis.set_xticks(places, [f"{value:g}" for value in table.index])
        elif pd.api.types.is_integer_dtype(table.index):
            axis.xaxis.set_major_locator(whole_numbers())
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.set_title(printable(heading), fontsize=10)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        elif ylim is not None:
            axis.set_ylim(*ylim)
        without_frame(axis)
    name_beside(figure, list(handles.values()), title)
    return figure


def grouped_bars(values: pd.DataFrame, label: str, title: str) -> Figure:
    """Horizontal bars: a group for each row, in it a bar for each column, each with its value.

    Args:
        values: percent, a row for each group from the top down; NaN draws none.
        label: of the axis.
    """
    count = len(values.columns)
    figure = Figure(figsize=(7.5, 1.3 + (0.16 + 0.22 * count) * len(values)), layout="constrained")
    axis = figure.subplots()
    height = 0.84 / count
    for number, column in enumerate(values):
        hue, hatch = _SERIES[number % len(_SERIES)]
        places = np.arange(len(values)) + (number - (count - 1) / 2) * height
        lengths = values[column].fillna(0)
        axis.barh(
            places,
            lengths,
            0.92 * height,
            color=hue,
            hatch=hatch,
            edgecolor="white",
            label=printable(str(column), 60),
        )
        for place, length in zip(places, values[column], strict=True):
            if length == length:
                axis.text(length + 1, place, f"{length:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(values)), [printable(str(name)) for name in values.index])
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, 110))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(count, 2), frameon=False, fontsize=9)
    entitle(figure, title)
    return figure


def matrices(
    panels: Mapping[str, torch.Tensor],
    classes: Sequence[str],
    title: str,
    *,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """A matrix for each panel: shares of a row's images by the column's class.

    Args:
        panels: title -> counts (K, K).
        classes: K names.
    """
    columns = min(2, len(panels))
    figure, axes = make_panels(len(panels), columns, (3.5, 3.4), (0.9, 0.6))
    for number, (axis, (heading, counts)) in enumerate(zip(axes, panels.items(), strict=True)):
        draw_matrix(axis, counts, classes)
        axis.set_title(printable(heading, 60), fontsize=9)
        axis.set(
            xlabel=xlabel if number >= len(panels) - columns else "",
            ylabel=ylabel if number % columns == 0 else "",
        )
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.7, aspect=30)
    bar.set_label("percent of the row")
    entitle(figure, title)
    return figure


def draw_matrix(axis: Axes, counts: torch.Tensor, classes: Sequence[str]) -> None:
    """Draws shares of each row into an axis; with few classes also as numbers, and their names.

    Args:
        counts: (K, K), not negative.
    """
    totals = counts.sum(1, keepdim=True)
    percent = (100 * counts / totals.clamp(min=1)).numpy()
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    count = len(classes)
    if count <= _FEW:
        for line, column in np.ndindex(count, count):
            if percent[line, column] >= 0.5:
                hue = "#ffffff" if percent[line, column] > 55 else "#000000"
                text = f"{percent[line, column]:.0f}"
                axis.text(column, line, text, ha="center", va="center", fontsize=6.5, color=hue)
        names = [printable(name, 20) for name in classes]
        are_long = max(map(len, names)) > 3
        axis.set_xticks(range(count), names, rotation=90 if are_long else 0)
        axis.set_yticks(range(count), names)
    axis.tick_params(labelsize=7, length=0)


def points(panels: Mapping[str, pd.DataFrame], classes: Sequence[str], title: str) -> Figure:
    """A cloud of points for each panel: clean ones by class, triggered ones in black over them.

    Args:
        panels: title -> a row for each point: `x`, `y`, `label`, `is_triggered`.
        classes: names by label.
    """
    figure, axes = make_panels(len(panels), 3, (2.9, 3.0), (1.7, 0.6))
    shown = sorted({int(label) for table in panels.values() for label in table["label"]})
    hues = colormaps["turbo"](np.linspace(0.05, 0.95, max(1, len(shown))))
    for axis, (heading, table) in zip(axes, panels.items(), strict=True):
        clean, triggered = table[~table["is_triggered"]], table[table["is_triggered"]]
        for label in sorted(set(clean["label"].astype(int).tolist())):
            rows = clean[clean["label"] == label]
            axis.plot(rows["x"], rows["y"], ".", color=hues[shown.index(label)], ms=4)
            if len(shown) <= _FEW:  # in grey, the name in the middle tells the classes apart
                middle = rows[["x", "y"]].median()
                axis.text(
                    middle["x"],
                    middle["y"],
                    printable(classes[label], 12),
                    ha="center",
                    va="center",
                    fontsize=8,
                    weight="bold",
                    bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.8},
                )
        axis.plot(triggered["x"], triggered["y"], "x", color="black", ms=4, mew=0.9)
        axis.set(xticks=[], yticks=[])
        axis.set_title(printable(heading), fontsize=10)
        axis.spines[:].set_color("#bbbbbb")
    handles = [
        Line2D([], [], color=_CONTROL, marker=".", ls="", ms=8, label="clean, by class"),
        Line2D([], [], color="black", marker="x", ls="", ms=6, label="triggered"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    entitle(figure, title)
    return figure


def overlaid(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps as colours over grey images; a larger value is lighter, so that grey shows it, too.

    Args:
        images: float (N, C, H, W) in [0, 1].
        maps: float (N, H, W) in [0, 1].

    Returns:
        float (N, 3, H, W) in [0, 1].
    """
    colours = torch.from_numpy(colormaps["inferno"](maps.cpu().numpy())[..., :3]).float()
    grey = images.cpu().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return 0.35 * grey + 0.65 * colours.permute(0, 3, 1, 2)


def inspection(
    matrix: torch.Tensor,
    bars: Mapping[tuple[str, str], Sequence[float]],
    examples: Mapping[str, torch.Tensor],
    captions: Sequence[str],
    classes: Sequence[str],
    title: str,
    note: str,
) -> Figure:
    """A page: where adversarial images go, each signal by class, and some of the images.

    Args:
        matrix: counts (K, K), true class -> adversarial label.
        bars: name of a signal, and of its values -> a value for each class, NaN where there is
            none; the largest one is hatched.
        examples: name of a row -> float images (N, C, H, W) in [0, 1].
        captions: N texts, under the last row.
        classes: K names.
        note: a sentence at the foot.
    """
    lines = -(-len(bars) // 2)
    figure = Figure(figsize=(11, 2.6 + 1.75 * lines + 1.1 * len(examples)), layout="constrained")
    parts: Any = figure.subfigures(
        2, 1, height_ratios=(0.9 + 1.75 * lines, 0.6 + 1.1 * len(examples))
    )
    left, right = parts[0].subfigures(1, 2, width_ratios=(1, 1.35))
    axis = left.subplots()
    draw_matrix(axis, matrix, classes)
    axis.set(xlabel="label of the adversarial image", ylabel="true class")
    axis.set_title("A: percent of the row", fontsize=9)
    panels = list(right.subplots(lines, 2, squeeze=False).flat)
    for panel in panels[len(bars) :]:
        panel.set_visible(False)
    names = [printable(name, 12) for name in classes]
    for panel, ((heading, unit), values) in zip(panels, bars.items(), strict=False):
        _draw_bars(panel, np.asarray(values, dtype=float), names)
        panel.set_title(printable(heading, 60), fontsize=9)
        panel.set_ylabel(printable(unit), fontsize=8)
    _draw_examples(parts[1], examples, captions)
    parts[1].supxlabel(printable(note, LONGEST_TITLE), fontsize=9, x=0.02, ha="left")
    entitle(figure, title)
    return figure


def _draw_bars(axis: Axes, values: NDArray[np.float64], names: Sequence[str]) -> None:
    """Draws a bar for each class, the largest one hatched; with few classes also their names.

    Args:
        values: (K,), NaN where there is none.
    """
    drawn = axis.bar(range(len(values)), values, color="#0072B2", width=0.75)
    finite = values[np.isfinite(values)]
    if finite.any():  # else none is the largest
        drawn[int(np.nanargmax(values))].set(facecolor="#D55E00", hatch="///", edgecolor="white")
    low, high = min([0.0, *finite]), max([0.0, *finite])
    high = high if high > low else 1.0  # all are 0
    axis.set(xlim=(-0.6, len(values) - 0.4), ylim=(1.05 * low, 1.05 * high))
    if len(names) <= _FEW:
        are_long = max(map(len, names)) > 3
        axis.set_xticks(range(len(names)), names, rotation=90 if are_long else 0)
    else:
        axis.xaxis.set_major_locator(whole_numbers())
    axis.tick_params(labelsize=7)
    without_frame(axis)


def _draw_examples(
    place: Any, examples: Mapping[str, torch.Tensor], captions: Sequence[str]
) -> None:
    """Draws rows of images into a part of a figure, with captions under the last row.

    Args:
        examples, captions: as for `inspection`.
    """
    count = min(len(images) for images in examples.values())
    cells = place.subplots(len(examples), count, squeeze=False)
    texts, size = captions_below(captions)
    for number, (name, images) in enumerate(examples.items()):
        for column in range(count):
            cell = cells[number, column]
            cell.imshow(
                images[column].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if number == len(examples) - 1:
                cell.set_xlabel(texts[column], fontsize=size, labelpad=2)
        cells[number, 0].set_ylabel(printable(name), fontsize=9)
