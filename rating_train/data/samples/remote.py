"""Where a dataset's bytes come from, and what must hold of a cache directory before a shard is fetched into it.

The remote is only read. The cache is a directory of copies, any of which may be deleted: so it must never be the
dataset itself, and never a directory with anything else in it. Imports no torch and no streaming.
"""

from __future__ import annotations

import os
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.data.samples.shard_cache import PART, Download, is_live, locked, remove_part
from rating_train.errors import UserError
from rating_train.files import sha256_file
from rating_train.shards.manifest import check_index, read_manifest
from rating_train.shards.mds_read import INDEX_NAME, read_index
from rating_train.shards.schema import MANIFEST_NAME


@dataclass(frozen=True)
class Source:
    """Where a dataset's bytes come from.

    Attributes:
        path: dataset directory; with ``remote``, the directory of this node that caches it.
        remote: s3://, gs:// or a directory; "" where ``path`` is the dataset itself, of which nothing is ever deleted.
        cache_limit_bytes: most bytes of one split in the cache; 0 is no limit.
    """

    path: str
    remote: str = ""
    cache_limit_bytes: int = 0

    @property
    def plain_remote(self) -> str:
        """The remote as streaming names it: a directory as a path (file:///a/b as /a/b), without a trailing slash."""
        url = urllib.parse.urlparse(self.remote)
        return (url.path if url.scheme == "file" else self.remote).rstrip("/")


def fetch_split(source: Source, split: str, download: Download) -> dict[str, Any]:
    """Fetch a remote dataset's manifest and a split's index, and remove from the cache what they do not vouch for.

    Call it on one rank of each node. A file in the cache that has not the size in the index, or is left of a download
    that was cut off, is removed, and its shard is fetched again when it is needed. Jobs may share a cache.

    Returns:
        The manifest.

    Raises:
        UserError: the remote cannot be read or is no dataset, or the cache directory holds something else.
    """
    cache, folder = Path(source.path), Path(source.path) / split
    with tempfile.TemporaryDirectory(prefix="rating_train-") as temporary:
        fetched = Path(temporary)
        download(MANIFEST_NAME, fetched / MANIFEST_NAME)
        try:
            if split in read_manifest(fetched)["splits"]:
                download(f"{split}/{INDEX_NAME}", fetched / split / INDEX_NAME)
            manifest = check_index(fetched, split)
            shards = {s["raw_data"]["basename"]: s for s in read_index(fetched / split)}
        except UserError as e:  # the temporary folder's name would help nobody
            where = e.where.replace(temporary, source.plain_remote)
            raise UserError(e.what, where=where, expected=e.expected, fix=e.fix) from e
        _refuse_foreign(source, folder, set(shards), sha256_file(fetched / split / INDEX_NAME))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for name in (MANIFEST_NAME, f"{split}/{INDEX_NAME}"):
                part = (
                    cache / f".{split}.{Path(name).name}.tmp"
                )  # not in the split's folder: a crash leaves it
                part.write_bytes((fetched / name).read_bytes())
                os.replace(part, cache / name)
            for file in folder.iterdir():
                if file.is_dir():
                    if not is_live(file):
                        remove_part(file)
                elif file.name != INDEX_NAME:
                    entry = shards.get(file.name)
                    if entry is None or file.stat().st_size != entry["raw_data"]["bytes"]:
                        file.unlink()
    return manifest


def _refuse_foreign(source: Source, folder: Path, shards: set[str], index_sha256: str) -> None:
    """Raise :class:`UserError` if the cache directory is the remote, or holds files that are not its copies."""
    expected = "an empty or absent directory, or the cache of this same dataset"
    fix = "set data.path to another directory, or delete this one if you do not need it"
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
        # NAME.part is a download in progress, and NAME.SUFFIX what is left of one by an older version.
        foreign = [
            f for f in files if f != INDEX_NAME and not any(f == s or f.startswith(f"{s}.") for s in shards)
        ]
        foreign += [f for f in files if (folder / f).is_dir() and not f.endswith(PART)]
        problem = f"it holds {foreign[0]}, which the index does not name" if foreign else ""
    if problem:
        raise UserError(
            f"the cache does not match {source.remote}: {problem}", where=folder, expected=expected, fix=fix
        )
