"""Charts as SVG text: sharp at every size, in the page's own colours, light and dark. No library, no script."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from rating_train.reports.page.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    axis,
    frame,
    number,
    svg,
    text,
)

Point = tuple[float, float]

COLOURS = 7  # --c0 to --c6 of the style
_MOST_POINTS = 600  # of a line: more cannot be told apart, and make a page heavy
_DENSITY_BINS = 44


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: for the legend; "" shows none.
        points: (x, y), ascending in x.
        dots: whether to mark each point.
        colour: number of its colour.
        dashed: whether the line is dashed.
        smooth: whether to show the moving mean over the points, and the points faintly.
    """

    label: str
    points: Sequence[Point]
    dots: bool = False
    colour: int = 0
    dashed: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at an event, for example a restart; ``kind`` is its class in the style."""

    x: float
    label: str
    kind: str = "mark"


@dataclass(frozen=True)
class Spread:
    """One line of a chart of distributions.

    Attributes:
        label: what it is.
        values: ascending positions: for a box 5, 25, 50, 75 and 95 %; for an interval low, value and high.
        note: shown at the right.
    """

    label: str
    values: Sequence[float]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """A named point with an interval of its y."""

    label: str
    x: float
    y: float
    interval: Sequence[float] | None = None
    colour: int = 0
    front: bool = field(default=False)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    unit: str = "",
    log: bool = False,
    zero: bool = False,
    marks: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Return curves over one axis; what was not logged is said instead of drawn."""
    lines = [line for line in lines if line.points]
    if not lines:
        return nothing(title)
    xs = [p[0] for line in lines for p in line.points]
    x = axis(list(x_range or (min(xs), max(xs))), LEFT, WIDTH - RIGHT, margin=0.015)
    shown = [_smoothed(line.points) if line.smooth else line.points for line in lines]
    ys = [p[1] for points in shown for p in points]
    faint = [p[1] for line in lines if line.smooth for p in line.points]
    y = axis([*ys, *_trimmed(faint)], HEIGHT - BOTTOM, TOP, log=log, zero=zero)
    parts = [frame(x, y, x_label, unit)]
    for mark in marks:
        at = x.at(mark.x)
        parts.append(
            f'<line class="{mark.kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(mark.label)}</title></line>"
        )
    for line, points in zip(lines, shown):
        colour = f"c{line.colour % COLOURS}"
        if line.smooth:
            parts.append(f'<path class="line faint {colour}" d="{_path(line.points, x, y)}"/>')
        dash = " dashed" if line.dashed else ""
        parts.append(f'<path class="line {colour}{dash}" d="{_path(points, x, y)}"/>')
        if line.dots:
            for px, py in points:
                parts.append(
                    f'<circle class="dot {colour}" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3.2">'
                    f"<title>{escape(line.label)} {number(py)} at {number(px)}</title></circle>"
                )
    return svg("".join(parts), f"{title}: {', '.join(filter(None, (line.label for line in lines)))}")


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean over a centred window of about a fortieth of the curve."""
    half = max(2, len(points) // 80)
    ys = [p[1] for p in points]
    return [(p[0], statistics.fmean(ys[max(0, i - half) : i + half + 1])) for i, p in enumerate(points)]


def _trimmed(values: Sequence[float]) -> list[float]:
    """Return the ends of the middle 98 %: a single spike of the raw curve does not flatten the rest."""
    if len(values) < 50:
        return list(values)
    ordered = sorted(values)
    cut = len(ordered) // 100
    return [ordered[cut], ordered[-1 - cut]]


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    step = -(-len(points) // _MOST_POINTS)
    kept = [*points[::step], points[-1]]
    return "M" + "L".join(f"{x.at(px):.1f} {y.at(py):.1f}" for px, py in kept)


def nothing(title: str) -> Markup:
    """Return an empty chart that says so."""
    return svg(text(WIDTH / 2, HEIGHT / 2, "not logged", kind="name"), f"{title}: not logged")


def density(title: str, points: Sequence[Point], low: float, high: float, names: tuple[str, str]) -> Markup:
    """Return how many points fall into each small square, darker for more (by the logarithm), with y = x.

    Args:
        points: (x, y) within [low, high].
        names: of both axes.
    """
    size = 340.0
    x = Axis(low, high, LEFT, LEFT + size)
    y = Axis(low, high, TOP + size, TOP)
    width = (high - low) / _DENSITY_BINS
    counts: dict[tuple[int, int], int] = {}
    for px, py in points:
        cell = tuple(min(_DENSITY_BINS - 1, max(0, int((v - low) / width))) for v in (px, py))
        counts[cell[0], cell[1]] = counts.get((cell[0], cell[1]), 0) + 1
    most = max(counts.values(), default=1)
    side = size / _DENSITY_BINS
    height = TOP + size + BOTTOM
    parts = [frame(x, y, *names, height=height)]
    for (i, j), n in sorted(counts.items()):
        shade = 0.18 + 0.82 * (math.log(n + 1) / math.log(most + 1))
        parts.append(
            f'<rect class="cell" x="{LEFT + i * side:.1f}" y="{TOP + size - (j + 1) * side:.1f}" '
            f'width="{side:.2f}" height="{side:.2f}" fill-opacity="{shade:.2f}"><title>{n} items</title></rect>'
        )
    parts.append(_segment("ideal", x.at(low), y.at(low), x.at(high), y.at(high)))
    return svg("".join(parts), title, LEFT + size + RIGHT, height)


def calibration_chart(bins: Sequence[dict[str, object]], unit: str = " (stars)") -> Markup:
    """Return the mean rating over the mean prediction of each bin, with intervals, and the diagonal."""
    points = [
        Place(f"{b['n']} items", float(b["mean_predicted"]), float(b["mean_true"]), b["interval_95"])  # type: ignore[arg-type]
        for b in bins
    ]
    if not points:
        return nothing("calibration")
    ends = [v for p in points for v in (p.x, p.y, *(p.interval or ()))]
    x = axis(ends, LEFT, WIDTH - RIGHT)
    y = axis(ends, HEIGHT - BOTTOM, TOP)
    ideal = _segment("ideal", x.at(x.low), y.at(y.low), x.at(x.high), y.at(y.high))
    body = frame(x, y, f"mean predicted{unit}", f"mean true{unit}") + ideal + _places(points, x, y)
    return svg(body, "calibration: mean true rating over bins of the prediction")


def pareto_chart(title: str, places: Sequence[Place], x_label: str, y_label: str) -> Markup:
    """Return named points, the best of each cost joined: those that no cheaper one reaches."""
    if not places:
        return nothing(title)
    ys = [v for p in places for v in (p.y, *(p.interval or ()))]
    x = axis([p.x for p in places], LEFT, WIDTH - RIGHT, margin=0.2)
    y = axis(ys, HEIGHT - BOTTOM, TOP, margin=0.12)
    best: list[Point] = []
    for place in sorted(places, key=lambda p: (p.x, -p.y)):
        if not best or place.y > best[-1][1]:
            best.append((place.x, place.y))
    steps = []
    for (ax, ay), (bx, _) in itertools.pairwise(best):
        steps += [(ax, ay), (bx, ay)]
    steps.append(best[-1])
    front = f'<path class="line front" d="{_path([*steps, (x.high, best[-1][1])], x, y)}"/>'
    return svg(frame(x, y, x_label, y_label) + front + _places(places, x, y, named=True), title)


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _places(places: Sequence[Place], x: Axis, y: Axis, named: bool = False) -> str:
    parts = []
    heights = _apart([y.at(p.y) - 7 for p in places])
    for p, height in zip(places, heights):
        colour, cx, cy = f"c{p.colour % COLOURS}", x.at(p.x), y.at(p.y)
        if p.interval:
            low, high = (y.at(v) for v in p.interval)
            parts.append(
                f'<line class="whisker {colour}" x1="{cx:.1f}" x2="{cx:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
        told = f"{p.label}: {number(round(p.x, 4))}, {number(round(p.y, 4))}"
        parts.append(
            f'<circle class="dot {colour}" cx="{cx:.1f}" cy="{cy:.1f}" r="4"><title>{escape(told)}</title></circle>'
        )
        if named:
            left = cx > (x.start + x.end) / 2
            parts.append(text(cx + (-8 if left else 8), height, p.label, "end" if left else "start"))
    return "".join(parts)


def _apart(heights: Sequence[float]) -> list[float]:
    """Return the heights of labels, moved down where one would cover another."""
    found, above = dict[int, float](), -math.inf
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        found[i] = above = max(heights[i], above + 13.0)
    return [found[i] for i in range(len(heights))]


def box_chart(title: str, rows: Sequence[Spread], x_label: str) -> Markup:
    """Return a box for each row: the middle half, whiskers from 5 to 95 %, the median."""
    return _row_chart(title, rows, x_label, 0.0, box=True)


def interval_chart(
    title: str, rows: Sequence[Spread], x_label: str, reference: float | None = None
) -> Markup:
    """Return a value with its interval for each row, and a line at the value of all items."""
    return _row_chart(title, rows, x_label, reference, box=False)


def _row_chart(title: str, rows: Sequence[Spread], x_label: str, line_at: float | None, box: bool) -> Markup:
    if not rows:
        return nothing(title)
    step, left, right = 21.0, 158.0, 56.0
    height = TOP + step * len(rows) + BOTTOM
    values = [v for row in rows for v in row.values]
    x = axis([*values, *([] if line_at is None else [line_at])], left, WIDTH - right)
    parts = []
    for v in x.ticks(4):
        at = x.at(v)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM:.1f}"/>'
        )
        parts.append(text(at, height - BOTTOM + 15, number(v)))
    if line_at is not None:
        at = x.at(line_at)
        parts.append(
            f'<line class="ideal" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM:.1f}"/>'
        )
    for i, row in enumerate(rows):
        y = TOP + step * (i + 0.5)
        label = row.label if len(row.label) <= 23 else f"{row.label[:22]}…"
        parts.append(text(left - 8, y + 4, label, "end"))
        parts.append(text(WIDTH - right + 8, y + 4, row.note, "start", "note"))
        at_ = [x.at(v) for v in row.values]
        told = f"<title>{escape(row.label)}: {', '.join(number(round(v, 4)) for v in row.values)}</title>"
        parts.append(
            f'<line class="whisker c0" x1="{at_[0]:.1f}" x2="{at_[-1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        if box:
            parts.append(
                f'<rect class="box" x="{at_[1]:.1f}" y="{y - 6:.1f}" width="{max(1.0, at_[3] - at_[1]):.1f}" '
                f'height="12">{told}</rect>'
                f'<line class="median" x1="{at_[2]:.1f}" x2="{at_[2]:.1f}" y1="{y - 6:.1f}" y2="{y + 6:.1f}"/>'
            )
        else:
            middle = at_[len(at_) // 2]
            parts.append(f'<circle class="dot c0" cx="{middle:.1f}" cy="{y:.1f}" r="4">{told}</circle>')
    parts.append(text((left + WIDTH - right) / 2, height - 6, x_label, kind="name"))
    return svg("".join(parts), title, WIDTH, height, "rows")
