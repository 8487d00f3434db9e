"""Nothing waits forever: a stopped rank, a dead or stopped DataLoader worker, a stop requested twice.

To the others a stopped process (SIGSTOP) looks hung: it exists, keeps its connections, and is silent.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks
from tests.faults.ledger import Attempt, living, stop_process, wait_until_none_lives

WATCHDOG_MINUTES = 0.5  # longer than a start takes, also on a busy machine
# What a rank is in that waits for another one: a collective, or the end of those that reduce gradients.
COLLECTIVE = re.compile(r"in (all_reduce|all_gather\w*|broadcast\w*|reduce\w*|barrier|gather\w*|finish)\b")
TRAIN = {"epochs": 4000, "save_every_steps": 0, "stop_check_steps": 1}


@pytest.fixture
def start(ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    """Start the run and wait until it trains; at the end kill what is left of it, stopped processes too."""

    def begin(wait: bool = True, **train: object) -> Attempt:
        config = tiny_config(train={**TRAIN, **train}, data={"workers": 1})
        job = Attempt(ranks, config, tmp_path / "runs" / "run", str(tmp_path))
        if wait:
            assert job.wait(lambda: len(job.new_steps()) >= 3, 150, "step 3"), job.output[-4000:]
        return job

    yield begin
    for process in living(str(tmp_path)):
        process.kill()
    assert not wait_until_none_lives(str(tmp_path), 30)


def stacks(job: Attempt) -> dict[int, str]:
    files = {r: job.run / "logs" / f"stacks_{r:05d}.txt" for r in (0, 1)}
    return {rank: file.read_text() for rank, file in files.items() if file.is_file() and file.read_text()}


def wait_for_end(job: Attempt, process: psutil.Process, seconds: float, what: str) -> None:
    """Wait until one rank has ended, whether or not the launcher has noticed."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s\n{job.output[-4000:]}"
        time.sleep(0.05)


def end(job: Attempt, *stopped: psutil.Process, code: int = 1) -> str:
    """Kill what was stopped (torchrun would, half a minute later); torchrun must end and leave no process."""
    for process in stopped:
        process.kill()
    assert not job.wait(lambda: False, 60, "the end of torchrun")
    assert job.process.returncode == code, job.output[-4000:]
    assert not wait_until_none_lives(job.token, 10)
    job.join()
    return job.output


@pytest.mark.timeout(400)
def test_a_stopped_rank_ends_the_others_with_stacks_and_the_next_start_resumes(
    start: Callable[..., Attempt],
) -> None:
    job = start(watchdog_minutes=WATCHDOG_MINUTES, save_every_steps=2)
    assert job.wait(lambda: (job.run / "checkpoints" / "latest.json").exists(), 60, "a checkpoint")
    first, second = (job.ranks()[f"rank {r}"] for r in (0, 1))
    stop_process(second)
    wait_for_end(job, first, 60 * WATCHDOG_MINUTES + 40, "the watchdog")
    assert (job.run / "HUNG").is_file()
    output = end(job, second)
    assert 0 in stacks(job)
    assert COLLECTIVE.search(stacks(job)[0]), stacks(job)[0]
    assert re.search(r"no progress for \d+ s while \w+, step \d+", stacks(job)[0])
    assert "exitcode  : 75" in output

    step = job.new_steps()[-1]
    job = start(wait=False, max_steps=step + 2)
    assert job.wait(lambda: bool(job.new_steps()), 150, "a step"), job.output[-4000:]
    assert not (job.run / "HUNG").exists()
    output = end(job, code=0)
    assert job.new_steps()[0] > 1 and job.new_steps()[-1] == step + 2, "it resumes from a checkpoint"
    assert f"finished at step {step + 2}" in output
    assert not (job.run / "HUNG").exists()


@pytest.mark.timeout(200)
def test_a_killed_worker_fails_the_run_with_a_clear_error(start: Callable[..., Attempt]) -> None:
    job = start()
    loader = job.loaders()[0]
    loader.kill()
    output = end(job)
    # Which message appears depends on what the rank and its worker were doing at that moment.
    said = (
        rf"DataLoader worker \(pid(\(s\))? {loader.pid}\) (is killed by signal: Killed|exited unexpectedly)"
        "|a DataLoader worker of this rank died while it handed over a batch"
    )
    assert re.search(said, output), output
    assert not (job.run / "LOCK").exists()


@pytest.mark.timeout(200)
def test_a_stopped_worker_ends_all_ranks_with_stacks(start: Callable[..., Attempt]) -> None:
    job = start(watchdog_minutes=WATCHDOG_MINUTES)
    rank, loader = job.ranks()["rank 1"], job.loaders()
    loader = [p for p in loader if p.ppid() == rank.pid]
    stop_process(loader[0])
    wait_for_end(job, rank, 60 * WATCHDOG_MINUTES + 40, "the watchdog")
    output = end(job)
    assert "exitcode  : 75" in output
    assert (job.run / "HUNG").is_file()
    # Each rank shows where it was stuck: one waits for its worker, the other for that rank.
    assert set(stacks(job)) == {0, 1}
    assert "_try_get_data" in stacks(job)[1] and COLLECTIVE.search(stacks(job)[0]), stacks(job)


@pytest.mark.timeout(200)
def test_a_second_sigterm_ends_a_stuck_rank_at_once(start: Callable[..., Attempt]) -> None:
    job = start()
    first, second = (job.ranks()[f"rank {r}"] for r in (0, 1))
    stop_process(second)
    first.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # the same signal forwarded by a launcher is not a second one
    first.send_signal(signal.SIGTERM)
    time.sleep(6)
    assert first.is_running() and first.status() != psutil.STATUS_ZOMBIE and not stacks(job)
    first.send_signal(signal.SIGTERM)
    wait_for_end(job, first, 15, "the hard exit")
    output = end(job, second)
    assert "asked to stop again while training" in stacks(job)[0] and COLLECTIVE.search(stacks(job)[0])
    assert "exitcode  : 75" in output
    assert not (job.run / "HUNG").exists(), "the other ranks did nothing wrong"


@pytest.mark.timeout(200)
def test_a_collective_that_waits_too_long_fails_before_the_watchdog(start: Callable[..., Attempt]) -> None:
    # Without logging and stop checks, all collectives are DeepSpeed's, in groups that it creates itself.
    job = start(collective_timeout_minutes=0.25, log_every_steps=1000, stop_check_steps=1000)
    first, second = (job.ranks()[f"rank {r}"] for r in (0, 1))
    stop_process(second)
    wait_for_end(job, first, 60, "the collective's time-out")
    output = end(job, second)
    # Several buffers of gradients are on their way: the one that rank 0 waits for may fail by the time-out of another.
    said = r"Timed out waiting 15000ms|Application timeout caused pair closure"
    assert re.search(said, output), output[-4000:]
    assert "exitcode  : 1 " in output
    assert not stacks(job) and not (job.run / "HUNG").exists()
