"""The cache of a remote's shards: its limit, its order of eviction, and processes that are killed while they fetch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rating_train.data.samples import shard_cache
from rating_train.data.samples.remote import Source, fetch_split
from rating_train.data.samples.shard_cache import PART, Prefetch, ShardCache
from rating_train.errors import UserError
from rating_train.shards.mds_read import read_index
from tests.conftest import REPO, small_file_system
from tests.helpers.small_shards import flip_a_byte, reshard

pytestmark = pytest.mark.timeout(120)

#: Runs as a process of its own: OPEN makes the cache of argv; its download takes the seconds of argv[4].
OPEN = """
import pathlib, random, shutil, sys, time
from rating_train.data.samples.shard_cache import ShardCache
from rating_train.shards.mds_read import read_index

remote, cache = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
limit, seconds = int(sys.argv[3]), float(sys.argv[4])

def download(name, to):
    content = (remote / name).read_bytes()
    with open(to, "wb") as f:
        f.write(content[: len(content) // 2])
        f.flush()
        if seconds:
            print("half", flush=True)
            time.sleep(seconds)
        f.write(content[len(content) // 2 :])

shards = read_index(cache / "train")
cache = ShardCache(cache / "train", shards, limit, "remote", download)
"""


@pytest.fixture(scope="module")
def remote(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 shards of 64 KB."""
    return reshard(demo / "data", tmp_path_factory.mktemp("remote") / "data", 64_000, copies=3)


@pytest.fixture
def cache(remote: Path, tmp_path: Path) -> Path:
    """An empty cache: the index alone."""
    fetch_split(Source(str(tmp_path / "cache"), str(remote)), "train", copy_from(remote))
    return tmp_path / "cache"


def copy_from(remote: Path) -> Callable[[str, Path], None]:
    def download(name: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((remote / name).read_bytes())

    return download


def opened(remote: Path, cache: Path, shards: int = 0) -> ShardCache:
    """A cache with space for so many shards; 0 is no limit."""
    entries = read_index(cache / "train")
    limit = shards and shards * 64_000 + (cache / "train/index.json").stat().st_size
    return ShardCache(cache / "train", entries, limit, str(remote), copy_from(remote))


def present(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "train").iterdir() if p.name != "index.json")


def name(shard: int) -> str:
    return f"shard.{shard:05d}.mds"


@contextlib.contextmanager
def process(*arguments: object, program: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OPEN + program, *map(str, arguments)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def test_the_least_recently_used_shard_is_evicted(remote: Path, cache: Path) -> None:
    shards = opened(remote, cache, shards=5)
    for shard in (0, 1, 2, 3, 4, 0, 2):
        shards.ensure(shard)
    assert present(cache) == [name(s) for s in (0, 1, 2, 3, 4)]
    shards.ensure(5)
    assert present(cache) == [name(s) for s in (0, 2, 3, 4, 5)]
    shards.ensure(6)
    assert present(cache) == [name(s) for s in (0, 2, 4, 5, 6)]
    with open(cache / "train" / name(0), "rb") as held:
        for shard in (7, 8, 9):
            shards.ensure(shard)
        assert name(0) not in present(cache)
        assert held.read() == (remote / "train" / name(0)).read_bytes(), "an open file stays readable"


def test_without_a_limit_all_stays(remote: Path, cache: Path) -> None:
    shards = opened(remote, cache)
    for shard in range(12):
        shards.ensure(shard)
    assert present(cache) == [name(s) for s in range(12)]


def test_many_processes_keep_the_limit_together_and_find_every_shard(remote: Path, cache: Path) -> None:
    limit = opened(remote, cache, shards=5)._limit
    program = """
rng = random.Random(sys.argv[5])
for _ in range(60):
    shard = rng.randrange(15)
    for _ in range(8):
        cache.ensure(shard)
        path = cache.folder / shards[shard]["raw_data"]["basename"]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        break
    assert content == (remote / "train" / path.name).read_bytes()
print("done", flush=True)
"""
    peak = 0
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(process(remote, cache, limit, 0, seed, program=program)) for seed in range(4)
        ]
        while any(p.poll() is None for p in running):
            sizes = []
            for folder, _, names in os.walk(cache / "train"):
                for file in names:
                    with contextlib.suppress(FileNotFoundError):
                        sizes.append(os.stat(os.path.join(folder, file)).st_size)
            peak = max(peak, sum(sizes))
        assert [p.stdout.read() for p in running if p.stdout] == ["done\n"] * 4
    assert limit - 3 * 64_000 < peak <= limit
    assert not [f for f in present(cache) if f.endswith(PART)]


def test_who_needs_a_shard_that_another_process_fetches_waits_for_it(remote: Path, cache: Path) -> None:
    with process(remote, cache, 0, 2, program="cache.ensure(3)") as other:
        assert other.stdout is not None and other.stdout.readline() == "half\n"
        shards = opened(remote, cache)
        shards._download = None  # type: ignore[assignment]  # it must not be called
        shards.ensure(3)
        assert (cache / "train" / name(3)).read_bytes() == (remote / "train" / name(3)).read_bytes()
        assert other.wait(timeout=30) == 0


def test_a_killed_process_leaves_a_download_that_the_next_reader_removes(remote: Path, cache: Path) -> None:
    five = opened(remote, cache, shards=5)
    with process(remote, cache, 0, 600, program="cache.ensure(3)") as other:
        assert other.stdout is not None and other.stdout.readline() == "half\n"
        for shard in range(5, 9):
            five.ensure(shard)
        five.ensure(9)
        assert present(cache) == [name(3) + PART, *(name(s) for s in (6, 7, 8, 9))], "it counts as complete"
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=30)
    assert (cache / "train" / (name(3) + PART)).is_dir()
    five.ensure(10)
    assert present(cache) == [name(s) for s in (6, 7, 8, 9, 10)], "its space is free again"
    with process(remote, cache, 0, 600, program="cache.ensure(3)") as other:
        assert other.stdout is not None and other.stdout.readline() == "half\n"
        other.kill()
        other.wait(timeout=30)
    five.ensure(3)
    assert (cache / "train" / name(3)).read_bytes() == (remote / "train" / name(3)).read_bytes()


def test_the_next_job_removes_what_a_killed_one_left_and_nothing_of_a_living_one(
    remote: Path, cache: Path
) -> None:
    with (
        process(remote, cache, 0, 600, program="cache.ensure(3)") as living,
        process(remote, cache, 0, 600, program="cache.ensure(4)") as killed,
    ):
        for other in (living, killed):
            assert other.stdout is not None and other.stdout.readline() == "half\n"
        killed.kill()
        killed.wait(timeout=30)
        fetch_split(Source(str(cache), str(remote)), "train", copy_from(remote))
        assert present(cache) == [name(3) + PART]


def test_two_jobs_share_a_cache(remote: Path, cache: Path) -> None:
    first = opened(remote, cache, shards=5)
    for shard in range(4):
        first.ensure(shard)
    fetch_split(Source(str(cache), str(remote)), "train", copy_from(remote))
    second = opened(remote, cache, shards=5)
    second._download = None  # type: ignore[assignment]  # what the first has fetched is there
    for shard in range(4):
        second.ensure(shard)
    first.ensure(4)
    first.ensure(5)
    assert present(cache) == [name(s) for s in (1, 2, 3, 4, 5)], "both count what is there"


def test_a_download_of_another_hash_is_refused_and_not_left(
    remote: Path, cache: Path, tmp_path: Path
) -> None:
    def download(file: str, to: Path) -> None:
        copy_from(remote)(file, to)
        flip_a_byte(to, 4000)

    shards = ShardCache(cache / "train", read_index(cache / "train"), 0, "s3://b/data", download)
    with pytest.raises(
        UserError, match=rf"train/{name(2)} does not have the hash.*s3://b/data/train/{name(2)}"
    ):
        shards.ensure(2)
    assert present(cache) == []
    opened(remote, cache).ensure(2)
    assert present(cache) == [name(2)]


def test_a_full_disk_is_named(remote: Path, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", 1) as disk:
        fetch_split(Source(str(disk / "cache"), str(remote)), "train", copy_from(remote))
        (disk / "ballast").write_bytes(bytes(1_000_000 - (disk / "cache/train/index.json").stat().st_size))
        with pytest.raises(UserError, match=r"cannot be stored in the cache .*No space left.*free space"):
            opened(remote, disk / "cache").ensure(0)
        assert present(disk / "cache") == []


def test_a_file_system_without_locks_is_refused(
    remote: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "hold_lock", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"without file locks.*data\.path"):
        opened(remote, cache).ensure(0)


def test_a_limit_below_four_shards_and_the_index_is_refused(remote: Path, cache: Path) -> None:
    opened(remote, cache, shards=4)
    with pytest.raises(UserError, match=r"four of the largest shards.*data\.cache_limit_mb to at least 2"):
        ShardCache(cache / "train", read_index(cache / "train"), 200_000, "", copy_from(remote))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_shards_are_fetched_ahead_in_the_order_of_the_last_request(remote: Path, cache: Path) -> None:
    begun, go, order = threading.Event(), threading.Event(), []

    def download(file: str, to: Path) -> None:
        order.append(file)
        begun.set()
        assert go.wait(30)
        copy_from(remote)(file, to)

    shards = ShardCache(cache / "train", read_index(cache / "train"), 0, "", download)
    prefetch = Prefetch(shards)
    prefetch.want([0, 1, 2])
    assert begun.wait(30)
    prefetch.want([7, 1])
    go.set()
    wait_for(lambda: len(present(cache)) == 3 and not any(f.endswith(PART) for f in present(cache)))
    assert order == [f"train/{name(s)}" for s in (0, 7, 1)]
    prefetch.close()
    prefetch.want([9])
    wait_for(lambda: prefetch._thread is not None and not prefetch._thread.is_alive())
    assert len(order) == 3


def test_what_cannot_be_fetched_ahead_is_met_by_its_reader(remote: Path, cache: Path) -> None:
    failed = threading.Event()

    def download(file: str, to: Path) -> None:
        failed.set()
        raise UserError("cannot be downloaded", where=file)

    shards = ShardCache(cache / "train", read_index(cache / "train"), 0, "", download)
    prefetch = Prefetch(shards)
    prefetch.want([3])
    assert failed.wait(30)
    with pytest.raises(UserError, match=rf"cannot be downloaded.*{name(3)}"):
        shards.ensure(3)
    prefetch.close()


def test_random_use_never_leaves_more_than_the_limit(remote: Path, cache: Path) -> None:
    shards, rng = opened(remote, cache, shards=4), random.Random(1)
    for _ in range(60):
        shards.ensure(rng.randrange(15))
        assert sum(p.stat().st_size for p in (cache / "train").iterdir()) <= shards._limit
