"""The lock of a run directory: who may hold it, and when it is taken from a dead owner."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rating_train import files
from rating_train.errors import UserError
from rating_train.processes import process_lives, start_ticks, this_process
from rating_train.resilience import lock_file
from rating_train.resilience.run_lock import RunLock

pytestmark = pytest.mark.timeout(60)

FAST = {"beat_seconds": 0.1, "stale_seconds": 1.0}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in 20 s"
        time.sleep(0.02)


def beat(run: Path) -> dict:
    return json.loads((run / "heartbeat.json").read_text())


def write_owner(run: Path, **changes: object) -> None:
    run.mkdir(exist_ok=True)
    owner = {"nonce": "aa", "job": "", "restart": 0, "since": "then", **this_process(), **changes}
    (run / "LOCK").write_text(json.dumps(owner))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    return process.pid


def test_the_lock_is_held_beats_and_is_released(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run, job="7", restart=2, **FAST) as lock:
        owner = json.loads((run / "LOCK").read_text())
        assert owner["pid"] == os.getpid() and owner["job"] == "7" and owner["restart"] == 2
        lock.update(step=3, total_steps=9, phase="training")
        until(lambda: beat(run).get("step") == 3)
        first = beat(run)["counter"]
        until(lambda: beat(run)["counter"] > first + 2)
        assert json.loads((run / "LOCK").read_text()) == owner
        lock.check()
    assert not (run / "LOCK").exists()
    assert beat(run)["phase"] == "ended: done" and beat(run)["step"] == 3
    assert sorted(p.name for p in run.iterdir()) == ["heartbeat.json"]


def test_the_reason_for_the_end_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path, **FAST):
        raise ZeroDivisionError("a bug")
    assert beat(tmp_path)["phase"] == "ended: ZeroDivisionError: a bug"
    with RunLock(tmp_path, **FAST) as lock:
        lock.update(outcome="early stop")
    assert beat(tmp_path)["phase"] == "ended: early stop"


def test_a_living_owner_is_named(tmp_path: Path) -> None:
    with RunLock(tmp_path, job="41", **FAST) as lock:
        lock.update(step=12, phase="evaluating")
        until(lambda: beat(tmp_path).get("step") == 12)
        with pytest.raises(UserError, match="another job is using this run") as error:
            RunLock(tmp_path, job="42", **FAST).acquire()
        text = str(error.value)
        for part in (f"process {os.getpid()} on ", "job 41", "evaluating at step 12", "touch STOP"):
            assert part in text, text
        lock.check()
    RunLock(tmp_path / "other", **FAST).release()  # never acquired: nothing to do


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    write_owner(tmp_path, pid=dead_pid())
    with RunLock(tmp_path, stale_seconds=1000) as lock:  # would not end in time if it watched
        lock.check()


def test_a_reused_process_id_is_another_process(tmp_path: Path) -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    write_owner(tmp_path, start_ticks=ticks - 1)
    with RunLock(tmp_path, stale_seconds=1000):
        pass


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    owner = {**this_process(), "pid": process.pid, "start_ticks": start_ticks(process.pid)}
    assert process_lives(owner) is True
    process.kill()
    until(lambda: process_lives(owner) is False)
    process.communicate(timeout=30)


@pytest.mark.parametrize("key", ["host", "boot_id", "pid_namespace"])
def test_a_process_elsewhere_is_not_checked(key: str) -> None:
    assert process_lives({**this_process(), key: "elsewhere"}) is None
    assert process_lives({**this_process(), "pid": dead_pid()}) is False


def test_an_earlier_restart_of_the_same_job_is_replaced_at_once(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", job="99", restart=1)
    with RunLock(tmp_path, job="99", restart=2, stale_seconds=1000):
        pass


@pytest.mark.parametrize(("job", "restart"), [("99", 1), ("98", 5), ("", 5)])
def test_other_jobs_and_the_same_restart_are_watched(job: str, restart: int, tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", job=job and "99", restart=1)
    with RunLock(tmp_path, job, restart, **FAST):
        beat_before = beat(tmp_path)
    assert beat_before["job"] == job  # taken over after the watch, as nothing beat


def test_an_owner_elsewhere_with_a_heartbeat_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = RunLock(tmp_path, **FAST)
    owner._owner["host"] = "elsewhere"
    with owner, caplog.at_level(logging.INFO):
        with pytest.raises(UserError, match="on elsewhere"):
            RunLock(tmp_path, **FAST).acquire()
        owner.check()
    assert sum("watching it for 1 s for a sign of life" in m for m in caplog.messages) == 1


def test_an_owner_elsewhere_without_a_heartbeat_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_owner(tmp_path, host="elsewhere")
    (tmp_path / "heartbeat.json").write_text('{"counter": 5}')
    with caplog.at_level(logging.WARNING), RunLock(tmp_path, **FAST):
        pass
    assert any("took over" in m and "no heartbeat in 1 s" in m for m in caplog.messages)


@pytest.mark.parametrize("content", [b"", b'{"nonce": "a', b"\xff\xfe", b"[]"])
def test_a_torn_lock_is_replaced_after_the_watch(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_bytes(content)
    with RunLock(tmp_path, **FAST) as lock:
        lock.check()


def test_an_owner_whose_lock_was_taken_notices_and_leaves_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, **FAST)
    lock.acquire()
    write_owner(tmp_path, nonce="another", host="elsewhere")
    until(lambda: lock.lost)
    with pytest.raises(UserError, match=r"taken over this run.* on elsewhere"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "LOCK").read_text())["nonce"] == "another"


def test_a_deleted_lock_is_lost(tmp_path: Path) -> None:
    with RunLock(tmp_path, **FAST) as lock:
        (tmp_path / "LOCK").unlink()
        until(lambda: lock.lost)
        with pytest.raises(UserError, match="its lock was deleted"):
            lock.check()


def test_a_lock_that_another_candidate_made_meanwhile_is_put_back(tmp_path: Path) -> None:
    """A candidate judged an old lock; when it renames, the lock is another candidate's."""
    write_owner(tmp_path, nonce="old", pid=dead_pid())
    candidate = RunLock(tmp_path, **FAST)
    from rating_train.resilience.lock_file import read_state

    judged = read_state(tmp_path / "LOCK")
    assert judged is not None
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        write_owner(tmp_path, nonce="faster")
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", late)
        assert not candidate._move_away(judged)
    assert json.loads((tmp_path / "LOCK").read_text())["nonce"] == "faster"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LOCK"]


def test_a_full_disk_is_logged_once_and_still_leaves_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLock(tmp_path, **FAST) as lock, caplog.at_level(logging.WARNING):
        replace, failures = os.replace, []

        def full(source: Path, target: Path) -> None:
            failures.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        until(lambda: len(failures) > 3)
        stamp = (tmp_path / "LOCK").stat().st_mtime_ns
        until(lambda: (tmp_path / "LOCK").stat().st_mtime_ns > stamp)
        monkeypatch.setattr(os, "replace", replace)
        counter = beat(tmp_path)["counter"]
        until(lambda: beat(tmp_path)["counter"] > counter)
        lock.check()
    assert sum("the heartbeat cannot be written" in m for m in caplog.messages) == 1


def test_a_stale_time_below_two_heartbeats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="less than two heartbeats"):
        RunLock(tmp_path, beat_seconds=5, stale_seconds=6)


def test_a_file_system_that_is_away_does_not_lose_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.01,))
    failures = []

    def stale(*_: object, **__: object) -> None:
        failures.append(1)
        raise OSError(errno.ESTALE, "Stale file handle")

    with RunLock(tmp_path, **FAST) as lock:
        with monkeypatch.context() as m:
            m.setattr(lock_file, "open", stale, raising=False)
            until(lambda: len(failures) > 5)
        counter = beat(tmp_path)["counter"]
        until(lambda: beat(tmp_path)["counter"] > counter)
        lock.check()
    assert sum("the lock cannot be read" in m for m in caplog.messages) == 1
    assert not (tmp_path / "LOCK").exists()


def test_a_lock_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.01,))

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    lock = RunLock(tmp_path, **FAST)
    lock.acquire()
    with monkeypatch.context() as m:
        m.setattr(os, "unlink", stale)
        lock.release()
    assert "cannot be removed" in caplog.text and (tmp_path / "LOCK").exists()
    assert "ended" in beat(tmp_path)["phase"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_taking_the_lock_survives_transient_errors(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.01, 0.01))
    errors = {"open": [number], "fsync": [number]}

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            if errors[name]:
                raise OSError(errors[name].pop(), "injected")
            return real(*args, **more)

        return call

    for name in errors:
        monkeypatch.setattr(os, name, failing(name))
    with RunLock(tmp_path, **FAST) as lock:
        lock.check()
    assert errors == {"open": [], "fsync": []}


def test_a_lock_that_was_created_although_an_error_was_reported_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither could it be flushed, nor removed: the second attempt finds it, and must not refuse its own process."""
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.01, 0.01))
    errors = [errno.EIO, errno.EIO]

    def failing(*_: object, **__: object) -> None:
        if errors:
            raise OSError(errors.pop(), "injected")

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(os, "unlink", failing)
    with RunLock(tmp_path, **FAST) as lock:
        lock.check()
        assert not errors
        monkeypatch.undo()
    assert not (tmp_path / "LOCK").exists()


def test_a_dead_owners_lock_is_taken_over_although_the_reply_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.01,))
    dead = {**this_process(), "pid": 2**22 + 1, "nonce": "of a dead process"}
    (tmp_path / "LOCK").write_text(json.dumps(dead))
    rename, replies = os.rename, [errno.EIO]

    def lost_reply(source: Any, target: Any) -> None:
        rename(source, target)
        if replies:
            raise OSError(replies.pop(), "the server's reply was lost")

    monkeypatch.setattr(os, "rename", lost_reply)
    with RunLock(tmp_path, **FAST) as lock:
        lock.check()
    assert "took over" in caplog.text and not replies
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heartbeat.json"]


@pytest.mark.parametrize("where", ["/dev/null", "/dev/null/run", "/proc/none/run"])
def test_a_run_directory_that_cannot_be_is_one_error(where: str) -> None:
    with pytest.raises(UserError, match="the run directory cannot be used") as caught:
        RunLock(Path(where)).acquire()
    assert where in str(caught.value) and "runs_dir" in str(caught.value)
