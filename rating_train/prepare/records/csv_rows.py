"""Rows of a CSV or TSV file: its delimiter, encoding and decimal sign are found out and shown.

Reasons given here: ``not_utf8``, ``bad_csv``.
"""

from __future__ import annotations

import codecs
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, cast

from rating_train.errors import UserError
from rating_train.prepare.records.columns import RATINGS, columns_or_check
from rating_train.prepare.records.csv_split import Row, split_rows
from rating_train.prepare.records.lines import Lines, Raw, read_lines, same
from rating_train.prepare.records.listing import is_clean, to_listing
from rating_train.prepare.records.numbers import decimal_sign, read_number
from rating_train.prepare.records.reading import Reading, pick
from rating_train.shards.schema import Dropped, Listing

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 16
_SAMPLE_ROWS = 1000
_DELIMITERS = ",;\t|"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Dialect:
    """How a file is written: its delimiter, the encoding of its text, and the decimal sign of its numbers."""

    delimiter: str = ","
    encoding: str = "utf-8"
    decimal: str = ""

    def __str__(self) -> str:
        name = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}.get(
            self.delimiter, self.delimiter
        )
        return f"{name}, {self.encoding}, decimal sign {self.decimal or '.'}"


class _Recoded:
    """The lines of a text in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="\n")

    def readline(self, limit: int = -1, /) -> bytes:
        return self._text.readline(limit).encode("utf-8", "surrogateescape")


def read_csv(stream: BinaryIO, source: str, reading: Reading) -> Iterator[Raw]:
    """Yield the rows of a CSV file.

    Raises:
        UserError: its header lacks columns or cannot be read.
    """
    header, decimal, rows = csv_rows(stream, source, reading)
    reading = replace(reading, decimal=decimal)
    columns = columns_or_check(header, source, reading, "CSV header lacks")
    reading.show_unread(header, source)
    for line, row in rows:
        if isinstance(row, Dropped):
            yield Raw(source, line, partial(same, row))
        else:
            yield Raw(source, line, partial(_parse_row, row, header, columns, source, line, reading))


def csv_rows(
    stream: BinaryIO, source: str, reading: Reading
) -> tuple[list[str], str, Iterator[tuple[int, list[str] | Dropped]]]:
    """Return the header of a CSV file, its decimal sign, and its rows with the lines where they start.

    Raises:
        UserError: its header cannot be read.
    """
    buffered = cast(BinaryIO, stream if hasattr(stream, "peek") else io.BufferedReader(stream, _SAMPLE_BYTES))  # type: ignore[arg-type]
    dialect = _dialect(buffered, source, reading)
    text = buffered if dialect.encoding == "utf-8" else _Recoded(buffered, dialect.encoding)
    rows = split_rows(_lines(text, source), dialect.delimiter, source)
    first = next(rows, Row(1, []))
    if first.problem:
        raise UserError(f"cannot read the CSV header ({first.problem})", where=source)
    found = (
        (row.line, Dropped(source, row.line, "", "bad_csv", row.problem) if row.problem else row.cells)
        for row in rows
    )
    return [name.strip() for name in first.cells], reading.decimal or dialect.decimal, found


def _lines(stream: Lines, source: str) -> Iterator[str]:
    """Yield lines as text; undecodable bytes stay visible, so that only their own row is refused."""
    return (raw.decode("utf-8", "surrogateescape") for _, raw, _ in read_lines(stream, source))


def _parse_row(
    row: list[str],
    header: list[str],
    columns: dict[str, int] | None,
    source: str,
    line: int,
    reading: Reading,
) -> Listing | Dropped:
    if len(row) != len(header):
        return Dropped(source, line, "", "bad_csv", f"{len(row)} columns, the header has {len(header)}")
    if columns is None:
        if not all(map(is_clean, row)):
            return Dropped(source, line, "", "not_utf8", "undecodable bytes")
        record = {name: value for name, value in zip(header, row) if value != ""}
        return to_listing(reading.record(record), source, line, reading)
    values: dict[str, Any] = {field: row[i] for field, i in columns.items()}
    if not all(is_clean(v) for v in values.values()):
        return Dropped(source, line, "", "not_utf8", "undecodable bytes")
    for field in RATINGS if reading.rated else ():
        values[field] = _number(values[field], reading.decimal)
    return to_listing({k: v for k, v in values.items() if v != ""}, source, line, reading)


def _number(text: str, decimal: str) -> float | str:
    """Return a CSV cell as a number; other text stays text, and is refused where it is checked."""
    try:
        if not text.strip():
            return ""
        return read_number(text, decimal) if decimal else float(text)
    except ValueError:
        return text


def _dialect(stream: BinaryIO, source: str, reading: Reading) -> Dialect:
    """Find out how a file is written, from its beginning, which is not consumed."""
    sample: bytes = stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES]  # type: ignore[attr-defined]
    encoding = reading.encoding or _encoding(sample)
    text = sample.decode(encoding, "replace").removeprefix("\ufeff")
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = reading.separator
    if not delimiter:
        counts = {d: header.count(d) for d in _DELIMITERS}
        delimiter = max(counts, key=lambda d: counts[d]) if any(counts.values()) else ","
    dialect = Dialect(delimiter, encoding)
    if reading.rated and not reading.decimal:
        cells = (pick(row, reading.task.target.column) for row in _sampled(lines[:-1], delimiter, source))
        dialect = replace(dialect, decimal=decimal_sign(c for c in cells if isinstance(c, str)))
    if reading.shown and dialect != Dialect():
        shown = replace(dialect, decimal=reading.decimal or dialect.decimal)
        log.info("%s: %s (other: --delimiter, --encoding, --decimal)", source, shown)
    return dialect


def _sampled(lines: list[str], delimiter: str, source: str) -> Iterator[dict[str, str]]:
    """Yield the first rows by the names of their columns, without those that have too many or too few cells."""
    rows = split_rows(lines, delimiter, source)
    header = [name.strip() for name in next(rows, Row(1, [])).cells]
    for row in islice(rows, _SAMPLE_ROWS):
        if len(row.cells) == len(header):
            yield dict(zip(header, row.cells))


def _encoding(sample: bytes) -> str:
    """Return UTF-16 by its mark; Latin-1 (as Windows has it) where no line with a byte above 127 is UTF-8."""
    if sample.startswith(_UTF16):
        return "utf-16"
    high = [line for line in sample.split(b"\n")[:-1] if not line.isascii()]
    return "cp1252" if len(high) > 1 and not any(_is_utf8(line) for line in high) else "utf-8"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
