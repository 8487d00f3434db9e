"""``rating-train report RUN [RUN...]``: one HTML page for a run, and one that compares several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import atomic_write_text
from rating_train.reports.comparison import Comparison, compare_runs, run_names
from rating_train.reports.page import charts
from rating_train.reports.page.charts import Line, Place
from rating_train.reports.page.parts import Section, card, figure, page, say_difference, section, table
from rating_train.reports.page.render import Table
from rating_train.reports.rows import number
from rating_train.reports.runs.data import RunData, read_run
from rating_train.reports.runs.quality import (
    LABELS,
    cost_section,
    error_section,
    quality_section,
    slice_section,
    top_cards,
    warnings_of,
)
from rating_train.reports.runs.training import training_section, what_section
from rating_train.run_dir import REPORT_DIR

PAGE_FILE = "index.html"
COMPARISON_FILE = "comparison.html"


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


def make_run_page(path: Path, refresh: int = 0) -> Path:
    """Write ``report/index.html`` of a run; return its path.

    Args:
        path: run directory; the run may be training.
        refresh: seconds after which a browser reads the page again; 0 never.

    Raises:
        UserError: as :func:`rating_train.reports.runs.data.read_run`.
    """
    run = read_run(path)
    device = run.provenance.get("device")
    facts = [
        str(run.config.get("model.backbone") or "").rpartition("/")[2],
        f"data {run.trained_on}" if run.trained_on else "",
        f"{run.provenance.get('ranks')} ranks on {device}" if device else "",
    ]
    text = page(
        run.name,
        " · ".join(filter(None, facts)),
        top_cards(run),
        sections_of(run),
        warnings=warnings_of(run),
        refresh=refresh,
    )
    return _write(path, PAGE_FILE, text)


def make_comparison_page(paths: Sequence[Path]) -> Path:
    """Write ``report/comparison.html`` of the first run, which compares all of them; return its path."""
    runs = [read_run(path) for path in paths]
    names = run_names([run.path for run in runs])
    try:
        found, why = compare_runs(paths), ""
    except UserError as e:
        found, why = None, f"The runs cannot be compared item by item: {e.what}."
    sections = [
        _metrics(runs, names, found),
        _curves(runs, names),
        _pareto(runs, names),
        *([_settings(names, found)] if found else []),
    ]
    known = [(value, name) for run, name in zip(runs, names) if (value := _value(run, "plcc")) is not None]
    top = [card("runs", f"{len(runs)}")]
    if known:
        top.append(card("best PLCC", f"{max(known)[0]:.3f}", max(known)[1]))
    if found:
        top.append(card("items that all scored", f"{found.items:,}", f"split {found.split}"))
    text = page(
        "Comparison: " + ", ".join(names),
        f"The baseline of all differences is {names[0]}.",
        top,
        sections,
        warnings=[why] if why else [],
    )
    return _write(paths[0], COMPARISON_FILE, text)


def _write(run: Path, name: str, text: str) -> Path:
    folder = run / REPORT_DIR
    folder.mkdir(exist_ok=True)
    atomic_write_text(folder / name, text)
    return folder / name


def _metric(run: RunData, name: str) -> dict[str, Any]:
    return dict((run.judgement or {}).get("metrics", {}).get(name) or {})


def _value(run: RunData, name: str) -> float | None:
    value: float | None = _metric(run, name).get("value")
    return value


def _metrics(runs: Sequence[RunData], names: Sequence[str], found: Comparison | None) -> Section:
    """Every run's metrics with intervals, and each difference from the first as a sentence."""
    short = [label.split(" ")[0] for label in LABELS.values()]
    head = ["run", "step", "items", *short, "PLCC from", "to", "CES paper's", "CES strict"]
    rows: list[list[Any]] = []
    for run, name in zip(runs, names):
        values = [_value(run, m) for m in LABELS]
        ends = _metric(run, "plcc").get("interval_95") or (None, None)
        ces = [run.row.get("ces_mac_linear"), run.row.get("ces_flop_attention")]
        rows.append([name, run.row.get("step"), len(run.rows), *values, *ends, *ces])
    says = []
    for name, differences in zip(names[1:], found.differences if found else []):
        for metric in ("plcc", "srcc", "rmse"):
            difference = differences.get(metric)
            if difference is not None:
                ends = difference.interval
                plain = {"value": difference.value, "interval_95": [ends.low, ends.high] if ends else None}
                says.append(say_difference(name, names[0], metric, plain, runs[0].target.suffix))
    note = "Differences: paired bootstrap on the items that all runs scored. CES at the padded length."
    return section("metrics", "Metrics", says=says, tables=[table(Table(head, rows, note=note))])


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> Section:
    """Validation and training of all runs over the epochs, where they have them, else over the steps."""

    def epoch_of(run: RunData) -> float | None:
        last = run.train[-1] if run.train else {}
        epochs, step = number(last, "epoch"), last.get("step")
        return epochs / step if epochs and step else None

    scales = [epoch_of(run) for run in runs]
    by_epoch = all(s is not None for s in scales)

    def points(i: int, rows: Any, key: str) -> list[tuple[float, float]]:
        scale = (scales[i] or 1.0) if by_epoch else 1.0
        return [(scale * r["step"], v) for r in rows if (v := number(r, key)) is not None]

    figures = []
    for title, key in (
        ("Validation PLCC", "plcc"),
        (f"Validation RMSE{runs[0].target.label}", "rmse"),
        ("Training loss", "loss"),
    ):
        lines = []
        for i, (run, name) in enumerate(zip(runs, names)):
            split = str(run.config.get("data.eval_split") or "val")
            rows = run.train if key == "loss" else run.curves.get(split, ())
            lines.append(Line(name, points(i, rows, key), key != "loss", i, smooth=key == "loss"))
        drawing = charts.line_chart(title, lines, "epoch" if by_epoch else "step", log=key == "loss")
        figures.append(figure(title, drawing, key=lines))
    return section("curves", "Curves", columns=3, figures=figures)


def _pareto(runs: Sequence[RunData], names: Sequence[str]) -> Section:
    """PLCC over C in both conventions."""
    figures = []
    for key, label in (
        ("c_mac_linear", "C, paper's convention"),
        ("c_flop_attention", "C, strict convention"),
    ):
        places = [
            Place(name, float(c), plcc, _metric(run, "plcc").get("interval_95"), i)
            for i, (run, name) in enumerate(zip(runs, names))
            if (c := run.row.get(key)) is not None and (plcc := _value(run, "plcc")) is not None
        ]
        title = f"PLCC over {label}"
        note = "Dashed: what no cheaper run reaches. Whiskers: 95 % interval."
        figures.append(figure(title, charts.pareto_chart(title, places, label, "PLCC"), note))
    return section("pareto", "Accuracy against cost", figures=figures)


def _settings(names: Sequence[str], found: Comparison) -> Section:
    rows = [[key, *("–" if v is None else str(v) for v in values)] for key, values in found.settings.items()]
    intro = "" if rows else "No setting differs."
    tables = [table(Table(("setting", *names), rows))] if rows else []
    return section("settings", "Settings that differ", intro, tables=tables)
