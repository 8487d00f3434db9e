"""Shard files that stay open between samples.

A parallel file system asks its metadata server whenever a file is opened. A file opened for every sample is, for 64
GPUs at 800 samples per second each, 51,200 requests per second to a server that the whole cluster shares.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Files that a process keeps open, of all sources together: of a block of the default order, the shards of 64 MiB are
#: about as many.
MOST_OPEN = 128


class _Shard(NamedTuple):
    descriptor: int
    offsets: NDArray[np.uint32]  # (samples + 1,): where each begins, and the end of the last


class OpenShards:
    """Samples of a split's shards as bytes. A process that is forked from this one can use its descriptors too.

    Args:
        paths: of the shards.
        samples: number of samples of each.
        most: files to keep open; 0 for none, where a file may be deleted to free its space.
    """

    def __init__(self, paths: Sequence[Path], samples: Sequence[int], most: int = MOST_OPEN) -> None:
        self._paths, self._samples, self._most = paths, samples, most
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # by number; the last was used last
        weakref.finalize(self, _close, self._open)

    def read(self, shard: int, place: int) -> bytes:
        """Read the sample at ``place`` of a shard.

        Raises:
            OSError: the file cannot be opened or read. It is opened again next time.
            ValueError: it ends before the sample does, or its table of offsets is damaged.
        """
        try:
            descriptor, offsets = self._opened(shard)
            begin, end = int(offsets[place]), int(offsets[place + 1])
            if not 4 * (self._samples[shard] + 2) <= begin < end:
                raise ValueError(f"impossible offsets {begin} and {end}")
            data = _read(descriptor, end - begin, begin)
        except (OSError, ValueError):
            self.close()  # all: too many may be open
            raise
        while len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return data

    def close(self) -> None:
        """Close all files."""
        _close(self._open)

    def _opened(self, shard: int) -> _Shard:
        if shard not in self._open:
            descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            try:
                table = _read(descriptor, 4 * (self._samples[shard] + 1), 4)
            except BaseException:
                os.close(descriptor)
                raise
            self._open[shard] = _Shard(descriptor, np.frombuffer(table, "<u4"))
        self._open.move_to_end(shard)
        return self._open[shard]

    def __reduce__(self) -> tuple[Any, ...]:
        """For DataLoader workers that are spawned: descriptors do not travel."""
        return OpenShards, (self._paths, self._samples, self._most)


def _close(shards: OrderedDict[int, _Shard]) -> None:
    while shards:
        os.close(shards.popitem()[1].descriptor)


def _read(descriptor: int, size_bytes: int, offset: int) -> bytes:
    """Read exactly so much. The kernel may return less than was asked for, as a network file system does."""
    data = os.pread(descriptor, size_bytes, offset)
    while len(data) < size_bytes:
        more = os.pread(descriptor, size_bytes - len(data), offset + len(data))
        if not more:
            raise ValueError(
                f"the file ends at byte {offset + len(data)}, within a sample or the table of offsets"
            )
        data += more
    return data
