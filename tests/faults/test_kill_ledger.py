"""A run that is killed and restarted repeatedly ends as if nothing had happened.

RATING_TRAIN_KILLS=50 pytest -s tests/faults/test_kill_ledger.py prints the ledger of 50 kills.
RATING_TRAIN_KILL_SEED chooses the victims, the moments and the pauses.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rating_train.checkpoint import store
from tests.conftest import Ranks
from tests.faults.ledger import STEPS_PER_KILL, Attempt, none_left, supervise, wait_until_none_lives
from tests.faults.ledger_runs import EVAL_EVERY, assert_same_run, sections

KILLS = int(os.environ.get("RATING_TRAIN_KILLS", "2"))
SEED = int(os.environ.get("RATING_TRAIN_KILL_SEED", "17"))


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
    with none_left(token):
        ledger = supervise(ranks, config, broken, KILLS, random.Random(SEED), EVAL_EVERY, token)
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
    steps, stage, token = 45, 1, str(tmp_path)
    ranks.train(2, tiny_config("straight", **sections(stage, steps)))
    broken = tmp_path / "runs/broken"
    config = tiny_config("broken", **sections(stage, steps))
    job = Attempt(ranks, config, broken, token, max_restarts=3)
    assert job.wait(lambda: len(job.ranks()) == 2, 120, "the ranks"), job.output[-4000:]
    rank = job.ranks()["rank 1"]
    # The first save, of step 3, is written in the background: on a busy machine it may be there later than step 5.
    latest = broken / "checkpoints" / store.LATEST
    assert job.wait(lambda: latest.exists() and len(job.new_steps()) >= 5, 120, "step 5 and a checkpoint")
    rank.kill()
    assert not job.wait(lambda: False, 120, "the end")
    job.join()
    assert job.process.returncode == 0, job.output[-40000:]
    assert "resuming from step" in job.output
    assert not wait_until_none_lives(token, 10)
    assert_same_run(tmp_path / "runs/straight", broken, steps, stage)
