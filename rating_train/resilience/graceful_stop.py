"""Graceful shutdown: signals, a STOP file or a time limit set a flag, and all ranks agree on it.

Nothing is saved inside a signal handler: it only sets a flag, which the loop reads at a step boundary.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from types import FrameType

from rating_train.distributed.collectives import all_gather, max_over_ranks
from rating_train.files import MarkerFile

log = logging.getLogger(__name__)

# Reasons after which the run is to resume later (the scheduler, a limit), unlike a person's Ctrl-C or STOP file.
REQUEUE_REASONS = ("signal SIGUSR1", "signal SIGTERM", "the time limit")

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

# Signals followed soon by SIGKILL, or by an impatient person. (SIGUSR1 comes minutes before the end of a job.)
URGENT_REASONS = ("signal SIGTERM", "signal SIGINT")


class Stopped(Exception):
    """Raised on all ranks when they agreed to stop in the middle of an operation; the message is the reason."""


class StopFlag:
    """Holds the reason why this rank wants to stop (``""`` while it does not).

    Args:
        stop_file: a file whose presence requests a stop (checked by rank 0 only).
        deadline: ``time.monotonic()`` seconds after which to stop; ``None`` for no limit.
        is_main: whether this is rank 0.
    """

    def __init__(self, stop_file: Path, deadline: float | None, is_main: bool) -> None:
        self.reason = ""
        self._stop_file = MarkerFile(stop_file)
        self._deadline = deadline
        self._is_main = is_main
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def done(self) -> None:
        """Ignore signals that arrive from now on, also after the context: this process is leaving.

        A scheduler and a launcher may both forward the same signal, one a little later than the other; its default
        action would turn a graceful shutdown into a failure. And the launcher ends all ranks as soon as the first one
        has failed: the others have yet to release the lock and to tell their error.
        """
        self._previous.update(dict.fromkeys((signal.SIGUSR1, signal.SIGTERM), _ignore))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = f"signal {signal.Signals(number).name}"

    def poll(self) -> str:
        """Check the file and the clock as well; return the reason so far."""
        if not self.reason and self._is_main and self._stop_file.is_present():
            self.reason = f"the file {self._stop_file.path}"
        if not self.reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "the time limit"
        return self.reason

    def agreed(self, urgent_only: bool = False) -> str:
        """Return the reason if any rank wants to stop, else ``""``. A collective, at the same step on all ranks.

        Args:
            urgent_only: consider only SIGTERM and SIGINT.
        """
        reason = self.poll()
        if urgent_only and reason not in URGENT_REASONS:
            reason = ""
        if not max_over_ranks(1 if reason else 0):
            return ""
        return next(text for text in all_gather(reason) if text)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Replace the default action, which would end the process."""
