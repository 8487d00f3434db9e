"""A run that is killed and restarted repeatedly ends as if nothing had happened.

RATING_TRAIN_KILLS=50 pytest -s tests/faults/test_kill_ledger.py prints the ledger of 50 kills.
RATING_TRAIN_KILL_SEED chooses the victims, the moments and the pauses.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import Ranks
from tests.faults.ledger import STEPS_PER_KILL, Attempt, living, supervise, wait_until_none_lives
from tests.helpers.runs import assert_same, evaluations, global_batches, read_ids, read_log

KILLS = int(os.environ.get("RATING_TRAIN_KILLS", "4"))
SEED = int(os.environ.get("RATING_TRAIN_KILL_SEED", "17"))
EVAL_EVERY = 7


def sections(stage: int, steps: int) -> dict[str, dict]:
    return {
        "data": {"workers": 1},
        "model": {"head_dropout": 0.1},  # the random number generators affect the weights
        "zero": {"stage": stage},
        "train": {
            "epochs": 999,  # of about 20 steps
            "max_steps": steps,
            "save_every_steps": 3,
            "eval_every_steps": EVAL_EVERY,
            "background_save": True,
        },
    }


def assert_same_run(straight: Path, broken: Path, steps: int, stage: int) -> None:
    """Compare ordered ids, losses, evaluations, pointers, and every bit of the last checkpoint."""
    assert [row["step"] for row in read_log(broken)] == list(range(1, steps + 1))
    assert read_ids(broken, 0).keys() == read_ids(broken, 1).keys()
    assert global_batches(straight) == global_batches(broken)
    assert read_log(straight) == read_log(broken)
    assert evaluations(straight) == evaluations(broken)
    for pointer in (store.LATEST, store.BEST):
        one, other = (json.loads((run / "checkpoints" / pointer).read_text()) for run in (straight, broken))
        assert one == other, pointer
    last = Path("checkpoints") / store.step_name(steps)
    assert store.verify(broken / last)["step"] == steps
    names = sorted(p.relative_to(straight / last) for p in (straight / last).rglob("*.pt"))
    assert len(names) >= 5 and names == sorted(
        p.relative_to(broken / last) for p in (broken / last).rglob("*.pt")
    )
    for name in names:
        one, other = (torch.load(run / last / name, weights_only=False) for run in (straight, broken))
        assert_same(one, other, str(name))
    weights = [consolidated_weights(run / last, stage) for run in (straight, broken)]
    assert_same(weights[0], weights[1], "weights")
    assert {p.name for p in (straight / "checkpoints").iterdir()} == {
        p.name for p in (broken / "checkpoints").iterdir()
    }, "temporary directories remain, or other checkpoints were kept"


@pytest.mark.timeout(300 + 60 * KILLS)
def test_kills_change_nothing(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, steps, token = 2, STEPS_PER_KILL * KILLS + 10, str(tmp_path)
    straight, broken = tmp_path / "runs/straight", tmp_path / "runs/broken"
    started = time.monotonic()
    ranks.train(2, tiny_config("straight", **sections(stage, steps)))
    straight_seconds = time.monotonic() - started
    config = tiny_config("broken", **sections(stage, steps))
    try:
        ledger = supervise(ranks, config, broken, KILLS, random.Random(SEED), EVAL_EVERY, token)
    finally:
        for process in living(token):
            process.kill()
        wait_until_none_lives(token, 30)
    done = len((broken / "samples/rank_00000.jsonl").read_text().splitlines())
    with capsys.disabled():
        print(ledger.table(steps, done, straight_seconds))
    assert len(ledger.kills) == KILLS and ledger.refused == 0
    assert_same_run(straight, broken, steps, stage)
    assert not [name for name in ledger.blocks if Path(name).exists()], "shared memory outlives a killed job"
    assert not (broken / "LOCK").exists()


@pytest.mark.timeout(300)
def test_torchrun_restarts_a_killed_rank_by_itself(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    steps, stage, token = 14, 1, str(tmp_path)
    ranks.train(2, tiny_config("straight", **sections(stage, steps)))
    broken = tmp_path / "runs/broken"
    config = tiny_config("broken", **sections(stage, steps))
    job = Attempt(ranks, config, broken, token, max_restarts=3)
    assert job.wait(lambda: len(job.new_steps()) >= 5, 120, "step 5")
    job.ranks()["rank 1"].kill()
    assert not job.wait(lambda: False, 120, "the end")
    job.join()
    assert job.process.returncode == 0, job.output[-40000:]
    assert "resuming from step" in job.output
    assert not wait_until_none_lives(token, 10)
    assert_same_run(tmp_path / "runs/straight", broken, steps, stage)
