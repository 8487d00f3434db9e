"""Copies of a remote split's shards on this node, at most so many bytes of them, shared by any number of processes.

All there is to the cache is its directory, so that nothing has to agree with it, and nothing is left of a process
that is killed::

    CACHE/.SPLIT.lock            locked (flock) while sizes are counted and names change, not during a download
    CACHE/SPLIT/index.json
    CACHE/SPLIT/NAME             a complete shard, whose hash was right when it was downloaded
    CACHE/SPLIT/NAME.part/NAME   a download in progress; its process holds the lock of the directory

A shard that is being downloaded counts with its complete size. The least recently used shard is evicted (its access
time says which); a reader that finds its shard evicted fetches it again, and one that has it open keeps reading it. A
NAME.part whose lock is free is that of a process that was killed: it is removed. Imports no torch and no streaming.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import hold_lock
from rating_train.shards.mds_read import INDEX_NAME
from rating_train.shards.verify import shard_problem

log = logging.getLogger(__name__)

#: Copies one file: (its name in the remote, a local path). Raises :class:`UserError`.
Download = Callable[[str, Path], None]

PART = ".part"
_TICK = 0.02  # seconds between two looks at what another process does


class ShardCache:
    """The cache of one split. Picklable, and safe in any number of processes and threads.

    Args:
        folder: CACHE/SPLIT, with the index in it.
        shards: the index's entries.
        limit_bytes: most bytes of the folder; 0 is no limit.
        remote: name of the remote, for messages.
        download: copies one file of the remote.

    Raises:
        UserError: the limit is too low for four shards.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[dict[str, Any]],
        limit_bytes: int,
        remote: str,
        download: Download,
    ) -> None:
        self.folder, self._limit, self._remote, self._download = folder, limit_bytes, remote, download
        self._files = [shard["raw_data"] for shard in shards]
        self._sizes = {file["basename"]: file["bytes"] for file in self._files}
        least = 4 * max(self._sizes.values()) + (folder / INDEX_NAME).stat().st_size
        if 0 < limit_bytes < least:
            raise UserError(
                f"the cache may hold {limit_bytes} bytes, but four of the largest shards and the index take {least}",
                where=folder,
                fix=f"set data.cache_limit_mb to at least {-(-least >> 20) + 1}",
            )

    def ensure(self, shard: int) -> None:
        """See that a shard is here, and mark it as used. It may be evicted at any moment after that.

        Raises:
            UserError: the shard cannot be downloaded, or has another hash in the remote.
        """
        path = self.folder / self._files[shard]["basename"]
        while not _touch(path):
            claim = self._claim(path)
            if claim is None:
                time.sleep(_TICK)
                continue
            try:
                self._fetch(shard, path)
            finally:
                os.close(claim)

    def _claim(self, path: Path) -> int | None:
        """Reserve the space of a download: an open NAME.part, locked; ``None`` if another process has to act first."""
        part = path.with_name(path.name + PART)
        with locked(self.folder):
            if path.exists() or is_live(part) or not self._make_space(self._sizes[path.name]):
                return None
            remove_part(part)
            part.mkdir()
            claim = os.open(part, os.O_RDONLY)
            hold_lock(claim)
            return claim

    def _fetch(self, shard: int, path: Path) -> None:
        expected = self._files[shard]
        part = path.with_name(path.name + PART)
        name = f"{self.folder.name}/{path.name}"
        try:
            self._download(name, part / path.name)
            if problem := shard_problem(part / path.name, expected["bytes"], expected["hashes"]):
                raise UserError(
                    f"shard {name} does not have the hash in the index: it {problem}",
                    where=f"{self._remote}/{name}",
                    fix="upload this shard again",
                )
            with locked(self.folder):
                os.replace(part / path.name, path)
                part.rmdir()
        except OSError as e:
            raise UserError(
                f"shard {name} cannot be stored in the cache ({e})",
                where=self.folder,
                fix="free space on this disk, or set data.path to another one",
            ) from e
        finally:
            remove_part(part)

    def _make_space(self, size: int) -> bool:
        """Evict shards until ``size`` more bytes fit; False if downloads in progress take the space."""
        if not self._limit:
            return True
        used, present = size, []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(PART):
                if is_live(Path(entry.path)):
                    used += self._sizes.get(entry.name.removesuffix(PART), 0)
                else:
                    remove_part(Path(entry.path))
                continue
            status = entry.stat()
            used += status.st_size
            if entry.name in self._sizes:
                present.append((status.st_atime_ns, status.st_size, entry.path))
        for _, bytes_, path in sorted(present):
            if used <= self._limit:
                break
            os.unlink(path)
            used -= bytes_
        return used <= self._limit


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the cache directory ``folder`` (see above): no other process counts or renames meanwhile.

    Raises:
        UserError: its file system has no locks.
    """
    with open(folder.with_name(f".{folder.name}.lock"), "wb") as lock:
        if hold_lock(lock, wait=True) is None:
            raise UserError(
                "the cache directory is on a file system without file locks",
                where=folder,
                expected="a disk of this node",
                fix="set data.path to another directory",
            )
        yield


def is_live(part: Path) -> bool:
    """Whether a process downloads into the NAME.part directory. Call it while the cache is locked."""
    try:
        fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not hold_lock(fd)
    finally:
        os.close(fd)


def remove_part(part: Path) -> None:
    """Remove a NAME.part and what is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(part)


def _touch(path: Path) -> bool:
    """Note that a file was used just now; False if it is not there."""
    try:
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


class Prefetch:
    """Fetches shards ahead of their readers, in a thread of this process that starts with the first request."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[int] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these shards next, in this order, and none of those that were wanted before."""
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify()
        if self._thread is None and shards:
            self._thread = threading.Thread(target=self._run, daemon=True, name="prefetch")
            self._thread.start()

    def close(self) -> None:
        """Fetch nothing more; a download in progress is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard = self._wanted.pop(0)
            try:
                self._cache.ensure(shard)
            except (UserError, OSError) as e:  # the reader of this shard will meet it, and say so
                log.debug("shard %d could not be fetched ahead: %s", shard, e)
                with self._changed:
                    self._wanted = []
