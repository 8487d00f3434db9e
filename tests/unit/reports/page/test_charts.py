"""Charts: round ticks, every point in its place, and no coordinate that is not a number."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from rating_train.reports.page.axes import axis, log_ticks, number, ticks
from rating_train.reports.page.charts import (
    Line,
    Mark,
    Place,
    Spread,
    box_chart,
    calibration_chart,
    density,
    interval_chart,
    line_chart,
    pareto_chart,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3.1, 4.9, [3.5, 4, 4.5]),
        (-20, 20, [-20, -10, 0, 10, 20]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_ticks_of_any_range_are_few_and_inside() -> None:
    for power in range(-8, 9):
        for width in (1.0, 1.7, 3.3, 9.9):
            low, high = 0.37 * 10.0**power, (0.37 + width) * 10.0**power
            found = ticks(low, high)
            assert 2 <= len(found) <= 11 and low <= min(found) and max(found) <= high * (1 + 1e-9)
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100] and len(log_ticks(1e-6, 1e6)) <= 8


def test_numbers_are_as_people_write_them() -> None:
    assert [number(v) for v in (0, 0.25, 1000, 2e-5, -3.5, 1e7)] == [
        "0",
        "0.25",
        "1,000",
        "2e-5",
        "-3.5",
        "1e7",
    ]


def test_an_axis_keeps_its_ends_inside_and_one_value_is_enough() -> None:
    a = axis([2.0, 4.0], 100, 0)
    assert 0 < a.at(4.0) < a.at(2.0) < 100
    alone = axis([3.0], 0, 100)
    assert alone.at(3.0) == pytest.approx(50)
    assert axis([0.0, 5.0], 0, 100, log=True).log is False, "zero has no logarithm"
    assert axis([], 0, 1).ticks()


def drawn(svg: str) -> ElementTree.Element:
    """The chart as XML, after a check of every number in it."""
    for text in re.findall(r'(?:x|y|x1|x2|y1|y2|cx|cy|width|height|d)="([^"]*)"', svg):
        for value in re.findall(r"[-\d.]+|nan|inf", text):
            assert math.isfinite(float(value)), text
    return ElementTree.fromstring(svg)


def test_every_chart_is_valid_with_many_points_one_point_and_none() -> None:
    curve = [(float(i), 1.0 + math.sin(i / 9)) for i in range(2000)]
    full = drawn(line_chart("t", [Line("a <b>", curve, smooth=True), Line("c", curve[:3], dots=True)], "x", log=True,
                            marks=[Mark(500.0, "resumed")]))  # fmt: skip
    assert len(full.findall("circle")) == 3 and len(full.findall("path")) == 3
    assert any(e.get("class") == "mark" for e in full.iter())
    for points in ([(1.0, 2.0)], []):
        found = drawn(line_chart("t", [Line("a", points, smooth=True)], "x", zero=True))
        assert bool(points) == (len(found.findall("path")) > 0)
    assert "not logged" in line_chart("t", [], "x")
    row = Spread("name <i>", [1.0, 2.0, 3.0, 4.0, 5.0], "12")
    assert len(drawn(box_chart("t", [row, row], "x")).findall("rect")) == 2
    assert len(drawn(interval_chart("t", [Spread("n", [0.1, 0.2, 0.3])], "x", 0.2)).findall("circle")) == 1
    bins = [{"n": 5, "mean_predicted": 4.0, "mean_true": 4.1, "interval_95": None}]
    assert len(drawn(calibration_chart(bins)).findall("circle")) == 1
    for empty in (box_chart("t", [], "x"), calibration_chart([]), pareto_chart("t", [], "x", "y")):
        assert "not logged" in empty


def test_a_density_counts_every_point_once() -> None:
    points = [(1.0 + 4 * i / 999, 5.0 - 4 * i / 999) for i in range(1000)]
    found = drawn(density("t", points, 1.0, 5.0, ("x", "y")))
    counts = [int((e.findtext("title") or "0").split()[0]) for e in found.findall("rect")]
    assert sum(counts) == 1000


def test_the_front_is_what_no_cheaper_point_reaches() -> None:
    places = [Place("cheap", 1, 0.5), Place("dominated", 2, 0.4), Place("dear", 3, 0.7)]
    found = drawn(pareto_chart("t", places, "C", "PLCC"))
    (front,) = (e for e in found.findall("path") if "front" in (e.get("class") or ""))
    heights = [float(p.split()[1]) for p in (front.get("d") or "").lstrip("M").split("L")]
    assert len(set(heights)) == 2 and heights == sorted(heights, reverse=True), (
        "two of the three points are on it"
    )
    assert {e.text for e in found.findall("text")} >= {"cheap", "dominated", "dear"}
