"""Read a catalogue in Parquet through DuckDB, a few thousand rows at a time, in the file's order."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

from rating_train.errors import UserError
from rating_train.prepare.records.columns import columns_or_check
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.listing import to_listing
from rating_train.prepare.records.reading import Reading
from rating_train.shards.schema import Dropped, Listing

_ROWS_AT_ONCE = 2048
_MEMORY = "1GiB"


def parquet_rows(path: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Return the column names of a Parquet file, and its rows as Python values.

    Lists come as lists and structs as dictionaries.

    Raises:
        UserError: the file is not Parquet, or is damaged (also while its rows are read).
    """
    import duckdb  # late: other kinds of source do not need it

    try:
        # Bounded: a small file may declare values that expand to any size. By default DuckDB keeps the order of rows.
        db = duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "threads": 1})
        result = db.execute("SELECT * FROM read_parquet(?)", [glob.escape(path)])
    except duckdb.Error as e:
        raise _damaged(path, e) from e
    names = [column[0] for column in result.description]

    def rows() -> Iterator[tuple[Any, ...]]:
        try:
            while block := result.fetchmany(_ROWS_AT_ONCE):
                yield from block
        except duckdb.Error as e:
            raise _damaged(path, e) from e

    return names, rows()


def _damaged(path: str, error: Exception) -> UserError:
    said = str(error).partition("\n")[0]
    return UserError(f"cannot read the Parquet file ({said})", where=path, fix="fetch the file again")


def read_parquet(source: str, reading: Reading) -> Iterator[Raw]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: it lacks columns, or cannot be read.
    """
    header, rows = parquet_rows(source)
    columns = columns_or_check(header, source, reading, "Parquet schema lacks")
    reading.show_unread(header, source)
    if columns is not None and "images" in header:  # nested, as Amazon's own files have them
        columns["images"] = header.index("images")
    for number, row in enumerate(rows, start=1):
        yield Raw(source, number, partial(_parse_row, row, header, columns, source, number, reading))


def _parse_row(
    row: tuple[Any, ...],
    header: list[str],
    columns: dict[str, int] | None,
    source: str,
    line: int,
    reading: Reading,
) -> Listing | Dropped:
    if columns is None:
        return to_listing(reading.record(dict(zip(header, map(_plain, row)))), source, line, reading)
    record = {field: row[i] for field, i in columns.items()}
    return to_listing({k: v for k, v in record.items() if v != ""}, source, line, reading)


def _plain(value: Any) -> Any:
    """Return a DECIMAL as a float."""
    return float(value) if isinstance(value, Decimal) else value
