"""Samples of a split by id, read from MosaicML Streaming's MDS shards.

The shards are those that streaming's writer would make, and its downloaders copy what is not on disk. Which samples
are read, and in which order, is decided in :mod:`..order`; a DataLoader worker is told with each batch. So there is no
state that is shared between processes.

Two things that streaming's own readers leave out are done here. They open a shard for each sample: here files stay open
(:mod:`.open_shards`). They check no local shard: here each is hashed before it is first used
(:class:`..order.FirstReads` says by which rank).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.storage import CloudDownloader
from torch.utils.data import Dataset

from rating_train.data.order import Ids
from rating_train.data.samples import remote
from rating_train.data.samples.open_shards import MOST_OPEN, OpenShards
from rating_train.data.samples.remote import Source
from rating_train.data.samples.shard_cache import Prefetch, ShardCache
from rating_train.errors import UserError
from rating_train.shards.mds_read import INDEX_NAME, decode, read_index
from rating_train.shards.schema import MDS_COLUMNS
from rating_train.shards.verify import shard_problem

_TRIES = 8  # of reading a shard that other processes may evict meanwhile, or that a file system fails to read
_DOWNLOAD_SECONDS = 300.0  # streaming's default of 60 s is short for a shard of 64 MiB on a busy link


@dataclass(frozen=True)
class Request:
    """One batch, as a DataLoader worker is asked for it.

    Attributes:
        ids: samples, in order.
        check: shards to hash before anything is read.
        ahead: shards that later requests need, the nearest first; fetched in the background.
    """

    ids: Sequence[int] | Ids
    check: Sequence[int] = ()
    ahead: Sequence[int] = ()


class SplitDataset(Dataset[dict[str, Any]]):
    """The samples of a split. Map-style; a DataLoader asks it for a :class:`Request` at a time.

    Args:
        source: where the shards are; what ``check_split`` or :func:`fetch_split` vouches for.
        split: sub-directory.
        most_open: shards on disk that stay open in each process.

    Raises:
        UserError: the shards have other columns, or the cache limit is too low for them.
    """

    def __init__(self, source: str | Path | Source, split: str, most_open: int = MOST_OPEN) -> None:
        self.source = source if isinstance(source, Source) else Source(str(source))
        self.split = split
        self._folder = Path(self.source.path).resolve() / split
        entries = read_index(self._folder)
        _refuse_other_columns(entries, self._folder)
        self._entries = entries
        self._files: list[dict[str, Any]] = [entry["raw_data"] for entry in entries]
        self.samples_per_shard: Ids = np.array([entry["samples"] for entry in entries], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        # A cache evicts files of this and other processes: one that is open would keep its space on the disk.
        self._open = OpenShards(
            [self._folder / file["basename"] for file in self._files],
            self.samples_per_shard.tolist(),
            most=0 if self.source.remote else most_open,
        )
        self._cache: ShardCache | None = None
        self._prefetch: Prefetch | None = None  # made by the process that reads
        if self.source.remote:
            remote, limit = self.source.plain_remote, self.source.cache_limit_bytes
            self._cache = ShardCache(self._folder, entries, limit, remote, Downloader(remote))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return self.__getitems__(Request([sample]))[0]

    def __getitems__(self, request: Request) -> list[dict[str, Any]]:
        """Read the samples of a request.

        Raises:
            UserError: a shard is missing, damaged, or cannot be fetched; names it and its path.
        """
        shards = self.shards_of(request.ids)
        if self._cache is not None:
            if self._prefetch is None:
                self._prefetch = Prefetch(self._cache)
            self._prefetch.want(request.ahead)
            for shard in dict.fromkeys(shards):
                self._cache.ensure(shard)
        for shard in request.check:
            self._retry(shard, self._check)
        return [self._retry(shard, self._read, int(sample)) for shard, sample in zip(shards, request.ids)]

    def identity(self) -> tuple[tuple[int, int, int], ...]:
        """What tells these files from copies of them: inode, size and change time of the index and two shards."""
        names = {INDEX_NAME, self._files[0]["basename"], self._files[-1]["basename"]}
        if self._cache is not None:
            names = {INDEX_NAME}
        found = [os.stat(self._folder / name) for name in sorted(names)]
        return tuple((f.st_ino, f.st_size, f.st_ctime_ns) for f in found)

    def shards_of(self, ids: Sequence[int] | Ids) -> list[int]:
        """Return the shard of each sample."""
        return np.searchsorted(self._ends, ids, side="right").tolist()

    def close(self) -> None:
        """Close files and stop fetching ahead. The next request starts both again."""
        self._open.close()
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _read(self, shard: int, sample: int) -> dict[str, Any]:
        before = int(self._ends[shard - 1]) if shard else 0
        data = self._open.read(shard, sample - before)
        return decode(data, self._entries[shard])

    def _check(self, shard: int) -> None:
        file = self._files[shard]
        if problem := shard_problem(self._path(shard), file["bytes"], file["hashes"]):
            raise self._damaged(shard, f"{problem}; none of it was read")

    def _retry(self, shard: int, action: Callable[..., Any], *arguments: int) -> Any:
        """Call ``action`` with a shard. Where it was evicted, fetch it again; where reading fails, wait a little."""
        for attempt in range(_TRIES):
            try:
                return action(shard, *arguments)
            except FileNotFoundError as e:
                if self._cache is None:
                    raise self._damaged(shard, "is missing") from e
                self._cache.ensure(shard)
            except OSError as e:
                if attempt == _TRIES - 1:
                    raise self._damaged(shard, f"cannot be read ({e})") from e
                time.sleep(0.01 * 2**attempt)
            except (ValueError, IndexError) as e:  # bytes that are no sample
                raise self._damaged(shard, f"holds a sample that cannot be read ({e})") from e
        raise self._damaged(shard, "is evicted before it can be read: data.cache_limit_mb is too low")

    def _damaged(self, shard: int, what: str) -> UserError:
        again = "run `rating-train verify` on the dataset, and copy or prepare it again"
        copy = "delete this file: it is a copy, and is downloaded again"
        return UserError(
            f"shard {self.split}/{self._files[shard]['basename']} {what}",
            where=self._path(shard),
            fix=again if self._cache is None else copy,
        )

    def _path(self, shard: int) -> Path:
        return self._folder / self._files[shard]["basename"]

    def __getstate__(self) -> dict[str, Any]:
        """For DataLoader workers that are spawned: a thread does not travel."""
        return {**self.__dict__, "_prefetch": None}


def _refuse_other_columns(entries: Sequence[dict[str, Any]], folder: Path) -> None:
    """Raise :class:`UserError` where a shard has other columns than ``prepare`` writes."""
    for entry in entries:
        columns = dict(zip(entry["column_names"], entry["column_encodings"]))
        if columns != MDS_COLUMNS and not _is_of_a_task(columns):
            raise UserError(
                f"shard {folder.name}/{entry['raw_data']['basename']} has other columns: {columns}",
                where=folder,
                expected=str(MDS_COLUMNS),
                fix="make the dataset with `rating-train prepare`",
            )


def _is_of_a_task(columns: dict[str, str]) -> bool:
    """Whether these are columns that ``prepare`` writes: texts, an image and numbers."""
    fixed = {"id": "str", "rating": "float32", "image": "bytes", "rating_count": "float64"}
    return columns.keys() >= {"id", "rating"} and all(
        kind == fixed.get(name, "str") for name, kind in columns.items()
    )


class Downloader:
    """Copies files of a remote by streaming's own downloaders. Picklable; a client of its own in every thread."""

    def __init__(self, remote: str) -> None:
        self.remote = remote
        self._clients = threading.local()

    def __call__(self, name: str, to: Path) -> None:
        """Copy the file ``name`` of the remote to an absent local path.

        Raises:
            UserError: it cannot be downloaded; names its address.
        """
        origin = f"{self.remote}/{name}"
        try:
            if not hasattr(self._clients, "downloader"):
                self._clients.downloader = CloudDownloader.get(self.remote)
            self._clients.downloader.download(origin, str(to), _DOWNLOAD_SECONDS)
        except Exception as e:  # of whichever storage it is
            raise UserError(
                f"cannot be downloaded ({type(e).__name__}: {e})",
                where=origin,
                expected="a dataset directory, made by `rating-train prepare` and uploaded completely",
                fix="check data.remote, the credentials and S3_ENDPOINT_URL",
            ) from e

    def __reduce__(self) -> tuple[Any, ...]:
        return Downloader, (self.remote,)


def fetch_split(source: Source, split: str) -> dict[str, Any]:
    """Fetch and check a remote dataset's manifest and index (:func:`rating_train.data.samples.remote.fetch_split`)."""
    return remote.fetch_split(source, split, Downloader(source.plain_remote))
