"""Read Arrow files as the ``datasets`` library of Hugging Face writes them: rows in order, images by their place.

An image is a struct of ``bytes`` and ``path``, or a binary value. Its bytes stay in the file, which is mapped into
memory, until they are asked for: a listing names it by its place, ``arrow:ROW:COLUMN:NUMBER:FILE`` (all from 0).
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from rating_train.errors import UserError
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.table import read_table

SUFFIX = ".arrow"
_FILE_MAGIC = b"ARROW1"  # the format with random access; `datasets` writes the other one, a stream
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_PLACE = re.compile(r"arrow:(\d+):(\d+):(\d+):(.+)", re.DOTALL)


class Place(NamedTuple):
    """Where the bytes of an image are: the row, the column, and the place in a list of images."""

    row: int
    column: int
    number: int
    file: str

    def __str__(self) -> str:
        return f"arrow:{self.row}:{self.column}:{self.number}:{self.file}"

    @classmethod
    def of(cls, image: str) -> Place | None:
        """Return the place that a listing's image names; ``None`` where it names something else."""
        found = _PLACE.fullmatch(image)
        return cls(int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None


def arrow_rows(path: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Return the column names of an Arrow file, and its rows as Python values, with places for the images.

    Raises:
        UserError: pyarrow is not installed, the file is not Arrow, or is damaged (also while its rows are read).
    """
    table = _table(path)
    return list(table.column_names), _rows(table, path)


def read_arrow(source: str, reading: Reading) -> Iterator[Raw]:
    """Yield the rows of an Arrow file.

    Raises:
        UserError: it lacks columns, or as :func:`arrow_rows`.
    """
    header, rows = arrow_rows(source)
    yield from read_table(header, rows, source, reading, "Arrow schema lacks")


def image_at(place: Place) -> bytes:
    """Return the bytes of an image.

    Raises:
        UserError: as :func:`arrow_rows`.
        LookupError: there is none.
    """
    value = _table(place.file).column(place.column)[place.row]
    if not _holds_images(value.type):
        raise LookupError("the column holds no image")
    if _is_list(value.type):
        value = value.values[place.number]
    if _is_picture(value.type):
        value = value["bytes"]
    data = value.as_py()
    if data is None:
        raise LookupError("the row holds no image")
    return bytes(data)


def _table(path: str) -> Any:
    try:
        found = os.stat(path)
    except OSError as e:
        raise UserError(f"cannot read the Arrow file ({e.strerror})", where=path) from e
    return _mapped(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)  # mapped, not loaded
def _mapped(path: str, mtime_ns: int, size: int) -> Any:
    """Return a file as a table whose values stay in the file; the stamp is that of its content."""
    arrow = _pyarrow(path)
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


def _pyarrow(path: str) -> Any:
    try:
        arrow = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.ipc")
    except ImportError as e:
        fix = "pip install 'rating_train[huggingface]', or save the data as Parquet or JSON lines"
        raise UserError("reading Arrow files needs the pyarrow package", where=path, fix=fix) from e
    return arrow


def _rows(table: Any, path: str) -> Iterator[tuple[Any, ...]]:
    first = 0
    for batch in table.to_batches():
        columns = [
            _places(values, path, column, first) if _holds_images(values.type) else values.to_pylist()
            for column, values in enumerate(batch.columns)
        ]
        yield from zip(*columns)
        first += batch.num_rows


def _places(values: Any, path: str, column: int, first: int) -> list[Any]:
    """Return the places of a column's images, or the paths of those that are not in the file."""
    if not _is_list(values.type):
        return [_named(here, Place(row, column, 0, path)) for row, here in enumerate(_heads(values), first)]
    heads = iter(_heads(values.flatten()))
    return [
        None if count is None else [_named(next(heads), Place(row, column, n, path)) for n in range(count)]
        for row, count in enumerate(values.value_lengths().to_pylist(), first)
    ]


def _heads(values: Any) -> list[tuple[bool, str | None]]:
    """Return of each image whether its bytes are here, and its path."""
    pictures = _is_picture(values.type)
    compute = importlib.import_module("pyarrow.compute")
    data = compute.struct_field(values, "bytes") if pictures else values
    has_path = pictures and values.type.get_field_index("path") >= 0
    paths = compute.struct_field(values, "path").to_pylist() if has_path else [None] * len(values)
    return list(zip(data.is_valid().to_pylist(), paths))


def _named(head: tuple[bool, str | None], place: Place) -> str | None:
    return str(place) if head[0] else head[1]


def _holds_images(kind: Any) -> bool:
    one = kind.value_type if _is_list(kind) else kind
    return _is_picture(one) or _is_binary(one)


def _is_list(kind: Any) -> bool:
    types = importlib.import_module("pyarrow").types
    return bool(types.is_list(kind) or types.is_large_list(kind))


def _is_picture(kind: Any) -> bool:
    types = importlib.import_module("pyarrow").types
    at = kind.get_field_index("bytes") if types.is_struct(kind) else -1
    return at >= 0 and _is_binary(kind.field(at).type)


def _is_binary(kind: Any) -> bool:
    types = importlib.import_module("pyarrow").types
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
