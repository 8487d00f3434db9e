"""One job per run directory: a lock that a crashed owner leaves behind and the next job can take over.

::

    LOCK             who owns the run: created with O_EXCL, written once, removed at the end
    heartbeat.json   what the owner is doing: a counter that increases while it is alive; stays at the end

A second job that finds LOCK decides whether its owner is alive:

- same host, boot and PID namespace: a process with that id and start time exists, or it does not;
- same scheduler job with a lower restart count: the scheduler ended that job before it started this one;
- otherwise it watches for ``stale_seconds`` of its own monotonic clock. Clocks of two hosts are never compared. Any
  change of LOCK or heartbeat.json in that time is a sign of life. On a network file system that caches attributes
  for longer (NFS: ``acregmax``), increase ``stale_seconds``.

A dead owner's LOCK is renamed before a new one is created, so that one of two candidates succeeds. An owner that was
wrongly considered dead (its host was suspended) finds another owner's LOCK and must stop: :meth:`RunLock.check`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rating_train import run_dir
from rating_train.errors import UserError
from rating_train.files import make_folder, remove, rename, retry
from rating_train.processes import process_lives, this_process
from rating_train.resilience.lock_file import LockState, describe, read_state

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # between two looks at an owner that is being watched
_SETTLE_SECONDS = 0.2  # time for another candidate to put back a lock that it renamed by mistake


class RunLock:
    """The lock of one run directory, held by rank 0.

    Args:
        run: the run directory; created if missing.
        job: the scheduler's job id, the same after a requeue; ``""`` without a scheduler.
        restart: how often the scheduler has restarted this job.
        beat_seconds: time between heartbeats.
        stale_seconds: time without a heartbeat after which an owner whose process cannot be checked is considered
            dead; at least twice ``beat_seconds``.
    """

    def __init__(
        self,
        run: Path,
        job: str = "",
        restart: int = 0,
        beat_seconds: float = 5.0,
        stale_seconds: float = 30.0,
    ) -> None:
        if stale_seconds < 2 * beat_seconds:
            raise ValueError(f"stale_seconds {stale_seconds} is less than two heartbeats of {beat_seconds}")
        self._run = run
        self._lock = run / run_dir.LOCK_FILE
        self._heartbeat = run / run_dir.HEARTBEAT_FILE
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._owner = {"nonce": secrets.token_hex(8), "job": job, "restart": restart, **this_process()}
        self._facts: dict[str, Any] = {"phase": "starting"}
        self._counter = 0
        self._logged: set[str] = set()  # kinds of problems that were logged
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        #: Whether another job has taken over the run.
        self.lost = False

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.release(f"{kind.__name__}: {error}" if kind else "")

    def acquire(self) -> None:
        """Take the lock, from a dead owner if necessary, and start the heartbeat.

        Raises:
            UserError: another job owns the run; the message names it.
        """
        try:
            self._acquire()
        except OSError as e:
            raise UserError(
                f"the run directory cannot be used ({e})",
                where=self._run,
                expected="a directory that this job can write to",
                fix="set runs_dir to one, or wait until the file system is back",
            ) from e
        self._beat()
        self._thread = threading.Thread(target=self._beats, name="run lock", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        make_folder(self._run)
        while not retry(self._create, self._lock):
            found = read_state(self._lock)
            if found is None:  # just released, or not visible on this host yet
                time.sleep(_LOOK_SECONDS)
                continue
            if found.content.get("nonce") == self._owner["nonce"]:  # created, although an error was reported
                self._owner = found.content
                break
            why = self._dead_at_once(found.content) or self._watch(found)
            if why and self._move_away(found):
                log.warning("took over %s from %s: %s", self._lock, describe(found.content), why)
        for torn in retry(lambda: list(self._run.glob(f".{self._heartbeat.name}.tmp-*")), self._run):
            remove(torn)  # left by an owner that was killed while writing it

    def release(self, reason: str = "") -> None:
        """Stop the heartbeat and remove LOCK if it is still this job's. Do nothing where it is not held.

        Args:
            reason: why the run ended; ``""`` takes the fact ``outcome``, or "done".
        """
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        self._thread = None
        self._look()
        if self.lost:
            return
        self.update(phase=f"ended: {reason or self._facts.get('outcome') or 'done'}")
        self._beat()
        try:
            remove(self._lock)
        except OSError as e:  # no reason to fail after the work is done
            log.warning("%s cannot be removed (%s): the next job takes it over", self._lock, e)

    def update(self, **facts: Any) -> None:
        """Record what the job is doing (step, total_steps, phase, ...): JSON values, for the next heartbeat."""
        self._facts = {
            **self._facts,
            **facts,
        }  # replaced, never mutated: the other thread reads it without a lock

    def check(self) -> None:
        """Verify that the run still belongs to this job. Call at step boundaries and before a save.

        Raises:
            UserError: another job has taken over the run.
        """
        if self.lost:
            try:
                other = read_state(self._lock)
            except OSError:
                other = None  # the message does without it
            raise UserError(
                "another job has taken over this run, or its lock was deleted"
                + (f": {describe(other.content)}" if other else ""),
                where=self._lock,
                fix="nothing, if that job resumed from the last checkpoint; this one stops here",
            )

    def _create(self) -> bool:
        """Create LOCK; return whether it is ours now."""
        content = {**self._owner, "since": _now_text()}
        try:
            fd = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(fd, "w", encoding="utf-8") as f:
                json.dump(content, f, indent=2)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # the first error counts
                self._lock.unlink(missing_ok=True)
            raise
        # A candidate that judged the old lock may still rename this one, and put it back.
        time.sleep(_SETTLE_SECONDS)
        if not self._is_mine():
            return False
        self._owner = content
        return True

    def _dead_at_once(self, owner: dict[str, Any]) -> str:
        """Return why the owner is certainly dead; ``""`` if that is not certain."""
        if process_lives(owner) is False:
            return "its process is gone"
        job, restart = owner.get("job"), owner.get("restart")
        if (
            job
            and job == self._owner["job"]
            and isinstance(restart, int)
            and restart < self._owner["restart"]
        ):
            return f"it is restart {restart} of this job {job}, and this is restart {self._owner['restart']}"
        return ""

    def _watch(self, found: LockState) -> str:
        """Watch for ``stale_seconds``; return why the owner is dead, or ``""`` if it released the lock.

        Raises:
            UserError: the owner is alive.
        """
        if process_lives(found.content):
            raise self._refusal(found.content)
        log.warning(
            "%s belongs to %s; watching it for %g s for a sign of life",
            self._lock, describe(found.content), self._stale_seconds,
        )  # fmt: skip
        before = found, read_state(self._heartbeat)
        end = time.monotonic() + self._stale_seconds
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            now = read_state(self._lock), read_state(self._heartbeat)
            if now[0] is None:
                return ""
            if now != before:
                raise self._refusal(now[0].content)
        return f"no heartbeat in {self._stale_seconds:g} s"

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        beat = read_state(self._heartbeat)
        last = ""
        if beat and beat.content:
            c = beat.content
            last = f"; last heartbeat {c.get('time', 'unknown')}, {c.get('phase', 'unknown')} at step {c.get('step')}"
        return UserError(
            f"another job is using this run: {describe(owner)}{last}",
            where=self._lock,
            fix="wait for it, stop it (touch STOP in the run directory), or give this run another `name`",
        )

    def _move_away(self, judged: LockState) -> bool:
        """Rename the dead owner's LOCK; return False if it has changed or gone and must be judged again."""
        if read_state(self._lock) != judged:
            return False
        aside = self._lock.with_name(f"{self._lock.name}.stale-{self._owner['nonce']}")
        try:
            rename(self._lock, aside, lambda: True)
        except FileNotFoundError:
            return False  # the other candidate was faster
        right = read_state(aside) == judged
        if not right:
            # Another candidate took over between the look and the rename, and this is its lock. Put it back, but
            # never over a third candidate's; in that case its owner notices at its next look.
            with contextlib.suppress(OSError):
                os.link(aside, self._lock)
        with contextlib.suppress(OSError):  # nobody reads it
            remove(aside)
        return right

    def _is_mine(self) -> bool:
        """Return whether LOCK is ours. Looks twice: another candidate may have renamed it briefly by mistake."""
        for look in range(2):
            if look:
                time.sleep(_SETTLE_SECONDS)
            state = read_state(self._lock)
            if state is not None and state.content.get("nonce") == self._owner["nonce"]:
                return True
        return False

    def _beats(self) -> None:
        while not self._end.wait(self._beat_seconds):
            self._look()
            if self.lost:
                return
            self._beat()

    def _look(self) -> None:
        """Set ``lost`` if the lock is another job's."""
        try:
            if self._is_mine():
                return
        except OSError as e:  # an unavailable file system does not mean that the lock is lost
            self._log_once("read", "the lock cannot be read (%s); trying again", e)
            return
        self.lost = True
        log.error("%s no longer belongs to this job", self._lock)

    def _beat(self) -> None:
        """Replace heartbeat.json; without fsync, because it describes only the present."""
        self._counter += 1
        beat = {
            **{key: self._owner[key] for key in ("nonce", "host", "pid", "job", "restart")},
            **self._facts,
            "counter": self._counter,
            "beat_seconds": self._beat_seconds,
            "time": _now_text(),
            "unix_time": round(time.time(), 3),
        }
        temporary = self._heartbeat.with_name(f".{self._heartbeat.name}.tmp-{self._owner['nonce']}")
        try:
            temporary.write_text(json.dumps(beat, indent=2) + "\n", "utf-8")
            os.replace(temporary, self._heartbeat)
        except (
            OSError,
            TypeError,
            ValueError,
        ) as e:  # a full disk, or a fact that is not JSON: keep training
            self._log_once("write", "the heartbeat cannot be written (%s); trying again", e)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.utime(self._lock)  # a sign of life that needs no space

    def _log_once(self, kind: str, text: str, error: Exception) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning(text, error)


def _now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
