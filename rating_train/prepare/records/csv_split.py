"""Lines of CSV text to rows of cells; a quote that is never closed costs its own line and no other.

Inside quotes a row may span lines. Where such a row cannot be right, because text stands behind its closing quote, its
cells are not those of the header, or the file ends, the quote was a stray one (``"12 inch pan``): the first line is
given up, and the next ones are read again, each as the beginning of a row.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rating_train.errors import UserError
from rating_train.prepare.records.lines import MAX_LINE_BYTES

# Lines are read again while that is cheap: a hostile file may have a stray quote in each line.
_AGAIN_CHARS = 64 << 20
_AGAIN_TIMES = 4


class Row(NamedTuple):
    """The cells of a row that starts in a line, or what is wrong with the line."""

    line: int
    cells: list[str]
    problem: str = ""


def split_rows(lines: Iterable[str], delimiter: str, source: str) -> Iterator[Row]:
    """Yield the rows of a CSV text; the first one is the header. Blank lines are none.

    Args:
        lines: the text, with or without line ends.
        delimiter: one character.
        source: the file, for errors.

    Raises:
        UserError: a row of many megabytes, in the cells of which there are line ends.
    """
    text = _Text(lines, source)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    width: int | None = None
    while True:
        text.begin()
        try:
            cells, problem = next(reader), ""
        except StopIteration:
            return
        except csv.Error as e:
            cells, problem = [], str(e)
        if len(text.row) > 1 and not problem and len(cells) != (width or len(cells)):
            problem = f"{len(cells)} columns, the header has {width}"
        if not problem:
            if cells or width is None:
                yield Row(text.start, cells)
        elif len(text.row) == 1:
            cells, problem = _leniently(text.row[0], delimiter)
            yield Row(text.start, cells, problem)
        else:
            yield from text.give_up(problem)
        width = len(cells) if width is None else width


def _leniently(line: str, delimiter: str) -> tuple[list[str], str]:
    """Return the cells of a line with text behind a closing quote, as in ``"A" pan``; or what is wrong with it."""
    reader = csv.reader([line, ""], delimiter=delimiter)
    try:
        cells = next(reader)
    except csv.Error as e:
        return [], str(e)
    return ([], "a quote is never closed") if reader.line_num > 1 else (cells, "")


class _Text:
    """The lines of a source, for a reader that joins those that a quote spans; they can be read again.

    Attributes:
        start: the first line of the row that is being read.
        row: the lines of this row so far.
    """

    def __init__(self, lines: Iterable[str], source: str) -> None:
        self.start = 1
        self.row: list[str] = []
        self._lines, self._source = iter(lines), source
        self._again: deque[str] = deque()
        self._chars, self._left = 0, _AGAIN_CHARS  # of this row; that may still be read again

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            line = self._again.popleft()
        else:
            line = next(self._lines)
            self._left += _AGAIN_TIMES * len(line)
        self.row.append(line)
        self._chars += len(line)
        if self._chars > MAX_LINE_BYTES:  # quoted line ends can join lines to a row without end
            raise UserError(
                f"a row of more than {MAX_LINE_BYTES >> 20} MiB",
                where=f"{self._source}:{self.start}",
                fix="look for a quote that is never closed",
            )
        return line

    def begin(self) -> None:
        """Begin a row at the next line."""
        self.start += len(self.row)
        self.row.clear()
        self._chars = 0

    def give_up(self, problem: str) -> Iterator[Row]:
        """Yield the first line of the row as one that is none, and have the others read again; or yield them all."""
        last = self.start + len(self.row) - 1
        problem = f"a quote is open at the end of the line; read on to line {last}: {problem}"
        self._left -= self._chars
        if self._left < 0:
            yield from (Row(self.start + i, [], problem) for i, line in enumerate(self.row) if line.strip())
            return
        self._again.extendleft(reversed(self.row[1:]))
        del self.row[1:]
        yield Row(self.start, [], problem)
