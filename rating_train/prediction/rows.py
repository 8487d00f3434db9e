"""The rows to score, by their place in the input: of catalogue files, or of a prepared dataset. Imports no torch.

Parts are fixed ranges of row numbers, counted from 0 through all files. A rank asks for its parts in ascending order,
so files that have no random access (compressed ones, JSON lines) are read through once, and what lies between is passed
over without being parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rating_train.errors import UserError
from rating_train.prepare.records.lines import Raw
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.sources import read_raw
from rating_train.shards.manifest import check_split
from rating_train.shards.mds_read import BadShard, read_index, read_shard
from rating_train.shards.schema import Dropped, Listing
from rating_train.shards.verify import shard_problem


class Row(NamedTuple):
    """One row of the input.

    Attributes:
        id: the item's id; "" where the record has none.
        listing: its fields, its images by name; ``None`` for a record that cannot be used.
        reason: why not.
        sample: of a prepared dataset, the stored sample instead of a listing.
    """

    id: str
    listing: Listing | None = None
    reason: str = ""
    sample: dict[str, Any] | None = None


class Rows(Protocol):
    """An input, read from its beginning to its end."""

    def count(self) -> int:
        """Return the number of rows, which may take reading all of them."""
        ...

    def read(self, first: int, last: int) -> Iterator[Row]:
        """Yield the rows [first, last); ``first`` is not before the last row of an earlier call."""
        ...


class SourceRows:
    """The records of catalogue files; ratings are not needed and not looked at."""

    def __init__(self, sources: Sequence[str], reading: Reading = Reading()) -> None:  # noqa: B008  # immutable
        self.sources, self._reading = tuple(sources), replace(reading, rated=False)
        self._raws: Iterator[Raw] = self._read()
        self._at = 0

    def _read(self) -> Iterator[Raw]:
        for source in self.sources:
            yield from read_raw(source, self._reading)

    def count(self) -> int:
        return sum(1 for _ in self._read())

    def read(self, first: int, last: int) -> Iterator[Row]:
        for _ in islice(self._raws, first - self._at):
            pass
        self._at = first
        for raw in islice(self._raws, last - first):
            self._at += 1
            item = raw.parse()
            yield _refused(item) if isinstance(item, Dropped) else Row(item.id, item)
        if self._at != last:
            raise UserError(
                f"the sources have {self._at} rows, of which {last} were counted",
                where=", ".join(self.sources),
                fix="they changed while they were read: remove OUT.parts and run again",
            )


def _refused(item: Dropped) -> Row:
    return Row(item.id, reason=f"{item.reason}: {item.detail} ({Path(item.source).name}:{item.line})")


@dataclass(frozen=True)
class _Shard:
    path: Path
    entry: dict[str, Any]
    first: int  # row number of its first sample


class DatasetRows:
    """The samples of a split of a prepared dataset in stored order; each shard is verified when it is first read."""

    def __init__(self, data: str, split: str) -> None:
        self.folder = Path(data) / split
        check_split(data, split)
        self._shards, self._rows = [], 0
        for entry in read_index(self.folder):
            self._shards.append(_Shard(self.folder / entry["raw_data"]["basename"], entry, self._rows))
            self._rows += entry["samples"]
        self._verified: set[Path] = set()

    def count(self) -> int:
        return self._rows

    def read(self, first: int, last: int) -> Iterator[Row]:
        for shard in self._shards:
            begin, end = max(first, shard.first), min(last, shard.first + shard.entry["samples"])
            if begin >= end:
                continue
            self._verify(shard)
            try:
                wanted = set(range(begin - shard.first, end - shard.first))
                for sample in read_shard(shard.path, shard.entry, wanted):
                    yield Row(sample["id"], sample=sample)
            except (OSError, BadShard) as e:
                raise UserError(f"the shard cannot be read: {e}", where=shard.path) from e

    def _verify(self, shard: _Shard) -> None:
        if shard.path in self._verified:
            return
        if problem := shard_problem(
            shard.path, shard.entry["raw_data"]["bytes"], shard.entry["raw_data"]["hashes"]
        ):
            raise UserError(f"the shard {problem}", where=shard.path, fix="copy or prepare the dataset again")
        self._verified.add(shard.path)
