"""Supervision of the training loop: one job per run directory, heartbeats, and graceful shutdown."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rating_train import run_dir
from rating_train.config.schema import TrainConfig
from rating_train.distributed.collectives import on_main
from rating_train.distributed.world import ScheduledJob, World
from rating_train.errors import UserError
from rating_train.files import atomic_write_text, remove
from rating_train.resilience.graceful_stop import REQUEUE_REASONS, StopFlag, Stopped
from rating_train.resilience.run_lock import RunLock
from rating_train.resilience.watchdog import Watchdog


@dataclass(frozen=True)
class Supervisor:
    """The lock, watchdog and stop flag of a run, on every rank; rank 0 holds the lock."""

    lock: RunLock
    watchdog: Watchdog
    stop: StopFlag

    def beat(self, phase: str, step: int, total_steps: int) -> None:
        """Report progress to this rank's watchdog and to heartbeat.json."""
        self.watchdog.beat(f"{phase}, step {step}")
        # The heartbeat comes from a thread, also while this one is stuck: `status` tells the two apart by this time.
        self.lock.update(
            phase=phase, step=step, total_steps=total_steps, progress_unix_time=round(time.time(), 3)
        )

    def first_step_done(self) -> None:
        """Note that there is something to save: from now on, signals wait for a step boundary."""
        self.watchdog.leave_early = None

    def agreed_to_stop(self) -> str:
        """Return why to stop, or ``""``. A collective, at a step boundary.

        Raises:
            UserError: another job has taken over the run.
        """
        on_main(self.lock.check)
        return self.stop.agreed()

    def stop_if_agreed(self, urgent_only: bool = False) -> None:
        """Raise on all ranks if any of them wants to stop. A collective, in the middle of an operation.

        Args:
            urgent_only: consider only SIGTERM and SIGINT.

        Raises:
            Stopped: some rank wants to stop; the message is the reason.
            UserError: another job has taken over the run.
        """
        on_main(self.lock.check)
        if reason := self.stop.agreed(urgent_only):
            raise Stopped(reason)

    def stop_if_urgent(self) -> None:
        """Call :meth:`stop_if_agreed` for SIGTERM and SIGINT only."""
        self.stop_if_agreed(urgent_only=True)


@contextlib.contextmanager
def supervise(
    run: Path, config: TrainConfig, world: World, job: ScheduledJob, started: float
) -> Iterator[Supervisor]:
    """Lock the run directory and supervise the job that uses it. A collective at its beginning.

    Args:
        run: the run directory.
        config: limits of time and of silence.
        world: this process among the ranks.
        job: the scheduler's job.
        started: ``time.monotonic()`` seconds from which ``time_limit_minutes`` counts.

    Raises:
        UserError: another job owns the run.
    """
    lock = RunLock(run, job.id, job.restart)
    on_main(lock.acquire)
    reason = ""
    try:
        on_main(lambda: _forget_hang(run / run_dir.HUNG_FILE))
        watchdog = Watchdog(
            60 * config.watchdog_minutes, run_dir.stacks_file(run, world.rank), run / run_dir.HUNG_FILE
        )
        stop = StopFlag(run / run_dir.STOP_FILE, deadline(config, job, started), world.is_main)
        watchdog.leave_early = lambda reason: _leave(run, lock, reason)
        with watchdog, stop:
            try:
                yield Supervisor(lock, watchdog, stop)
            finally:
                stop.done()
    except BaseException as e:
        reason = f"{type(e).__name__}: {e}"
        raise
    finally:
        lock.release(reason)


def _forget_hang(marker: Path) -> None:
    """Remove what an attempt that hung left. Rank 0."""
    try:
        remove(marker)
    except OSError as e:
        raise UserError(f"cannot be removed ({e})", where=marker, fix="remove it, then start again") from e


def leave_markers(run: Path, reason: str, step: int) -> None:
    """Remove STOP, which has been obeyed, and leave REQUEUE where the launcher is to start the run again. Rank 0."""
    remove(run / run_dir.STOP_FILE)
    _leave_requeue(run, f"at step {step}", reason)


def _leave(run: Path, lock: RunLock, reason: str) -> None:
    """Leave a run in which this attempt has done nothing yet, from the watchdog's thread."""
    _leave_requeue(run, "before the first step of this attempt", reason)
    lock.release(reason)


def _leave_requeue(run: Path, when: str, reason: str) -> None:
    """Write REQUEUE if the scheduler or a time limit ended the attempt, not a person."""
    if reason in REQUEUE_REASONS:
        atomic_write_text(run / run_dir.REQUEUE_FILE, f"{reason} {when}\n")


def deadline(config: TrainConfig, job: ScheduledJob, started: float) -> float | None:
    """Return the ``time.monotonic()`` seconds at which to stop: the earlier of the run's limit and the job's end."""
    limits = []
    if config.time_limit_minutes:
        limits.append(started + 60 * config.time_limit_minutes)
    if job.ends_at is not None:
        left = job.ends_at - time.time()
        # At most a quarter of a short job: otherwise it would stop right after each start.
        limits.append(time.monotonic() + left - min(60 * config.job_end_margin_minutes, left / 4))
    return min(limits, default=None)
