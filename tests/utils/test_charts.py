"""Figures of analyses: what is drawn, and that no name or number breaks one."""

import io
import itertools
import math

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from tests.utils.test_plot import assert_whole_legend, ticks
from utils import charts
from utils.plot import Figure

NAMES = ("plain", "_hidden $x$", "long " * 20)  # also such as matplotlib would change


def drawn(figure: Figure) -> int:
    """The number of bytes of a small picture of it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=30)
    return len(picture.getvalue())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_model_has_a_curve_and_controls_are_grey() -> None:
    table = pd.DataFrame({name: [10.0, math.nan, 30.0] for name in NAMES}, index=[0, 5, 20])
    figure = charts.curves_of({"ASR": table}, "k", "title", controls=(NAMES[2],), spaced=True)
    (axis,) = figure.axes
    assert len(axis.lines) == len(texts(figure)) == 3
    assert [to_hex(line.get_color()) for line in axis.lines][2] == "#777777"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "5", "20"]
    assert list(axis.lines[0].get_xdata()) == [0, 1, 2]
    assert drawn(figure) > 1000


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_a_long_title_stands_over_the_legend(panels: int) -> None:
    table = pd.DataFrame({f"model {number}": [1.0, 2.0] for number in range(4)})
    title = "Linear CKA with the backdoored model, on the channels that the trigger changes most"
    figure = charts.curves_of({str(n): table for n in range(panels)}, "k", title)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    (heading,) = (text for text in figure.texts if text.get_text().startswith("Linear"))
    assert legend.get_window_extent().y1 < heading.get_window_extent().y0


@pytest.mark.parametrize("panels", [1, 3, 4])
def test_a_legend_of_many_models_is_whole(panels: int) -> None:
    table = pd.DataFrame({f"model {number}": [1.0, 2.0] for number in range(25)})
    title = "a long title of many words " * 8
    assert_whole_legend(charts.curves_of({str(n): table for n in range(panels)}, "k", title))


def test_a_point_between_gaps_has_a_marker() -> None:
    """Of twenty points each second one has a marker, and the one at place 7."""
    rows = range(20)
    lone = [50.0 if row == 7 else math.nan for row in rows]
    table = pd.DataFrame({"all": [*map(float, rows)], "lone": lone})
    figure = charts.curves_of({"ASR": table}, "round", "title")
    every, alone = (line.get_markevery() for line in figure.axes[0].lines)
    assert every == [*range(0, 20, 2)]
    assert 7 in alone


def test_one_round_has_one_tick() -> None:
    figure = charts.curves_of({"ASR": pd.DataFrame({"a": [1.0]}, index=[3])}, "round", "title")
    assert ticks(figure.axes[0]) == [3]


def test_each_bar_has_its_value_and_none_is_drawn_for_nothing() -> None:
    table = pd.DataFrame({"a": [12.34, 50.0], "b": [math.nan, 100.0]}, index=list(NAMES[:2]))
    figure = charts.grouped_bars(table, "percent", "title")
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["12.3", "50.0", "100.0"]
    assert drawn(figure) > 1000


def test_a_matrix_has_percent_of_its_rows() -> None:
    """1 and 3 of 4; a row of nothing is empty. With many classes there are no numbers."""
    counts = torch.tensor([[1, 3], [0, 0]])
    figure = charts.matrices({"x": counts}, ["a", "b"], "title", xlabel="x", ylabel="y")
    assert [text.get_text() for text in figure.axes[0].texts] == ["25", "75"]
    many = torch.eye(43, dtype=torch.int64)
    classes = [str(label) for label in range(43)]
    figure = charts.matrices({"x": many}, classes, "title", xlabel="x", ylabel="y")
    assert not figure.axes[0].texts
    assert drawn(figure) > 1000


def test_points_of_clean_images_have_their_class_in_the_middle() -> None:
    rows = [(0, 0, 0, False), (2, 0, 0, False), (4, 0, 0, False), (9, 9, 1, False), (1, 1, 1, True)]
    table = pd.DataFrame(rows, columns=["x", "y", "label", "is_triggered"])
    figure = charts.points({"before": table}, NAMES, "title")
    first, second = figure.axes[0].texts
    assert (first.get_text(), first.get_position()) == ("plain", (2, 0))
    assert second.get_text().startswith(" _hidden")
    assert list(figure.axes[0].lines[-1].get_xdata()) == [1]
    assert drawn(figure) > 1000


def test_a_larger_value_of_a_map_is_lighter() -> None:
    """Grey shows it, too: the luminance rises."""
    maps = torch.linspace(0, 1, 5).view(1, 1, 5)
    images = charts.overlaid(torch.zeros(1, 3, 1, 5), maps)
    assert images.shape == (1, 3, 1, 5)
    luminance = (images[0, :, 0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1)).sum(0)
    assert (luminance.diff() > 0).all()
    assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("classes", [3, 43])
def test_the_page_of_an_inspection_hatches_the_largest_bar(classes: int) -> None:
    values = [float(label) for label in range(classes - 1)] + [math.nan]
    figure = charts.inspection(
        torch.eye(classes, dtype=torch.int64),
        {("A", "share"): values, ("B", "ratio"): [math.nan] * classes},
        {"clean": torch.rand(4, 3, 8, 8), "adversarial": torch.rand(4, 3, 8, 8) + 0.5},
        ["0 | 1"] * 4,
        [*NAMES, *map(str, range(classes - 3))],
        "title",
        "note",
    )
    (panel,) = [axis for axis in figure.axes if axis.get_title() == "A"]
    assert [bar.get_hatch() for bar in panel.patches].index("///") == classes - 2
    assert drawn(figure) > 1000


@pytest.mark.parametrize(
    ("values", "low", "high", "hatched"),
    [
        ([0.0, 0.0, 0.0], 0, 1.05, None),
        ([math.nan, math.nan, math.nan], 0, 1.05, None),
        ([math.nan, 0.0, 2.0], 0, 2.1, 2),
        ([3.0, 2.0, 2.5], 0, 3.15, 0),
        ([-2.0, 1.0, 0.0], -2.1, 1.05, 1),
    ],
)
def test_bars_of_an_inspection_begin_at_0_and_all_classes_have_room(
    values: list[float], low: float, high: float, hatched: int | None
) -> None:
    images = {"clean": torch.rand(1, 3, 8, 8)}
    matrix = torch.eye(3, dtype=torch.int64)
    figure = charts.inspection(
        matrix, {("A", "share of images"): values}, images, ["0 | 1"], list(NAMES[:3]), "t", "n"
    )
    (panel,) = [axis for axis in figure.axes if axis.get_title() == "A"]
    assert panel.get_xlim() == (-0.6, 2.6)
    assert panel.get_ylim() == pytest.approx((low, high))
    assert panel.get_ylabel() == "share of images"
    hatches = [bar.get_hatch() for bar in panel.patches]
    assert [place for place, hatch in enumerate(hatches) if hatch] == (
        [] if hatched is None else [hatched]
    )


def test_captions_of_an_inspection_do_not_touch() -> None:
    """Of classes whose names have ten letters, under the images of a page."""
    figure = charts.inspection(
        torch.eye(3, dtype=torch.int64),
        {("A", "share"): [0.1, 0.2, 0.3]},
        {"clean": torch.rand(8, 3, 8, 8)},
        ["1 (automobile) | 9 (cauliflower)"] * 8,
        list(NAMES[:3]),
        "title",
        "note",
    )
    figure.draw_without_rendering()
    captions = [axis.xaxis.label for axis in figure.axes if "automobile" in axis.get_xlabel()]
    boxes = [caption.get_window_extent() for caption in captions]
    assert len(boxes) == 8
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
