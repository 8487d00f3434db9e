"""Shards that stay open: the bytes of the files, each opened once, and opened again where reading failed."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rating_train.data.samples.open_shards import OpenShards

SAMPLES = [b"first", b"the second", b"3"]
HEAD = 4 * (len(SAMPLES) + 2)


def write_shard(path: Path, samples: list[bytes] = SAMPLES) -> Path:
    """A count, the table of offsets, the samples; without the JSON that streaming puts between."""
    offsets = np.cumsum([HEAD, *map(len, samples)]).astype("<u4")
    path.write_bytes(len(samples).to_bytes(4, "little") + offsets.tobytes() + b"".join(samples))
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_shard(tmp_path / f"{k}.mds", [b"%d " % k + s for s in SAMPLES]) for k in range(3)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened."""
    counted: Counter[str] = Counter()
    true_open = os.open

    def count(path: Path, flags: int) -> int:
        counted[path.name] += 1
        return true_open(path, flags)

    monkeypatch.setattr(os, "open", count)
    return counted


def descriptors() -> list[str]:
    """The shards that this process has open."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sorted(name for link in links if link.exists() and (name := link.resolve().name).endswith(".mds"))


def test_each_file_is_opened_once(paths: list[Path], opened: Counter[str]) -> None:
    shards = OpenShards(paths, [3, 3, 3])
    for place in (2, 0, 1, 0):
        for k in (1, 0, 2):
            assert shards.read(k, place) == b"%d " % k + SAMPLES[place]
    assert opened == {"0.mds": 1, "1.mds": 1, "2.mds": 1}
    shards.close()
    assert descriptors() == []
    assert shards.read(0, 0) == b"0 first" and opened["0.mds"] == 2
    del shards
    assert descriptors() == [], "nobody has to close it by hand"


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_files_are_open_than_allowed(paths: list[Path], opened: Counter[str], most: int) -> None:
    shards = OpenShards(paths, [3, 3, 3], most)
    for k in (0, 1, 0, 2, 0, 1):
        assert shards.read(k, 1) == b"%d the second" % k
        assert len(descriptors()) <= most
    # The one that was not used for longest is closed: of two, the first stays open.
    assert opened["0.mds"] == {0: 3, 1: 3, 2: 1}[most]


def test_a_read_that_returns_less_is_continued(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: whole(fd, min(size, 3), offset))
    assert OpenShards(paths, [3, 3, 3]).read(1, 1) == b"1 the second"


def test_a_file_that_could_not_be_read_is_opened_again(
    paths: list[Path], opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = OpenShards(paths, [3, 3, 3])
    shards.read(0, 0)
    shards.read(1, 0)

    def stale(*_: int) -> bytes:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", stale)
        with pytest.raises(OSError, match="Stale"):
            shards.read(0, 0)
        with pytest.raises(OSError, match="Stale"):  # within the table of offsets
            shards.read(2, 0)
    assert descriptors() == []
    assert shards.read(0, 0) == b"0 first" and opened["0.mds"] == 2


def test_damage_is_an_error(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.mds")
    intact = path.read_bytes()
    for damaged, message in [
        (intact[:-1], "the file ends at byte"),
        (intact[:10], "the file ends at byte 10"),
        (bytes(len(intact)), "impossible offsets"),
        (intact[:4] + b"\xff" * 4 + intact[8:], "impossible offsets"),
    ]:
        path.write_bytes(damaged)
        shards = OpenShards([path], [3])
        with pytest.raises(ValueError, match=message):
            for place in range(3):
                shards.read(0, place)


def test_it_travels_to_another_process_without_its_descriptors(paths: list[Path]) -> None:
    shards = OpenShards(paths, [3, 3, 3], most=2)
    shards.read(0, 0)
    copy = pickle.loads(pickle.dumps(shards))
    assert descriptors() == ["0.mds"]
    assert copy.read(2, 2) == b"2 3"
