"""10 straight steps equal 5 + kill -9 + 5, bit for bit: weights, optimizer state, losses and ordered ids.

12 items a step of about 50 an epoch: the ten steps cross two epoch boundaries, one before the kill and one after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import REPO, Ranks
from tests.helpers.runs import assert_same, read_ids, read_log


CHECKPOINT_WORKER = REPO / "tests" / "faults" / "checkpoint_worker.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_equal_five_kill_five(
    stage: int, ranks: Ranks, tiny_config: Callable[..., Path], few_items: Path, tmp_path: Path
) -> None:
    items = json.loads((few_items / "manifest.json").read_text())["splits"]["train"]["items"]
    assert 4 * 12 < items < 5 * 12, "the epochs end in the fifth step and in the ninth or tenth"
    sections = {
        "batch": {"global_items": 12, "micro_items": 3},
        "zero": {"stage": stage},
        "data": {"path": str(few_items), "workers": 2 if stage == 2 else 0},
        "train": {"epochs": 9, "max_steps": 10, "save_every_steps": 5, "keep_last": 9},
    }
    straight, broken = tiny_config("straight", **sections), tiny_config("broken", **sections)
    a, b = tmp_path / "runs" / "straight", tmp_path / "runs" / "broken"
    ranks.train(2, straight)
    # Rank 0 dies when it begins to save step 10: steps 6 to 10 are lost.
    ranks.run(2, CHECKPOINT_WORKER, "die", "begun@10", "train", broken, code=1)
    assert (b / "checkpoints" / "step_00000005").exists()
    assert not (b / "checkpoints" / "step_00000010").exists()
    output = ranks.train(2, broken, "--resume", "must")
    assert "resuming from step 5 of 10" in output

    assert read_log(a) == read_log(b)
    assert [row["step"] for row in read_log(b)] == list(range(1, 11))
    for rank in (0, 1):
        assert read_ids(a, rank) == read_ids(b, rank)
    last = "checkpoints/step_00000010"
    names = sorted(p.relative_to(a / last) for p in (a / last).rglob("*.pt"))
    assert len(names) >= 4 - (stage == 0), names
    for name in names:
        first, second = (torch.load(run / last / name, weights_only=False) for run in (a, b))
        # ZeRO-3 cuts the one-element bias of the head for 2 ranks: the second one's element is padding, and holds
        # whatever the memory held.
        assert_same(first, second, str(name), padding=1 if stage == 3 and "rank_1_" in str(name) else 0)
    weights = [consolidated_weights(run / last, stage) for run in (a, b)]
    assert_same(weights[0], weights[1], "weights")


@pytest.mark.timeout(300)
def test_a_finished_run_started_again_does_nothing(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(train={"epochs": 9, "max_steps": 2})
    ranks.train(2, config)
    before = (tmp_path / "runs/run/checkpoints/latest.json").read_text()
    output = ranks.train(2, config)
    assert "finished at step 2" in output
    assert (tmp_path / "runs/run/checkpoints/latest.json").read_text() == before
    assert len(read_log(tmp_path / "runs/run")) == 2


@pytest.mark.timeout(300)
def test_another_order_is_refused_with_the_difference(ranks: Ranks, tiny_config: Callable[..., Path]) -> None:
    ranks.train(2, tiny_config(train={"max_steps": 2}))
    config = tiny_config(train={"max_steps": 3, "precision": "fp32"}, data={"shuffle_seed": 1})
    output = ranks.train(2, config, code=1)
    assert "shuffle_seed was 9176 and is now 1" in output
    assert "precision was 'bf16' and is now 'fp32'" in output
