"""Rows of a file with a schema (Parquet, Arrow) to listings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from rating_train.prepare.records.columns import columns_or_check
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.listing import to_listing
from rating_train.prepare.records.reading import Reading
from rating_train.shards.schema import Dropped, Listing


def read_table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], source: str, reading: Reading, what: str
) -> Iterator[Raw]:
    """Yield the rows of a table, which are numbered from 1.

    Args:
        header: names of the columns.
        rows: a value for each of them: lists as lists, structs as dictionaries.
        source: the file.
        reading: the task, and how its columns are read.
        what: how the sentence about missing columns begins.

    Raises:
        UserError: columns are missing.
    """
    columns = columns_or_check(header, source, reading, what)
    reading.show_unread([name for name in header if name != "images" or not reading.of_amazon], source)
    if columns is not None and "images" in header:  # nested, as Amazon's own files have them
        columns["images"] = list(header).index("images")
    for number, row in enumerate(rows, start=1):
        yield Raw(source, number, partial(_parse_row, row, header, columns, source, number, reading))


def _parse_row(
    row: Sequence[Any],
    header: Sequence[str],
    columns: dict[str, int] | None,
    source: str,
    line: int,
    reading: Reading,
) -> Listing | Dropped:
    if columns is None:
        return to_listing(reading.record(dict(zip(header, map(_plain, row)))), source, line, reading)
    record = {field: _plain(row[i]) for field, i in columns.items()}
    return to_listing({k: v for k, v in record.items() if v != ""}, source, line, reading)


def _plain(value: Any) -> Any:
    """Return a DECIMAL as an integer where it is whole, so that a long id keeps its digits, else as a float."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)
