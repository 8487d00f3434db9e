"""Images in the rows of a source, as the ``datasets`` library of Hugging Face writes them to Arrow and Parquet files.

An image is a struct of ``bytes`` and ``path``, or a binary value in a column that is read as images: any other binary
column is text, as old writers of Parquet have it. A column holds one image per row, or a list of them. Its bytes stay
in the file until they are asked for: a listing names it by its place, ``KIND:ROW:COLUMN:NUMBER:FILE`` (all from 0).
Values are those of ``pyarrow``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from rating_train.errors import UserError

#: The columns, of those of a file, that are read as images.
ImageColumns = Callable[[Sequence[str]], Collection[str]]

_PLACE = re.compile(r"(arrow|parquet):(\d+):(\d+):(\d+):(.+)", re.DOTALL)


class Place(NamedTuple):
    """Where the bytes of an image are: the row, the column, the place in a list of images, the file and its kind."""

    row: int
    column: int
    number: int
    file: str
    kind: str = "arrow"

    def __str__(self) -> str:
        return f"{self.kind}:{self.row}:{self.column}:{self.number}:{self.file}"

    @classmethod
    def of(cls, image: str) -> Place | None:
        """Return the place that a listing's image names; ``None`` where it names something else."""
        found = _PLACE.fullmatch(image)
        return cls(int(found[2]), int(found[3]), int(found[4]), found[5], found[1]) if found else None


def import_pyarrow(path: str, what: str, submodule: str) -> Any:
    """Return ``pyarrow`` with one of its submodules.

    Args:
        path: the file that needs it.
        what: how the sentence of the error begins.
        submodule: its name in ``pyarrow``.

    Raises:
        UserError: it is not installed.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        importlib.import_module(f"pyarrow.{submodule}")
    except ImportError as e:
        fix = "pip install 'rating_train[huggingface]', or save the data as Parquet with paths, or as JSON lines"
        raise UserError(f"{what} needs the pyarrow package", where=path, fix=fix) from e
    return arrow


def columns_of(batch: Any, first: int, path: str, kind: str, images: ImageColumns | None) -> list[list[Any]]:
    """Return the columns of a record batch as Python values, with places for the images.

    Args:
        batch: the rows.
        first: number of its first row in the file.
        path: the file.
        kind: of the file, see :class:`Place`.
        images: which binary columns hold images; ``None``: those without a value that is text.
    """
    names = batch.schema.names
    wanted = None if images is None else set(images(names))
    columns: list[list[Any]] = []
    for column, (name, values) in enumerate(zip(names, batch.columns)):
        place = Place(first, column, 0, path, kind)
        if not is_pictures(values.type):
            columns.append(values.to_pylist())
        elif _is_picture(_one(values.type)) or (wanted is not None and name in wanted):
            columns.append(_places(values, place))
        else:
            texts = [text_of(value) for value in values.to_pylist()]
            columns.append(texts if wanted is not None or _are_texts(texts) else _places(values, place))
    return columns


def text_of(value: Any) -> Any:
    """Return a binary value as text, also within a list; what is not UTF-8 stays as it is, and is refused later."""
    if isinstance(value, list):
        return [text_of(one) for one in value]
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _are_texts(values: list[Any]) -> bool:
    flat = (one for value in values for one in (value if isinstance(value, list) else [value]))
    return any(isinstance(one, str) and one for one in flat)  # no image file is UTF-8


def bytes_of(value: Any, number: int) -> bytes:
    """Return the bytes of an image.

    Args:
        value: of a row and a column, a scalar of pyarrow.
        number: the place in a list of images.

    Raises:
        LookupError: there is none.
    """
    if not is_pictures(value.type):
        raise LookupError("the column holds no image")
    if _is_list(value.type):
        value = (value.values or [])[number]
    if _is_picture(value.type):
        value = value["bytes"]
    data = value.as_py()
    if data is None:
        raise LookupError("the row holds no image")
    return bytes(data)


def is_pictures(kind: Any) -> bool:
    """Whether a column of this type may hold images."""
    return _is_picture(_one(kind)) or _is_binary(_one(kind))


def _places(values: Any, first: Place) -> list[Any]:
    """Return the places of a column's images, or the paths of those that are not in the file."""
    if not _is_list(values.type):
        return [_named(head, first, row, 0) for row, head in enumerate(_heads(values))]
    heads = iter(_heads(values.flatten()))
    return [
        None if count is None else [_named(next(heads), first, row, number) for number in range(count)]
        for row, count in enumerate(values.value_lengths().to_pylist())
    ]


def _heads(values: Any) -> list[tuple[bool, str | None]]:
    """Return of each image whether its bytes are here, and its path."""
    pictures = _is_picture(values.type)
    compute = importlib.import_module("pyarrow.compute")
    data = compute.struct_field(values, "bytes") if pictures else values
    has_path = pictures and values.type.get_field_index("path") >= 0
    paths = compute.struct_field(values, "path").to_pylist() if has_path else [None] * len(values)
    return list(zip(data.is_valid().to_pylist(), paths))


def _named(head: tuple[bool, str | None], first: Place, row: int, number: int) -> str | None:
    return str(first._replace(row=first.row + row, number=number)) if head[0] else head[1]


def _one(kind: Any) -> Any:
    """Return the type of the values in a list; of anything else, its own."""
    return kind.value_type if _is_list(kind) else kind


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
