"""A dataset in remote storage and its cache on this node: what must hold before a shard is fetched.

The remote is only read. The cache is a directory of copies, any of which may be deleted: so it must never be the
dataset itself, and never a directory with anything else in it. Imports no torch and no streaming.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file
from rating_train.shards.manifest import check_index, read_manifest
from rating_train.shards.mds_read import INDEX_NAME
from rating_train.shards.schema import MANIFEST_NAME

#: Copies one file: (its name in the remote, a local path). Errors: :class:`UserError`.
Download = Callable[[str, Path], None]


@dataclass(frozen=True)
class Source:
    """Where a dataset's bytes come from.

    Attributes:
        path: dataset directory; with ``remote``, the directory of this node that caches it.
        remote: s3://, gs:// or a directory; "" where ``path`` is the dataset itself, of which nothing is ever deleted.
        cache_limit_bytes: most bytes that one split may take in the cache; 0 is no limit.
        predownload_items: items of a loader process to fetch ahead; 0 takes streaming's 8 batches.
        verify_hash: hash every shard when it is first read. (Downloads are always hashed.)
    """

    path: str
    remote: str = ""
    cache_limit_bytes: int = 0
    predownload_items: int = 0
    verify_hash: bool = True

    @property
    def plain_remote(self) -> str:
        """The remote as streaming names it: a directory as a path (file:///a/b as /a/b), without a last slash."""
        url = urllib.parse.urlparse(self.remote)
        return (url.path if url.scheme == "file" else self.remote).rstrip("/")


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch_split` leaves: the manifest, and the lock on the cache for as long as this lives."""

    manifest: dict[str, Any]
    lock: BufferedWriter


def fetch_split(source: Source, split: str, download: Download) -> Fetched:
    """Fetch a remote dataset's manifest and a split's index, and bring the cache into line.

    Call it on one rank of each node. A shard in the cache that has not the size in the index (a download that was
    cut off) is removed, and fetched again when it is needed.

    Raises:
        UserError: the remote cannot be read or is no dataset, the cache directory holds something else, or another
            job of this node caches there.
    """
    cache, folder = Path(source.path), Path(source.path) / split
    with tempfile.TemporaryDirectory(prefix="rating_train-") as temporary:
        fetched = Path(temporary)
        download(MANIFEST_NAME, fetched / MANIFEST_NAME)
        try:
            if split in read_manifest(fetched)["splits"]:
                download(f"{split}/{INDEX_NAME}", fetched / split / INDEX_NAME)
            manifest = check_index(fetched, split)
        except UserError as e:  # the temporary folder's name would help nobody
            where = e.where.replace(temporary, source.plain_remote)
            raise UserError(e.what, where=where, expected=e.expected, fix=e.fix) from e
        shards = {s["raw_data"]["basename"]: s for s in read_json(fetched / split / INDEX_NAME)["shards"]}
        _refuse_foreign(source, folder, set(shards), sha256_file(fetched / split / INDEX_NAME))
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock_cache(folder)
        for name in (MANIFEST_NAME, f"{split}/{INDEX_NAME}"):
            part = cache / f"{name}.tmp"
            part.write_bytes((fetched / name).read_bytes())
            os.replace(part, cache / name)
    for file in folder.iterdir():
        entry = shards.get(file.name)
        if file.name != INDEX_NAME and (entry is None or file.stat().st_size != entry["raw_data"]["bytes"]):
            file.unlink()
    return Fetched(manifest, lock)


def _refuse_foreign(source: Source, folder: Path, shards: set[str], index_sha256: str) -> None:
    """Errors: :class:`UserError` if the cache directory is the remote, or holds files that are not its copies."""
    expected = "an empty or absent directory, or the cache of this very dataset"
    fix = "set data.path to another directory, or delete this one if it is of no use"
    if Path(source.plain_remote).resolve() == Path(source.path).resolve():
        raise UserError(
            "data.path and data.remote are the same directory", where=source.path, expected=expected
        )
    if not folder.is_dir():
        return
    index = folder / INDEX_NAME
    files = sorted(f.name for f in folder.iterdir())
    if files and not index.is_file():
        problem = f"it has {files[0]} but no {INDEX_NAME}"
    elif files and sha256_file(index) != index_sha256:
        problem = f"its {INDEX_NAME} is that of another dataset, or of another version of it"
    else:
        # A download in progress is named after its shard: NAME.tmp, or boto's NAME.RANDOM.
        foreign = [
            f for f in files if f != INDEX_NAME and not any(f == s or f.startswith(f"{s}.") for s in shards)
        ]
        problem = f"it holds {foreign[0]}, which the index does not name" if foreign else ""
    if problem:
        raise UserError(
            f"the cache does not match {source.remote}: {problem}", where=folder, expected=expected, fix=fix
        )


def _lock_cache(folder: Path) -> BufferedWriter:
    """An open file that holds the lock of a cache directory while this process and its loaders live.

    Two jobs in one cache would each count only their own bytes towards the limit.
    """
    lock = open(folder.with_name(f".{folder.name}.lock"), "wb")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.close()
        raise UserError(
            "the cache is in use by another job on this node, or by another split that is the same",
            where=folder,
            fix="give each job its own data.path",
        ) from e
    except OSError:  # no locks on this file system
        pass
    return lock
