"""A killed job leaves nothing behind in /dev/shm and TMPDIR that could disturb the next one. And jobs side by side."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks, full
from tests.helpers.ranks import SHARED_MEMORY, wait_for_step

# Constant rates, so that the losses do not depend on how long the run was meant to be.
LONG = {"optim": {"schedule": "constant", "warmup_fraction": 0.0}, "train": {"epochs": 4000}}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "train.jsonl").read_text().splitlines()]


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    launcher = psutil.Process(process.pid)
    return [launcher, *launcher.children(recursive=True)]


def shared_memory_names(process: subprocess.Popen[str]) -> set[str]:
    """Files of /dev/shm that a process of the job has mapped or open, without those that have no name any more."""
    found = set()
    for member in family(process):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            lines = Path(f"/proc/{member.pid}/maps").read_text().splitlines()
            found |= {line.split(maxsplit=5)[-1] for line in lines if "/dev/shm/" in line}
            for fd in Path(f"/proc/{member.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(fd))
    return {name for name in found if name.startswith(str(SHARED_MEMORY)) and not name.endswith("(deleted)")}


def kill_at_once(process: subprocess.Popen[str]) -> None:
    """kill -9 of the complete job as a scheduler does it: its helpers have no time to clean up after it."""
    members = family(process)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in members:
            member.send_signal(number)
    psutil.wait_procs(members, timeout=30)
    process.wait(timeout=30)


@pytest.mark.timeout(300)
def test_a_killed_job_leaves_no_shared_memory_and_its_neighbour_continues(
    ranks: Ranks, tiny_config: Callable[..., Path], demo: Path, tmp_path: Path
) -> None:
    """Both train from one remote through one cache, which the killed job leaves as good as it was."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "RATING_TRAIN_LOG": "WARNING"}  # nobody reads the output meanwhile
    cache = {"workers": 1, "remote": str(demo / "data"), "path": str(tmp_path / "cache")}
    killed_run, live_run = tmp_path / "runs/killed", tmp_path / "runs/live"
    killed = ranks.start(2, "-m", "rating_train", "train", tiny_config("killed", **LONG, data=cache), env=env)
    live = ranks.start(2, "-m", "rating_train", "train", tiny_config("live", **LONG, data=cache), env=env)
    wait_for_step(killed_run, 2, killed)
    wait_for_step(live_run, 2, live)
    named = shared_memory_names(killed) | shared_memory_names(live)
    kill_at_once(killed)
    named |= shared_memory_names(live)
    assert not [name for name in named if Path(name).exists()], "named shared memory outlives a killed job"
    assert not list(temporary.glob("[0-9]*_*")) and not list(temporary.glob("rating_train*"))

    done = len(losses(live_run))
    wait_for_step(live_run, max(done + 5, 8), live)
    (live_run / "STOP").touch()
    output, _ = live.communicate(timeout=60)
    assert live.returncode == 0, output[-4000:]

    again = tiny_config("killed", **{**LONG, "train": {"max_steps": 8}}, data=cache)
    ranks.train(2, again, env=env)
    assert losses(killed_run)[:8] == losses(live_run)[:8]


@full
@pytest.mark.timeout(300)
def test_two_jobs_side_by_side_train_as_they_do_alone(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"data": {"workers": 1}, "train": {"max_steps": 6, "eval_every_steps": 3}}
    both = [
        ranks.start(2, "-m", "rating_train", "train", tiny_config(name, **sections)) for name in ("a", "b")
    ]
    for process in both:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output[-4000:]
    ranks.train(2, tiny_config("alone", **sections))
    runs = tmp_path / "runs"
    assert losses(runs / "a") == losses(runs / "b") == losses(runs / "alone")
    assert len(losses(runs / "alone")) == 6
    scores = [json.loads((runs / n / "eval.jsonl").read_text().splitlines()[-1])["rmse"] for n in ("a", "b")]
    assert scores[0] == scores[1]
