"""Read Arrow files as the ``datasets`` library of Hugging Face writes them: rows in order, images by their place.

The file is mapped into memory, and an image is read from there when its bytes are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rating_train.errors import UserError
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.tables.pictures import ImageColumns, Place, bytes_of, columns_of, import_pyarrow
from rating_train.prepare.tables.table import read_table

SUFFIX = ".arrow"
_FILE_MAGIC = b"ARROW1"  # the format with random access; `datasets` writes the other one, a stream
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_rows(path: str, images: ImageColumns | None = None) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Return the column names of an Arrow file, and its rows as Python values, with places for the images.

    Args:
        path: the file.
        images: which binary columns hold images; ``None``: those without a value that is text.

    Raises:
        UserError: pyarrow is not installed, the file is not Arrow, or is damaged (also while its rows are read).
    """
    table = _table(path)
    return list(table.column_names), _rows(table, path, images)


def read_arrow(source: str, reading: Reading) -> Iterator[Raw]:
    """Yield the rows of an Arrow file.

    Raises:
        UserError: it lacks columns, or as :func:`arrow_rows`.
    """
    header, rows = arrow_rows(source, reading.image_columns)
    yield from read_table(header, rows, source, reading, "Arrow schema lacks")


def image_at(place: Place) -> bytes:
    """Return the bytes of an image.

    Raises:
        UserError: as :func:`arrow_rows`.
        LookupError: there is none.
    """
    return bytes_of(_table(place.file).column(place.column)[place.row], place.number)


def _table(path: str) -> Any:
    try:
        found = os.stat(path)
    except OSError as e:
        raise UserError(f"cannot read the Arrow file ({e.strerror})", where=path) from e
    return _mapped(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)  # mapped, not loaded
def _mapped(path: str, mtime_ns: int, size: int) -> Any:
    """Return a file as a table whose values stay in the file; the stamp is that of its content."""
    arrow = import_pyarrow(path, "reading Arrow files", "ipc")
    try:
        with open(path, "rb") as file:
            is_stream = file.read(len(_FILE_MAGIC)) != _FILE_MAGIC
            file.seek(max(0, size - len(_STREAM_END)))
            if (
                is_stream and file.read() != _STREAM_END
            ):  # a stream may end anywhere: pyarrow would not notice
                raise arrow.ArrowInvalid("its end is missing")
        mapped = arrow.memory_map(path)
        return (arrow.ipc.open_stream if is_stream else arrow.ipc.open_file)(mapped).read_all()
    except (arrow.ArrowException, OSError) as e:
        raise _damaged(path, e) from e


def _damaged(path: str, error: Exception) -> UserError:
    said = str(error).partition("\n")[0]
    return UserError(f"cannot read the Arrow file ({said})", where=path, fix="fetch or save it again")


def _rows(table: Any, path: str, images: ImageColumns | None) -> Iterator[tuple[Any, ...]]:
    first = 0
    for batch in table.to_batches():
        yield from zip(*columns_of(batch, first, path, "arrow", images))
        first += batch.num_rows
