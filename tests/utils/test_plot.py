"""Figures of runs and tables: nothing that belongs into one is outside of it."""

import io
import math
import warnings
from collections.abc import Sequence

import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes

from utils import plot
from utils.plot import Figure


def ticks(axis: Axes) -> list[float]:
    """The ticks inside the limits of an axis of rounds."""
    low, high = axis.get_xlim()
    return [tick for tick in axis.get_xticks() if low <= tick <= high]


def assert_whole_legend(figure: Figure) -> None:
    """Each name is inside the figure, and below the title."""
    figure.savefig(io.BytesIO(), dpi=100, format="png")
    (legend,) = figure.legends
    with figure.any_letters():
        title = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    for name in legend.get_texts():
        box = name.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, name
        assert 0 <= box.y0 < box.y1 <= title.y0, name


def loss_panel(losses: Sequence[float]) -> Axes:
    rows = [{"epoch": 1 + place, "loss": loss} for place, loss in enumerate(losses)]
    return plot.curves(rows, "epoch", "title").axes[1]


@pytest.mark.parametrize("losses", [[-1.0, -2.0], [2.0, -0.5, 1.0], [-1.0], [math.inf, -1.0, 0.0]])
def test_negative_losses_are_inside_the_panel(losses: list[float]) -> None:
    low, high = loss_panel(losses).get_ylim()
    assert all(low < loss < high for loss in losses if math.isfinite(loss))


@pytest.mark.parametrize("losses", [[2.0, 0.1], [0.0, 3.0], [0.0], []])
def test_without_a_negative_loss_the_panel_begins_at_0(losses: list[float]) -> None:
    low, high = loss_panel(losses).get_ylim()
    assert low == 0
    assert high > max(losses, default=0)


@pytest.mark.parametrize(
    ("losses", "places"),
    [
        ([2.0], [0]),
        ([2.0, math.nan], [0]),
        ([2.0, math.inf, 1.0, 0.5], [0]),
        ([2.0, 1.0], []),
    ],
)
def test_a_loss_that_no_line_reaches_has_a_marker(losses: list[float], places: list[int]) -> None:
    (line,) = loss_panel(losses).lines
    assert line.get_markevery() == places
    assert (line.get_marker() == "o") == bool(places)


def test_one_epoch_has_one_tick() -> None:
    rows = [{"round": 1, "acc": 0.5, "loss": 1.0}]
    for axis in plot.curves(rows, "round", "title").axes:
        assert ticks(axis) == [1]
    assert ticks(plot.curves_with_bands({"sig": pd.DataFrame(rows)}, "title").axes[0]) == [1]


@pytest.mark.parametrize("title", ["title", "a long title of many words " * 8, "\u732b\U0001f600"])
def test_a_legend_of_many_names_is_whole(title: str) -> None:
    """No font has all letters of the last title, of which no warning may speak."""
    names = [f"method {number}" for number in range(25)]
    costs = pd.DataFrame({"defense": names, "seconds": 10.0, "der": 0.5})
    rates = dict.fromkeys(("asr_before", "acc_before", "asr", "acc"), 0.5)
    arrows = pd.DataFrame({"defense": "sau", "attack": names, **rates})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_whole_legend(plot.cost(costs, title))
        assert_whole_legend(plot.before_after(arrows, {"sau": 1}, title))


@pytest.mark.parametrize("values", [{}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 4.0}])
def test_bars_have_room_whatever_their_lengths(values: dict[str, float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot.bars(values, "times", "title")
        figure.savefig(io.BytesIO(), dpi=30, format="png")
    low, high = figure.axes[0].get_xlim()
    assert (low, high) == (0, pytest.approx(1.12 * max(values.values(), default=0) or 1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_title_is_whole_on_narrow_figures(count: int) -> None:
    """It stands between the edges of the figure, and above the first image."""
    title = "a method of a long name on digits, target 3 (three): test images; before | after"
    figure = plot.image_grid({"clean": torch.rand(count, 3, 4, 4)}, {}, title)
    (axis,) = figure.axes
    heading, image = axis.texts[0], axis.images[0]
    box = heading.get_window_extent()
    assert heading.get_text().replace("\n", " ") == title
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    assert box.y0 >= image.get_window_extent().y1


@pytest.mark.parametrize("draw", ["curves", "bars"])
def test_a_long_title_is_whole_above_panels(draw: str) -> None:
    title = "a long title of many words " * 7
    rows = [{"round": 1, "acc": 0.5}]
    of_kind = {
        "curves": lambda: plot.curves(rows, "round", title),
        "bars": lambda: plot.bars({"a": 1.0}, "times", title),
    }
    figure = of_kind[draw]()
    (heading,) = figure.texts
    box = heading.get_window_extent()
    assert heading.get_text().replace("\n", " ") == title.strip()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
