"""Training from a remote through a cache that is smaller than the dataset: a directory, and a real S3 server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rating_train.config.load import config_from_dict
from rating_train.data.samples.remote import Source
from rating_train.data.loader import _requests
from rating_train.data.order import FirstReads
from rating_train.data.samples.streaming_dataset import SplitDataset, fetch_split
from rating_train.errors import UserError
from tests.conftest import Ranks
from tests.helpers.runs import losses
from tests.helpers.small_shards import flip_a_byte, reshard

LIMIT_MB = 1
BUCKET = "listings"


@pytest.fixture(scope="module")
def remote(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 MB of training shards of 64 KB."""
    return reshard(demo / "data", tmp_path_factory.mktemp("remote") / "data", 64_000, copies=6)


@pytest.fixture(scope="module")
def s3(remote: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for an S3 server on a free port of this machine that holds the dataset."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp("s3") / "server.log", "wb")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    env = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=env["S3_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        for attempt in range(100):
            with contextlib.suppress(Exception):
                client.create_bucket(Bucket=BUCKET)
                break
            assert server.poll() is None and attempt < 99, "the S3 server does not answer"
            time.sleep(0.2)
        for file in (f for f in sorted(remote.rglob("*")) if f.is_file()):
            client.upload_file(str(file), BUCKET, f"data/{file.relative_to(remote)}")
        yield env
    finally:
        server.kill()
        server.wait()
        log.close()


class Watch:
    """The largest size of all files under a directory while it is watched, in bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak = folder, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            size = 0
            for folder, _, names in os.walk(self.folder):
                for name in names:
                    with contextlib.suppress(OSError):
                        size += os.stat(os.path.join(folder, name)).st_size
            self.peak = max(self.peak, size)


def fingerprint(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.timeout(240)
def test_training_through_a_small_cache_is_training_from_the_directory(
    remote: Path, s3: dict[str, str], ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """20 steps on 2 ranks from the directory itself, from it as a remote, and from the S3 server: the same losses."""
    before = fingerprint(remote)
    total = sum(f.stat().st_size for f in (remote / "train").iterdir())
    assert total > 2 * (LIMIT_MB << 20), "the cache is smaller than the dataset"
    common: dict[str, object] = {"shuffle_block_samples": 100, "workers": 1, "prefetch_batches": 1}
    more = {"train": {"max_steps": 20}, "eval": {"max_items": 12}}
    ranks.train(2, tiny_config("local", data={**common, "path": str(remote)}, **more))
    expected = losses(tmp_path / "runs/local")
    assert len(expected) == 20
    for name, where, env in (("file", f"file://{remote}", {}), ("s3", f"s3://{BUCKET}/data", s3)):
        cache = tmp_path / f"cache-{name}"
        options = {"path": str(cache), "remote": where, "cache_limit_mb": LIMIT_MB, "predownload_items": 12}
        with Watch(cache / "train") as watch:
            ranks.train(2, tiny_config(name, data={**common, **options}, **more), env=env)
        assert 0 < watch.peak <= LIMIT_MB << 20, f"{name}: {watch.peak} bytes in the cache"
        assert losses(tmp_path / "runs" / name) == expected
    assert fingerprint(remote) == before, "the remote is only read"


@pytest.mark.timeout(60)
def test_a_bucket_that_is_not_there_is_named(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    elsewhere = Source(str(tmp_path / "cache"), f"s3://{BUCKET}/elsewhere/")
    with pytest.raises(UserError, match=rf"not found.*s3://{BUCKET}/elsewhere/manifest\.json.*data\.remote"):
        fetch_split(elsewhere, "train")
    assert fetch_split(Source(str(tmp_path / "cache"), f"s3://{BUCKET}/data"), "train")["splits"]


# --- the cache in one process --------------------------------------------------------------------------


def source(cache: Path, remote: Path, **more: int) -> Source:
    return Source(str(cache), str(remote), **more)


def read(where: Source, ids: np.ndarray, ahead: int = 2) -> list[str]:
    """The ids of the samples of some batches, (K, B), as a DataLoader worker reads them."""
    fetch_split(where, "train")
    dataset = SplitDataset(where, "train")
    checks = FirstReads(dataset.samples_per_shard, 0, [0]).of(ids, 1)
    rows = ((row, checks.get(k, ())) for k, row in enumerate(ids))
    with contextlib.closing(dataset):
        return [
            sample["id"]
            for request in _requests(dataset, rows, 0, ahead)
            for sample in dataset.__getitems__(request)
        ]


@pytest.mark.timeout(60)
def test_a_thrashed_cache_still_gives_every_sample_in_order(remote: Path, tmp_path: Path) -> None:
    """Each item from another shard, in a cache of six of them, and more fetched ahead than the cache holds."""
    items = json.loads((remote / "manifest.json").read_text())["splits"]["train"]["items"]
    ids = np.random.default_rng(3).permutation(items)[:200].reshape(-1, 4)
    complete = SplitDataset(remote, "train")
    expected = [complete[int(i)]["id"] for i in ids.reshape(-1)]
    where = source(tmp_path / "cache", remote, cache_limit_bytes=400_000)
    with Watch(tmp_path / "cache" / "train") as watch:
        assert read(where, ids, ahead=10) == expected
    assert 0 < watch.peak <= 400_000


@pytest.fixture
def filled(remote: Path, tmp_path: Path) -> Path:
    """A cache that an earlier job left complete."""
    cache = tmp_path / "cache"
    shutil.copytree(remote / "train", cache / "train")
    shutil.copy(remote / "manifest.json", cache)
    return cache


def test_a_download_that_was_cut_off_is_fetched_again(filled: Path, remote: Path) -> None:
    shard = filled / "train" / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:100])
    (filled / "train" / "shard.00002.mds.tmp").write_bytes(b"half")
    (filled / "train" / "shard.00002.mds").unlink()
    assert len(read(source(filled, remote), np.arange(200).reshape(-1, 4))) == 200
    assert shard.read_bytes() == (remote / "train" / shard.name).read_bytes()
    assert not list((filled / "train").glob("*.tmp"))


def test_a_flipped_byte_in_the_cache_is_named(filled: Path, remote: Path) -> None:
    shard = filled / "train" / "shard.00001.mds"
    flip_a_byte(shard, 4000)
    with pytest.raises(UserError, match=rf"shard train/{shard.name} has xxh64 .*{shard}.*delete this file"):
        read(source(filled, remote), np.arange(200).reshape(-1, 4))


def test_a_flipped_byte_in_the_remote_is_named(remote: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(remote, tmp_path / "copy"))
    bad = copy / "train" / "shard.00001.mds"
    flip_a_byte(bad, 4000)
    with pytest.raises(UserError, match=rf"shard train/{bad.name} does not have the hash.*{bad}"):
        read(source(tmp_path / "cache", copy), np.arange(200).reshape(-1, 4))
    assert not (tmp_path / "cache" / "train" / bad.name).exists()


@pytest.mark.parametrize(
    "what", ["other dataset", "foreign file", "foreign folder", "no index", "remote itself"]
)
def test_a_cache_directory_with_something_else_in_it_is_refused(
    what: str, filled: Path, remote: Path, demo: Path
) -> None:
    where = source(filled, remote)
    if what == "other dataset":
        shutil.copy(demo / "data/train/index.json", filled / "train/index.json")
    elif what == "foreign file":
        (filled / "train" / "thesis.txt").write_text("the only copy")
    elif what == "foreign folder":
        (filled / "train" / "shard.00001.mds.thesis").mkdir()
        (filled / "train" / "shard.00001.mds.thesis" / "thesis.txt").write_text("the only copy")
    elif what == "no index":
        (filled / "train" / "index.json").unlink()
    else:
        where = source(remote, remote)
    before = fingerprint(Path(where.path))
    with pytest.raises(UserError, match=r"does not match|same directory"):
        fetch_split(where, "train")
    assert fingerprint(Path(where.path)) == before, "nothing is deleted"


def test_a_limit_below_four_shards_is_refused(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"four of the largest shards.*take \d+.*data\.cache_limit_mb"):
        read(source(tmp_path / "cache", remote, cache_limit_bytes=100_000), np.zeros((1, 4), np.int64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cache_limit_mb": 100}, "needs `data.remote`: it would delete the only copy"),
        ({"predownload_items": 5}, "needs `data.remote`"),
        ({"remote": "ftp://host/data"}, "expected s3://, gs://, file:// or a directory"),
        ({"remote": "s3://bucket/data", "cache_limit_mb": -1}, "`data.cache_limit_mb` is -1"),
        ({"verify": "never"}, "expected one of first_read, size"),
    ],
)
def test_settings_that_would_lose_data_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict({"data": data})
