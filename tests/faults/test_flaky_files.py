"""A run directory on a network file system that is slow, fails now and then, and shows other hosts' files late.

RATING_TRAIN_FLAKY_KILLS=20 pytest -s tests/faults/test_flaky_files.py kills such a run 20 times at each level, and
prints the ledger. RATING_TRAIN_KILL_SEED chooses the victims, the moments and the failures.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.faults.ledger import STEPS_PER_KILL, none_left, supervise
from tests.faults.ledger_runs import EVAL_EVERY, assert_same_run, sections
from tests.helpers.flaky_fs import FlakyFiles, Trouble

KILLS = int(os.environ.get("RATING_TRAIN_FLAKY_KILLS", "0"))
SEED = int(os.environ.get("RATING_TRAIN_KILL_SEED", "17"))
LEVELS = {
    "low": Trouble(rate=0.005, delay_ms=5, late_ms=500, seed=SEED),
    "high": Trouble(rate=0.03, delay_ms=10, late_ms=3000, outage="20000:1500", seed=SEED),
}


@pytest.mark.timeout(240)
def test_a_run_on_a_failing_file_system_is_the_same(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    stage, steps = 2, 8
    straight, broken = tmp_path / "runs/straight", tmp_path / "runs/broken"
    layer = FlakyFiles(broken, tmp_path, Trouble(rate=0.03, delay_ms=1, late_ms=1000, seed=SEED))
    ranks.train(2, tiny_config("straight", **sections(stage, steps)))
    config = tiny_config("broken", **sections(stage, steps))
    process = ranks.start(2, "-m", "rating_train", "train", config, env=layer.env)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-6000:]
    assert layer.total("estale") + layer.total("eio") >= 10 and layer.total("hidden") >= 10
    assert_same_run(straight, broken, steps, stage)


@pytest.mark.skipif(not KILLS, reason="minutes: RATING_TRAIN_FLAKY_KILLS=20 runs it")
@pytest.mark.timeout(300 + 120 * KILLS)
@pytest.mark.parametrize("level", LEVELS)
def test_kills_on_a_failing_file_system_change_nothing(
    level: str,
    ranks: Ranks,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage, steps, token = 2, STEPS_PER_KILL * KILLS + 10, str(tmp_path)
    straight, broken = tmp_path / "runs/straight", tmp_path / "runs/broken"
    layer = FlakyFiles(broken, tmp_path, LEVELS[level])
    started = time.monotonic()
    ranks.train(2, tiny_config("straight", **sections(stage, steps)), timeout=1800)
    straight_seconds = time.monotonic() - started
    config = tiny_config("broken", **sections(stage, steps))
    with none_left(token):
        ledger = supervise(
            ranks, config, broken, KILLS, random.Random(SEED), EVAL_EVERY, token,
            env=lambda start: {**layer.env, "FLAKY_FS_HOST": f"job {start} "}, own_ends=KILLS,
        )  # fmt: skip
    done = len((broken / "samples/rank_00000.jsonl").read_text().splitlines())
    with capsys.disabled():
        print(
            f"\n{level}: {LEVELS[level]}",
            ledger.table(steps, done, straight_seconds),
            *layer.table(),
            sep="\n",
        )
        for number, text in enumerate(ledger.own_ends):
            print(f"--- failed by itself, {number + 1}\n{text[-3000:]}")
    assert len(ledger.kills) == KILLS and ledger.refused == 0
    assert_same_run(straight, broken, steps, stage)
