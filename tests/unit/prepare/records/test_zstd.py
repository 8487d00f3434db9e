"""Packed by zstandard: all frames are read, and a file that is cut off is never a smaller one."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

from rating_train.prepare.records.zstd import ZstdFile

LINES = [b"%d %s\n" % (n, random.Random(n).randbytes(20).hex().encode()) for n in range(3000)]
SKIPPABLE = bytes.fromhex("502a4d18 03000000") + b"abc"


@pytest.fixture(scope="module")
def zstandard() -> Any:
    return pytest.importorskip("zstandard")


def read(zstandard: Any, packed: bytes) -> list[bytes]:
    return list(io.BufferedReader(ZstdFile(io.BytesIO(packed), zstandard), 1 << 16))


def frames(zstandard: Any, count: int) -> list[bytes]:
    pack = zstandard.ZstdCompressor().compress
    size = len(LINES) // count
    return [pack(b"".join(LINES[i * size : (i + 1) * size])) for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_all_frames_are_read(zstandard: Any, count: int) -> None:
    assert read(zstandard, b"".join(frames(zstandard, count))) == LINES
    assert read(zstandard, SKIPPABLE.join([b"", *frames(zstandard, count)])) == LINES
    assert read(zstandard, b"") == []


@pytest.mark.parametrize("lost", [1, 4, 20, 2000, 30_000])
def test_a_file_that_is_cut_off_is_an_error(zstandard: Any, lost: int) -> None:
    one, two = frames(zstandard, 2)
    with pytest.raises(EOFError, match="cut off"):
        read(zstandard, one + two[:-lost])


def test_what_is_behind_the_last_frame_is_an_error(zstandard: Any) -> None:
    with pytest.raises(zstandard.ZstdError):
        read(zstandard, frames(zstandard, 1)[0] + b"rubbish")
