"""The sections of a run's page: what was run, how it trained, how good it is, where it errs, what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rating_train.log import duration
from rating_train.model.accounting import SHOWN
from rating_train.reports.page import charts
from rating_train.reports.page.charts import Line, Mark, Spread
from rating_train.reports.page.parts import Section, card, figure, say, say_difference, section, table
from rating_train.reports.page.render import Table
from rating_train.reports.rows import number
from rating_train.reports.run_data import RunData
from rating_train.reports.shown_items import cards as item_cards
from rating_train.reports.shown_items import find_items
from rating_train.scoring.metrics import METRICS
from rating_train.scoring.slices import slices

LABELS = {
    "plcc": "PLCC",
    "srcc": "SRCC",
    "kendall": "Kendall tau-b",
    "rmse": "RMSE (stars)",
    "mae": "MAE (stars)",
    "r2": "R²",
}
SLICES = {
    "category": "Main category",
    "rating_count": "Number of ratings",
    "rating": "True rating",
    "text_chars": "Characters of text",
}

_BOX = (0.05, 0.25, 0.5, 0.75, 0.95)


def top_cards(run: RunData) -> list[dict[str, str]]:
    """Return the numbers that a reader looks for first."""
    found = []
    if run.judgement:
        for name in ("plcc", "srcc", "rmse"):
            metric = run.judgement["metrics"][name]
            ends = metric["interval_95"]
            value = "undefined" if metric["value"] is None else f"{metric['value']:.3f}"
            more = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else metric.get("undefined", "no interval")
            found.append(card(LABELS[name], value, more))
        found.append(card("items", f"{run.judgement['n']:,}", _groups(run.judgement)))
    row = run.row
    if row.get("ces_mac_linear") is not None:
        strict = row.get("ces_flop_attention")
        more = "paper's convention, padded" + ("" if strict is None else f"; strict {strict:.3f}")
        found.append(card("CES", f"{row['ces_mac_linear']:.3f}", more))
    if run.train:
        last = run.train[-1]
        epoch = number(last, "epoch")
        found.append(card("steps", f"{last['step']:,}", "" if epoch is None else f"{epoch:.2f} epochs"))
        if seconds := _seconds(run):
            rates = [v for r in run.train if (v := number(r, "samples_per_second")) is not None]
            more = f"{float(np.median(rates)):,.4g} items/s (median)" if rates else ""
            found.append(card("training time", duration(seconds), more))
    return found


def _groups(judgement: Mapping[str, Any]) -> str:
    return "" if judgement["groups"] is None else f"{judgement['groups']:,} product groups"


def _seconds(run: RunData) -> float | None:
    """Return seconds spent in steps: pauses between attempts do not count."""
    total, before = 0.0, 0
    for row in run.train:
        each = number(row, "step_seconds")
        if each is not None:
            total += each * max(0, row["step"] - before)
        before = row["step"]
    return total or None


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
        ["dataset", str(run.config.get("data.path") or "") or None],
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
    times = [t for r in run.train if (t := number(r, "time")) is not None]
    timed = len(times) == len(run.train) and len(times) > 1 and times == sorted(times)
    start = times[0] if timed else 0.0
    scale, unit = _time_unit(times[-1] - start) if timed else (1.0, "step")

    def x(row: Mapping[str, Any]) -> float:
        return (float(row["time"]) - start) / scale if timed else float(row["step"])

    def points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        if timed:
            rows = [r for r in rows if start <= (number(r, "time") or -1.0) <= times[-1] + 3600]
        return [(x(r), factor * v) for r in rows if (v := number(r, key)) is not None]

    marks = _marks(run, x, start, scale, timed)
    name = f"time since the first logged step ({unit})" if timed else "step"
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
        ("Error on validation", ("rmse", "mae"), "stars"),
    ):
        lines = [
            Line(f"{split} {key.upper()}", points(rows, key), True, 2 * i + j, dashed=j > 0)
            for i, (split, rows) in enumerate(own.items())
            for j, key in enumerate(keys)
        ]
        add(title, lines, unit)
    rates = [
        Line(label, [(x(r), v) for r, v in values], colour=i) for i, (label, values) in enumerate(_rates(run))
    ]
    add("Learning rate", rates, zero=True)
    add("Gradient norm", [Line("", points(run.train, "grad_norm"), smooth=len(run.train) > 20)], log=True)
    add("Throughput", [Line("", points(run.train, "samples_per_second"))], "items/s", zero=True)
    add(
        "Waiting for data",
        [Line("", points(run.train, "data_wait_fraction", 100.0))],
        "% of a step",
        zero=True,
    )
    add("Peak memory", [Line("", points(run.train, "peak_memory_gib"))], "GiB", zero=True)
    skipped = max((int(number(r, "skipped_steps") or 0) for r in run.train), default=0)
    starts = sum(m.kind == "mark" for m in marks)
    intro = (
        f"One axis for all: {name}. {starts} restart{'s' if starts != 1 else ''} (dashed lines), "
        f"{skipped} skipped step{'s' if skipped != 1 else ''} (solid lines)."
    )
    return section("training", "Training", intro, columns=3, figures=figures)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")


def _rates(run: RunData) -> list[tuple[str, list[tuple[Mapping[str, Any], float]]]]:
    """Return one curve for each group; equal ones share a curve, for the last would hide the others."""
    curves: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
    for row in run.train:
        rates = row.get("lr")
        for name, rate in (rates if isinstance(rates, Mapping) else {"": rates}).items():
            if (value := number({"lr": rate}, "lr")) is not None:
                curves.setdefault(str(name), []).append((row, value))
    shared: dict[str, tuple[list[str], list[tuple[Mapping[str, Any], float]]]] = {}
    for name, values in curves.items():
        key = repr([(r["step"], v) for r, v in values])
        shared.setdefault(key, ([], values))[0].append(name)
    return [(", ".join(names), values) for names, values in shared.values()]


def _marks(run: RunData, x: Any, start: float, scale: float, timed: bool) -> list[Mark]:
    """Return a line for each start after the first, and for each row in which steps were skipped."""
    marks = []
    for entry in (run.provenance.get("history") or [])[1:]:
        step, told = entry.get("step"), str(entry.get("started"))
        if not isinstance(step, int):
            continue
        at = float(step)
        if timed:
            try:
                at = (time.mktime(time.strptime(told[:19], "%Y-%m-%dT%H:%M:%S")) - start) / scale
            except ValueError:
                continue
        marks.append(Mark(at, f"resumed at step {step}, {told}"))
    before = 0
    for row in run.train:
        count = int(number(row, "skipped_steps") or 0)
        if count > before:
            marks.append(Mark(x(row), f"{count - before} steps skipped before step {row['step']}", "skip"))
        before = max(before, count)
    return marks


def quality_section(run: RunData) -> Section:
    """How good it is: all metrics with intervals, baselines beside them, density and calibration."""
    found = run.judgement
    assert found is not None and run.predictions is not None
    scores = [b for b in (found.get("baselines") or {}).get("scores", []) if "n" in b]
    head = ["metric", "value", "95 % from", "to", *(b["name"].split(" (")[0] for b in scores)]
    rows = [
        [LABELS[name], m["value"], *(m["interval_95"] or (None, None)), *(b[name] for b in scores)]
        for name, m in ((n, found["metrics"][n]) for n in METRICS)
    ]
    reasons = {m["undefined"] for m in found["metrics"].values() if "undefined" in m}
    of = "items" if found["groups"] is None else "product groups"
    note = f"Intervals: {found['resamples']:,} bootstrap resamples of {of}, seed {found['seed']}."
    after = found["logistic"]
    if after["plcc"] is not None:
        note += f" PLCC after a 4-parameter logistic fit: {after['plcc']:.4f}."
    note += "".join(f" Undefined: {why}." for why in sorted(reasons))
    pairs = [(r.rating or 0.0, r.score) for r in run.rows]
    low, high = min(1.0, *(min(p) for p in pairs)), max(5.0, *(max(p) for p in pairs))
    near = min(min(p) for p in pairs)
    low = max(low, min(near - 0.1, 4.0)) if near > 1.5 else low
    line = found["calibration"]
    told = "" if line["slope"] is None else (
        f"true = {line['slope']:.2f} × predicted {line['intercept']:+.2f}; mean gap {line['mean_gap']:.3f} stars."
    )  # fmt: skip
    figures = [
        figure("Predicted against true", charts.density("predicted against true", pairs, low, high,
               ("true rating (stars)", "predicted (stars)")), "Darker: more items (logarithmic). Dashed: y = x."),
        figure("Calibration", charts.calibration_chart(line["bins"]), f"Bins of equally many predictions. {told}"),
    ]  # fmt: skip
    return section(
        "quality",
        "How good it is",
        f"{run.predictions.stem}: {found['n']:,} items.",
        says=_baseline_says(found),
        tables=[table(Table(head, rows, note=note))],
        figures=figures,
    )


def _baseline_says(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Say whether the model is better than each baseline."""
    said = []
    compared = found.get("baselines") or {}
    if compared.get("unavailable"):
        said.append(say(f"No baselines: {compared['unavailable']}."))
    for baseline in compared.get("scores", []):
        name = baseline["name"].split(" (")[0]
        if "unavailable" in baseline:
            said.append(say(f"{name}: {baseline['unavailable']}."))
            continue
        differences = baseline["model_minus_baseline"]
        metric = "plcc" if differences["plcc"] is not None else "rmse"
        if differences[metric] is not None:
            said.append(say_difference("The model", name, metric, differences[metric]))
    return said


def slice_section(run: RunData) -> Section:
    """By category, number of ratings, rating and text length: PLCC with intervals, residuals, tables."""
    found = run.judgement
    assert found is not None
    figures, tables = [], []
    errors = np.array([r.score - (r.rating or 0.0) for r in run.rows])
    parts = slices(run.rows)
    overall = found["metrics"]["plcc"]["value"]
    for what, entries in ((w, found["slices"][w]) for w in SLICES if w in found["slices"]):
        if what in ("category", "rating_count"):
            boxes = [
                Spread(p.name, np.quantile(errors[p.members], _BOX).tolist(), f"{p.members.size:,}")
                for p in parts.get(what, [])[:20]
            ]  # fmt: skip
            note = "Box: middle half; line: 5 to 95 %. Right: items. Above 0 the model is too generous."
            title = f"Residuals by {SLICES[what].lower()}"
            figures.append(figure(title, charts.box_chart(title, boxes, "predicted − true (stars)"), note))
        if len(entries) > 1 and what != "rating":
            spreads = [
                Spread(e["name"], [ends[0], e["plcc"], ends[1]], f"{e['plcc']:.2f}")
                for e in entries[:20]
                if e["plcc"] is not None and (ends := e["interval_95"]["plcc"])
            ]
            title = f"PLCC by {SLICES[what].lower()}"
            drawing = charts.interval_chart(title, spreads, "PLCC with 95 % interval", overall)
            figures.append(figure(title, drawing, "Dashed: all items."))
        head = (
            SLICES[what],
            "items",
            "PLCC",
            "95 % from",
            "to",
            "SRCC",
            "RMSE",
            "MAE",
            "mean true",
            "mean error",
        )
        rows = [
            [e["name"], e["n"], e["plcc"], *(e["interval_95"]["plcc"] or (None, None)), e["srcc"], e["rmse"], e["mae"],
             e["mean_true"], e["mean_error"]]
            for e in entries
        ]  # fmt: skip
        tables.append(table(Table(head, rows, 3), f"By {SLICES[what].lower()}"))
    return section("slices", "Where it is good and bad", figures=figures, tables=tables)


def error_section(run: RunData) -> Section:
    """What is over- and underestimated, and the best and the worst items with image and text."""
    found = run.judgement
    assert found is not None and run.predictions is not None
    bias = found["bias"]
    says = []
    if "mean" in bias:
        says.append(
            {"kind": "", "text": f"Mean error {bias['mean']:+.4f} stars, median {bias['median']:+.4f}."}
        )
        shrink = bias["correlation_with_true"]
        if shrink is not None and shrink < -0.2:
            text = f"High ratings are underestimated, low ones overestimated (correlation: {shrink:.2f})."
            says.append(say(text))
        for side, word in (("over", "overestimated"), ("under", "underestimated")):
            tail = bias[side]
            often = ", ".join(
                f"{c['name']} ({c['n']}, expected {c['expected']:.1f})" for c in tail["categories"][:3]
            )
            text = (
                f"The 5 % most {word} ({tail['n']:,} items): true {tail['mean_true']:.2f}, predicted "
                f"{tail['mean_predicted']:.2f} on average"
                + (f"; more often than expected: {often}." if often else ".")
            )
            says.append(say(text))
    split = str(run.row.get("split") or run.predictions.stem.rpartition("_step_")[0]).partition("@")[0]
    chosen = found["items"]
    ids = [*chosen["worst"], *chosen["best"]]
    stored = find_items(run.data, split, ids) if run.data is not None else {}
    groups = [
        {"title": "Worst items", "items": item_cards(run.rows, chosen["worst"], stored)},
        {"title": "Best items", "items": item_cards(run.rows, chosen["best"], stored)},
    ]
    return section("errors", "Where it errs", says=says, items=groups)


def cost_section(run: RunData) -> Section:
    """What one item costs, and CES in both conventions at both lengths."""
    row = run.row
    rows = []
    for convention, name in SHOWN.items():
        for suffix, tokens, length in (
            ("", row.get("padded_tokens"), "padded"),
            ("_true_length", row.get("true_tokens"), "true"),
        ):
            c, ces = row.get(f"c_{convention}{suffix}"), row.get(f"ces_{convention}{suffix}")
            if c is not None or ces is not None:
                shown = None if tokens is None else f"{tokens:,.1f}"
                rows.append([f"{name} ({convention})", length, shown, c, ces])
    parameters = row.get("parameters")
    intro = "" if parameters is None else f"{parameters:,} parameters. "
    intro += "CES = max(0, PLCC) × E(C). The paper counts multiply-accumulates without attention; strict: all FLOPs."
    note = "Padded: the sequence that is computed. True: each item at its own length."
    return section(
        "cost",
        "Cost and CES",
        intro,
        tables=[table(Table(("convention", "length", "tokens", "C", "CES"), rows, note=note))],
    )


def sections_of(run: RunData) -> list[Section]:
    """Return the sections that this run has something for."""
    found = []
    if run.judgement:
        found += [quality_section(run), slice_section(run), error_section(run)]
    if run.train or run.evaluations:
        found.insert(1 if found else 0, training_section(run))
    if any(key.startswith("ces_") for key in run.row):
        found.append(cost_section(run))
    return [*found, what_section(run)]


def warnings_of(run: RunData) -> list[str]:
    """Return what a reader must know before the numbers."""
    told = ((run.judgement or {}).get("seen") or {}).get("warning") or ""
    return [f"{told[0].upper()}{told[1:]}."] if told else []
