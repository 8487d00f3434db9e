"""What stands around the loop of a run: one job per run directory, signs of life, and asking to stop."""

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
from rating_train.resilience.graceful_stop import StopFlag, Stopped
from rating_train.resilience.run_lock import RunLock
from rating_train.resilience.watchdog import Watchdog


@dataclass(frozen=True)
class Supervisor:
    """The guards of a run, on every rank; rank 0 holds the lock."""

    lock: RunLock
    watchdog: Watchdog
    stop: StopFlag

    def beat(self, phase: str, step: int, total_steps: int) -> None:
        """A sign of life, to this rank's watchdog and to heartbeat.json."""
        self.watchdog.beat(f"{phase}, step {step}")
        self.lock.update(phase=phase, step=step, total_steps=total_steps)

    def agreed_to_stop(self) -> str:
        """Why to stop, or ``""``; a collective, at a step border.

        Raises:
            UserError: another job has taken the run over.
        """
        on_main(self.lock.check)
        return self.stop.agreed()

    def stop_if_agreed(self, urgent_only: bool = False) -> None:
        """Raise on all ranks alike where any of them wants to stop; a collective, in the middle of something.

        Args:
            urgent_only: heed SIGTERM and SIGINT alone.

        Raises:
            Stopped: with the reason.
            UserError: another job has taken the run over.
        """
        on_main(self.lock.check)
        if reason := self.stop.agreed(urgent_only):
            raise Stopped(reason)

    def stop_if_urgent(self) -> None:
        """:meth:`stop_if_agreed`, for SIGTERM and SIGINT alone."""
        self.stop_if_agreed(urgent_only=True)


@contextlib.contextmanager
def supervise(
    run: Path, config: TrainConfig, world: World, job: ScheduledJob, started: float
) -> Iterator[Supervisor]:
    """Take the run directory and watch over what is done in it. A collective at its beginning.

    Args:
        started: ``time.monotonic()`` seconds from which ``time_limit_minutes`` counts.

    Raises:
        UserError: another job owns the run.
    """
    lock = RunLock(run, job.id, job.restart)
    on_main(lock.acquire)
    reason = ""
    try:
        on_main(lambda: run_dir.make(run))
        on_main(lambda: (run / run_dir.HUNG_FILE).unlink(missing_ok=True))
        watchdog = Watchdog(
            60 * config.watchdog_minutes, run_dir.stacks_file(run, world.rank), run / run_dir.HUNG_FILE
        )
        stop = StopFlag(run / run_dir.STOP_FILE, deadline(config, job, started), world.is_main)
        with watchdog, stop:
            yield Supervisor(lock, watchdog, stop)
            stop.done()
    except BaseException as e:
        reason = f"{type(e).__name__}: {e}"
        raise
    finally:
        lock.release(reason)


def deadline(config: TrainConfig, job: ScheduledJob, started: float) -> float | None:
    """``time.monotonic()`` seconds at which to stop, the earlier of the run's own limit and the job's end."""
    limits = []
    if config.time_limit_minutes:
        limits.append(started + 60 * config.time_limit_minutes)
    if job.ends_at is not None:
        left = job.ends_at - time.time()
        # At most a quarter of a short job: it would stop as soon as it starts, again and again.
        limits.append(time.monotonic() + left - min(60 * config.job_end_margin_minutes, left / 4))
    return min(limits, default=None)
