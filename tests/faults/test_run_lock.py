"""The lock of a run among real processes: killed, stopped, and many concurrently."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rating_train.errors import UserError
from rating_train.resilience.run_lock import RunLock
from tests.faults.ledger import stop_process

pytestmark = pytest.mark.timeout(120)

OWNER = """
import sys, time
from pathlib import Path
from rating_train.errors import UserError
from rating_train.resilience.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat_seconds=0.1, stale_seconds=1.5)
lock._owner["host"] = sys.argv[2] or lock._owner["host"]
lock.acquire()
print("held", flush=True)
try:
    while True:
        lock.check()
        time.sleep(0.02)
except UserError as e:
    print(e, flush=True)
"""

# Each holds the lock once. `inside` is created with O_EXCL: two at a time would fail.
CONTENDER = """
import os, random, signal, sys, time
from pathlib import Path
from rating_train.errors import UserError
from rating_train.resilience.run_lock import RunLock
run, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
inside = run / "inside"
while True:
    lock = RunLock(run, beat_seconds=0.1, stale_seconds=1)
    try:
        lock.acquire()
    except UserError:
        time.sleep(random.uniform(0, 0.05))
        continue
    break
os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
time.sleep(0.2)
lock.check()
inside.unlink()
if dies:
    os.kill(os.getpid(), signal.SIGKILL)
lock.release()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def owner(processes: list[subprocess.Popen[str]], run: Path, host: str = "") -> subprocess.Popen[str]:
    """Start a process that holds the lock, as another host if one is named."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run), host],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes.append(process)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    killed = owner(processes, tmp_path)
    with pytest.raises(UserError, match=f"process {killed.pid} "):
        RunLock(tmp_path).acquire()
    killed.kill()
    killed.wait(timeout=30)
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == killed.pid
    with RunLock(tmp_path, stale_seconds=1000) as lock:
        lock.check()


def test_a_stopped_owner_on_this_host_is_alive(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    stopped = owner(processes, tmp_path)
    os.kill(stopped.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="another job is using this run"):
        RunLock(tmp_path, beat_seconds=0.1, stale_seconds=0.5).acquire()


def test_a_suspended_owner_elsewhere_is_replaced_and_stops_when_it_wakes(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    suspended = owner(processes, tmp_path, "elsewhere")
    stop_process(psutil.Process(suspended.pid))
    with RunLock(tmp_path, beat_seconds=0.1, stale_seconds=1.5) as lock:
        os.kill(suspended.pid, signal.SIGCONT)
        output, _ = suspended.communicate(timeout=30)
        assert suspended.returncode == 0 and "another job has taken over this run" in output, output
        time.sleep(0.3)  # several beats: it has left the new owner's lock alone
        lock.check()


def test_of_many_candidates_only_one_holds_the_lock_at_a_time(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    owner(processes, tmp_path).kill()
    kinds = ["dies", "lives"] * 4
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(tmp_path), kind], stderr=subprocess.PIPE, text=True
        )
        for kind in kinds
    ]
    processes += contenders
    for process, kind in zip(contenders, kinds):
        _, error = process.communicate(timeout=100)
        assert process.returncode == (-signal.SIGKILL if kind == "dies" else 0), error
    assert not (tmp_path / "inside").exists()
    # A killed owner may have left a partial heartbeat; the next owner removes it.
    assert {p.name for p in tmp_path.glob("[!.]*")} <= {"LOCK", "heartbeat.json"}
    with RunLock(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["heartbeat.json"]
