"""``rating-train report``: what a run did, as three pictures and one JSON file.

Reads ``train.jsonl``, ``eval.jsonl`` and the newest file of ``predictions/``. Any of them, and any key of a
row, may be missing: what cannot be drawn is left out and listed, with its reason, in ``summary.json``.
Imports no torch, so that a login node can draw the report of a running job.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rating_train.config.task import Target
from rating_train.files import atomic_write_json
from rating_train.reports import plots
from rating_train.reports.rows import learning_rates, number
from rating_train.reports.runs.data import read_results, read_settings, target_of
from rating_train.run_dir import EVAL_LOG, PREDICTIONS_DIR, REPORT_DIR, TRAIN_LOG
from rating_train.scoring.metrics import Scores, per_group, score
from rating_train.scoring.predictions import Prediction, deduplicate, read_predictions
from rating_train.scoring.slices import NO_CATEGORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
SCATTER_FILE = "scatter.png"
CATEGORIES_FILE = "error_by_category.png"
SUMMARY_FILE = "summary.json"

MAX_CATEGORIES = 30

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[str, Rows, str, str]  # label, rows, key of the number, line style


def make_report(run_dir: Path) -> Path:
    """Draw the report of one run.

    Writes ``report/summary.json``, ``report/curves.png``, ``report/scatter.png`` and
    ``report/error_by_category.png``. A picture with nothing to draw is left out, and an older one removed.

    Returns:
        The report folder.

    Raises:
        UserError: a missing folder, a folder that is not a run, or a log that is not JSON lines.
    """
    train, evaluations, newest = read_results(run_dir)
    target = target_of(read_settings(run_dir))
    report = run_dir / REPORT_DIR
    report.mkdir(exist_ok=True)
    skipped: dict[str, str] = {}
    if train or evaluations:
        _draw_curves(report / CURVES_FILE, run_dir.name, train, evaluations, target)
    else:
        skipped[CURVES_FILE] = f"neither {TRAIN_LOG} nor {EVAL_LOG} has rows"
    predictions = _report_predictions(report, newest, skipped, target)
    figures = [f for f in (CURVES_FILE, SCATTER_FILE, CATEGORIES_FILE) if f not in skipped]
    for name in skipped:
        (report / name).unlink(missing_ok=True)
    summary = {
        "run": run_dir.name,
        "training": _training_summary(train),
        "evaluation": {split: _evaluation_summary(rows) for split, rows in evaluations.items()},
        "predictions": predictions,
        "figures": figures,
        "figures_left_out": skipped,
    }
    atomic_write_json(report / SUMMARY_FILE, _without_nan(summary))
    return report


def _report_predictions(
    report: Path, newest: Path | None, skipped: dict[str, str], target: Target
) -> dict[str, Any] | None:
    """Draw and summarize one file of predictions; note in ``skipped`` what could not be drawn."""
    if newest is None:
        skipped[SCATTER_FILE] = skipped[CATEGORIES_FILE] = f"no files in {PREDICTIONS_DIR}/"
        return None
    rows = [row for row in deduplicate(read_predictions(newest)) if row.rating is not None]
    if not rows:
        skipped[SCATTER_FILE] = skipped[CATEGORIES_FILE] = f"{newest.name} has no rows with a rating"
        return {"file": newest.name, "scores": None, "by_category": None}
    scores = score([row.score for row in rows], _ratings(rows))
    predicted = [row.score for row in rows]
    _draw_scatter(report / SCATTER_FILE, newest.stem, predicted, _ratings(rows), scores, target)
    by_category = _by_category(rows)
    if by_category:
        _draw_categories(report / CATEGORIES_FILE, newest.stem, by_category, scores, target)
    else:
        skipped[CATEGORIES_FILE] = f"{newest.name} has no categories"
    table = {name: s.as_dict() for name, s in by_category.items()}
    return {"file": newest.name, "scores": scores.as_dict(), "by_category": table or None}


def _ratings(rows: Sequence[Prediction]) -> list[float]:
    return [row.rating for row in rows if row.rating is not None]


def _by_category(rows: Sequence[Prediction]) -> dict[str, Scores]:
    """Return category -> scores, the largest category first; empty if no row has a category."""
    if not any(row.category for row in rows):
        return {}
    names = [row.category or NO_CATEGORY for row in rows]
    return per_group([row.score for row in rows], _ratings(rows), names)


def _training_summary(rows: Rows) -> dict[str, Any] | None:
    """Return the first and last step, the final loss and the typical speed (medians: a stall is no trend)."""
    if not rows:
        return None
    waits = [
        wait / step
        for wait, step in ((number(r, "data_wait_seconds"), number(r, "step_seconds")) for r in rows)
        if wait is not None and step
    ]
    losses = [loss for loss in (number(r, "loss") for r in rows) if loss is not None]
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "first_step": rows[0]["step"],
        "last_step": rows[-1]["step"],
        "rows": len(rows),
        "last_epoch": number(rows[-1], "epoch"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "mean_loss_of_last_20th": statistics.fmean(tail) if tail else None,
        "median_samples_per_second": _median([number(r, "samples_per_second") for r in rows]),
        "median_step_seconds": _median([number(r, "step_seconds") for r in rows]),
        "median_data_wait_share": _median(waits),
    }


def _evaluation_summary(rows: Rows) -> dict[str, Any]:
    """Return the last row and the row with the highest PLCC, as logged."""
    defined = (row for row in rows if number(row, "plcc") is not None)
    best = max(defined, key=lambda row: row["plcc"], default=None)
    return {"evaluations": len(rows), "best_by_plcc": best, "last": rows[-1]}


def _median(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return statistics.median(defined) if defined else None


def _without_nan(value: Any) -> Any:
    """Return the same JSON value with NaN and infinity, which a foreign log may hold, as ``None``."""
    if isinstance(value, Mapping):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _draw_curves(path: Path, run: str, train: Rows, evaluations: Mapping[str, Rows], target: Target) -> None:
    figure = plots.new_figure(13.5, 7.2)
    grid = figure.subplots(2, 3)
    figure.suptitle(plots.plain(run), fontweight="bold")
    _panel(grid[0, 0], "Training loss (MSE)", [("", train, "loss", "-")], smooth=True)
    rates: list[Curve] = [
        (label, [{"step": row["step"], "lr": rate} for row, rate in points], "lr", "-")
        for label, points in learning_rates(train)
    ]
    _panel(grid[0, 1], "Learning rate", rates)
    _panel(grid[0, 2], "Gradient norm", [("", train, "grad_norm", "-")], smooth=True)
    splits = evaluations.items()
    plcc = [(f"{split} PLCC", rows, "plcc", "o-") for split, rows in splits]
    srcc = [(f"{split} SRCC", rows, "srcc", "s--") for split, rows in splits]
    _panel(grid[1, 0], "PLCC and SRCC", plcc + srcc, colours=len(evaluations))
    rmse = [(f"{split} RMSE", rows, "rmse", "o-") for split, rows in splits]
    mae = [(f"{split} MAE", rows, "mae", "s--") for split, rows in splits]
    _panel(grid[1, 1], f"RMSE and MAE{target.label}", rmse + mae, colours=len(evaluations))
    _panel(grid[1, 2], "Throughput (samples/s)", [("", train, "samples_per_second", "-")], smooth=True)
    grid[1, 2].set_ylim(bottom=0, top=1.1 * grid[1, 2].get_ylim()[1])
    grid[0, 1].yaxis.set_major_formatter("{x:.1e}")
    # The same range of steps everywhere, so that panels can be compared.
    steps = [row["step"] for rows in (train, *evaluations.values()) for row in rows]
    margin = max(1.0, 0.02 * (max(steps) - min(steps)))
    for axes in grid.flat:
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    plots.save(figure, path)


def _panel(axes: Axes, title: str, curves: Sequence[Curve], smooth: bool = False, colours: int = 0) -> None:
    """Draw one panel of curves (label, rows, key, style) against the step, or say that nothing was logged.

    ``smooth`` draws the raw numbers faintly behind their moving mean; colours repeat after ``colours`` curves
    (0: only once all are used).
    """
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(color="0.92")
    for i, (label, rows, key, style) in enumerate(curves):
        points = [(row["step"], value) for row in rows if (value := number(row, key)) is not None]
        if not points:
            continue
        steps, values = [step for step, _ in points], [value for _, value in points]
        colour = plots.COLOURS[(i % colours if colours else i) % len(plots.COLOURS)]
        if smooth and len(values) >= 20:
            axes.plot(steps, values, color=colour, lw=1.0, alpha=0.3, label="logged")
            values, label = _moving_mean(values), "moving mean"
        axes.plot(steps, values, style, color=colour, ms=4, lw=1.6, label=plots.plain(label))
        if smooth and min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])
    elif any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=9)


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window of about a fortieth of the curve, so that it does not lag."""
    half = max(2, len(values) // 80)
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _draw_scatter(
    path: Path, name: str, predicted: list[float], true: list[float], scores: Scores, target: Target
) -> None:
    figure = plots.new_figure(6.6, 6.0)
    axes = figure.subplots()
    # The scale of the target, widened where a number lies outside it.
    ends = [*(target.bounds or ()), *predicted, *true]
    margin = (max(ends) - min(ends)) / 40 or 1.0
    low, high = min(ends) - margin, max(ends) + margin
    axes.plot([low, high], [low, high], "--", color="0.35", lw=1.2, label="y = x", zorder=3)
    if len(true) > 2000:
        square = (low, high, low, high)
        bins = axes.hexbin(true, predicted, gridsize=60, bins="log", mincnt=1, extent=square)
        figure.colorbar(bins, ax=axes, label="items", shrink=0.85)
    else:
        axes.scatter(true, predicted, s=14, alpha=0.45, color=plots.COLOURS[0], linewidths=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set(xlabel=f"true {target.name}{target.label}", ylabel=f"predicted {target.name}{target.label}")
    shown = f"PLCC {_shown(scores.plcc)}   SRCC {_shown(scores.srcc)}   RMSE {_shown(scores.rmse)}"
    axes.set_title(f"{plots.plain(name)}\n{shown}   n = {scores.n:,}", fontsize=11)
    axes.legend(frameon=False, loc="upper left")
    plots.save(figure, path)


def _draw_categories(
    path: Path, name: str, table: Mapping[str, Scores], overall: Scores, target: Target
) -> None:
    """Draw RMSE and PLCC of the largest categories side by side, the worst RMSE at the top."""
    largest = list(table.items())[:MAX_CATEGORIES]
    shown = sorted(largest, key=lambda item: item[1].rmse or 0.0)
    figure = plots.new_figure(11.5, 1.5 + 0.29 * len(shown))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    for axes, metric, unit in ((left, "rmse", target.label), (right, "plcc", "")):
        values = [getattr(s, metric) for _, s in shown]
        axes.barh(places, [v or 0.0 for v in values], color=plots.COLOURS[0], alpha=0.85, height=0.7)
        # Print the numbers beside the bars: an undefined one has no bar and would otherwise read as zero.
        beside = axes.get_yaxis_transform()
        for place, value in zip(places, values):
            axes.text(1.01, place, _shown(value), transform=beside, va="center", fontsize=8)
        total = getattr(overall, metric)
        if total is not None:
            axes.axvline(total, color=plots.COLOURS[1], lw=1.4, ls="--", label=f"all items {total:.3f}")
            axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
        axes.set_title(f"{metric.upper()}{unit}", loc="left", fontsize=11)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    left.set_ylim(-0.6, len(shown) - 0.4)
    left.set_yticks(places, [f"{plots.plain(category[:40])} ({s.n:,})" for category, s in shown], fontsize=9)
    right.tick_params(axis="y", length=0)
    left_out = f" ({MAX_CATEGORIES} largest of {len(table)})" if len(table) > MAX_CATEGORIES else ""
    figure.suptitle(
        f"{plots.plain(name)}: error by category{left_out}, number of items in brackets", fontweight="bold"
    )
    plots.save(figure, path)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
