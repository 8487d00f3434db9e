"""The lines of a training log that people read: one format of numbers, one table for each evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rating_train.log import duration, number, text_table
from rating_train.model.accounting import ces_line
from rating_train.scoring.metrics import EXTRA_METRICS, LARGER_IS_BETTER, METRICS

Row = Mapping[str, Any]


def step_line(row: Row, total_steps: int) -> str:
    """Return the line of a row of train.jsonl: every number in four digits, and the time left."""
    left = (total_steps - row["step"]) * row["step_seconds"]
    speed = f", {100 * row['mfu']:.0f}% of the device" if row.get("mfu") is not None else ""
    return (
        f"step {row['step']}/{total_steps}: loss {number(row['loss'])}, grad norm {number(row['grad_norm'])}, "
        f"lr {number(row['lr'])}, {number(row['samples_per_second'])} items/s{speed}, "
        f"waiting for data {100 * (row['data_wait_fraction'] or 0):.0f}%, {duration(left)} left"
    )


def evaluation_lines(
    row: Row, earlier: Sequence[Row], metric: str, seconds: float, left_seconds: float | None
) -> str:
    """Return what an evaluation is told as: a table with the previous and the best so far, CES, the time left.

    Args:
        row: of eval.jsonl.
        earlier: rows of this run's evaluations before it, in order.
        metric: what the run selects its best checkpoint by; marked with a star.
        seconds: that the evaluation took.
        left_seconds: of training, or ``None`` where that is not known yet.
    """
    best = _best([*earlier, row], metric)
    if best is None:
        verdict = f"no {metric.upper()} so far"
    elif best is row:
        verdict = f"the best {metric.upper()} so far"
    else:
        verdict = f"best {metric.upper()} so far {number(best[metric])} at step {best['step']}"
    header = ["", f"step {row['step']}"]
    columns = [row]
    if earlier:
        header.append("before")
        columns.append(earlier[-1])
    if best is not None and best is not row:
        header.append(f"best (step {best['step']})")
        columns.append(best)
    body = [
        [
            f"{name.upper()}{' *' if name == metric else ''}",
            *(_metric(column.get(name)) for column in columns),
        ]
        for name in (*METRICS, *EXTRA_METRICS)
    ]
    why = row.get("undefined") or {}
    reasons = dict.fromkeys(why.values())
    lines = [
        f"evaluation at step {row['step']} ({duration(seconds)}): {row['n']:,} items; {verdict}",
        *text_table(header, body),
        *(
            f"undefined: {reason} ({', '.join(k.upper() for k in why if why[k] == reason)})"
            for reason in reasons
        ),
        ces_line(row),
    ]
    if left_seconds:
        lines.append(f"{duration(left_seconds)} of training left")
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _metric(value: float | None) -> str:
    """Return a metric in four decimals, so that a column lines up."""
    return "undefined" if value is None else f"{value:.4f}"


def _best(rows: Sequence[Row], metric: str) -> Row | None:
    """Return the row with the best metric, the first of equal ones; ``None`` where it is defined nowhere."""
    sign = 1 if LARGER_IS_BETTER[metric] else -1
    defined = [row for row in rows if row.get(metric) is not None]
    return max(defined, key=lambda row: sign * row[metric], default=None)
