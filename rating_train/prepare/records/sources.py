"""Read product catalogues: Amazon-2023 metadata (JSON lines), CSV, Parquet and Arrow, one record at a time.

Nothing here holds more than one record in memory, and nothing that a *record* contains can raise: a corrupt line, a
wrong type or an impossible rating becomes a :class:`Dropped` with a fixed reason. Only a source that cannot be read at
all (missing, truncated archive, header without the needed columns) is a :class:`UserError`.

Reasons given here: ``not_utf8``, ``bad_json``, ``bad_csv``, ``line_too_long``; the others by
``prepare/records/listing.py``.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from rating_train.errors import UserError
from rating_train.prepare.records.csv_rows import csv_rows, read_csv
from rating_train.prepare.records.lines import MAX_LINE_BYTES, Raw, read_lines, same
from rating_train.prepare.records.listing import to_listing
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.zstd import ZstdFile, import_zstandard
from rating_train.prepare.tables.arrow import SUFFIX as ARROW_SUFFIX
from rating_train.prepare.tables.arrow import arrow_rows, read_arrow
from rating_train.prepare.tables.parquet import parquet_rows, read_parquet
from rating_train.shards.schema import Dropped, Listing

#: The paper's columns, of the files of Amazon Reviews 2023 and of a CSV.
AS_PUBLISHED = Reading()

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_CSV_SUFFIXES = (".csv", ".tsv")
_PACKED_SUFFIXES = (".gz", ".zst")
KINDS = "names that end in .jsonl, .ndjson, .json, .csv or .tsv, then perhaps .gz or .zst; or in .parquet or .arrow"

#: Further kinds of source: suffix of a file's name -> function that yields its records as dictionaries with the keys
#: of Amazon-2023 metadata. An extension adds to it (docs/extending.md).
READERS: dict[str, Callable[[str], Iterable[dict[str, Any]]]] = {}


class Record(NamedTuple):
    """One record of one source: ``line`` is where it starts (1 is the first line of the file, or row of a Parquet)."""

    source: str
    line: int
    item: Listing | Dropped


def read_source(path: str, reading: Reading = AS_PUBLISHED) -> Iterator[Record]:
    """Yield every record of a JSON lines, CSV or TSV (also ``.gz``, ``.zst``), Parquet or Arrow file.

    Args and errors: as :func:`read_raw`. Blank lines are not records.
    """
    for raw in read_raw(path, reading):
        yield Record(raw.source, raw.line, raw.parse())


def read_raw(path: str, reading: Reading = AS_PUBLISHED) -> Iterator[Raw]:
    """Yield the records that :func:`read_source` yields, without parsing them.

    Args:
        path: the file.
        reading: the task, and how its columns are read.

    Raises:
        UserError: the file is missing, is of no known kind, lacks needed CSV columns, or its archive is damaged (a
            torn download must not pass as a small catalogue).
    """
    kind = source_kind(path)
    if kind in READERS:
        for number, record in enumerate(READERS[kind](path), start=1):
            yield Raw(path, number, partial(_parse_record, record, path, number, reading))
        return
    if kind in ("parquet", "arrow"):
        yield from (read_parquet if kind == "parquet" else read_arrow)(path, reading)
        return
    with _open(path) as stream:
        yield from read_csv(stream, path, reading) if kind == "csv" else _read_jsonl(stream, path, reading)


def first_records(path: str, count: int, reading: Reading = AS_PUBLISHED) -> list[dict[str, Any]]:
    """Return the first records of a source as they are, by the names of its columns; broken ones are passed over.

    Raises:
        UserError: as :func:`read_raw`, but no column is needed.
    """
    kind = source_kind(path)
    if kind in READERS:
        return list(islice(READERS[kind](path), count))
    if kind in ("parquet", "arrow"):
        header, rows = (parquet_rows if kind == "parquet" else arrow_rows)(path)
        return [dict(zip(header, row)) for row in islice(rows, count)]
    with _open(path) as stream:
        if kind == "csv":
            header, _, cells = csv_rows(stream, path, reading)
            good = (row for _, row in cells if not isinstance(row, Dropped) and len(row) == len(header))
            return [{name: v for name, v in zip(header, row) if v != ""} for row in islice(good, count)]
        values = (
            _json_value(raw) for _, raw, complete in read_lines(stream, path) if complete and raw.strip()
        )
        return list(islice((value for value in values if isinstance(value, dict)), count))


def _json_value(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def source_kind(path: str) -> str:
    """Return ``"jsonl"``, ``"csv"``, ``"parquet"``, ``"arrow"`` or a suffix of :data:`READERS`, by the file's name.

    Raises:
        UserError: the file is missing or of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise UserError("source file not found", where=path, fix="check --source")
    if not file.is_file():
        raise UserError("source is not a file", where=path, expected=KINDS)
    if kind := kind_of_name(path):
        return kind
    raise UserError("unknown kind of source", where=path, expected=KINDS)


def kind_of_name(path: str) -> str:
    """Return the kind of a source by its name alone, as :func:`source_kind`; "" for any other name."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in READERS:
        return suffixes[-1]
    if suffixes and suffixes[-1] in (".parquet", ARROW_SUFFIX):
        return suffixes[-1][1:]
    if suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "jsonl" if last in _JSON_SUFFIXES else "csv" if last in _CSV_SUFFIXES else ""


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    suffix = Path(path).suffix.lower()
    # UnicodeError: torn UTF-16.
    damage: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, UnicodeError)
    zstandard = import_zstandard(path) if suffix == ".zst" else None
    if zstandard is not None:
        damage += (zstandard.ZstdError,)
    try:
        with open(path, "rb") as file:
            if suffix == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif zstandard is not None:
                yield cast(BinaryIO, io.BufferedReader(ZstdFile(file, zstandard), 1 << 20))
            else:
                yield file
    except damage as e:
        raise UserError(f"cannot read the source ({e})", where=path, fix="fetch the file again") from e


# --- JSON lines ---------------------------------------------------------------------------------------


def _read_jsonl(stream: BinaryIO, source: str, reading: Reading) -> Iterator[Raw]:
    for number, raw, complete in read_lines(stream, source):
        if not raw.strip():
            continue
        if not complete:
            too_long = Dropped(source, number, "", "line_too_long", f"over {MAX_LINE_BYTES} bytes")
            yield Raw(source, number, partial(same, too_long))
        else:
            yield Raw(source, number, partial(_parse_json_line, raw, source, number, reading))


def _parse_json_line(raw: bytes, source: str, line: int, reading: Reading) -> Listing | Dropped:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        return Dropped(source, line, "", "not_utf8", str(e))
    except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
        return Dropped(source, line, "", "bad_json", str(e))
    if not isinstance(value, dict):
        return Dropped(source, line, "", "bad_json", f"an object is needed, got {type(value).__name__}")
    return _parse_record(value, source, line, reading)


def _parse_record(record: dict[str, Any], source: str, line: int, reading: Reading) -> Listing | Dropped:
    return to_listing(record if reading.is_native else reading.record(record), source, line, reading)
