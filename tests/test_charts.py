"""Charts are valid XML whose points and bars lie where their axes say."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from gemma_mtp.charts import BarChart, Line, LineChart, picture, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart):
    """The group of a picture's only chart."""
    return ElementTree.fromstring(picture("A <title> & more", [chart])).find(f"{SVG}g")


def axis(group, name):
    """What gives the value at a pixel of an axis, from its first and its last tick alone."""
    along = "x" if name == "x" else "y"
    marks = [mark for mark in group.findall(f"{SVG}text") if mark.get("class") == f"{name} tick"]
    first, last = ((float(mark.text.replace(",", "")), float(mark.get(along))) for mark in (marks[0], marks[-1]))
    raised = 0 if name == "x" else 4  # the baseline of a label is that much below its tick

    def value(pixel):
        return first[0] + (pixel + raised - first[1]) / (last[1] - first[1]) * (last[0] - first[0])

    return value


@pytest.mark.parametrize("from_zero", [True, False])
def test_points_lie_where_the_axes_say(from_zero):
    points = [(0.0, 3.25), (500.0, 9.5), (2_000.0, 4.125), (3_500.0, math.nan), (4_000.0, 7.0)]
    group = drawn(LineChart("Loss", "steps", [Line("loss", points, 0)], from_zero))
    x_of, y_of = axis(group, "x"), axis(group, "y")
    line = next(shape for shape in group.findall(f"{SVG}polyline") if "key" not in shape.get("class"))
    kept = [point for point in points if math.isfinite(point[1])]
    at = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert [(x_of(x), y_of(y)) for x, y in at] == [pytest.approx(point, abs=4_000 * 1e-4) for point in kept]
    assert [y_of(y) for _, y in at] == pytest.approx([y for _, y in kept], abs=1e-3)
    circles = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in group.findall(f"{SVG}circle")]
    assert circles == at


def test_bars_reach_from_zero_to_their_value():
    bars = {"greedy": [2.5, 1.0, 0.4], "sampled": [1.2, 0.95, math.nan]}
    group = drawn(BarChart("Speed-up", ["python", "cpp", "story"], bars, mark=1.0))
    y_of = axis(group, "y")
    shapes = group.findall(f"{SVG}rect")
    tops = [y_of(float(shape.get("y"))) for shape in shapes]
    feet = [y_of(float(shape.get("y")) + float(shape.get("height"))) for shape in shapes]
    assert tops == pytest.approx([2.5, 1.2, 1.0, 0.95, 0.4], abs=1e-2)
    assert feet == pytest.approx([0.0] * 5, abs=1e-2)
    starts = [float(shape.get("x")) for shape in shapes]
    assert starts == sorted(starts)
    mark = next(line for line in group.findall(f"{SVG}line") if line.get("class") == "mark")
    assert y_of(float(mark.get("y1"))) == pytest.approx(1.0, abs=1e-2)


def test_every_series_is_in_the_legend_and_has_its_look_there():
    lines = [Line("greedy", [(1, 0.5)], 0), Line("greedy, held out", [(1, 0.4)], 0, dashed=True)]
    group = drawn(LineChart("Acceptance", "depth", lines))
    names = [text.text for text in group.findall(f"{SVG}text") if text.get("class") == "legend"]
    keys = [shape.get("class") for shape in group.findall(f"{SVG}polyline") if "key" in shape.get("class")]
    assert names == ["greedy", "greedy, held out"]
    assert keys == ["key c0", "key c0 dashed"]


def test_a_picture_has_other_colours_on_dark_pages():
    style = ElementTree.fromstring(picture("Title", [])).findtext(f"{SVG}style")
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    assert ".page{fill:#ffffff}" in light
    assert ".page{fill:#0d1117}" in dark
    assert " .c0{fill:#0969da}" in light
    assert " .c0{fill:#58a6ff}" in dark


def test_charts_without_data_can_be_drawn():
    assert drawn(LineChart("Loss", "steps", [Line("loss", [], 0)])) is not None
    assert drawn(BarChart("Speed-up", [], {})) is not None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (3.3, 3.3), (-2.5, 0), (0, 1e-4), (1, 8), (12, 98_765)])
def test_ticks_enclose_the_data_in_even_round_steps(low, high):
    values = ticks(low, high)
    assert values[0] <= low
    assert values[-1] >= high
    assert 2 <= len(values) <= 9
    steps = [after - before for before, after in pairwise(values)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)) in (1, 2, 5)
