"""A disk that is full, or that one rank cannot write to, during saves: nothing hangs, nothing is lost silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rating_train.checkpoint import store
from rating_train.files import read_json_lines
from tests.conftest import Ranks, full, small_file_system

pytestmark = pytest.mark.timeout(800)

WORKER = Path(__file__).with_name("checkpoint_worker.py")
CONTINUES = "training continues (train.max_failed_saves)"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", megabytes=200) as folder:
        yield folder


def config_of(make: Callable[..., Path], runs: Path, steps: int, **train: object) -> Path:
    """Write a configuration that saves every 2 steps in the background, finalized before the next step."""
    settings = {"max_steps": steps, "save_every_steps": 2, "stop_check_steps": 1, "log_sample_ids": False}
    return make(runs_dir=str(runs), train={**settings, "max_failed_saves": 2, "keep_last": 1, **train})


def steps_logged(run: Path) -> list[int]:
    return [row["step"] for row in read_json_lines(run / "train.jsonl")]


def assert_latest_alone(root: Path, step: int) -> None:
    """Assert that this checkpoint is valid and the latest, and that only the best one is beside it."""
    assert store.newest_valid(root) == (store.Found(step, root / store.step_name(step)), [])
    best = store.pointed_step(root, store.BEST)
    steps = {step} if best is None else {step, best}
    kept = {store.LATEST, store.BEST, *map(store.step_name, steps)}
    assert {p.name for p in root.iterdir()} <= kept
    assert store.pointed_step(root, store.LATEST) == step


def error_line(output: str) -> str:
    (line,) = [line for line in output.splitlines() if "rating-train train: error:" in line]
    assert "exitcode  : 2" in output, "in torchrun's words"
    assert output.count("Traceback (most recent call last)") == 1, "torchrun's own, and none of the ranks"
    return line


def test_a_disk_that_fills_while_saving(
    ranks: Ranks, tiny_config: Callable[..., Path], small_disk: Path
) -> None:
    root = small_disk / "run" / "checkpoints"

    def start(steps: int, cases: str, code: int = 0) -> str:
        process = ranks.start(2, WORKER, "disk", cases, "train", config_of(tiny_config, small_disk, steps))
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output[-6000:]
        return output

    # Two failures, one of each kind, then space again, then one more failure: the counter was reset.
    output = start(12, "ok,write,space,ok,space,ok")
    failed = [line for line in output.splitlines() if CONTINUES in line]
    assert [re.search(r"checkpoint of step (\d+)", line).group(1) for line in failed] == ["4", "6", "10"]  # type: ignore[union-attr]
    for line in failed:
        assert f"where: {root}" in line and re.search(r"expected: [\d,]{6,} bytes of free space", line), line
    assert re.search(r"\(rank \d: (engine|rank_).*pt: .*; [\d,]+ bytes were free", failed[0]), failed[0]
    assert re.search(r"needs [\d,]+ bytes, but [\d,]+ are free", failed[1])
    assert steps_logged(small_disk / "run") == list(range(1, 13))
    assert_latest_alone(root, 12)

    # One more in a row than may fail.
    output = start(30, "write,space,write", code=1)
    assert "resuming from step 12" in output and output.count(CONTINUES) == 2
    line = error_line(output)
    assert "the checkpoint of step 18 could not be written" in line and f"where: {root}" in line
    assert_latest_alone(root, 12)

    # The last one may not fail, though it is the first: it is retried once, after the evaluation.
    output = start(14, "write,write", code=1)
    assert "resuming from step 12" in output and CONTINUES not in output
    assert output.count("saving again at the end") == 1
    assert "the checkpoint of step 14 could not be written" in error_line(output)
    assert_latest_alone(root, 12)


def test_one_rank_that_cannot_write(ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = config_of(tiny_config, tmp_path / "runs", 8)
    output = ranks.run(2, WORKER, "blocked", "4,6", "train", config)
    failed = [line for line in output.splitlines() if CONTINUES in line]
    assert len(failed) == 2 and all("(rank 1: rank_00001.pt: " in line for line in failed), failed
    assert not any("rank 0: " in line for line in failed)
    assert_latest_alone(tmp_path / "runs" / "run" / "checkpoints", 8)


@full
def test_the_logs_on_a_full_disk(ranks: Ranks, tiny_config: Callable[..., Path], small_disk: Path) -> None:
    """From some step on not one byte is free: the run ends, its files are valid, and with free space it resumes."""
    run = small_disk / "run"
    settings = {"save_every_steps": 4, "background_save": False, "max_failed_saves": 99}
    config = config_of(tiny_config, small_disk, 0, epochs=20, **settings)
    ranks.run(1, WORKER, "full", "5", "train", config, code=1, env={"FULL_FOLDER": str(small_disk)})
    steps = steps_logged(run)
    assert len(steps) >= 4 and steps == list(range(1, len(steps) + 1))
    (small_disk / "filler").unlink()
    assert_latest_alone(run / "checkpoints", 4)
    assert "resuming from step 4 of 8" in ranks.train(1, config_of(tiny_config, small_disk, 8))
    assert steps_logged(run) == list(range(1, 9))
    assert_latest_alone(run / "checkpoints", 8)
