"""Line and bar charts as an SVG picture, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

WIDTH, HEIGHT = 760, 300  # pixels of one chart
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 62, 46  # around where its data goes
LETTER = 6.6  # pixels that a letter of the legend takes, roughly
# Of the light and of the dark page: text, axis and grid, page, and then the colours of the data.
_INK, _GRID, _PAGE = ("#1f2328", "#e6edf3"), ("#d0d7de", "#373e47"), ("#ffffff", "#0d1117")
_DATA = (
    ("#0969da", "#58a6ff"),
    ("#bc4c00", "#f0883e"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"),
    ("#bf3989", "#f778ba"),
    ("#6e7781", "#8b949e"),
)


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x; those that are not finite are left out. colour: its number among the colours of
    data, so that lines that belong together can share one."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over an x axis. from_zero: whether the y axis starts there, else near the least y."""

    title: str
    x_label: str
    lines: Sequence[Line]
    from_zero: bool = True


@dataclass(frozen=True)
class BarChart:
    """A group of bars for each of `groups`; `bars` has the heights of one colour by its name. mark: a height to draw a
    line at, with which bars are to be compared."""

    title: str
    groups: Sequence[str]
    bars: Mapping[str, Sequence[float]]
    mark: float | None = None


def picture(title: str, charts: Sequence[LineChart | BarChart]) -> str:
    """An SVG document: the charts below each other. Every point and bar has its figures as a tooltip."""
    height = 40 + HEIGHT * len(charts)
    sizes = {"width": str(WIDTH), "height": str(height), "viewBox": f"0 0 {WIDTH} {height}"}
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **sizes})
    SubElement(svg, "title").text = title
    SubElement(svg, "style").text = _style()
    SubElement(svg, "rect", {"class": "page", "width": "100%", "height": "100%"})
    _text(svg, 16, 26, title, "heading")
    for number, chart in enumerate(charts):
        place = SubElement(svg, "g", {"transform": f"translate(0 {40 + number * HEIGHT})"})
        _text(place, 16, 18, chart.title, "title")
        if isinstance(chart, LineChart):
            _draw_lines(place, chart)
        else:
            _draw_bars(place, chart)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def ticks(low: float, high: float, least_step: float = 0.0) -> list[float]:
    """Up to nine values 1, 2 or 5 times a power of ten apart, the first not above `low`, the last not below `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 7))
    step = max(least_step, next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 7.001))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _draw_lines(place: Element, chart: LineChart) -> None:
    lines = [(line, [point for point in line.points if all(map(math.isfinite, point))]) for line in chart.lines]
    points = [point for _, kept in lines for point in kept] or [(0.0, 0.0)]
    xs = [x for x, _ in points]
    left, right = min(xs), max(xs)
    whole = all(x == int(x) for x in xs)
    y_at = _y_axis(place, [y for _, y in points], chart.from_zero)

    def x_at(x: float) -> float:
        return LEFT + (x - left) / ((right - left) or 1.0) * (WIDTH - LEFT - RIGHT)

    for x in ticks(left, right, least_step=1.0 if whole else 0.0):
        if left <= x <= right:
            _text(place, x_at(x), HEIGHT - BOTTOM + 17, f"{x:,g}" if abs(x) < 1e6 else f"{x:g}", "x tick")
    _text(place, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, chart.x_label, "x")
    for line, kept in lines:
        kind = f"c{line.colour} dashed" if line.dashed else f"c{line.colour}"
        at = [(x_at(x), y_at(y)) for x, y in kept]
        SubElement(place, "polyline", {"class": kind, "points": " ".join(f"{x:.2f},{y:.2f}" for x, y in at)})
        for (x, y), (across, down) in zip(kept, at, strict=True):
            where = {"class": f"c{line.colour}", "cx": f"{across:.2f}", "cy": f"{down:.2f}", "r": "2.5"}
            SubElement(SubElement(place, "circle", where), "title").text = f"{line.name}, {x:g}: {y:.4g}"
    _legend(place, ((line.name, line.colour, line.dashed) for line in chart.lines))


def _draw_bars(place: Element, chart: BarChart) -> None:
    heights = [height for of in chart.bars.values() for height in of if math.isfinite(height)]
    y_at = _y_axis(place, [*heights, chart.mark or 0.0], from_zero=True)
    room = (WIDTH - LEFT - RIGHT) / max(1, len(chart.groups))
    width = 0.8 * room / max(1, len(chart.bars))
    for number, group in enumerate(chart.groups):
        start = LEFT + number * room
        _text(place, start + room / 2, HEIGHT - BOTTOM + 17, group, "x")
        for colour, (name, of) in enumerate(chart.bars.items()):
            if not math.isfinite(of[number]):
                continue
            top = y_at(of[number])
            where = {"x": start + 0.1 * room + colour * width, "y": top, "width": width, "height": y_at(0.0) - top}
            bar = SubElement(place, "rect", {"class": f"c{colour}", **{key: f"{at:.2f}" for key, at in where.items()}})
            SubElement(bar, "title").text = f"{name}, {group}: {of[number]:.4g}"
    if chart.mark is not None:
        _across(place, y_at(chart.mark), "mark")
    _legend(place, ((name, colour, False) for colour, name in enumerate(chart.bars)))


def _y_axis(place: Element, ys: Sequence[float], from_zero: bool) -> Callable[[float], float]:
    """Draws the axis. Returns what gives a value's pixels from the top of the chart."""
    values = ticks(min(0.0, *ys) if from_zero else min(ys), max(0.0, *ys) if from_zero else max(ys))
    low, high = values[0], values[-1]

    def at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for value in values:
        _across(place, at(value), "grid")
        _text(place, LEFT - 8, at(value) + 4, f"{value:g}", "y tick")
    return at


def _across(place: Element, y: float, kind: str) -> None:
    ends = {"x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": f"{y:.2f}", "y2": f"{y:.2f}"}
    SubElement(place, "line", {"class": kind, **ends})


def _legend(place: Element, entries: Iterable[tuple[str, int, bool]]) -> None:
    """Names and colours in rows above the data, most of which hold six."""
    x, y = float(LEFT), 36.0
    for name, colour, dashed in entries:
        width = 34 + LETTER * len(name)
        if x + width > WIDTH:
            x, y = float(LEFT), y + 15
        kind = f"c{colour} dashed" if dashed else f"c{colour}"
        SubElement(place, "polyline", {"class": f"key {kind}", "points": f"{x},{y - 4} {x + 18},{y - 4}"})
        _text(place, x + 23, y, name, "legend")
        x += width


def _text(place: Element, x: float, y: float, text: str, kind: str) -> None:
    SubElement(place, "text", {"class": kind, "x": f"{x:.2f}", "y": f"{y:.2f}"}).text = text


def _style() -> str:
    def colours(page: int) -> str:
        rules = [f".page{{fill:{_PAGE[page]}}} text{{fill:{_INK[page]}}} .mark{{stroke:{_INK[page]}}}"]
        rules.append(f".grid{{stroke:{_GRID[page]}}}")
        for number, shades in enumerate(_DATA):
            rules.append(f".c{number}{{fill:{shades[page]}}} polyline.c{number}{{fill:none;stroke:{shades[page]}}}")
        return " ".join(rules)

    shapes = (
        "text{font:12px system-ui,sans-serif} .heading{font-size:16px;font-weight:600} .title{font-weight:600} "
        ".x{text-anchor:middle} .y{text-anchor:end} polyline{stroke-width:2;stroke-linejoin:round} "
        ".dashed{stroke-dasharray:5 4} .mark{stroke-dasharray:2 3}"
    )
    return f"{shapes} {colours(0)} @media (prefers-color-scheme:dark){{{colours(1)}}}"
