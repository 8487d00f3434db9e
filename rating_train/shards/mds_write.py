"""Write MDS shards (version 2, which MosaicML Streaming reads), byte for byte as its ``MDSWriter`` does.

``MDSWriter`` itself is not used because importing streaming imports torch: seconds and hundreds of megabytes for every
worker of a build, for a format of forty lines. A test holds the bytes equal.

A shard: uint32 number of samples n, uint32 offsets (n + 1), the configuration as JSON, the samples. A sample:
uint32 sizes of its variable-length columns, then all columns in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rating_train.shards.mds_read import INDEX_NAME
from rating_train.shards.schema import MDS_COLUMNS, Listing

HASHES = ("sha1", "xxh64")  # sorted, as the format demands; streaming checks them when it downloads a shard

_SIZES: dict[str, int | None] = {"str": None, "bytes": None, "float32": 4, "float64": 8, "int64": 8}
_PACKED = {"float32": "<f", "float64": "<d", "int64": "<q"}


def encode_sample(listing: Listing, image: bytes, columns: Mapping[str, str] = MDS_COLUMNS) -> bytes:
    """Encode one sample of these columns: ``image`` is a JPEG; ``rating`` is stored as float32, a count as int64."""
    own: dict[str, Any] = {
        "id": listing.id,
        "main_category": listing.category,
        "image": image,
        **listing.texts,
    }
    own |= {"rating": listing.rating, "rating_count": listing.rating_count}
    return encode_values(own, columns)


def encode_values(own: Mapping[str, Any], columns: Mapping[str, str]) -> bytes:
    """Encode one sample, column -> value."""
    values: list[bytes] = []
    sizes: list[int] = []
    for name in sorted(columns):
        kind = columns[name]
        value: Any = own[name]
        if kind in _PACKED:
            values.append(struct.pack(_PACKED[kind], value))
        else:
            values.append(value if kind == "bytes" else value.encode("utf-8"))
            sizes.append(len(values[-1]))
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(values)


def shard_name(number: int) -> str:
    """Return, for example, ``shard.00000.mds``."""
    return f"shard.{number:05}.mds"


def write_index(folder: Path, shards: list[dict[str, Any]]) -> Path:
    """Write ``index.json`` of a folder of shards, flushed to the disk; return its path."""
    path = folder / INDEX_NAME
    write_synced(path, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode("utf-8"))
    return path


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk. Not atomic: its folder is temporary."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


class ShardWriter:
    """Writes shards of at most ``shard_bytes`` to a new ``folder``; holds one shard in memory.

    Attributes:
        shards: entries of the index, one per shard written.
        sha256: hex SHA-256 of every file written, by name.
    """

    def __init__(self, folder: Path, shard_bytes: int, columns: Mapping[str, str] = MDS_COLUMNS) -> None:
        self.folder = folder
        names = sorted(columns)
        folder.mkdir()
        self.shards: list[dict[str, Any]] = []
        self.sha256: dict[str, str] = {}
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": list(HASHES),
            "size_limit": shard_bytes,
            "column_names": names,
            "column_encodings": [columns[name] for name in names],
            "column_sizes": [_SIZES[columns[name]] for name in names],
        }
        self._header = json.dumps(self._config, sort_keys=True).encode("utf-8")
        self._limit = shard_bytes
        self._samples: list[bytes] = []
        self._bytes = self._empty_bytes()

    def write(self, sample: bytes) -> None:
        """Append an encoded sample; a sample that does not fit starts the next shard."""
        size = len(sample) + 4
        if self._samples and self._bytes + size > self._limit:
            self._flush()
        self._samples.append(sample)
        self._bytes += size

    def finish(self) -> Path:
        """Write the last shard and the index; return the path of the index."""
        if self._samples:
            self._flush()
        index = write_index(self.folder, self.shards)
        self.sha256[INDEX_NAME] = hashlib.sha256(index.read_bytes()).hexdigest()
        return index

    def _empty_bytes(self) -> int:
        return 4 + 4 + len(self._header)

    def _flush(self) -> None:
        count = len(self._samples)
        sizes = np.fromiter((len(s) for s in self._samples), np.int64, count)
        offsets = np.concatenate(([0], sizes.cumsum())) + 4 + 4 * (count + 1) + len(self._header)
        start = struct.pack("<I", count) + offsets.astype("<u4").tobytes() + self._header
        data = b"".join((start, *self._samples))
        self._samples, self._bytes = [], self._empty_bytes()
        name = shard_name(len(self.shards))
        write_synced(self.folder / name, data)
        hashes = {"sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64(data).hexdigest()}
        raw = {"basename": name, "bytes": len(data), "hashes": hashes}
        self.shards.append({"samples": count, "raw_data": raw, "zip_data": None, **self._config})
        self.sha256[name] = hashlib.sha256(data).hexdigest()
