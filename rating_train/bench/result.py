"""What a benchmark found: rows with a limit that was taken in the same run; as a table, as JSON, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.log import number, text_table

#: What is measured by default, in this order; each is a method of :class:`rating_train.bench.parts.Bench`.
PARTS = ("loader", "forward", "step", "train")
#: What is measured only where it is asked for.
MORE_PARTS = ("features", "attention", "profile")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: loader, forward, step, train, or one that is measured where it is asked for.
        name: what was measured.
        value: the median of the rounds.
        unit: of the value and of the limit.
        spread: smallest and largest of the rounds.
        limit: the most that could be reached, measured in the same run; ``None`` where there is no such thing.
        limit_name: what the limit is.
        larger_is_better: whether a larger value is faster; ``None`` for what is no speed.
    """

    part: str
    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    limit: float | None = None
    limit_name: str = ""
    larger_is_better: bool | None = True

    @property
    def ratio(self) -> float | None:
        """The value as a share of its limit."""
        return self.value / self.limit if self.limit else None

    @property
    def key(self) -> str:
        """What the row is known by in a comparison."""
        return f"{self.part}: {self.name} [{self.unit}]"


def as_json(machine: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the result as JSON values."""
    return {
        "machine": dict(machine),
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
    }


def render(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    body = [
        [
            f"{row.part}: {row.name}",
            number(row.value),
            f"{number(row.spread[0])} to {number(row.spread[1])}" if row.spread else "",
            row.unit,
            f"{100 * row.ratio:.1f}%" if row.ratio is not None else "",
            f"{number(row.limit)} {row.limit_name}" if row.limit is not None else "",
        ]
        for row in rows
    ]
    return "\n".join(text_table(["", "median", "rounds", "unit", "of the limit", "limit"], body))


def read_result(path: Path) -> dict[str, Row]:
    """Read the rows that ``--json`` wrote, by their keys.

    Raises:
        UserError: the file is none of ours.
    """
    try:
        rows = [
            Row(**{name: value for name, value in row.items() if name != "ratio"})
            for row in read_json(path)["rows"]
        ]
        found = {row.key: row for row in rows if isinstance(row.value, (int, float))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as e:
        raise UserError(
            f"no result of `rating-train bench` can be read ({type(e).__name__}: {e})",
            where=path,
            fix="give a file that `rating-train bench CONFIG --json FILE` wrote",
        ) from e
    return found


@dataclass(frozen=True)
class Difference:
    """A row of two runs. ``change`` is how much faster the new one is: 0.1 is 10 %, negative is slower."""

    key: str
    before: float
    now: float
    change: float


def compare(before: Mapping[str, Row], now: Sequence[Row]) -> list[Difference]:
    """Return the speeds that both runs measured."""
    found = []
    for row in now:
        old = before.get(row.key)
        if old is None or row.larger_is_better is None or old.value <= 0 or row.value <= 0:
            continue
        ratio = row.value / old.value if row.larger_is_better else old.value / row.value
        found.append(Difference(row.key, old.value, row.value, ratio - 1))
    return found


def render_comparison(differences: Sequence[Difference], tolerance: float) -> str:
    """Return a table of two runs, with a mark where the new one is slower by more than ``tolerance``."""
    body = [
        [
            d.key,
            number(d.before),
            number(d.now),
            f"{100 * d.change:+.1f}%",
            "SLOWER" if is_slower(d, tolerance) else "",
        ]
        for d in differences
    ]
    return "\n".join(text_table(["", "before", "now", "faster by", ""], body))


def is_slower(difference: Difference, tolerance: float) -> bool:
    """Return whether the new run is slower by more than a share ``tolerance``."""
    return difference.change < -tolerance
