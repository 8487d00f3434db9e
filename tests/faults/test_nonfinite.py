"""A non-finite loss: the step is skipped on every rank and counted, and too many in a row stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rating_train.shards.writer import DatasetWriter, SplitWriter
from tests.conftest import Ranks
from tests.helpers.listings import listing


def poisoned_copy(demo: Path, out: Path, poisoned: Iterable[int]) -> None:
    """Copy the demo's shards with absurd ratings at some positions, whose squared error overflows fp32."""
    from streaming import LocalDataset

    where = set(poisoned)
    manifest = json.loads((demo / "data" / "manifest.json").read_text())
    with DatasetWriter(out) as writer:
        for split in ("train", "val"):
            dataset = LocalDataset(local=str(demo / "data"), split=split)
            shards = SplitWriter(out.with_name(f"{out.name}-{split}"), 1 << 26)
            for i in range(len(dataset)):
                row = dict(dataset[i])
                image = row.pop("image")
                rating = float(row.pop("rating"))
                if split == "train" and i in where:
                    rating = 3e38
                count = int(row.pop("rating_count"))
                shards.write(
                    listing(row.pop("id"), **row, image="", rating=rating, rating_count=count, group=""),
                    image,
                )
            shards.finish()
            writer.adopt(split, shards.folder, shards.stats)
        writer.commit({"version": manifest["version"]})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_steps_that_read_a_bad_item_are_skipped_and_counted(
    stage: int, demo: Path, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    poisoned_copy(demo, tmp_path / "data", [30])
    config = tiny_config(
        data={"path": str(tmp_path / "data"), "shuffle": False}, zero={"stage": stage}, train={"max_steps": 5}
    )
    ranks.train(2, config)
    rows = [json.loads(line) for line in (tmp_path / "runs/run/train.jsonl").read_text().splitlines()]
    # 12 items a step in stored order: item 30 is read by the third step.
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 1, 1]
    assert [r["loss"] is None for r in rows] == [False, False, True, False, False]
    assert rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0


@pytest.mark.timeout(300)
def test_too_many_in_a_row_stop_the_run_with_the_last_checkpoint_intact(
    demo: Path, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    poisoned_copy(demo, tmp_path / "data", range(24, 240))
    config = tiny_config(
        data={"path": str(tmp_path / "data"), "shuffle": False},
        train={"max_steps": 12, "save_every_steps": 2, "keep_last": 1, "max_skipped_steps": 3},
    )
    output = ranks.train(2, config, code=1)
    assert "4 steps in a row had a loss or gradient that is not finite" in output
    assert output.count("error:") == 1, "one line for the job, not one per rank"
    from rating_train.checkpoint import store

    found, skipped = store.newest_valid(tmp_path / "runs/run/checkpoints")
    assert found is not None and found.step == 4 and not skipped
