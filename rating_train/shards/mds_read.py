"""Read MDS shards in plain Python, without torch: their index, their samples, some columns of them.

Training decodes its samples here too (``data/samples``): what ``verify`` and the report see is what a model sees. Tests
compare it with streaming's own writer and reader.

A shard is ``uint32 count``, then ``uint32 offset`` for each sample and one for the end, then the index entry as
JSON, then the samples. A sample is a ``uint32 size`` for each column without a fixed one, then all values. Everything
is little-endian.
"""

from __future__ import annotations

import mmap
import os
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
    """The bytes are not those of a shard; the message says which part of it is wrong."""


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the index entries of all shards of a split, in order.

    Raises:
        UserError: there is no index, or it is not an MDS index.
    """
    content = read_json(folder / INDEX_NAME)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise UserError(
            "not an index of uncompressed MDS shards",
            where=folder / INDEX_NAME,
            fix="copy the dataset again from where it was made, or prepare it again",
        )
    return shards


def _is_entry(shard: Any) -> bool:
    """Whether an entry has what is read here; its file must lie in the folder of the index."""
    try:
        raw, columns = shard["raw_data"], (shard["column_names"], shard["column_encodings"])
        lengths = {len(column) for column in (*columns, shard["column_sizes"])}
        return (
            (shard["format"], shard["compression"]) == ("mds", None)
            and all(isinstance(n, int) and n >= 0 for n in (shard["samples"], raw["bytes"]))
            and all(isinstance(text, str) for text in (*columns[0], *columns[1], *raw["hashes"].values()))
            and all(size is None or (isinstance(size, int) and size >= 0) for size in shard["column_sizes"])
            and len(lengths) == 1
            and raw["basename"] not in (".", "..")
            and not {"/", "\0"}.intersection(raw["basename"])
        )
    except (TypeError, KeyError, AttributeError):
        return False


def iter_sampled(folders: Sequence[Path], most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield samples of some splits in stored order, one in memory at a time.

    Args:
        folders: the folders of the splits.
        most: yield this many, chosen at random with a fixed seed; ``None``, or more than there are, yields all.

    Raises:
        UserError: a shard is missing or damaged; the message names it.
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
    """Yield the samples of a shard in order.

    Args:
        path: the shard.
        shard: its entry in the index.
        wanted: places of the samples to read; ``None`` reads all.

    Raises:
        OSError: the file cannot be read.
        BadShard: its table of offsets, or a sample, does not match the file or the columns.
    """
    with open(path, "rb") as f:
        head = f.read(4)
        count = int.from_bytes(head, "little")
        if len(head) < 4 or count != shard["samples"]:
            raise BadShard(f"its header counts {count} samples, the index {shard['samples']}")
        size = os.fstat(f.fileno()).st_size
        if 4 * (count + 2) > size:
            raise BadShard("it ends within its table of offsets")
        table = f.read(4 * (count + 1))
        offsets = struct.unpack(f"<{count + 1}I", table)
        for place in range(count):
            if wanted is not None and place not in wanted:
                continue
            begin, end = offsets[place], offsets[place + 1]
            if not 4 * (count + 2) <= begin <= end:
                raise BadShard(f"sample {place} has impossible offsets {begin} and {end}")
            if end > size:
                raise BadShard(f"it ends within sample {place}")
            f.seek(begin)
            try:
                yield decode(f.read(end - begin), shard)
            except BadShard as e:
                raise BadShard(f"sample {place} cannot be decoded: {e}") from e


def read_columns(path: Path, shard: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield some columns of all samples of a shard, in order; the bytes of the others are not read.

    Raises:
        OSError: the file cannot be read.
        BadShard: its table of offsets, or a sample, does not match the file or the columns.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        count = shard["samples"]
        if size < 4 * (count + 2):
            raise BadShard("it ends within its table of offsets")
        # Not closed by hand: an error's traceback may still hold a part of it.
        content = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    if struct.unpack_from("<I", content)[0] != count:
        raise BadShard(f"its header does not count {count} samples")
    offsets = struct.unpack_from(f"<{count + 1}I", content, 4)
    for place in range(count):
        begin, end = offsets[place], offsets[place + 1]
        if not 4 * (count + 2) <= begin <= end <= size:
            raise BadShard(f"sample {place} has impossible offsets {begin} and {end}")
        try:
            yield decode(content[begin:end], shard, names)
        except BadShard as e:
            raise BadShard(f"sample {place} cannot be decoded: {e}") from e


def iter_texts(folder: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the items of a split without their images, in stored order.

    Args:
        folder: of the split.
        most: yield this many, chosen at random with a fixed seed; ``None``, or more than there are, yields all.

    Raises:
        UserError: a shard is missing or damaged; the message names it.
    """
    shards = read_index(folder)
    total = sum(shard["samples"] for shard in shards)
    chosen = None if most is None or most >= total else set(random.Random(0).sample(range(total), most))
    place = 0
    for shard in shards:
        path = folder / shard["raw_data"]["basename"]
        names = [name for name in shard["column_names"] if name != "image"]
        try:
            for item in read_columns(path, shard, names):
                if chosen is None or place in chosen:
                    yield item
                place += 1
        except (OSError, BadShard) as e:
            raise UserError(
                f"the shard cannot be read: {e}", where=path, fix="run `rating-train verify` on the dataset"
            ) from e


_NUMBERS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i", "int": "<q"}


def decode(
    data: bytes | memoryview, shard: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Decode one sample, or the columns ``names`` of it, by its shard's entry in the index.

    Raises:
        BadShard: the bytes are not those of a sample with these columns.
    """
    try:
        return _decode(data, shard, names)
    except UnicodeDecodeError as e:
        raise BadShard(f"a text is not UTF-8: {e}") from e
    except struct.error as e:
        raise BadShard(f"it has {len(data)} bytes, and a size or a number lacks some: {e}") from e
    except KeyError as e:
        raise BadShard(f"its columns have an encoding that is not known: {e}") from e


def _decode(
    data: bytes | memoryview, shard: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, Any]:
    sizes: list[int] = []
    at = 0
    for size in shard["column_sizes"]:
        if not size:
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
        sizes.append(size)
    if at + sum(sizes) != len(data):
        raise BadShard(f"its columns take {at + sum(sizes)} bytes, it has {len(data)}")
    sample: dict[str, Any] = {}
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes):
        value = data[at : at + size]
        at += size
        if names is not None and name not in names:
            continue
        if encoding == "str":
            sample[name] = str(value, "utf-8")
        elif encoding == "bytes":
            sample[name] = bytes(value)
        else:
            (sample[name],) = struct.unpack(_NUMBERS[encoding], value)
    return sample
