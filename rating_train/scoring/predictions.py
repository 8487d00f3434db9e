"""Predictions, one per item: deduplicated, checked for coverage, written and read.

Data-parallel evaluation pads the last batch of a rank with items that another rank also scores, so the
gathered rows contain duplicates and, after a fault, gaps. Both would silently change a correlation:
duplicates are dropped only once they are known to agree, and a gap is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import atomic_write_text, read_json_lines

COLUMNS = ("id", "score", "rating", "category")
SUBMISSION_COLUMNS = ("item_id", "score", "params", "flops")

#: Two scores of one item may differ by this many stars: an item scored by two ranks is in two different
#: batches, and bf16 kernels sum in another order for another batch. A real mix-up (two items with one id,
#: weights that differ between ranks, dropout left on) differs by far more: RMSE is about 0.3.
DUPLICATE_TOLERANCE_STARS = 0.05

_NAMED = 5
_LOWEST, _HIGHEST = 1.0, 5.0  # stars, of a submitted score


@dataclass(frozen=True)
class Prediction:
    """One scored item.

    Attributes:
        id: the item's id, non-empty.
        score: the predicted rating in stars.
        rating: the true rating in stars, or ``None`` if unknown.
        category: the item's main category, or ``None`` if unknown.
        rating_count: the number of ratings behind ``rating``, or ``None`` if unknown.
        text_chars: characters of all text fields together, before any cut.
        group: name of the product group, whose items are resampled together.
        tokens: T of the item before padding: visual tokens, template and text.
    """

    id: str
    score: float
    rating: float | None = None
    category: str | None = None
    rating_count: int | None = None
    text_chars: int | None = None
    group: str | None = None
    tokens: int | None = None


def deduplicate(rows: Iterable[Prediction]) -> list[Prediction]:
    """Return the first row of each id, in order of first appearance.

    Args:
        rows: predictions, duplicates included.

    Raises:
        UserError: duplicates whose scores differ by more than :data:`DUPLICATE_TOLERANCE_STARS` (beyond 5: 1 %), or
            whose ratings or categories differ at all: they do not describe the same item.
    """
    first: dict[str, Prediction] = {}
    conflicts: list[str] = []
    for row in rows:
        kept = first.setdefault(row.id, row)
        if kept is row:
            continue
        # `not <=`, so that a NaN counts as a conflict.
        tolerance = DUPLICATE_TOLERANCE_STARS * max(
            1.0, abs(kept.score) / _HIGHEST
        )  # of other numbers: one percent
        if not abs(kept.score - row.score) <= tolerance:
            conflicts.append(f"{row.id}: scores {kept.score:.6g} and {row.score:.6g}")
        elif kept.rating != row.rating:
            conflicts.append(f"{row.id}: ratings {kept.rating} and {row.rating}")
        elif kept.category != row.category:
            conflicts.append(f"{row.id}: categories {kept.category!r} and {row.category!r}")
    if conflicts:
        raise UserError(
            f"{len(conflicts)} duplicate predictions disagree with the first of their id: "
            + _first_few(conflicts, "; "),
            where="predictions",
            expected="equal ratings and categories, and scores within "
            f"{DUPLICATE_TOLERANCE_STARS:g} (beyond 5: one percent)",
            fix="look for two items under one id, or for weights that differ between ranks",
        )
    return list(first.values())


def check_coverage(rows: Sequence[Prediction], expected_count: int | None = None) -> None:
    """Check that every item was scored exactly once.

    Args:
        rows: predictions after :func:`deduplicate`.
        expected_count: number of distinct items that must be present.

    Raises:
        UserError: repeated ids (the first 5, and how many), or a wrong count.
    """
    seen: dict[str, None] = {}
    problems: list[str] = []
    repeated = [row.id for row in rows if row.id in seen or seen.update({row.id: None})]
    if repeated:
        problems.append(f"{len(repeated)} repeated ({_first_few(repeated)})")
    if expected_count is not None and len(seen) != expected_count:
        problems.append(f"{len(seen)} distinct items, expected {expected_count}")
    if problems:
        raise UserError(
            "predictions do not cover the items: " + "; ".join(problems),
            where="predictions",
            expected="each expected item exactly once",
            fix="score the whole split again",
        )


def write_predictions(path: str | Path, rows: Iterable[Prediction]) -> None:
    """Write rows as JSON lines (``.jsonl``) or CSV (``.csv``), atomically.

    CSV has a header and leaves an unknown rating or category empty. Numbers read back bit-equal.

    Raises:
        UserError: another suffix, an empty id, or a score or rating that is not finite.
    """
    path = Path(path)
    write = _by_suffix(path, {".jsonl": _to_jsonl, ".csv": _to_csv})
    checked = [_checked(asdict(row), f"{path}: row {number}") for number, row in enumerate(rows, start=1)]
    atomic_write_text(path, write(checked))


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read predictions as :func:`write_predictions` writes them; other columns are ignored.

    Raises:
        UserError: no such file, another suffix, or a bad row (its line is named).
    """
    path = Path(path)
    read = _by_suffix(path, {".jsonl": _rows_of_jsonl, ".csv": _rows_of_csv})
    if not path.is_file():
        raise UserError("file not found", where=path)
    return [_checked(raw, where) for where, raw in read(path)]


def write_submission(path: str | Path, rows: Iterable[Prediction], params: float, flops: float) -> None:
    """Write the challenge's CSV: ``item_id``, ``score``, ``params`` (millions) and ``flops`` (billions).

    Scores are clipped to [1, 5] and written with 2 decimals.

    Args:
        path: the CSV file, written atomically.
        rows: one prediction per item.
        params: number of parameters (not millions).
        flops: operations per item (not billions). The file cannot name the convention: the paper's submission
            used multiply-accumulates without attention (``mac_linear``).

    Raises:
        UserError: no rows, repeated ids, a score that is not finite, or numbers that are not positive.
    """
    listed = list(rows)
    if not listed:
        raise UserError("no predictions to submit", where=path)
    check_coverage(listed)
    for name, value in (("params", params), ("flops", flops)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}", where=path, expected="a finite number above 0")
    cost = (f"{params / 1e6:.6f}", f"{flops / 1e9:.6f}")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SUBMISSION_COLUMNS)
    for number, row in enumerate(listed, start=1):
        checked = _checked(asdict(row), f"{path}: row {number}")
        score = min(max(checked.score, _LOWEST), _HIGHEST)
        writer.writerow((checked.id, f"{score:.2f}", *cost))
    atomic_write_text(path, buffer.getvalue())


def _first_few(names: Sequence[str], separator: str = ", ") -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more


def _by_suffix(path: Path, choices: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    try:
        return choices[path.suffix.lower()]
    except KeyError:
        raise UserError(
            f"unknown suffix {path.suffix!r} of a predictions file",
            where=path,
            expected=" or ".join(choices),
        ) from None


def _to_jsonl(rows: Iterable[Prediction]) -> str:
    return "".join(json.dumps(_known(r), allow_nan=False, ensure_ascii=False) + "\n" for r in rows)


def _known(row: Prediction) -> dict[str, Any]:
    """Return the columns of every file, and those others that are known."""
    return {name: value for name, value in asdict(row).items() if name in COLUMNS or value is not None}


def _to_csv(rows: Iterable[Prediction]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in rows:
        rating = "" if r.rating is None else repr(r.rating)
        writer.writerow((r.id, repr(r.score), rating, r.category or ""))
    return buffer.getvalue()


def _rows_of_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(read_json_lines(path), start=1):
        yield f"{path}: row {number}", row


def _rows_of_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8", newline="") as f:
        reader = csv.DictReader(f)
        missing = [c for c in ("id", "score") if c not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"no column {', '.join(missing)}", where=path, expected=", ".join(COLUMNS))
        for row in reader:
            yield f"{path}:{reader.line_num}", row


def _checked(raw: Any, where: str) -> Prediction:
    """Return a row of plain values as a :class:`Prediction`, or raise a UserError at ``where``."""
    if not isinstance(raw, Mapping):
        raise UserError(f"not an object but {type(raw).__name__}", where=where, expected=", ".join(COLUMNS))
    identity = raw.get("id")
    if not isinstance(identity, str) or not identity:
        raise UserError(f"id is {identity!r}", where=where, expected="a string that is not empty")
    score = _number(raw.get("score"), "score", where)
    if score is None:
        raise UserError("no score", where=where, expected="a finite number")
    category = raw.get("category")
    if category is not None and not isinstance(category, str):
        raise UserError(f"category is {category!r}", where=where, expected="a string or nothing")
    group = raw.get("group")
    return Prediction(
        identity,
        score,
        _number(raw.get("rating"), "rating", where),
        category or None,
        rating_count=_count(raw.get("rating_count"), "rating_count", where),
        text_chars=_count(raw.get("text_chars"), "text_chars", where),
        group=group if isinstance(group, str) and group else None,
        tokens=_count(raw.get("tokens"), "tokens", where),
    )


def _count(value: Any, name: str, where: str) -> int | None:
    number = _number(value, name, where)
    return None if number is None else int(number)


def _number(value: Any, name: str, where: str) -> float | None:
    """Return a finite float, or ``None`` for a missing or empty value."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is {value!r}", where=where, expected="a finite number")
    return number
