"""Samples are decoded as streaming decodes them, and what is no sample is an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from streaming import LocalDataset, MDSWriter

from rating_train.shards.mds_read import BadShard, decode, read_index

COLUMNS = {"b": "bytes", "d": "float64", "f": "float32", "i": "int64", "s": "str", "t": "str"}
SAMPLES: list[dict[str, Any]] = [
    {"b": b"\xff\x00", "d": 0.1, "f": 4.3, "i": -(2**40), "s": "Théière 🫖", "t": ""},
    {"b": b"", "d": math.nan, "f": -0.0, "i": 0, "s": "", "t": "x" * 70_000},
]


@pytest.fixture
def shard(tmp_path: Path) -> Any:
    """A shard as streaming's own writer makes it, opened by streaming."""
    with MDSWriter(out=str(tmp_path), columns=COLUMNS) as writer:
        for sample in SAMPLES:
            writer.write(sample)
    return LocalDataset(str(tmp_path)).shards[0]  # type: ignore[attr-defined]


def test_every_column_is_what_streaming_makes_of_it(shard: Any) -> None:
    entry = read_index(Path(shard.dirname))[0]
    for number, written in enumerate(SAMPLES):
        data = shard.get_sample_data(number)
        ours, theirs = decode(data, entry), shard.decode_sample(data)
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name] == value or (math.isnan(value) and math.isnan(ours[name])), name
            assert isinstance(ours[name], type(written[name]))


def test_bytes_that_are_no_sample_are_an_error(shard: Any) -> None:
    entry, data = read_index(Path(shard.dirname))[0], shard.get_sample_data(0)
    damaged = [b"", data[:3], data[:-1], data + b"x", b"\xff\xff\xff\x7f" + data[4:]]
    for part in (*damaged, data.replace("é".encode(), b"\xff\xfe")):
        with pytest.raises(BadShard, match=r"bytes|UTF-8"):
            decode(part, entry)


def test_a_number_of_another_size_is_an_error() -> None:
    entry = {"column_names": ["f"], "column_encodings": ["float32"], "column_sizes": [None]}
    assert decode(b"\4\0\0\0\0\0\0\0", entry) == {"f": 0.0}
    with pytest.raises(BadShard, match="has 7 bytes, and a size or a number lacks some"):
        decode(b"\3\0\0\0\0\0\0", entry)


def test_an_encoding_that_runs_code_is_refused() -> None:
    entry = {"column_names": ["a"], "column_encodings": ["pkl"], "column_sizes": [None]}
    with pytest.raises(BadShard, match="encoding that is not known: 'pkl'"):
        decode(b"\1\0\0\0N", entry)
