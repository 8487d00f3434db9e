"""Read a catalogue in Parquet through DuckDB, a few thousand rows at a time, in the file's order.

A file with images in its rows is read through ``pyarrow`` instead (:mod:`.parquet_pictures`).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from typing import Any

from rating_train.errors import UserError
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.tables.parquet_pictures import picture_rows
from rating_train.prepare.tables.pictures import ImageColumns, text_of
from rating_train.prepare.tables.table import read_table

SUFFIX = ".parquet"
_ROWS_AT_ONCE = 2048
_MEMORY = "1GiB"
_ALL = "SELECT * FROM read_parquet($1)"


def parquet_rows(
    path: str, images: ImageColumns | None = None
) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Return the column names of a Parquet file, and its rows as Python values.

    Lists come as lists and structs as dictionaries; images as their places, other binary values as texts.

    Args:
        path: the file.
        images: which binary columns hold images; ``None``: those without a value that is text.

    Raises:
        UserError: the file is not Parquet, or is damaged (also while its rows are read).
    """
    import duckdb  # late: other kinds of source do not need it

    try:
        db = _database()
        names, types = _schema(db, path)
        if _picture_columns(names, types, images):
            return names, picture_rows(path, images)
        result = db.execute(_ALL, [glob.escape(path)])
    except duckdb.Error as e:
        raise _damaged(path, e) from e

    is_binary = [_is_pictures(kind) for kind in types]

    def rows() -> Iterator[tuple[Any, ...]]:
        try:
            while block := result.fetchmany(_ROWS_AT_ONCE):
                if any(is_binary):
                    yield from (
                        tuple(text_of(v) if b else v for b, v in zip(is_binary, row)) for row in block
                    )
                else:
                    yield from block
        except duckdb.Error as e:
            raise _damaged(path, e) from e

    return names, rows()


def holds_pictures(path: str, images: ImageColumns | None = None) -> bool:
    """Whether a column of the file holds images; not of a file that cannot be read, which is reported elsewhere.

    Args:
        path: the file.
        images: which binary columns hold images; ``None``: any may.
    """
    import duckdb

    try:
        return _picture_columns(*_schema(_database(), path), images)
    except duckdb.Error:
        return False


def _database() -> Any:
    import duckdb

    # Bounded: a small file may declare values that expand to any size. By default DuckDB keeps the order of rows.
    return duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "threads": 1})


def _schema(db: Any, path: str) -> tuple[list[str], list[Any]]:
    """Return names and types of the columns, as DuckDB has them."""
    relation = db.sql(_ALL, params=[glob.escape(path)])
    return list(relation.columns), list(relation.types)


def _picture_columns(names: list[str], types: list[Any], images: ImageColumns | None) -> bool:
    """Whether a column holds images: a struct of bytes, or a binary one that is read as images."""
    wanted = names if images is None else images(names)
    return any(
        _is_pictures(kind) and (_one(kind).id == "struct" or name in wanted)
        for name, kind in zip(names, types)
    )


def _is_pictures(kind: Any) -> bool:
    """Whether a column of this type of DuckDB may hold images, as :func:`~.pictures.is_pictures` says."""
    kind = _one(kind)
    fields = dict(kind.children) if kind.id == "struct" else {"bytes": kind}
    return "bytes" in fields and fields["bytes"].id == "blob"


def _one(kind: Any) -> Any:
    """Return the type of the values in a list; of anything else, its own."""
    return dict(kind.children)["child"] if kind.id == "list" else kind


def _damaged(path: str, error: Exception) -> UserError:
    said = str(error).partition("\n")[0]
    return UserError(f"cannot read the Parquet file ({said})", where=path, fix="fetch the file again")


def read_parquet(source: str, reading: Reading) -> Iterator[Raw]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: it lacks columns, or cannot be read.
    """
    header, rows = parquet_rows(source, reading.image_columns)
    yield from read_table(header, rows, source, reading, "Parquet schema lacks")
