"""The sections of a run's page about its training: what was run, and the curves on one time axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rating_train.reports.page import charts
from rating_train.reports.page.charts import Line, Mark
from rating_train.reports.page.parts import Section, figure, section, table
from rating_train.reports.page.render import Table
from rating_train.reports.rows import learning_rates, number
from rating_train.reports.runs.data import RunData

#: Figures of a run's speed: title, name of a curve -> field of train.jsonl, factor, unit.
SPEED: tuple[tuple[str, tuple[tuple[str, str], ...], float, str], ...] = (
    ("Throughput", (("", "samples_per_second"),), 1.0, "items/s"),
    ("Waiting for data", (("", "data_wait_fraction"),), 100.0, "% of a step"),
    ("Padding", (("", "padding_share"),), 100.0, "% of computed tokens"),
    (
        "Operations of a rank",
        (("of the items", "tflops_per_rank"), ("with padding", "tflops_per_rank_padded")),
        1.0,
        "TFLOP/s",
    ),
    ("Peak memory", (("", "peak_memory_gib"),), 1.0, "GiB"),
)


def what_section(run: RunData) -> Section:
    """What was run: settings that differ from the defaults, data, versions, every start."""
    facts = run.provenance
    versions = facts.get("versions") or {}
    rows = [
        ["started", facts.get("started")],
        ["command", " ".join(map(str, facts.get("command") or [])) or None],
        ["commit", facts.get("commit")],
        ["ranks, nodes", f"{facts.get('ranks', '?')}, {facts.get('nodes', '?')}" if facts else None],
        ["device", facts.get("device")],
        ["dataset", run.trained_on or None],
        ["dataset's fingerprint", facts.get("data_fingerprint")],
        ["Python, platform", f"{facts.get('python')}, {facts.get('platform')}" if facts else None],
        *([name, told] for name, told in versions.items()),
    ]
    tables = [table(Table(("what", "value"), [r for r in rows if r[1]]), "Where and with what")]
    if run.changed:
        settings = [[key, _shown(value)] for key, value in run.changed.items()]
        tables.insert(
            0, table(Table(("setting", "value"), settings), "Settings that differ from the defaults")
        )
    starts = [h for h in facts.get("history") or [] if isinstance(h, dict)]
    if len(starts) > 1:
        lines = [[h.get("started"), h.get("step"), _changes(h.get("changed") or {})] for h in starts]
        tables.append(table(Table(("started", "at step", "settings changed"), lines), "Every start"))
    return section("what", "What was run", tables=tables)


def _changes(changed: Mapping[str, Any]) -> str:
    return "; ".join(f"{k} {v[0]} → {v[1]}" for k, v in changed.items() if isinstance(v, list)) or "none"


def _shown(value: Any) -> str:
    return str(value) if value != "" else '""'


def training_section(run: RunData) -> Section:
    """Curves on one axis: wall-clock time where rows have it, else steps; with restarts and skipped steps."""
    clock = _clock(run)
    scale, unit = _time_unit(clock.elapsed[-1]) if clock else (1.0, "step")

    def x(row: Mapping[str, Any]) -> float:
        return clock.at(float(row["time"])) / scale if clock else float(row["step"])

    def points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        if clock:
            rows = [r for r in rows if number(r, "time") is not None]
        return [(x(r), factor * v) for r in rows if (v := number(r, key)) is not None]

    marks = _marks(run, x, clock, scale)
    name = f"training time ({unit})" if clock else "step"
    own = run.curves
    xs = [x(r) for r in run.train] or [p[0] for rows in own.values() for p in points(rows, "plcc")]
    span = (min(xs), max(xs)) if xs else None
    figures = []

    def add(title: str, lines: list[Line], unit: str = "", note: str = "", **more: Any) -> None:
        drawing = charts.line_chart(title, lines, name, unit=unit, marks=marks, x_range=span, **more)
        figures.append(figure(title, drawing, note, lines))

    add("Training loss", [Line("", points(run.train, "loss"), smooth=len(run.train) > 20)], log=True,
        note="Faint: as logged; bold: moving mean." if len(run.train) > 20 else "")  # fmt: skip
    for title, keys, unit in (
        ("Correlation on validation", ("plcc", "srcc"), ""),
        ("Error on validation", ("rmse", "mae"), run.target.unit),
    ):
        lines = [
            Line(f"{split} {key.upper()}", points(rows, key), True, 2 * i + j, dashed=j > 0)
            for i, (split, rows) in enumerate(own.items())
            for j, key in enumerate(keys)
        ]
        add(title, lines, unit)
    rates = [
        Line(label, [(x(r), v) for r, v in values], colour=i)
        for i, (label, values) in enumerate(learning_rates(run.train))
    ]
    add("Learning rate", rates, zero=True)
    add("Gradient norm", [Line("", points(run.train, "grad_norm"), smooth=len(run.train) > 20)], log=True)
    for title, curves, factor, unit in SPEED:
        lines = [Line(name, points(run.train, key, factor)) for name, key in curves]
        add(title, lines, unit, zero=True)
    skipped = max((int(number(r, "skipped_steps") or 0) for r in run.train), default=0)
    starts = sum(m.kind == "mark" for m in marks)
    pauses = ", pauses between starts left out" if clock and starts else ""
    inner = sum(m.kind == "phase" for m in marks)
    boundaries = f"{inner + 1} phases (dotted lines between them), " if inner else ""
    intro = (
        f"One axis for all: {name}{pauses}. {starts} restart{'s' if starts != 1 else ''} (dashed lines), "
        f"{boundaries}{skipped} skipped step{'s' if skipped != 1 else ''} (solid lines)."
    )
    return section("training", "Training", intro, columns=3, figures=figures)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")


@dataclass(frozen=True)
class _Clock:
    """Wall-clock times of the rows, in seconds, and the training time at each."""

    times: Sequence[float]
    elapsed: Sequence[float]

    def at(self, time: float) -> float:
        return float(np.interp(time, self.times, self.elapsed))


def _clock(run: RunData) -> _Clock | None:
    """Return the training time: wall-clock time without what lies between two starts; ``None`` where rows have none."""
    times = [t for r in run.train if (t := number(r, "time")) is not None]
    if len(times) < max(2, len(run.train)) or times != sorted(times) or times[0] == times[-1]:
        return None
    resumed = _resumed(run)
    elapsed = [0.0]
    for before, row, begin, end in zip(run.train, run.train[1:], times, times[1:]):
        gap = end - begin
        if any(before["step"] <= step < row["step"] for step, _ in resumed):
            gap = min(gap, (number(row, "step_seconds") or 0.0) * (row["step"] - before["step"]))
        elapsed.append(elapsed[-1] + gap)
    return _Clock(times, elapsed)


def _resumed(run: RunData) -> list[tuple[int, str]]:
    """Return (step, when) of each start after the first."""
    entries = (run.provenance.get("history") or [])[1:]
    return [(e["step"], str(e.get("started"))) for e in entries if isinstance(e.get("step"), int)]


def _marks(run: RunData, x: Any, clock: _Clock | None, scale: float) -> list[Mark]:
    """Return a line for each start after the first, each boundary of phases, each row in which steps were skipped."""
    marks = []
    for step, told in _resumed(run):
        at = float(step)
        if clock:
            # At the last row before it: the pause has no width.
            place = sum(row["step"] <= step for row in run.train) - 1
            at = clock.elapsed[max(0, place)] / scale
        marks.append(Mark(at, f"resumed at step {step}, {told}"))
    marks += [
        Mark(x(earlier), f"phase {row.get('phase')} from step {earlier['step'] + 1} on", "phase")
        for earlier, row in pairwise(run.train)
        if row.get("phase") != earlier.get("phase")
    ]
    before = 0
    for row in run.train:
        count = int(number(row, "skipped_steps") or 0)
        if count > before:
            marks.append(Mark(x(row), f"{count - before} steps skipped before step {row['step']}", "skip"))
        before = max(before, count)
    return marks
