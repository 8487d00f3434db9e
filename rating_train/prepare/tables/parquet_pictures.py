"""Parquet files with images in their rows, as Hugging Face's hub has them: a few rows at a time, through ``pyarrow``.

A row group is read from its beginning, so images are cheap in the order of the rows, in which a build asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from rating_train.errors import UserError
from rating_train.prepare.tables.pictures import ImageColumns, Place, bytes_of, columns_of, import_pyarrow

#: Of the rows that are held at once, uncompressed; at least one row.
_BYTES_AT_ONCE = 16 << 20
_ROWS_AT_ONCE = 2048


def picture_rows(path: str, images: ImageColumns | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a file as Python values, with places for the images.

    Args:
        path: the file.
        images: which binary columns hold images; ``None``: those without a value that is text.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged.
    """
    first = 0
    file, damage = _open(path)
    try:
        for group in range(file.num_row_groups):
            for batch in _batches(file, group):
                yield from zip(*columns_of(batch, first, path, "parquet", images))
                first += batch.num_rows
    except damage as e:
        raise _damaged(path, e) from e


def image_at(place: Place) -> bytes:
    """Return the bytes of an image.

    Raises:
        UserError: as :func:`picture_rows`.
        LookupError: there is none.
    """
    try:
        found = os.stat(place.file)
    except OSError as e:
        raise UserError(f"cannot read the Parquet file ({e.strerror})", where=place.file) from e
    column = _column(place.file, found.st_mtime_ns, found.st_size, place.column)
    return bytes_of(column.value(place.row), place.number)


class _Column:
    """One column of a file, whose values are asked for by their rows, mostly upwards."""

    def __init__(self, path: str, number: int) -> None:
        self._path, (self._file, self._damage) = path, _open(path)
        self._name = self._file.schema_arrow.names[number]  # IndexError is a LookupError
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._group, self._first = -1, 0
        self._rest: Iterator[Any] = iter(())
        self._values: Any = ()

    def value(self, row: int) -> Any:
        """Return the scalar of a row.

        Raises:
            UserError: the file is damaged.
            LookupError: there is no such row.
        """
        if not 0 <= row < self._starts[-1]:
            raise LookupError(f"the file has no row {row}")
        try:
            group = next(g for g, end in enumerate(self._starts[1:]) if row < end)
            if group != self._group or row < self._first:
                self._group, self._first, self._values = group, self._starts[group], ()
                self._rest = _batches(self._file, group, [self._name])
            while row >= self._first + len(self._values):
                self._first += len(self._values)
                self._values = next(self._rest).column(self._name)
            return self._values[row - self._first]
        except self._damage as e:
            self._group = -1
            raise _damaged(self._path, e) from e


@lru_cache(maxsize=8)
def _column(path: str, mtime_ns: int, size: int, number: int) -> _Column:
    """Return a column as it was left; the stamp is that of the file's content."""
    return _Column(path, number)


def _open(path: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return a file, and what reading it may raise."""
    arrow = import_pyarrow(path, "reading images from Parquet files", "parquet")
    damage = (arrow.ArrowException, OSError, StopIteration)
    try:
        return arrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False), damage
    except damage as e:
        raise _damaged(path, e) from e


def _batches(file: Any, group: int, columns: list[str] | None = None) -> Iterator[Any]:
    """Yield the rows of a row group, as many at once as memory is meant for."""
    about = file.metadata.row_group(group)
    rows = _BYTES_AT_ONCE * about.num_rows // max(1, about.total_byte_size)
    rows = max(1, min(rows, _ROWS_AT_ONCE))
    return iter(file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False))


def _damaged(path: str, error: Exception) -> UserError:
    said = str(error).partition("\n")[0]
    return UserError(f"cannot read the Parquet file ({said})", where=path, fix="fetch the file again")
