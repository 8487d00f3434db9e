"""Write a dataset directory so that it is whole or absent.

Everything goes into ``DATA.tmp-HOST-PID-NONCE`` beside ``DATA``; the shards first, the manifest last, then
one rename. A build killed at any moment leaves at most that temporary folder, which the next one sweeps.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rating_train.errors import UserError
from rating_train.files import atomic_write_json, fsync_path, read_json, sha256_file, sha256_json
from rating_train.shards.mds_write import INDEX_NAME, ShardWriter, encode_sample, shard_name, write_index
from rating_train.shards.schema import MANIFEST_NAME, QUARANTINE_NAME, SPLITS, Dropped, Listing

logger = logging.getLogger(__name__)

# A hard link is not to be had: another file system, none at all, or too many of one file.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class RatingStats:
    """Count, mean and population standard deviation of ratings, in one pass (Welford, 1962)."""

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count = count
        self.mean = mean
        self.squares = squares  # sum of (rating - mean) ** 2

    def add(self, value: float) -> None:
        """Take one more rating in."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def merge(self, other: RatingStats) -> None:
        """Take in all of another (Chan et al., 1979); the order of merges counts in the last bits."""
        if other.count:
            count = self.count + other.count
            delta = other.mean - self.mean
            self.squares += other.squares + delta * delta * self.count * other.count / count
            self.mean += delta * other.count / count
            self.count = count

    @property
    def std(self) -> float:
        """Population standard deviation; 0.0 of a single rating."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


class SplitWriter:
    """The MDS shards of one split."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.stats = RatingStats()
        self.shards = ShardWriter(folder, shard_bytes)

    def write(self, listing: Listing, image: bytes) -> None:
        """Append a sample: ``image`` is a JPEG; ``rating`` is stored as float32, the count as int64."""
        self.shards.write(encode_sample(listing, image))
        self.stats.add(float(np.float32(listing.rating)))

    def finish(self) -> dict[str, Any]:
        """Write the last shard and the index; give the split's entry in the manifest."""
        index = self.shards.finish()
        fsync_path(self.folder)
        return split_entry(index, self.shards.shards, self.stats)


class MergedSplit:
    """The shards of one split as other folders hold them: linked in the order given, never rewritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stats = RatingStats()
        self._shards: list[dict[str, Any]] = []
        folder.mkdir()

    def adopt(self, source: Path, stats: RatingStats) -> None:
        """Take over all shards of a finished folder, under the next numbers."""
        for shard in read_json(source / INDEX_NAME)["shards"]:
            name = shard_name(len(self._shards))
            _link_or_copy(source / shard["raw_data"]["basename"], self.folder / name)
            self._shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
        self.stats.merge(stats)

    def finish(self) -> dict[str, Any]:
        """Write the index; give the split's entry in the manifest."""
        index = write_index(self.folder, self._shards)
        fsync_path(self.folder)
        return split_entry(index, self._shards, self.stats)


def split_entry(index: Path, shards: list[dict[str, Any]], stats: RatingStats) -> dict[str, Any]:
    """A split's entry in the manifest; refuses shards whose samples are not those that were counted."""
    items = sum(shard["samples"] for shard in shards)
    if items != stats.count:
        raise RuntimeError(f"{index}: {stats.count} samples written, the index has {items}")
    return {
        "items": items,
        "shards": len(shards),
        "bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
        "rating_mean": stats.mean,
        "rating_std": stats.std,
        "index_sha256": sha256_file(index),
    }


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
        fsync_path(target)


class DatasetWriter:
    """A dataset in the making; a context manager that leaves ``out`` whole, or nothing.

    Args:
        out: the dataset directory, which must not exist.
        shard_bytes: upper bound of one shard file.

    Errors: :class:`UserError` if ``out`` exists or its parent cannot be written to.
    """

    def __init__(self, out: str | Path, shard_bytes: int) -> None:
        self.out = Path(out)
        refuse_existing(self.out)
        self._shard_bytes = shard_bytes
        self._splits: dict[str, SplitWriter | MergedSplit] = {}
        self._committed = False
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(self.out)
            self.folder, self._lock = make_temporary(self.out)
        except OSError as e:
            raise UserError(
                f"cannot write here ({e})", where=self.out.parent, fix="choose another --out"
            ) from e
        self._quarantine = open(self.folder / QUARANTINE_NAME, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._quarantine.close()
        if not self._committed:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def write(self, split: str, listing: Listing, image: bytes) -> None:
        """Append a sample to a split (one of ``SPLITS``), which exists from its first sample on."""
        if split not in self._splits:
            self._splits[split] = SplitWriter(self._folder_of(split), self._shard_bytes)
        writer = self._splits[split]
        assert isinstance(writer, SplitWriter), "a split is either written or adopted"
        writer.write(listing, image)

    def adopt(self, split: str, source: Path, stats: RatingStats) -> None:
        """Append all shards of the folder ``source`` to a split: linked, or copied from another file system."""
        if split not in self._splits:
            self._splits[split] = MergedSplit(self._folder_of(split))
        merged = self._splits[split]
        assert isinstance(merged, MergedSplit), "a split is either written or adopted"
        merged.adopt(source, stats)

    def _folder_of(self, split: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        return self.folder / split

    def quarantine(self, dropped: Dropped) -> None:
        """Append one row to ``quarantine.jsonl``: source, line, id, reason, detail."""
        self._quarantine.write(json.dumps(vars(dropped), ensure_ascii=False) + "\n")

    def append_quarantine(self, path: Path) -> None:
        """Append all rows of another quarantine file."""
        with open(path, encoding="utf-8") as f:
            shutil.copyfileobj(f, self._quarantine, 1 << 20)

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Finish all shards, write the manifest last, rename. The manifest as written.

        ``splits`` and ``fingerprint`` are added here; the fingerprint covers the splits' indices, which
        hold the hashes of all shards.
        """
        splits = {name: self._splits[name].finish() for name in SPLITS if name in self._splits}
        whole = {
            **manifest,
            "splits": splits,
            "fingerprint": sha256_json({name: entry["index_sha256"] for name, entry in splits.items()}),
        }
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        atomic_write_json(self.folder / MANIFEST_NAME, whole)
        refuse_existing(self.out)  # made by another build meanwhile: rename would replace an empty folder
        os.rename(self.folder, self.out)
        self._committed = True
        fsync_path(self.out.parent)
        return whole


def refuse_existing(out: Path) -> None:
    """Errors: :class:`UserError` if something is at ``out``: a build never overwrites."""
    if out.exists() or out.is_symlink():
        raise UserError(
            "the dataset directory exists",
            where=out,
            fix="choose another --out, or remove it if it is of no use",
        )


def make_temporary(out: Path) -> tuple[Path, int]:
    """A fresh temporary folder for ``out`` and a descriptor that holds its lock while its maker lives."""
    while True:
        folder = out.with_name(f"{out.name}{_infix()}{os.getpid()}-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # no locks on this file system: then nobody takes the folder for stale either
            return folder, lock
        if folder.exists():  # not swept between mkdir and flock
            return folder, lock
        os.close(lock)


def remove_stale(out: Path) -> None:
    """:func:`sweep` what killed builds of ``out`` left beside it."""
    sweep(out.parent, re.escape(out.name))


def sweep(parent: Path, names: str) -> None:
    """Remove the temporary folders for ``names`` (a pattern) that dead processes of this machine left.

    A folder is stale when nobody holds its lock. Folders of other hosts stay: not every shared file
    system carries locks from host to host.
    """
    # The whole name is matched: the infix of host "a" also begins the folders of host "a-1".
    ours = re.compile(f"{names}{re.escape(_infix())}[0-9]+-[0-9a-f]{{8}}")
    for folder in sorted(f for f in parent.iterdir() if ours.fullmatch(f.name)):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.warning("left %s alone: another build may be writing it", folder)
        else:
            logger.warning("removing %s, left by a build that did not end", folder)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _infix() -> str:
    return f".tmp-{platform.node() or 'host'}-"
