"""The door to MosaicML Streaming for reading: shards by streaming, their order by :mod:`.order`.

Streaming's own iteration order depends on the number of nodes, ranks and workers, its state counts what was
yielded instead of what was trained on, and after the last batch of an epoch it resumes into an empty epoch.
So its transport (shards, download, cache, threads that prepare ahead) is kept, and the ids are given to it.

Two more things it does not do are done here. It never checks a local shard: every shard is hashed when it is first
read. And it counts a download towards the cache limit only when it is done, so that several processes pass the limit
together: here the space is reserved before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from time import sleep, time_ns
from typing import Any

import numpy as np
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.format import FileInfo
from streaming.base.shuffle import get_shuffle
from streaming.base.storage import CloudDownloader
from torch.utils.data import get_worker_info

from rating_train.data import cache
from rating_train.data.cache import Fetched, Source
from rating_train.data.order import Ids, interleave, worker_part
from rating_train.data.shared_memory import claimed_names
from rating_train.data.stale_memory import Claim
from rating_train.distributed.collectives import all_gather
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.mds_read import INDEX_NAME
from rating_train.shards.verify import fastest_hash, shard_problem

__all__ = ["OrderedDataset", "check_split", "fetch_split", "open_split", "read_manifest", "shuffled_epoch"]

_TRIES = 8  # of reading a shard that another process may evict in between
_DOWNLOAD_SECONDS = 300.0  # streaming's default of 60 s is short for a shard of 64 MiB on a busy link


class OrderedDataset(StreamingDataset):
    """A split whose sample order is given, one rank's batches at a time, before each iteration."""

    _batches: Ids | None = None
    _remote: str = ""
    _limit: int = 0  # bytes of this split in the cache; 0 is no limit
    #: One byte per shard, shared by the ranks of a node and their loader processes: 1 is "its hash is right".
    #: ``None`` trusts without looking.
    _verified: mmap.mmap | bytearray | None = None
    _failure: BaseException | None = None
    _fetched: Fetched | None = None  # holds the lock of the cache
    claim: Claim | None = None  # holds the locks of its shared memory, see stale_memory.py

    def set_batches(self, batches: Ids) -> None:
        """Read these batches next: (K, B) int64 sample ids of this rank. Call before ``iter(loader)``."""
        self._batches = batches

    # The two hooks by which StreamingDataset.__iter__ learns what to read. Overriding both leaves out its
    # shared-memory epoch counter and barrier, which a dead neighbour would hold for ever.
    def _resume_incr_epoch(self) -> tuple[int, int]:
        return 0, 0

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Ids:
        if self._batches is None:
            raise RuntimeError("set_batches() was not called before iterating")
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return np.ascontiguousarray(worker_part(self._batches, worker, workers)).reshape(-1)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are spawned: they check shards on their own."""
        state = {**self.__dict__, "_fetched": None, "claim": None}
        if self._verified is not None:
            state["_verified"] = bytearray(self._verified)
        return state

    # What fails in a background thread of streaming would only be printed, and the iteration would end early.
    def on_exception(self, future: Future) -> None:
        """Keep the error of a background thread for the process that reads."""
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()

    def _ready_thread(self, it: Any) -> None:
        """Let the reader go on as far as shards were fetched.

        Streaming's own waits for ever for a shard that was evicted again before it looked, as happens when the cache
        is small. Here the reader goes on, and fetches it itself.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            ahead = it.ready_index < it.prepare_index
            if ahead and self._shard_states[self._shard_of(it)] != _ShardState.PREPARING:
                it.ready_index += 1
            else:
                sleep(TICK)
        it.on_exit()

    def _shard_of(self, it: Any) -> int:
        return int(self.spanner[it.sample_ids[it.ready_index]][0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        threads = None
        try:
            for sample in super().__iter__():
                threads = self._iterator
                yield sample
        except Exception:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:  # also when the reader stops half-way: a process waits for its threads before it ends
            if threads is not None:
                threads.non_blocking_exit()
        if self._failure is not None:
            raise self._failure

    def get_item(self, sample_id: int, retry: int = _TRIES - 1) -> Any:
        """A sample by its id.

        Raises:
            UserError: its shard is damaged or gone; names the shard and its path.
        """
        shard = int(self.spanner[sample_id][0])
        if self._verified is not None and not self._verified[shard]:
            self._verify_shard(shard)
        try:
            return super().get_item(sample_id, retry)
        except (ValueError, IndexError, OSError) as e:  # bytes that are no sample
            raise self._damaged(shard, f"holds a sample that cannot be read ({e})") from e

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """See that a shard is here, downloading it where there is a remote. Safe in many processes and threads.

        Raises:
            UserError: the shard is gone, cannot be downloaded, or was downloaded with another hash.
        """
        if not self._remote:  # nothing to fetch, and nothing to evict
            if not self._shard_file(shard_id).is_file():
                raise self._damaged(shard_id, "is missing")
            return
        if not hasattr(self, "_cache_filelock"):  # made late: it cannot be pickled
            self._cache_filelock = FileLock(self._cache_filelock_path)
        reserved = self._reserve(shard_id)
        if reserved is None:
            while blocking and self._shard_states[shard_id] == _ShardState.PREPARING:
                sleep(TICK)
            return
        try:
            added = self.streams[0].prepare_shard(self.shards[shard_id])
        except Exception as e:  # of whichever storage it is; shown with the shard's name
            file = self._shard_file(shard_id)
            file.unlink(
                missing_ok=True
            )  # streaming leaves a download of the wrong hash where it would be read
            self._settle(shard_id, _ShardState.REMOTE, -reserved)
            what = (
                "does not have the hash in the index"
                if "Checksum" in str(e)
                else f"cannot be downloaded ({e})"
            )
            origin = f"{self._remote}/{self.streams[0].split}/{file.name}"
            raise UserError(
                f"shard {self._shard_name(shard_id)} {what}",
                where=origin,
                fix="check data.remote and its files",
            ) from e
        if self._verified is not None and added:
            self._verified[shard_id] = 1  # streaming has just hashed it
        self._settle(shard_id, _ShardState.LOCAL, added - reserved)

    def _reserve(self, shard_id: int) -> int | None:
        """Make room and claim the download: the bytes reserved, or ``None`` where the shard is here or on its way."""
        size = self.shards[shard_id].get_max_size()
        while True:
            with self._cache_filelock:
                state = self._shard_states[shard_id]
                if state == _ShardState.LOCAL and not self._shard_file(shard_id).is_file():
                    # Somebody tidied up the cache. Its space is free again.
                    self.cache_usage -= size
                    state = _ShardState.REMOTE
                if state != _ShardState.REMOTE:
                    self._shard_access_times[shard_id] = time_ns()
                    return None
                while self._limit and self._limit < self.cache_usage + size:
                    if not np.any(self._shard_states.numpy() == _ShardState.LOCAL):
                        break  # all of the cache is downloads on their way: wait for one to be done
                    self._evict_coldest_shard()
                else:
                    self._shard_states[shard_id] = _ShardState.PREPARING
                    self.cache_usage += size
                    return size
            sleep(TICK)

    def _settle(self, shard_id: int, state: Any, bytes_more: int) -> None:
        with self._cache_filelock:
            self.cache_usage += bytes_more
            self._shard_access_times[shard_id] = time_ns()
            self._shard_states[shard_id] = state

    def _verify_shard(self, shard: int) -> None:
        """Hash a shard that nobody on this node has hashed yet, and note that it is good."""
        info = self._shard_info(shard)
        for _ in range(_TRIES):
            self.prepare_shard(shard)
            with contextlib.suppress(FileNotFoundError):  # evicted in between: fetch it again
                if problem := shard_problem(self._shard_file(shard), info.bytes, info.hashes):
                    raise self._damaged(shard, f"{problem}; none of it was read")
                assert self._verified is not None
                self._verified[shard] = 1
                return
        raise self._damaged(shard, "is evicted before it can be read: data.cache_limit_mb is too low")

    def _damaged(self, shard: int, what: str) -> UserError:
        again = "run `rating-train verify` on the dataset, and copy or prepare it again"
        copy = "delete this file: it is a copy, and is downloaded again"
        return UserError(
            f"shard {self._shard_name(shard)} {what}",
            where=self._shard_file(shard),
            fix=copy if self._remote else again,
        )

    def _shard_name(self, shard: int) -> str:
        return f"{self.streams[0].split}/{self._shard_info(shard).basename}"

    def _shard_info(self, shard: int) -> FileInfo:
        return self.shards[shard].file_pairs[0][0]  # an MDS shard is one file, and ours are not compressed

    def _shard_file(self, shard: int) -> Path:
        return Path(self.streams[0].local, self._shard_name(shard))


def open_split(
    source: str | Path | Source,
    split: str,
    rank_items: int,
    world: World | None = None,
    fetched: Fetched | None = None,
) -> OrderedDataset:
    """Open a split that :func:`check_split` or :func:`fetch_split` found good. A collective: every rank calls it.

    Args:
        source: a :class:`Source`, or the directory of a local dataset, of which nothing is ever deleted.
        split: sub-directory.
        rank_items: items per batch of one rank.
        world: this process's place; needed by a job of several ranks.
        fetched: on the rank that called it, the result of :func:`fetch_split`.

    Raises:
        UserError: the cache limit is too low for the shards.
    """
    source = source if isinstance(source, Source) else Source(str(source))
    local = Path(source.path).resolve()
    options: dict[str, Any] = {}
    if source.remote:
        shards = read_json(local / split / INDEX_NAME)["shards"]
        options = {
            "remote": source.plain_remote,
            "cache_limit": source.cache_limit_bytes or None,
            "predownload": source.predownload_items or None,
            "validate_hash": fastest_hash(shards[0]["raw_data"]["hashes"]),
            "download_timeout": _DOWNLOAD_SECONDS,
        }
    try:
        with claimed_names():
            dataset = OrderedDataset(
                local=str(local), split=split, batch_size=rank_items, shuffle=False, **options
            )
    except ValueError as e:  # on all ranks alike: each sees the same files and settings
        error = UserError(
            f"the cache cannot be used: {e}", where=local / split, fix="see data.cache_limit_mb, data.path"
        )
        error.on_all_ranks = True
        raise error from e
    dataset._remote, dataset._limit = source.plain_remote, source.cache_limit_bytes
    dataset._fetched = fetched
    if source.verify_hash:
        dataset._verified = _node_bytes(dataset.num_shards, world or World())
    return dataset


def _node_bytes(count: int, world: World) -> mmap.mmap:
    """``count`` zero bytes shared by the ranks of this node, and by processes forked later. A collective.

    A file that is new for every run and has no name once all have mapped it: no crash can leave one behind that
    vouches for shards. Ranks that cannot see each other's files get bytes of their own, and hash once more.
    """
    name = None
    if world.local_rank == 0 and world.local_size > 1:
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile(prefix="rating_train-hashed-", delete=False) as f,
        ):
            f.truncate(count)
            name = f.name
    leaders = all_gather(name) if world.size > 1 else [None]
    shared = None
    leader = leaders[world.node * world.local_size] if world.size > 1 else None
    if leader is not None:
        with contextlib.suppress(OSError), open(leader, "r+b") as f:
            shared = mmap.mmap(f.fileno(), count)
    if world.size > 1:
        all_gather(None)
    if name is not None:
        os.unlink(name)
    return shared or mmap.mmap(-1, count)


def fetch_split(source: Source, split: str) -> Fetched:
    """:func:`rating_train.data.cache.fetch_split` through streaming's own downloader."""

    def download(name: str, to: Path) -> None:
        origin = f"{source.plain_remote}/{name}"
        try:
            downloader = CloudDownloader.get(source.plain_remote)
            downloader.download(origin, str(to), _DOWNLOAD_SECONDS)
            downloader.clean_up()
        except Exception as e:  # of whichever storage it is
            raise UserError(
                f"cannot be downloaded ({type(e).__name__}: {e})",
                where=origin,
                expected="a dataset directory, made by `rating-train prepare` and uploaded whole",
                fix="check data.remote, the credentials and S3_ENDPOINT_URL",
            ) from e

    return cache.fetch_split(source, split, download)


def shuffled_epoch(
    shard_samples: Ids, *, seed: int, epoch: int, block_samples: int, canonical_nodes: int, shuffle: bool
) -> Ids:
    """(N,) int64: the ids of an epoch in order, by streaming's py1e shuffle (shards, then within blocks)."""
    samples = int(shard_samples.sum())
    if not shuffle:
        return np.arange(samples, dtype=np.int64)
    parts = min(canonical_nodes, samples)
    return interleave(get_shuffle("py1e", shard_samples, parts, seed, epoch, block_samples), parts)
