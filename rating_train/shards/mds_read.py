"""A reader of MDS shards in plain Python: for looking at a dataset and checking it without torch.

Training reads through streaming (:mod:`.streams`). This reader is a second, independent one: ``verify`` and the
report see what is in the files and not what a library made of them.

A shard is ``uint32 count``, then ``uint32 offset`` for each sample and one for the end, then the index entry as
JSON, then the samples. A sample is a ``uint32 size`` for each column without a fixed one, then all values. Everything
is little-endian.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rating_train.errors import UserError
from rating_train.files import read_json

INDEX_NAME = "index.json"


class BadShard(ValueError):
    """The bytes are not those of a shard; the message says which part is wrong."""


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of all shards of a split, in order.

    Raises:
        UserError: no index, or one that is not an MDS index.
    """
    content = read_json(folder / INDEX_NAME)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or any(s.get("format") != "mds" or s.get("compression") for s in shards):
        raise UserError(
            "not an index of uncompressed MDS shards",
            where=folder / INDEX_NAME,
            fix="prepare the dataset again",
        )
    return shards


def iter_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Every sample of a split in stored order, one in memory at a time. Errors: as :func:`iter_sampled`."""
    return iter_sampled([folder])


def iter_sampled(folders: Sequence[Path], most: int | None = None) -> Iterator[dict[str, Any]]:
    """At most ``most`` samples of some splits in stored order, at random with a fixed seed; all if there are fewer.

    Raises:
        UserError: a shard that is missing or damaged, by its path.
    """
    shards = [(folder / s["raw_data"]["basename"], s) for folder in folders for s in read_index(folder)]
    total = sum(shard["samples"] for _, shard in shards)
    chosen = None
    if most is not None and most < total:
        chosen = np.sort(random.Random(0).sample(range(total), most))
    first = 0
    for path, shard in shards:
        wanted = None
        if chosen is not None:
            begin, end = np.searchsorted(chosen, (first, first + shard["samples"]))
            wanted = {int(c) - first for c in chosen[begin:end]}
        first += shard["samples"]
        try:
            if wanted is None or wanted:
                yield from read_shard(path, shard, wanted)
        except (OSError, BadShard) as e:
            raise UserError(
                f"the shard cannot be read: {e}", where=path, fix="run `rating-train verify` on the dataset"
            ) from e


def read_shard(
    path: Path, shard: Mapping[str, Any], wanted: set[int] | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of a shard in order, or those whose place in the shard is ``wanted``.

    Raises:
        OSError: the file cannot be read.
        BadShard: its table of offsets, or a sample, does not fit the file or the columns.
    """
    with open(path, "rb") as f:
        head = f.read(4)
        count = int.from_bytes(head, "little")
        if len(head) < 4 or count != shard["samples"]:
            raise BadShard(f"its header counts {count} samples, the index {shard['samples']}")
        table = f.read(4 * (count + 1))
        if len(table) < 4 * (count + 1):
            raise BadShard("it ends within its table of offsets")
        offsets = struct.unpack(f"<{count + 1}I", table)
        for place in range(count):
            if wanted is not None and place not in wanted:
                continue
            begin, end = offsets[place], offsets[place + 1]
            if not 4 * (count + 2) <= begin <= end:
                raise BadShard(f"sample {place} has impossible offsets {begin} and {end}")
            f.seek(begin)
            data = f.read(end - begin)
            if len(data) < end - begin:
                raise BadShard(f"it ends within sample {place}")
            try:
                yield decode(data, shard)
            except (ValueError, struct.error, KeyError) as e:
                raise BadShard(f"sample {place} cannot be decoded: {e}") from e


_NUMBERS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i", "int": "<q"}


def decode(data: bytes, shard: Mapping[str, Any]) -> dict[str, Any]:
    """One sample of its bytes, by the columns of its shard's entry in the index."""
    sizes: list[int] = []
    at = 0
    for size in shard["column_sizes"]:
        if not size:
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
        sizes.append(size)
    if at + sum(sizes) != len(data):
        raise ValueError(f"its columns take {at + sum(sizes)} bytes, it has {len(data)}")
    sample: dict[str, Any] = {}
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes):
        value = data[at : at + size]
        at += size
        if encoding == "str":
            sample[name] = value.decode("utf-8")
        elif encoding == "bytes":
            sample[name] = value
        else:
            (sample[name],) = struct.unpack(_NUMBERS[encoding], value)
    return sample
