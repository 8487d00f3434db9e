"""A real job of two ranks on damaged shards: it ends with one line that names them, and never trains on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rating_train.shards.mds_read import iter_sampled, read_index, read_shard
from rating_train.shards.verify import verify_dataset
from tests.conftest import Ranks
from tests.helpers.small_shards import flip_a_byte


def shard(data: Path) -> Path:
    return sorted((data / "train").glob("*.mds"))[-2]


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if "rating-train train: error:" in line]


@pytest.mark.timeout(120)
def test_a_flipped_byte_ends_training_before_its_shard_is_used(
    data: Path, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    bad = shard(data)
    (entry,) = [s for s in read_index(data / "train") if s["raw_data"]["basename"] == bad.name]
    damaged_ids = {s["id"] for s in read_shard(bad, entry)}
    other_ids = {s["id"] for s in iter_sampled([data / "train"])} - damaged_ids
    flip_a_byte(bad, bad.stat().st_size // 2)
    assert [p.path for p in verify_dataset(data).problems] == [str(bad)]

    # Unshuffled: the shard before the last is reached after some good steps.
    config = tiny_config(data={"path": str(data), "workers": 1, "shuffle": False, "prefetch_batches": 1})
    output = ranks.train(2, config, code=1)
    lines = error_lines(output)
    assert lines and all(f"train/{bad.name}" in line and str(bad) in line for line in lines), output[-3000:]
    assert all("xxh64" in line and "instead of" in line for line in lines)
    # No traceback but torchrun's own, which comes after all.
    assert not 0 <= output.find("Traceback") < output.rfind(lines[-1]), output[-3000:]
    used = {
        i
        for file in (tmp_path / "runs/run/samples").glob("*.jsonl")
        for line in file.read_text().splitlines()
        for i in json.loads(line)["ids"]
    }
    assert used and used <= other_ids
    assert not list((tmp_path / "runs/run/checkpoints").glob("step_*"))


def truncate(data: Path) -> Path:
    shard(data).write_bytes(shard(data).read_bytes()[:-7])
    return shard(data)


def delete(data: Path) -> Path:
    gone = shard(data)
    gone.unlink()
    return gone


def swap_index(data: Path) -> Path:
    shutil.copy(data / "val/index.json", data / "train/index.json")
    return data / "train/index.json"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", [truncate, delete, swap_index])
def test_what_is_seen_at_the_start_ends_training_there(
    damage: Callable[[Path], Path], data: Path, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage(data)
    assert str(path) in {p.path for p in verify_dataset(data).problems}
    output = ranks.train(2, tiny_config(data={"path": str(data)}), code=1)
    (line,) = error_lines(output)
    assert path.name in line and str(path.parent) in line
    assert not (tmp_path / "runs/run/train.jsonl").exists()
