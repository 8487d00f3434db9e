"""A judgement as text for a terminal: every number with its interval, CES with its conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rating_train.config.task import PAPER
from rating_train.log import text_table
from rating_train.model.accounting import ces_line
from rating_train.scoring.metrics import LARGER_IS_BETTER, METRICS, metric_label
from rating_train.scoring.slices import SLICES

_SHOWN_CATEGORIES = 10


def render(judgement: Mapping[str, Any], with_slices: bool = False) -> str:
    """Return the judgement as lines of text.

    Args:
        judgement: of :func:`rating_train.evaluation.run.evaluate_model`.
        with_slices: whether to add the tables by category, number of ratings, rating and text length.
    """
    row, unit = judgement["row"], unit_of(judgement)
    groups = "" if judgement["groups"] is None else f" in {judgement['groups']:,} product groups"
    lines = [
        f"step {row['step']}, split {row['split']}, {row['n']:,} items{groups}, {row['items_per_second']} items/s",
        "",
        *_metric_table(judgement),
        "",
        *_baseline_lines(judgement["baselines"], unit),
        ces_line(row),
        _calibration_line(judgement, unit),
        *_bias_lines(judgement["bias"], unit),
    ]
    if judgement["seen"]["warning"]:
        lines.append(f"warning: {judgement['seen']['warning']}")
    if with_slices:
        for what, parts in judgement["slices"].items():
            lines += ["", *_slice_table(what, parts)]
    lines += [
        "",
        f"predictions {judgement['files']['predictions']}, all of this in {judgement['files']['evaluation']}",
    ]
    return "\n".join(lines)


def unit_of(judgement: Mapping[str, Any]) -> str:
    """Return the unit of the target after a number: a space and its name, or nothing."""
    unit = _unit(judgement)
    return f" {unit}" if unit else ""


def _unit(judgement: Mapping[str, Any]) -> str:
    return str(judgement.get("unit", PAPER.target.unit))  # an older judgement is one of stars


def shown(value: float | None) -> str:
    """Return a metric in four decimals, or "undefined"."""
    return "undefined" if value is None else f"{value:.4f}"


def interval(ends: list[float] | None) -> str:
    """Return, for example, ``0.4821 to 0.6034``."""
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def label_of(metric: str, judgement: Mapping[str, Any]) -> str:
    """Return what a metric is called, with the unit of the target where it has one."""
    return metric_label(metric, _unit(judgement))


def _metric_table(judgement: Mapping[str, Any]) -> list[str]:
    """The model's metrics with their intervals, and each baseline's beside them; reasons below."""
    metrics, compared = judgement["metrics"], judgement["baselines"]["scores"]
    compared = [b for b in compared if "n" in b]
    header = ["metric", "value", "95% interval", *(b["name"].split(" (")[0] for b in compared)]
    body = [
        [
            label_of(name, judgement),
            shown(m["value"]),
            interval(m["interval_95"]),
            *(shown(b[name]) for b in compared),
        ]
        for name, m in metrics.items()
    ]
    reasons: dict[str, list[str]] = {}
    for name in METRICS:
        if "undefined" in metrics[name]:
            reasons.setdefault(metrics[name]["undefined"], []).append(label_of(name, judgement))
    after = judgement["logistic"]
    fit = shown(after["plcc"]) if after["plcc"] is not None else f"undefined: {after['undefined']}"
    return [
        *text_table(header, body),
        *(f"undefined: {why} ({', '.join(names)})" for why, names in reasons.items()),
        f"PLCC after a 4-parameter logistic fit: {fit}",
        f"intervals: {judgement['resamples']:,} resamples of "
        + ("items" if judgement["groups"] is None else "product groups")
        + f", seed {judgement['seed']}",
    ]


def _baseline_lines(found: Mapping[str, Any], unit: str) -> list[str]:
    """Say whether the model is better than each baseline, one sentence each."""
    if found["unavailable"]:
        return [f"no baselines: {found['unavailable']}", ""]
    lines = []
    for baseline in found["scores"]:
        if "unavailable" in baseline:
            lines.append(f"{baseline['name']}: {baseline['unavailable']}")
            continue
        told = [
            against(name, baseline["model_minus_baseline"][name], unit)
            for name in ("plcc", "rmse")
            if baseline["model_minus_baseline"][name] is not None
        ]
        sample = "" if baseline["fitted_on"] == baseline["of"] else (
            f", fitted on {baseline['fitted_on']:,} of {baseline['of']:,} training items"
        )  # fmt: skip
        lines.append(f"against {baseline['name']}{sample}: {'; '.join(told)}")
    return [*lines, ""]


def against(metric: str, difference: Mapping[str, Any], unit: str = " stars") -> str:
    """Say a difference, for example ``better by 0.0813 PLCC (95% interval 0.0612 to 0.1031)``."""
    sign = 1 if LARGER_IS_BETTER[metric] else -1
    unit = metric.upper() + (unit if metric in ("rmse", "mae") else "")
    value = sign * difference["value"]
    if difference["interval_95"] is None:
        return f"{value:+.4f} {unit}, no interval"
    low, high = sorted(sign * end for end in difference["interval_95"])
    if low <= 0 <= high:
        return f"no difference in {metric.upper()} can be told ({value:+.4f}, 95% interval {low:+.4f} to {high:+.4f})"
    if value < 0:
        low, high = -high, -low
    word = "better" if value > 0 else "worse"
    return f"{word} by {abs(value):.4f} {unit} (95% interval {low:.4f} to {high:.4f})"


def _calibration_line(judgement: Mapping[str, Any], unit: str) -> str:
    found = judgement["calibration"]
    if found["slope"] is None:
        return f"calibration: undefined ({found['undefined']})"
    return (
        f"calibration: mean gap {found['mean_gap']:.4f}{unit} over {len(found['bins'])} bins, "
        f"true = {found['slope']:.3f} x predicted {found['intercept']:+.3f}"
    )


def _bias_lines(found: Mapping[str, Any], unit: str) -> list[str]:
    if "mean" not in found:
        return [f"bias: undefined ({found['undefined']})"]
    lines = [f"bias: mean error {found['mean']:+.4f}{unit}, median {found['median']:+.4f}"]
    for side, word in (("over", "overestimated"), ("under", "underestimated")):
        tail = found[side]
        often = ", ".join(
            f"{c['name']} ({c['n']}, expected {c['expected']:.1f})" for c in tail["categories"][:3]
        )
        lines.append(
            f"  the {tail['n']:,} most {word} (5%): true {tail['mean_true']:.2f}, predicted "
            f"{tail['mean_predicted']:.2f} on average"
            + (f"; more often than expected: {often}" if often else "")
        )
    return lines


def _slice_table(what: str, parts: list[dict[str, Any]]) -> list[str]:
    cut = parts[:_SHOWN_CATEGORIES] if what == "category" else parts
    header = [SLICES[what], "items", "PLCC", "95% interval", "RMSE", "95% interval", "mean error"]
    body = [
        [
            part["name"][:40],
            f"{part['n']:,}",
            shown(part["plcc"]),
            interval(part["interval_95"]["plcc"]),
            shown(part["rmse"]),
            interval(part["interval_95"]["rmse"]),
            f"{part['mean_error']:+.4f}",
        ]
        for part in cut
    ]
    more = [f"and {len(parts) - len(cut)} more"] if len(cut) < len(parts) else []
    return [*text_table(header, body), *more]
