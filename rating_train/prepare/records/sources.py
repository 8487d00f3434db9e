"""Read product catalogues: Amazon-2023 metadata (JSON lines), CSV and Parquet, one record at a time.

Nothing here holds more than one record in memory, and nothing that a *record* contains can raise: a corrupt line, a
wrong type or an impossible rating becomes a :class:`Dropped` with a fixed reason. Only a source that cannot be read at
all (missing, truncated archive, header without the needed columns) is a :class:`UserError`.

Reasons given here: ``not_utf8``, ``bad_json``, ``bad_csv``, ``line_too_long``; the others by
``prepare/records/listing.py``.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from rating_train.errors import UserError
from rating_train.prepare.records.listing import is_clean, to_listing
from rating_train.prepare.records.parquet import parquet_rows
from rating_train.shards.schema import Dropped, Listing

MAX_USELESS_BYTES = 1 << 30  # in a row, without a record
MAX_LINE_BYTES = 16 << 20  # a longer line is not a listing; bounds the memory

_BOM = b"\xef\xbb\xbf"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_CSV_SUFFIXES = (".csv",)
_PACKED_SUFFIXES = (".gz", ".zst")

# CSV column names, in order of preference -> the name of the same thing in Amazon-2023 metadata.
_CSV_COLUMNS: dict[str, tuple[str, ...]] = {
    "parent_asin": ("id", "parent_asin"),
    "title": ("title",),
    "description": ("description",),
    "features": ("features",),
    "main_category": ("main_category",),
    "average_rating": ("rating", "average_rating"),
    "rating_number": ("rating_count", "rating_number"),
    "image_path": ("image", "image_path"),
    "image_paths": ("image_paths",),
    "group_id": ("group_id",),
}
_CSV_RATINGS = ("average_rating", "rating_number")
_CSV_REQUIRED = ("parent_asin", *_CSV_RATINGS)


#: Further kinds of source: suffix of a file's name -> function that yields its records as dictionaries with the keys
#: of Amazon-2023 metadata. An extension adds to it (docs/extending.md).
READERS: dict[str, Callable[[str], Iterable[dict[str, Any]]]] = {}


class Record(NamedTuple):
    """One record of one source: ``line`` is where it starts (1 is the first line of the file, or row of a Parquet)."""

    source: str
    line: int
    item: Listing | Dropped


def read_source(path: str, rated: bool = True) -> Iterator[Record]:
    """Yield every record of a ``.jsonl``/``.ndjson``/``.json``, ``.csv`` (also ``.gz``, ``.zst``) or ``.parquet`` file.

    Args and errors: as :func:`read_raw`. Blank lines are not records.
    """
    for raw in read_raw(path, rated):
        yield Record(raw.source, raw.line, raw.parse())


class Raw(NamedTuple):
    """One record of one source, not parsed yet: skipping it costs no more than finding its end."""

    source: str
    line: int
    parse: Callable[[], Listing | Dropped]


def read_raw(path: str, rated: bool = True) -> Iterator[Raw]:
    """Yield the records that :func:`read_source` yields, without parsing them.

    Args:
        path: the file.
        rated: whether a record needs a rating; if not, ratings are not looked at.

    Raises:
        UserError: the file is missing, is of no known kind, lacks needed CSV columns, or its archive is damaged (a
            torn download must not pass as a small catalogue).
    """
    kind = source_kind(path)
    if kind in READERS:
        for number, record in enumerate(READERS[kind](path), start=1):
            yield Raw(path, number, partial(to_listing, record, path, number, rated))
        return
    if kind == "parquet":
        yield from _read_parquet(path, rated)
        return
    with _open(path) as stream:
        yield from _read_csv(stream, path, rated) if kind == "csv" else _read_jsonl(stream, path, rated)


def source_kind(path: str) -> str:
    """Return ``"jsonl"``, ``"csv"``, ``"parquet"`` or a suffix of :data:`READERS`, by the file's name.

    Raises:
        UserError: the file is missing or of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise UserError("source file not found", where=path, fix="check --source")
    if not file.is_file():
        raise UserError("source is not a file", where=path, expected="a .jsonl, .csv or .parquet file")
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes and suffixes[-1] in READERS:
        return suffixes[-1]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in _JSON_SUFFIXES:
        return "jsonl"
    if last in _CSV_SUFFIXES:
        return "csv"
    raise UserError(
        "unknown kind of source",
        where=path,
        expected="a name that ends in .jsonl, .ndjson, .json or .csv, then perhaps .gz or .zst; or in .parquet",
    )


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    suffix = Path(path).suffix.lower()
    damage: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    zstandard = _import_zstandard(path) if suffix == ".zst" else None
    if zstandard is not None:
        damage += (zstandard.ZstdError,)
    try:
        with open(path, "rb") as file:
            if suffix == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif zstandard is not None:
                # Across frames: parallel compressors write many, and one frame is not the complete file.
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield cast(BinaryIO, io.BufferedReader(reader, 1 << 20))
            else:
                yield file
    except damage as e:
        raise UserError(f"cannot read the source ({e})", where=path, fix="fetch the file again") from e


def _import_zstandard(path: str) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as e:
        fix = "pip install zstandard, or unpack the file with unzstd"
        raise UserError("reading .zst needs the zstandard package", where=path, fix=fix) from e


def _lines(stream: BinaryIO, source: str) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, bytes, complete); of a line over the bound only the beginning, with complete=False.

    Raises:
        UserError: nothing but blank or overlong lines for so long that this cannot be a catalogue. A packed file of
            kilobytes may expand to terabytes of them.
    """
    number = useless = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        number += 1
        complete = len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n")
        useless = 0 if complete and not raw.isspace() else useless + len(raw)
        rest = raw
        while rest and not rest.endswith(b"\n") and useless <= MAX_USELESS_BYTES:
            rest = stream.readline(MAX_LINE_BYTES)
            useless += len(rest)
        if useless > MAX_USELESS_BYTES:
            raise UserError(
                f"no record in {useless >> 20} MiB", where=f"{source}:{number}", fix="check what this file is"
            )
        yield number, raw.removeprefix(_BOM) if number == 1 else raw, complete


# --- JSON lines ---------------------------------------------------------------------------------------


def _read_jsonl(stream: BinaryIO, source: str, rated: bool) -> Iterator[Raw]:
    for number, raw, complete in _lines(stream, source):
        if not raw.strip():
            continue
        if not complete:
            too_long = Dropped(source, number, "", "line_too_long", f"over {MAX_LINE_BYTES} bytes")
            yield Raw(source, number, partial(_same, too_long))
        else:
            yield Raw(source, number, partial(_parse_json_line, raw, source, number, rated))


def _same(dropped: Dropped) -> Dropped:
    return dropped


def _parse_json_line(raw: bytes, source: str, line: int, rated: bool) -> Listing | Dropped:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        return Dropped(source, line, "", "not_utf8", str(e))
    except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
        return Dropped(source, line, "", "bad_json", str(e))
    if not isinstance(value, dict):
        return Dropped(source, line, "", "bad_json", f"an object is needed, got {type(value).__name__}")
    return to_listing(value, source, line, rated)


# --- CSV ----------------------------------------------------------------------------------------------


def _read_csv(stream: BinaryIO, source: str, rated: bool) -> Iterator[Raw]:
    start = size = 0

    def text() -> Iterator[str]:
        nonlocal size
        for number, raw, _ in _lines(stream, source):
            size = len(raw) + (size if number > start else 0)
            if size > MAX_LINE_BYTES:  # quoted line ends can join lines to a row without end
                raise UserError(
                    f"a row of more than {MAX_LINE_BYTES >> 20} MiB",
                    where=f"{source}:{start}",
                    fix="look for a quote that is never closed",
                )
            # surrogateescape keeps undecodable bytes visible, so that only their own row is refused.
            yield raw.decode("utf-8", "surrogateescape")

    reader = csv.reader(text())
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as e:
        raise UserError(f"cannot read the CSV header ({e})", where=source) from e
    columns = _columns(header, source, rated, "CSV header lacks")
    while True:
        line = start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield Raw(source, line, partial(_same, Dropped(source, line, "", "bad_csv", str(e))))
            continue
        if row:
            parse = partial(_parse_csv_row, row, columns, len(header), source, line, rated)
            yield Raw(source, line, parse)


def _columns(header: list[str], source: str, rated: bool, what: str) -> dict[str, int]:
    columns: dict[str, int] = {}
    for field, names in _CSV_COLUMNS.items():
        found = [header.index(name) for name in names if name in header]
        if found:
            columns[field] = found[0]
    required = [f for f in _CSV_REQUIRED if rated or f not in _CSV_RATINGS]
    missing = ["|".join(_CSV_COLUMNS[f]) for f in required if f not in columns]
    fix = ""
    if rated and not columns.keys() >= {*_CSV_RATINGS}:
        fix = (
            "add these columns, matched by the id (the item metadata of Amazon Reviews 2023 has both); "
            "listings without ratings can be neither trained on nor scored"
        )
    if not {"title", "description", "features"} & columns.keys():
        missing.append("title, description or features")
    if missing:
        raise UserError(
            f"{what} {'; '.join(missing)}",
            where=source,
            expected="id|parent_asin, title, description, features, main_category, rating|average_rating, "
            "rating_count|rating_number, image|image_path or image_paths, and perhaps group_id"
            if rated
            else "id|parent_asin, title, description, features, main_category, image|image_path or image_paths",
            fix=fix,
        )
    return columns


def _parse_csv_row(
    row: list[str], columns: dict[str, int], width: int, source: str, line: int, rated: bool
) -> Listing | Dropped:
    if len(row) != width:
        return Dropped(source, line, "", "bad_csv", f"{len(row)} columns, the header has {width}")
    values: dict[str, Any] = {field: row[i] for field, i in columns.items()}
    if not all(is_clean(v) for v in values.values()):
        return Dropped(source, line, "", "not_utf8", "undecodable bytes")
    for field in _CSV_RATINGS if rated else ():
        values[field] = _number(values[field])
    return to_listing({k: v for k, v in values.items() if v != ""}, source, line, rated)


# --- Parquet ------------------------------------------------------------------------------------------


def _read_parquet(source: str, rated: bool) -> Iterator[Raw]:
    header, rows = parquet_rows(source)
    columns = _columns(header, source, rated, "Parquet schema lacks")
    if "images" in header:  # nested, as Amazon's own files have them
        columns["images"] = header.index("images")
    for number, row in enumerate(rows, start=1):
        yield Raw(source, number, partial(_parse_parquet_row, row, columns, source, number, rated))


def _parse_parquet_row(
    row: tuple[Any, ...], columns: dict[str, int], source: str, line: int, rated: bool
) -> Listing | Dropped:
    record = {field: row[i] for field, i in columns.items()}
    return to_listing({k: v for k, v in record.items() if v != ""}, source, line, rated)


def _number(text: str) -> float | str:
    """Return a CSV cell as a number; other text stays text, and is refused where it is checked."""
    try:
        return float(text) if text.strip() else ""
    except ValueError:
        return text
