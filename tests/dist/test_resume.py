"""10 straight steps equal 5 + kill -9 + 5, bit for bit: weights, optimizer state, losses and ordered ids.

60 items a step of about 240 an epoch: the ten steps cross two epoch borders, one before the kill and one after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import Ranks


def read_log(run: Path) -> list[dict]:
    timing = {
        "time",
        "samples_per_second",
        "step_seconds",
        "data_wait_seconds",
        "data_wait_fraction",
        "peak_memory_gib",
    }
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def read_ids(run: Path, rank: int) -> dict[int, list[str]]:
    """Ids of every step; where a step was done twice (before and after the kill), what was read last."""
    lines = (run / "samples" / f"rank_{rank:05d}.jsonl").read_text().splitlines()
    return {row["step"]: row["ids"] for row in map(json.loads, lines)}


def assert_same(a: object, b: object, where: str, padding: int = 0) -> None:
    """Bit-equal, but for the last ``padding`` elements of flat fp32 partitions."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        keep = len(a) - padding if padding and a.ndim == 1 and "fp32_flat_groups" in where else None
        assert torch.equal(a[:keep], b[:keep]) if a.ndim else torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", padding)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where  # type: ignore[arg-type]
        for i, (x, y) in enumerate(zip(a, b, strict=True)):  # type: ignore[arg-type]
            assert_same(x, y, f"{where}/{i}", padding)
    elif isinstance(a, (int, float, str, bool, type(None))):
        assert a == b, where


def kill_after_step(ranks: Ranks, config: Path, run: Path, step: int, saved: int) -> None:
    """Start a run and kill -9 all of it once rank 0 has done ``step`` and ``saved`` is committed, before its end."""
    process = ranks.start(2, "-m", "rating_train", "train", config, torchrun=False)
    samples, checkpoint = run / "samples" / "rank_00000.jsonl", run / "checkpoints" / f"step_{saved:08d}"
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and samples.is_file() and f'"step": {step},' in samples.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"step {step} was not reached in 120 s"
        time.sleep(0.01)
    ranks.kill(process)
    process.wait(timeout=30)
    assert not (run / "checkpoints" / "step_00000010").exists(), "killed too late: the run had ended"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_equal_five_kill_five(
    stage: int, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {
        "batch": {"global_items": 60, "micro_items": 15},
        "zero": {"stage": stage},
        "data": {"workers": 2 if stage == 2 else 0},
        "train": {"epochs": 9, "max_steps": 10, "save_every_steps": 5, "keep_last": 9},
    }
    straight, broken = tiny_config("straight", **sections), tiny_config("broken", **sections)
    a, b = tmp_path / "runs" / "straight", tmp_path / "runs" / "broken"
    ranks.train(2, straight)
    kill_after_step(ranks, broken, b, step=6, saved=5)
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
