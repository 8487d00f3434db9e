"""Write a dataset directory so that it is whole or absent.

Everything goes into ``DATA.tmp-HOST-PID-NONCE`` beside ``DATA``; the shards first, the manifest last, then
one rename. (``MDSWriter`` alone does not give that: leaving its ``with`` block on an exception still writes
a complete-looking index, so it is finished by hand here, and only when all went well.)
"""

from __future__ import annotations

import fcntl
import json
import logging
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
from streaming import MDSWriter

from rating_train.data.schema import MANIFEST_NAME, MDS_COLUMNS, QUARANTINE_NAME, SPLITS, Dropped, Listing
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, fsync_path, sha256_file, sha256_json

logger = logging.getLogger(__name__)

HASHES = ("sha1", "xxh64")  # sorted, as MDSWriter demands; streaming checks them when it downloads a shard


class RatingStats:
    """Count, mean and population standard deviation of ratings, in one pass (Welford, 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Take one more rating in."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._squares += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Population standard deviation; 0.0 of a single rating."""
        return float(np.sqrt(self._squares / self.count)) if self.count else 0.0


class SplitWriter:
    """The MDS shards of one split."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.stats = RatingStats()
        self._mds = MDSWriter(
            columns=dict(MDS_COLUMNS), out=str(folder), hashes=list(HASHES), size_limit=shard_bytes
        )

    def write(self, listing: Listing, image: bytes) -> None:
        """Append a sample: ``image`` is a JPEG; ``rating`` is stored as float32, the count as int64."""
        rating = np.float32(listing.rating)
        self._mds.write(
            {
                "id": listing.id,
                "image": image,
                "title": listing.title,
                "description": listing.description,
                "features": listing.features,
                "main_category": listing.main_category,
                "rating": rating,
                "rating_count": np.int64(listing.rating_count),
            }
        )
        self.stats.add(float(rating))

    def finish(self) -> dict[str, Any]:
        """Write the last shard and the index; give the split's entry in the manifest."""
        self._mds.finish()
        index = self.folder / "index.json"
        shards = json.loads(index.read_text("utf-8"))["shards"]
        items = sum(shard["samples"] for shard in shards)
        if items != self.stats.count:
            raise RuntimeError(f"{self.folder}: {self.stats.count} samples written, the index has {items}")
        for file in self.folder.iterdir():
            fsync_path(file)
        fsync_path(self.folder)
        return {
            "items": items,
            "shards": len(shards),
            "bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
            "rating_mean": self.stats.mean,
            "rating_std": self.stats.std,
            "index_sha256": sha256_file(index),
        }

    def abandon(self) -> None:
        """Stop without an index."""
        self._mds.cancel_future_jobs()


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
        self._splits: dict[str, SplitWriter] = {}
        self._committed = False
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(self.out)
            self.folder, self._lock = _make_temporary(self.out)
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
            for split in self._splits.values():
                split.abandon()
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def write(self, split: str, listing: Listing, image: bytes) -> None:
        """Append a sample to a split (one of ``SPLITS``), which exists from its first sample on."""
        if split not in self._splits:
            if split not in SPLITS:
                raise ValueError(f"split {split!r} is not one of {SPLITS}")
            self._splits[split] = SplitWriter(self.folder / split, self._shard_bytes)
        self._splits[split].write(listing, image)

    def quarantine(self, dropped: Dropped) -> None:
        """Append one row to ``quarantine.jsonl``: source, line, id, reason, detail."""
        self._quarantine.write(json.dumps(vars(dropped), ensure_ascii=False) + "\n")

    def keep_quarantine(self) -> Path:
        """Put the quarantine beside ``out``, where it outlives a build that is given up; its path."""
        self._quarantine.flush()
        path = self.out.with_name(f"{self.out.name}.{QUARANTINE_NAME}")
        shutil.copyfile(self.folder / QUARANTINE_NAME, path)
        return path

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


def _make_temporary(out: Path) -> tuple[Path, int]:
    """A fresh temporary folder for ``out`` and a descriptor that holds its lock while the build lives."""
    while True:
        folder = out.with_name(f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}")
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
    """Remove what killed builds of the same ``out`` on this machine left; a living build keeps its folder.

    A folder is stale when nobody holds its lock. Folders of other hosts stay: not every shared file
    system carries locks from host to host.
    """
    # The whole name is matched: the prefix of host "a" also begins the folders of host "a-1".
    ours = re.compile(re.escape(_prefix(out)) + r"\d+-[0-9a-f]{8}")
    for folder in sorted(f for f in out.parent.iterdir() if ours.fullmatch(f.name)):
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


def _prefix(out: Path) -> str:
    return f"{out.name}.tmp-{platform.node() or 'host'}-"
