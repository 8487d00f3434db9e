"""``rating-train prepare --init-task FILE``: a task file proposed from the columns of a source, to be looked at.

What a column is for is told by its name and by its first values, never by its name alone. What is not certain stands in
a comment beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.config.task import RESERVED, Task, load_task
from rating_train.errors import UserError
from rating_train.files import fsync_path
from rating_train.prepare.records.folders import expand_sources
from rating_train.prepare.records.listing import to_listing
from rating_train.prepare.records.numbers import NotANumber, decimal_sign, is_absent, read_number
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.sources import first_records
from rating_train.shards.schema import Listing

LOOKED_AT = 1000  # records
SHOWN = 10

_PICTURE = re.compile(r"(?i)\.(jpe?g|png|webp|gif|bmp|tiff?)(\?.*)?$|^(arrow|parquet):\d")

#: Words of a column's name, the most telling first.
_TARGETS = (
    "rating",
    "stars",
    "score",
    "mos",
    "quality",
    "grade",
    "price",
    "target",
    "label",
    "value",
    "days",
    "cost",
)
_COUNTS = ("rating_count", "rating_number", "votes", "reviews", "count", "number", "num", "n", "weight")
_IDS = ("id", "asin", "sku", "key", "uuid", "isbn", "ean", "name", "file", "photo", "image")
_GROUPS = ("group", "parent", "family", "variant")
_CATEGORIES = ("category", "genre", "department", "class", "type", "kind")
_IMAGES = ("image", "img", "photo", "picture", "poster", "thumbnail", "cover")
_PRICES = ("price", "cost", "amount", "fee")


@dataclass(frozen=True)
class Column:
    """A column of the source with its first values, of which none is absent."""

    name: str
    values: list[Any]
    decimal: str

    @property
    def numbers(self) -> list[float]:
        """Its values as numbers, without those that are not known; empty where one is no number."""
        try:
            return [_number(value, self.decimal) for value in self.values if not is_absent(value)]
        except (NotANumber, TypeError, OverflowError):
            return []

    @property
    def is_text(self) -> bool:
        """Whether it holds texts, or lists of texts, that are neither numbers nor names of pictures."""
        texts = [v if isinstance(v, str) else " ".join(v) if _is_texts(v) else None for v in self.values]
        said = [text for text in texts if text is not None]
        letters = sum(any(map(str.isalpha, text)) for text in said)
        return bool(said) and len(said) == len(texts) and 2 * letters > len(said) and not self.is_picture

    @property
    def is_picture(self) -> bool:
        """Whether its values name pictures, or hold them."""
        flat = [one for v in self.values for one in (v if isinstance(v, list) else [v])]
        named = [v.get("path") if isinstance(v, Mapping) else v for v in flat]
        return bool(named) and all(isinstance(v, str) and _PICTURE.search(v) for v in named)

    def rank(self, words: Sequence[str]) -> int:
        """Return the place in ``words`` of the first that the name has, or ends in; more than all if it has none."""
        parts = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).lower())
        name = "_".join(parts)
        found = [i for i, word in enumerate(words) if word in parts or word == name]
        return min(found, default=len(words))


def propose_task(file: str | Path, source: Sequence[str], reading: Reading) -> tuple[Task, list[Listing]]:
    """Write a task file for a source.

    Args:
        file: the file to write; it must not exist.
        source: as of ``--source``; its first file is looked at.
        reading: how CSV files are read.

    Returns:
        The task that the file says, and the first listings as it reads them.

    Raises:
        UserError: the file exists, the source has no records, or no column that could be the id or the target.
    """
    if Path(file).exists():
        raise UserError("the task file exists already", where=file, fix="give another --init-task")
    first = expand_sources(source)[0]
    records = first_records(first, LOOKED_AT, reading)
    if not records:
        raise UserError("the source has no records", where=first, fix="check --source")
    text = _proposed(_columns(records, reading.decimal), len(records), first)
    with open(file, "x", encoding="utf-8") as out:
        out.write(text)
    fsync_path(Path(file))
    task = load_task(file)
    own = Reading(task, unrated="predict", decimal=reading.decimal or _sign(records, task.target.column))
    read = (to_listing(own.record(record), first, 0, own) for record in records[:SHOWN])
    return task, [item for item in read if isinstance(item, Listing)]


def _columns(records: Sequence[Mapping[str, Any]], decimal: str) -> list[Column]:
    names = list(dict.fromkeys(name for record in records for name in record))
    return [
        Column(
            name,
            [v for record in records if (v := record.get(name)) is not None and v != "" and v != []],
            decimal or _sign(records, name),
        )
        for name in names
    ]


def _sign(records: Sequence[Mapping[str, Any]], name: str) -> str:
    return decimal_sign(v for record in records if isinstance(v := record.get(name), str))


def _number(value: Any, decimal: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = read_number(value, decimal) if isinstance(value, str) else float(value)
    if math.isinf(number):
        raise NotANumber("infinite")
    return number


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _best(
    columns: Sequence[Column], words: Sequence[str], fits: Callable[[Column], object], named: bool = True
) -> Column | None:
    """Return the column that fits with the most telling name; with ``named``, only one that has such a name."""
    fitting = [c for c in columns if c.values and fits(c) and (not named or c.rank(words) < len(words))]
    return min(fitting, key=lambda c: (c.rank(words), len(c.name.split("_"))), default=None)


def _proposed(columns: list[Column], records: int, source: str) -> str:
    """Return the text of the task file."""
    left = list(columns)

    def take(words: Sequence[str], fits: Callable[[Column], object], named: bool = True) -> Column | None:
        found = _best(left, words, fits, named)
        if found is not None:
            left.remove(found)
        return found

    def is_count(column: Column) -> bool:
        return bool(column.numbers) and min(column.numbers) >= 0

    identity = take(_IDS, lambda c: _is_id(c, records))
    weight = take(_COUNTS, is_count)
    identity = identity or take(_IDS, lambda c: _is_id(c, records) and not _is_target(c), named=False)
    if identity is None:
        raise UserError(
            "no column names the items: each needs a text or integer of its own",
            where=source,
            expected=f"one of {', '.join(c.name for c in columns[:40])} to be unique",
            fix="add such a column",
        )
    target = take(_TARGETS, lambda c: c.numbers) or take(_TARGETS, lambda c: c.numbers, named=False) or weight
    if target is None:
        raise UserError(
            "no column holds numbers to predict",
            where=source,
            expected=f"numbers in one of {', '.join(c.name for c in columns[:40])}",
            fix="check --delimiter and --decimal, or write the task by hand (docs/tasks.md)",
        )
    weight = None if weight is target else weight
    group = take(_GROUPS, lambda c: not c.is_text or len(set(map(str, c.values))) < len(c.values))
    images = [c for c in ([identity, *left]) if c.is_picture or _amazon_path(c)]
    images.sort(key=lambda c: (c is identity, c.rank(_IMAGES)))
    left = [c for c in left if c not in images]
    fields = [c for c in left if c.is_text]
    category = _best(fields, _CATEGORIES, lambda c: True)
    unread = [c.name for c in left if c not in fields]
    if not fields and not images:
        raise UserError("no column holds a text or names an image", where=source, fix="see docs/tasks.md")
    lines = [
        f"# Proposed from the first {records:,} records of {Path(source).name}. Check every line: docs/tasks.md",
        f"question: {_quoted(_question(target, bool(images), bool(fields)))}",
        *_target_lines(target),
        "# The texts, in the order of the prompt; cut to data.field_chars characters each.",
        "fields:" if fields else "fields: []",
        *_field_lines(fields),
        f"id: {_quoted(identity.name)}",
        f"group: {_quoted(group.name if group else '')}  # the same for variants of one item, which stay in one split",
        f"category: {_quoted(category.name if category else '')}  # for slices",
        *_weight_lines(weight),
        f"images: {json.dumps([_amazon_path(c) or c.name for c in images], ensure_ascii=False)}",
    ]
    lines += [f"# Not read: {', '.join(unread)}"] if unread else []
    return "\n".join(lines) + "\n"


def _is_id(column: Column, records: int) -> bool:
    """Whether each record has a value of its own: an integer, or one word or file name."""
    values = column.values
    simple = all(isinstance(v, str | int) and not isinstance(v, bool) for v in values)
    return (
        simple
        and len(values) == records == len(set(values))
        and all(len(str(v).split()) == 1 for v in values)
    )


def _is_target(column: Column) -> bool:
    """Whether the name is that of a number to predict, or the values are numbers with a fraction."""
    return column.rank(_TARGETS) < len(_TARGETS) or any(n != int(n) for n in column.numbers)


def _amazon_path(column: Column) -> str:
    """Return the path to the first picture where a column has pictures by size, as in Amazon Reviews 2023, else "".

    Both forms of the data set are known: ``{"large": [URL, ...], ...}`` and ``[{"large": URL, ...}, ...]``.
    """
    value = column.values[0] if column.values else None
    if isinstance(value, dict) and isinstance(value.get("large"), list):
        return f"{column.name}.large[0]"
    if isinstance(value, list) and isinstance(value[0], dict) and isinstance(value[0].get("large"), str):
        return f"{column.name}[0].large"
    return ""


def _question(target: Column, image: bool, text: bool) -> str:
    given = " and ".join([*(["its image"] if image else []), *(["its text"] if text else [])])
    return f"The {target.name.replace('_', ' ')} of this item, given {given}."


def _target_lines(target: Column) -> list[str]:
    numbers = target.numbers
    low, high = min(numbers), max(numbers)
    lines = [
        f"# Seen: {low:g} to {high:g} in {len(numbers):,} records. A value outside the bounds is left out."
    ]
    price = target.rank(_PRICES) < len(_PRICES) and low >= 0
    lower, upper = (None, None) if price else _bounds(low, high)
    lines += [
        "target:",
        f"  column: {_quoted(target.name)}",
        f"  name: {_quoted(target.name)}",
        '  unit: ""  # such as points or EUR',
        f"  lower: {_bound(lower)}  # null: none",
        f"  upper: {_bound(upper)}",
    ]
    if price:
        lines.append(f"  transform: {'log' if low > 0 else 'log1p'}  # errors of prices are relative")
    return lines


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    """Return the usual scale that holds the values best, or no bounds."""
    scales = [(1.0, 5.0), (0.0, 1.0), (0.0, 5.0), (1.0, 10.0), (0.0, 10.0), (0.0, 100.0)]
    for lower, upper in scales:
        if lower <= low and high <= upper and high > lower + (upper - lower) / 4:
            return lower, upper
    return None, None


def _bound(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"


def _field_lines(fields: Sequence[Column]) -> list[str]:
    lines, taken = [], set(RESERVED)
    for column in fields:
        name = re.sub(r"\W+", "_", column.name).strip("_").lower() or "text"
        name = name if name.isidentifier() else f"text_{name}"
        while name in taken:
            name += "_text"
        taken.add(name)
        source = "" if name == column.name else f"columns: [{_quoted(column.name)}], "
        words = _quoted(f"{column.name.replace('_', ' ').capitalize()}:")
        lines.append(f"- {{name: {name}, {source}words: {words}}}")
    return lines


def _weight_lines(weight: Column | None) -> list[str]:
    if weight is None:
        return ['weight: ""  # a number of ratings behind each target, or any other weight']
    counts = all(n == int(n) for n in weight.numbers) and weight.rank(("weight",)) > 0
    comment = "a number of ratings: --min-rating-count looks at it" if counts else "any number of 0 or more"
    return [
        f"weight: {_quoted(weight.name)}",
        f"weight_kind: {'ratings' if counts else 'any'}  # {comment}",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
