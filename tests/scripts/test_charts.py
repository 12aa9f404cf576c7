"""Charts: axes that hold the data, no spike lost, gaps where a value is missing, nothing that escapes the markup."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.charts import Curve, column_chart, line_chart, nice_ticks, share_bar, short, thin


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e9))
def test_ticks_hold_the_data_and_are_round(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width, 5)
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= low + width - step * 1e-6
    digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(digits - factor) for factor in (1, 2, 5, 10)) < 0.01


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_one_value_has_an_axis_too(value: float) -> None:
    ticks = nice_ticks(value, value, 5)
    assert ticks[0] < value < ticks[-1]


def test_thinned_curves_keep_their_ends_and_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[77] = (77.0, -5.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert (4321.0, 99.0) in kept and (77.0, -5.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:600], 600) == points[:600]


def _drawing(figure: str) -> ElementTree.Element:
    """The one SVG in a figure, as a browser's XML parser would take it."""
    svg = re.search(r"<svg viewBox=\"0 0 360.*?</svg>", figure, re.S)
    assert svg is not None
    return ElementTree.fromstring(svg[0])


def test_points_are_where_their_values_say() -> None:
    drawing = _drawing(
        line_chart("loss", [Curve("", [(1, 0.0), (2, 10.0), (3, 5.0)])], from_zero=True)
    )
    (line,) = drawing.findall("polyline")
    spots = [tuple(map(float, spot.split(","))) for spot in line.attrib["points"].split()]
    (x1, y1), (x2, y2), (x3, y3) = spots
    assert x1 < x2 < x3 and x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y2 < y3 < y1 and y1 - y3 == pytest.approx(y3 - y2, abs=0.2)
    labels = [text.text for text in drawing.findall("text")]
    assert "0" in labels and "10" in labels and "1" in labels and "3" in labels


def test_a_missing_value_breaks_the_line() -> None:
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0), (6, None), (7, 3.0)]
    drawing = _drawing(line_chart("norm", [Curve("", points)]))
    lines = drawing.findall("polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]
    assert len(drawing.findall("circle")) == 1  # a point that stands alone


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart("loss", []) == ""
    assert line_chart("loss", [Curve("a", [(1, None)])]) == ""


def test_names_stay_text() -> None:
    evil = '"><script>alert(1)</script>'
    for figure in (
        line_chart(evil, [Curve(evil, [(1, 1.0)]), Curve("b", [(1, 2.0)])]),
        column_chart(evil, [(evil, 3)]),
        share_bar(evil, [(evil, 1.0)]),
    ):
        assert "<script" not in figure and "&lt;script&gt;" in figure


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (5, "5"), (1234, "1234"), (12345, "12.3k"), (3e6, "3M"), (2e-5, "2e-5"), (0.25, "0.25")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
