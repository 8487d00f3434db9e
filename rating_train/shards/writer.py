"""Write a dataset directory so that it is complete or absent.

Everything goes into ``DATA.tmp-HOST-PID-NONCE`` beside ``DATA``: the shards first, the manifest last, then one rename.
A build killed at any moment leaves at most that temporary folder, which the next build sweeps.
"""

from __future__ import annotations

import errno
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
from rating_train.files import (
    atomic_write_json,
    fsync_path,
    hold_lock,
    read_json,
    sha256_file,
    sha256_json,
)
from rating_train.shards.mds_write import INDEX_NAME, ShardWriter, encode_sample, shard_name, write_index
from rating_train.shards.schema import MANIFEST_NAME, MDS_COLUMNS, QUARANTINE_NAME, SPLITS, Listing

logger = logging.getLogger(__name__)

# A hard link cannot be made: another file system, one without links, or too many links to one file.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class RatingStats:
    """Count, mean and population standard deviation of ratings, in one pass (Welford, 1962)."""

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count = count
        self.mean = mean
        self.squares = squares  # sum of (rating - mean) ** 2

    def add(self, value: float) -> None:
        """Add one rating."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def merge(self, other: RatingStats) -> None:
        """Add all ratings of another (Chan et al., 1979); the order of merges decides the last bits."""
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

    def __init__(self, folder: Path, shard_bytes: int, columns: Mapping[str, str] = MDS_COLUMNS) -> None:
        self.folder = folder
        self.columns = columns
        self.stats = RatingStats()
        self.shards = ShardWriter(folder, shard_bytes, columns)

    def write(self, listing: Listing, image: bytes) -> None:
        """Append a sample; ``image`` is a JPEG."""
        self.shards.write(encode_sample(listing, image, self.columns))
        if math.isnan(listing.rating):
            self.stats.count += 1  # of the split that can be scored only: there is no mean
        else:
            self.stats.add(float(np.float32(listing.rating)))

    def finish(self) -> dict[str, Any]:
        """Write the last shard and the index; return the split's entry in the manifest."""
        index = self.shards.finish()
        fsync_path(self.folder)
        return split_entry(index, self.shards.shards, self.stats)


class MergedSplit:
    """The shards of one split, taken from other folders: linked in the order given, never rewritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stats = RatingStats()
        self._shards: list[dict[str, Any]] = []
        folder.mkdir()

    def adopt(self, source: Path, stats: RatingStats) -> None:
        """Link all shards of a finished folder under the next numbers; ``stats`` are those of its ratings."""
        for shard in read_json(source / INDEX_NAME)["shards"]:
            name = shard_name(len(self._shards))
            _link_or_copy(source / shard["raw_data"]["basename"], self.folder / name)
            self._shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
        self.stats.merge(stats)

    def finish(self) -> dict[str, Any]:
        """Write the index; return the split's entry in the manifest."""
        index = write_index(self.folder, self._shards)
        fsync_path(self.folder)
        return split_entry(index, self._shards, self.stats)


def split_entry(index: Path, shards: list[dict[str, Any]], stats: RatingStats) -> dict[str, Any]:
    """Return a split's entry in the manifest; refuse shards that hold another number of samples than was counted."""
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
    """A dataset that is being made; a context manager that leaves a complete ``out``, or nothing.

    Args:
        out: the dataset directory, which must not exist.

    Raises:
        UserError: ``out`` exists or its parent cannot be written to.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        refuse_existing(self.out)
        self._splits: dict[str, MergedSplit] = {}
        self._committed = False
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.out.parent, re.escape(self.out.name))
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

    def adopt(self, split: str, source: Path, stats: RatingStats) -> None:
        """Append all shards of the folder ``source`` to a split: linked, or copied from another file system.

        Args:
            split: one of ``SPLITS``.
            source: a folder of shards with its index.
            stats: of the ratings in the shards.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        if split not in self._splits:
            self._splits[split] = MergedSplit(self.folder / split)
        self._splits[split].adopt(source, stats)

    def append_quarantine(self, path: Path) -> None:
        """Append all rows of another quarantine file."""
        with open(path, encoding="utf-8") as f:
            shutil.copyfileobj(f, self._quarantine, 1 << 20)

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the indices, then the manifest, and rename the folder to ``out``.

        Args:
            manifest: its fields but ``splits`` and ``fingerprint``, which are added here. The fingerprint covers the
                indices of the splits, which hold the hashes of all shards.

        Returns:
            The manifest as written.
        """
        splits = {name: self._splits[name].finish() for name in SPLITS if name in self._splits}
        complete = {
            **manifest,
            "splits": splits,
            "fingerprint": sha256_json({name: entry["index_sha256"] for name, entry in splits.items()}),
        }
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        atomic_write_json(self.folder / MANIFEST_NAME, complete)
        refuse_existing(self.out)  # made meanwhile by another build: a rename would replace an empty folder
        os.rename(self.folder, self.out)
        self._committed = True
        fsync_path(self.out.parent)
        return complete


def refuse_existing(out: Path) -> None:
    """Check that nothing is at ``out``: a build never overwrites.

    Raises:
        UserError: something is there.
    """
    if out.exists() or out.is_symlink():
        raise UserError(
            "the dataset directory exists already",
            where=out,
            fix="choose another --out, or remove it if it is not needed",
        )


def make_temporary(out: Path) -> tuple[Path, int]:
    """Make a temporary folder for ``out``; return it and a descriptor that holds its lock while this process lives."""
    while True:
        folder = out.with_name(f"{out.name}{_infix()}{os.getpid()}-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        held = hold_lock(lock)
        # Without locks on this file system (None) nobody takes the folder for stale either. Another process that holds
        # the lock is sweeping it, or has swept it: then a new one is made.
        if held is None or (held and folder.exists()):
            return folder, lock
        os.close(lock)


def sweep(parent: Path, names: str) -> None:
    """Remove the temporary folders that dead processes of this machine left.

    A folder is stale when nobody holds its lock. Folders of other hosts are kept: not every shared file system
    propagates locks between hosts.

    Args:
        parent: the folder to look in.
        names: a pattern of what the temporary folders were made for.
    """
    # The complete name is matched: the infix of host "a" is also a prefix of the folders of host "a-1".
    ours = re.compile(f"{names}{re.escape(_infix())}[0-9]+-[0-9a-f]{{8}}")
    for folder in sorted(f for f in parent.iterdir() if ours.fullmatch(f.name)):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if hold_lock(lock):
                logger.warning("removing %s, which a killed build left", folder)
                shutil.rmtree(folder)
            else:
                logger.warning("keeping %s: another build may be writing it", folder)
        finally:
            os.close(lock)


def _infix() -> str:
    return f".tmp-{platform.node() or 'host'}-"
