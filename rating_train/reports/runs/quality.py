"""The sections of a run's page about its quality: how good it is, where it errs, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rating_train.log import duration
from rating_train.model.accounting import SHOWN
from rating_train.reports.page import charts
from rating_train.reports.page.charts import Spread
from rating_train.reports.page.parts import Section, card, figure, say, say_difference, section, table
from rating_train.reports.page.render import Table
from rating_train.reports.rows import number
from rating_train.reports.runs.data import RunData
from rating_train.reports.runs.items import cards as item_cards
from rating_train.reports.runs.items import find_items
from rating_train.scoring import metrics
from rating_train.scoring.metrics import METRICS
from rating_train.scoring.slices import SLICES, slices

LABELS = {**metrics.LABELS, "r2": "R²"}

_BOX = (0.05, 0.25, 0.5, 0.75, 0.95)


def _label(metric: str, run: RunData) -> str:
    return LABELS[metric] if metric == "r2" else metrics.metric_label(metric, run.target.unit)


def top_cards(run: RunData) -> list[dict[str, str]]:
    """Return the numbers that a reader looks for first."""
    found = []
    if run.judgement:
        for name in ("plcc", "srcc", "rmse"):
            metric = run.judgement["metrics"][name]
            ends = metric["interval_95"]
            value = "undefined" if metric["value"] is None else f"{metric['value']:.3f}"
            more = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else metric.get("undefined", "no interval")
            found.append(card(_label(name, run), value, more))
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


def quality_section(run: RunData) -> Section:
    """How good it is: all metrics with intervals, baselines beside them, density and calibration."""
    found = run.judgement
    assert found is not None and run.predictions is not None
    scores = [b for b in (found.get("baselines") or {}).get("scores", []) if "n" in b]
    head = ["metric", "value", "95 % from", "to", *(b["name"].split(" (")[0] for b in scores)]
    rows = [
        [
            _label(name, run),
            m["value"],
            *(m["interval_95"] or (None, None)),
            *(b[name] for b in scores),
        ]
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
    low, high = _range(run, pairs)
    line = found["calibration"]
    told = "" if line["slope"] is None else (
        f"true = {line['slope']:.2f} × predicted {line['intercept']:+.2f}; "
        f"mean gap {line['mean_gap']:.3f}{run.target.suffix}."
    )  # fmt: skip
    axes = f"true rating{run.target.label}", f"predicted{run.target.label}"
    drawing = charts.density("predicted against true", pairs, low, high, axes)
    bins = charts.calibration_chart(line["bins"], run.target.label)
    figures = [
        figure("Predicted against true", drawing, "Darker: more items (logarithmic). Dashed: y = x."),
        figure("Calibration", bins, f"Bins of equally many predictions. {told}"),
    ]
    return section(
        "quality",
        "How good it is",
        f"{run.predictions.stem}: {found['n']:,} items.",
        says=_baseline_says(found, run.target.suffix),
        tables=[table(Table(head, rows, note=note))],
        figures=figures,
    )


def _range(run: RunData, pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the ends of the axes: the bounds, or the extremes; of stars without the part that is empty."""
    lowest, highest = min(min(p) for p in pairs), max(max(p) for p in pairs)
    bounds = run.target.bounds
    if bounds is None:
        if lowest < highest:
            return lowest, highest
        margin = max(0.5, abs(lowest) / 100)  # of one value: an axis needs a length
        return lowest - margin, highest + margin
    low, high = min(bounds[0], lowest), max(bounds[1], highest)
    return (max(low, min(lowest - 0.1, 4.0)) if bounds == (1.0, 5.0) and lowest > 1.5 else low), high


def _baseline_says(found: Mapping[str, Any], unit: str) -> list[dict[str, str]]:
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
            said.append(say_difference("The model", name, metric, differences[metric], unit))
    return said


def slice_section(run: RunData) -> Section:
    """By category, number of ratings, rating and text length: PLCC with intervals, residuals, tables."""
    found = run.judgement
    assert found is not None
    figures, tables = [], []
    errors = np.array([r.score - (r.rating or 0.0) for r in run.rows])
    parts = slices(run.rows, run.target.unit)
    overall = found["metrics"]["plcc"]["value"]
    for what, entries in ((w, found["slices"][w]) for w in SLICES if w in found["slices"]):
        if what in ("category", "rating_count"):
            boxes = [
                Spread(p.name, np.quantile(errors[p.members], _BOX).tolist(), f"{p.members.size:,}")
                for p in parts.get(what, [])[:20]
            ]  # fmt: skip
            note = "Box: middle half; line: 5 to 95 %. Right: items. Above 0 the model is too generous."
            title = f"Residuals by {SLICES[what]}"
            figures.append(
                figure(title, charts.box_chart(title, boxes, f"predicted − true{run.target.label}"), note)
            )
        if len(entries) > 1 and what != "rating":
            spreads = [
                Spread(e["name"], [ends[0], e["plcc"], ends[1]], f"{e['plcc']:.2f}")
                for e in entries[:20]
                if e["plcc"] is not None and (ends := e["interval_95"]["plcc"])
            ]
            title = f"PLCC by {SLICES[what]}"
            drawing = charts.interval_chart(title, spreads, "PLCC with 95 % interval", overall)
            figures.append(figure(title, drawing, "Dashed: all items."))
        head = (
            SLICES[what].capitalize(),
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
        tables.append(table(Table(head, rows, 3), f"By {SLICES[what]}"))
    return section("slices", "Where it is good and bad", figures=figures, tables=tables)


def error_section(run: RunData) -> Section:
    """What is over- and underestimated, and the best and the worst items with image and text."""
    found = run.judgement
    assert found is not None and run.predictions is not None
    bias = found["bias"]
    says = []
    if "mean" in bias:
        says.append(
            {
                "kind": "",
                "text": f"Mean error {bias['mean']:+.4f}{run.target.suffix}, median {bias['median']:+.4f}.",
            }
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


def warnings_of(run: RunData) -> list[str]:
    """Return what a reader must know before the numbers."""
    told = ((run.judgement or {}).get("seen") or {}).get("warning") or ""
    return [f"{told[0].upper()}{told[1:]}."] if told else []
