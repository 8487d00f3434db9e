"""Lines of a source as bytes, bounded in memory, and records that are not parsed yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from rating_train.errors import UserError
from rating_train.shards.schema import Dropped, Listing

MAX_USELESS_BYTES = 1 << 30  # in a row, without a record
MAX_LINE_BYTES = 16 << 20  # a longer line is not a listing; bounds the memory

_BOM = b"\xef\xbb\xbf"


class Lines(Protocol):
    """What lines are read from."""

    def readline(self, limit: int = -1, /) -> bytes:
        """Return a line with its end, or at most ``limit`` bytes of it."""
        ...


class Raw(NamedTuple):
    """One record of one source, not parsed yet: skipping it costs no more than finding its end."""

    source: str
    line: int
    parse: Callable[[], Listing | Dropped]


def same(dropped: Dropped) -> Dropped:
    """Parse a record that is known to be none."""
    return dropped


def read_lines(stream: Lines, source: str) -> Iterator[tuple[int, bytes, bool]]:
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
