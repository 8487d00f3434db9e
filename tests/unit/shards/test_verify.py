"""Verification finds every kind of damage, all of it at once, and names the shard and the path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset

from rating_train.cli import main
from rating_train.shards import mds_read
from rating_train.shards.verify import fastest_hash, hash_file, verify_dataset
from tests.helpers.small_shards import flip_a_byte

pytestmark = pytest.mark.timeout(120)


def shards(data: Path, split: str = "train") -> list[Path]:
    return sorted((data / split).glob("*.mds"))


def test_an_intact_dataset_is_valid(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_dataset(sharded, decode=-1, workers=2, on_progress=lambda *done: seen.append(done))
    manifest = json.loads((sharded / "manifest.json").read_text())
    items = sum(s["items"] for s in manifest["splits"].values())
    assert report.ok and report.items == report.decoded == items
    assert report.shards == len(shards(sharded)) + len(shards(sharded, "val")) == len(seen) > 5
    assert seen[-1] == (report.bytes, report.bytes)
    assert report.bytes == sum(s["bytes"] for s in manifest["splits"].values())


def test_a_sample_is_decoded_and_the_same_one_each_time(sharded: Path) -> None:
    assert verify_dataset(sharded, decode=17).decoded == 17
    assert verify_dataset(sharded, decode=10**6).decoded == verify_dataset(sharded).items
    assert verify_dataset(sharded).decoded == 0


def flip(data: Path) -> Path:
    flip_a_byte(shards(data)[2], 5000)
    return shards(data)[2]


def truncate(data: Path) -> Path:
    shards(data)[1].write_bytes(shards(data)[1].read_bytes()[:-1])
    return shards(data)[1]


def delete(data: Path) -> Path:
    gone = shards(data)[3]
    gone.unlink()
    return gone


def swap_index(data: Path) -> Path:
    shutil.copy(data / "val" / "index.json", data / "train" / "index.json")
    return data / "train" / "index.json"


def add_a_shard(data: Path) -> Path:
    extra = data / "train" / "shard.99999.mds"
    shutil.copy(shards(data)[0], extra)
    return extra


def swap_two_shards(data: Path) -> Path:
    first, second = shards(data)[:2]
    first.rename(data / "x")
    second.rename(first)
    (data / "x").rename(second)
    return first


DAMAGE: dict[Callable[[Path], Path], str] = {
    flip: "has sha1 .* instead of ",
    truncate: r"has \d+ bytes instead of \d+",
    delete: "is missing",
    swap_index: "index is not the one in the manifest",
    add_a_shard: "is not named in the index",
    swap_two_shards: "instead of",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_found_and_named(
    damage: Callable[[Path], Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damage(data)
    found = [p for p in verify_dataset(data, workers=1).problems if p.path == str(path)]
    assert found, f"{path} is not among the problems"
    with pytest.raises(AssertionError, match=DAMAGE[damage]):
        raise AssertionError(found[0].what)
    assert path.suffix != ".mds" or found[0].shard == f"train/{path.name}"
    assert main(["verify", str(data), "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert f"DAMAGED {found[0]}" in out
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert str(data) in line and "problem" in line


def test_all_damage_is_listed_not_only_the_first(data: Path) -> None:
    paths = {str(f(data)) for f in (flip, truncate, delete)}
    assert {p.path for p in verify_dataset(data).problems} == paths


def test_a_manifest_that_was_edited_is_found(data: Path) -> None:
    content = json.loads((data / "manifest.json").read_text())
    content["splits"]["train"]["items"] += 1
    content["fingerprint"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(content))
    what = " ".join(p.what for p in verify_dataset(data).problems)
    assert "items, the manifest" in what and "fingerprint" in what


def test_the_verb_says_what_it_checked(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sharded), "--decode", "all"]) == 0
    assert "is valid: 300 items in" in capsys.readouterr().out
    assert main(["verify", str(sharded.parent)]) == 2


# --- what verification is made of ------------------------------------------------------------------------


def test_the_plain_reader_reads_what_streaming_reads(sharded: Path) -> None:
    dataset = LocalDataset(str(sharded), "train")
    plain = list(mds_read.iter_sampled([sharded / "train"]))
    assert len(plain) == len(dataset)
    for i in (0, 1, len(plain) // 2, len(plain) - 1):
        theirs = dataset[i]
        assert {**plain[i], "rating": np.float32(plain[i]["rating"])} == theirs


def test_the_fastest_recorded_hash_is_taken(sharded: Path) -> None:
    recorded = mds_read.read_index(sharded / "train")[0]["raw_data"]["hashes"]
    assert fastest_hash(recorded) == "xxh64"
    assert fastest_hash({"sha1": "", "md5": ""}) == "sha1"
    assert fastest_hash({"unheard_of": ""}) is None
    assert hash_file(shards(sharded)[0], recorded) == recorded
