"""A run that is asked to stop saves the same step on every rank, leaves with 0, and goes on later."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks

LONG = {"epochs": 400, "save_every_steps": 0, "stop_check_steps": 2}


def wait_for_step(run: Path, step: int, process) -> None:
    log = run / "train.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in 120 s")


def rank_processes(process) -> list[psutil.Process]:
    """The ranks of a torchrun job: its direct children."""
    return psutil.Process(process.pid).children()


def finish(process, timeout: float = 60) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_or_to_all_processes_saves_and_requeues(
    number: signal.Signals, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    config = tiny_config(train=LONG, data={"workers": 1})
    process = ranks.start(2, "-m", "rating_train", "train", config)
    wait_for_step(run, 3, process)
    targets = rank_processes(process)[1:]
    if number == signal.SIGTERM:  # as a scheduler does it: every process of the job, loader processes too
        targets = [p for rank in rank_processes(process) for p in (rank, *rank.children(recursive=True))]
    for target in targets:
        os.kill(target.pid, number)
    output = finish(process)
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    assert f"signal {number.name} at step {step}" in output
    assert (run / "REQUEUE").read_text() == f"signal {number.name} at step {step}\n"
    assert step == len((run / "train.jsonl").read_text().splitlines())

    short = tiny_config(train={**LONG, "max_steps": step + 2}, data={"workers": 1})
    output = ranks.train(2, short)
    assert f"going on from step {step} of {step + 2}" in output
    assert not (run / "REQUEUE").exists()


@pytest.mark.timeout(200)
def test_a_stop_file_saves_once_and_is_used_up(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    process = ranks.start(2, "-m", "rating_train", "train", tiny_config(train=LONG))
    wait_for_step(run, 3, process)
    (run / "STOP").touch()
    assert "STOP at step" in finish(process)
    assert (run / "checkpoints" / "latest.json").is_file()
    assert not (run / "STOP").exists() and not (run / "REQUEUE").exists()


@pytest.mark.timeout(200)
def test_the_time_limit_saves_and_requeues(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    output = ranks.train(2, tiny_config(train={**LONG, "time_limit_minutes": 0.25}))
    assert "the time limit at step" in output
    assert (tmp_path / "runs/run/REQUEUE").is_file() and (
        tmp_path / "runs/run/checkpoints/latest.json"
    ).is_file()
