"""Read a catalogue in Parquet through DuckDB, a few thousand rows at a time, in the file's order."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from typing import Any

from rating_train.errors import UserError
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.table import read_table

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
    yield from read_table(header, rows, source, reading, "Parquet schema lacks")
