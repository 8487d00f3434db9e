"""A run that is asked to stop saves the same step on every rank, leaves with 0, and resumes later."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rating_train.checkpoint import store
from tests.conftest import Ranks
from tests.faults.ledger import Attempt, stop_process
from tests.helpers.ranks import Process, wait_for_step

LONG = {"epochs": 4000, "save_every_steps": 0, "stop_check_steps": 2}

StartLong = Callable[..., tuple[Path, Process]]


def rank_processes(process: Process) -> list[psutil.Process]:
    """The ranks of a job: direct children of its launcher."""
    return psutil.Process(process.pid).children()


@pytest.fixture
def start_long(ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path) -> StartLong:
    """Start a run of two ranks that ends only when it is told to; its directory and its job."""

    def start(**sections: Any) -> tuple[Path, Process]:
        config = tiny_config(train=LONG, **sections)
        job = ranks.start(2, "-m", "rating_train", "train", config, torchrun=False)
        return tmp_path / "runs" / "run", job

    return start


def finish(process: Process, timeout: float = 60) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_or_to_all_processes_saves_and_requeues(
    start_long: StartLong, number: signal.Signals, ranks: Ranks, tiny_config: Callable[..., Path]
) -> None:
    run, process = start_long(data={"workers": 1})
    wait_for_step(run, 3, process)
    targets = rank_processes(process)[1:]
    if number == signal.SIGTERM:  # as a scheduler does it: every process of the job, DataLoader workers too
        targets = [p for rank in rank_processes(process) for p in (rank, *rank.children(recursive=True))]
    # A scheduler and a launcher pass on the same signal, one a little later than the other. To the ranks' very end,
    # as it may come while they leave.
    deadline = time.monotonic() + 2
    while targets and time.monotonic() < deadline:
        for target in targets:
            with contextlib.suppress(psutil.NoSuchProcess):  # they have the signal, and have left
                target.send_signal(number)
        if number == signal.SIGUSR1:
            break
        targets = [p for p in targets if p.is_running()]
        time.sleep(0.05)
    output = finish(process)
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    assert f"signal {number.name} at step {step}" in output
    assert (run / "REQUEUE").read_text() == f"signal {number.name} at step {step}\n"
    assert step == len((run / "train.jsonl").read_text().splitlines())

    short = tiny_config(train={**LONG, "max_steps": step + 2}, data={"workers": 1})
    output = ranks.train(2, short)
    assert f"resuming from step {step} of {step + 2}" in output
    assert not (run / "REQUEUE").exists()


@pytest.mark.timeout(200)
def test_a_stop_file_saves_once_and_is_used_up(start_long: StartLong) -> None:
    run, process = start_long()
    wait_for_step(run, 3, process)
    (run / "STOP").touch()
    assert "STOP at step" in finish(process)
    assert (run / "checkpoints" / "latest.json").is_file()
    assert not (run / "STOP").exists() and not (run / "REQUEUE").exists()


@pytest.mark.timeout(200)
def test_a_signal_during_a_save_is_honoured_right_after_it_or_at_the_next(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The ranks look at the flag only when they save, once the state is copied: a later signal waits for the next."""
    run = tmp_path / "runs" / "run"
    config = tiny_config(train={**LONG, "stop_check_steps": 1000, "save_every_steps": 5}, data={"workers": 1})
    job = Attempt(ranks, config, run, str(tmp_path))
    assert job.wait(lambda: len(job.ranks()) == 2, 120, "the ranks"), job.output[-4000:]
    rank = job.ranks()["rank 1"]
    assert job.wait(job.saving, 120, "a save"), job.output[-4000:]
    rank.send_signal(signal.SIGUSR1)
    done = len(job.new_steps())
    assert not job.wait(lambda: False, 60, "the end")
    job.join()
    assert job.process.returncode == 0, job.output[-4000:]
    step = len(job.new_steps())
    assert step % 5 == 0 and step <= (done // 5 + 1) * 5, "not the one after the next"
    assert_stopped_at(job, run, step, saved=list(range(step, 0, -5))[:2])


@pytest.mark.timeout(300)
def test_a_signal_during_an_evaluation_abandons_it_and_the_next_start_repeats_it(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The training split, one item at a time, makes an evaluation long."""
    run = tmp_path / "runs" / "run"
    slow = {"data": {"workers": 1, "eval_split": "train"}, "eval": {"micro_items": 1}}
    train = {**LONG, "stop_check_steps": 1000, "eval_every_steps": 5}
    job = Attempt(ranks, tiny_config(train=train, **slow), run, str(tmp_path))
    assert job.wait(lambda: len(job.ranks()) == 2, 120, "the ranks"), job.output[-4000:]
    rank = job.ranks()["rank 1"]
    assert job.wait(lambda: 5 in job.new_steps(), 120, "an evaluation"), job.output[-4000:]
    rank.send_signal(signal.SIGUSR1)
    assert not job.wait(lambda: False, 60, "the end")
    job.join()
    assert job.process.returncode == 0, job.output[-4000:]
    assert "the evaluation at step 5 is abandoned (signal SIGUSR1)" in job.output
    assert_stopped_at(job, run, 5, saved=[5])
    assert not (run / "eval.jsonl").exists()

    short = {"data": {"workers": 1}, "eval": {"max_items": 24}}
    output = ranks.train(2, tiny_config(train={**train, "max_steps": 7}, **short))
    assert "resuming from step 5 of 7" in output
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 7]
    best = max(rows, key=lambda row: row["plcc"])
    pointed = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (pointed["step"], pointed["value"], pointed["metric"]) == (best["step"], best["plcc"], "plcc")
    assert store.pointed_step(run / "checkpoints", store.BEST) == best["step"]


def wait_for_start(run: Path, process: Process) -> None:
    """Until the ranks begin their first step."""
    log = run / "logs" / "rank_00000.log"
    deadline = time.monotonic() + 120
    while not (log.is_file() and "starting at step 0" in log.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(200)
def test_one_term_ends_a_first_step_between_two_micro_batches(start_long: StartLong) -> None:
    """A step of a hundred micro-batches on each rank: there is nothing to save before it is complete."""
    batch = {"global_items": 200, "micro_items": 1}
    run, process = start_long(batch=batch, data={"text_tokens": 1024})
    wait_for_start(run, process)
    first, second = rank_processes(process)
    for target in (first, second):
        target.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "signal SIGTERM at step 0 of" in output
    assert (run / "REQUEUE").read_text().startswith("signal SIGTERM ")
    assert not (run / "train.jsonl").exists() and not list((run / "checkpoints").iterdir())
    assert not (run / "LOCK").exists()


@pytest.mark.timeout(200)
def test_one_term_ends_a_rank_that_waits_for_another_in_its_first_step(start_long: StartLong) -> None:
    """Its main thread is stuck in a collective, and cannot look at anything."""
    # Many micro-batches: the first step lasts until one rank has been stopped.
    run, process = start_long(batch={"global_items": 200, "micro_items": 1}, data={"text_tokens": 1024})
    wait_for_start(run, process)
    waiting, stopped = sorted(rank_processes(process), key=lambda p: p.pid)  # as they were started
    stop_process(stopped)
    waiting.send_signal(signal.SIGTERM)
    waiting.wait(timeout=60)
    assert (run / "REQUEUE").read_text() == "signal SIGTERM before the first step of this attempt\n"
    assert "there is nothing to save, ending this process" in (run / "logs" / "rank_00000.log").read_text()
    assert not (run / "LOCK").exists() and not (run / "HUNG").exists()


def assert_stopped_at(job: Attempt, run: Path, step: int, saved: list[int]) -> None:
    """All steps up to this one were done, and are on disk; nothing is left over."""
    assert job.new_steps() == list(range(1, step + 1))
    assert (run / "REQUEUE").read_text() == f"signal SIGUSR1 at step {step}\n"
    checkpoints = run / "checkpoints"
    assert store.pointed_step(checkpoints, store.LATEST) == step
    assert [s for s, _ in store.steps_present(checkpoints)] == saved
    for found, directory in store.steps_present(checkpoints):
        assert store.verify(directory)["step"] == found
    assert not job.saving(), "a temporary directory is left"


def own_limit() -> tuple[dict[str, object], dict[str, str]]:
    """0.1 minutes of the run's own: (settings, environment)."""
    return {"time_limit_minutes": 0.1}, {}


def end_of_the_job() -> tuple[dict[str, object], dict[str, str]]:
    """A job of Slurm that ends in 24 seconds, less a margin of a quarter of them."""
    env = {"SLURM_JOB_ID": "4711", "SLURM_JOB_END_TIME": str(int(time.time()) + 24)}
    # torchrun inside a job of several tasks: who is which rank is torchrun's to say.
    env |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS_PER_NODE": "4"}
    return {"job_end_margin_minutes": 1.0}, env


@pytest.mark.timeout(200)
@pytest.mark.parametrize("limit", [own_limit, end_of_the_job])
def test_the_time_limit_saves_and_requeues(
    limit: Callable[[], tuple[dict[str, object], dict[str, str]]],
    ranks: Ranks,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    settings, env = limit()
    output = ranks.train(2, tiny_config(train={**LONG, **settings}), env=env)
    assert "the time limit at step" in output
    assert (tmp_path / "runs/run/REQUEUE").is_file() and (
        tmp_path / "runs/run/checkpoints/latest.json"
    ).is_file()
