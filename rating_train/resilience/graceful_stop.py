"""Stopping early, together: signals, a STOP file or a time limit raise a flag; the ranks agree on it.

Nothing is saved inside a signal handler: it only sets a flag, which the loop reads at a step border.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from types import FrameType

from rating_train.distributed.collectives import all_gather, max_over_ranks

log = logging.getLogger(__name__)

# What asks a run to go on later (the scheduler, a limit), unlike a person's Ctrl-C or STOP file.
REQUEUE_REASONS = ("signal SIGUSR1", "signal SIGTERM", "the time limit")

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

# What is followed by SIGKILL, or by an impatient person. (SIGUSR1 comes minutes before the end of a job.)
URGENT_REASONS = ("signal SIGTERM", "signal SIGINT")


class Stopped(Exception):
    """Raised on all ranks alike where they agreed to stop in the middle of something; the message is the reason."""


class StopFlag:
    """Why this rank wants to stop (``""`` while it does not).

    Args:
        stop_file: a file whose presence asks for a stop (looked for by rank 0 only).
        deadline: ``time.monotonic()`` seconds after which to stop; ``None`` for no limit.
        is_main: whether this is rank 0.
    """

    def __init__(self, stop_file: Path, deadline: float | None, is_main: bool) -> None:
        self.reason = ""
        self._stop_file = stop_file
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
        """All is saved: a signal that comes while the process leaves, also after the context, changes nothing.

        Schedulers and launchers pass on the same one, now and then a little later than the other; by its default
        action it would turn a run that has stopped in order into one that failed.
        """
        self._previous.update(dict.fromkeys((signal.SIGUSR1, signal.SIGTERM), _too_late))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = f"signal {signal.Signals(number).name}"

    def poll(self) -> str:
        """Look at the file and the clock as well; returns the reason so far."""
        if not self.reason and self._is_main and self._stop_file.exists():
            self.reason = f"the file {self._stop_file}"
        if not self.reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "the time limit"
        return self.reason

    def agreed(self, urgent_only: bool = False) -> str:
        """Return the reason, if any rank wants to stop, else ``""``; a collective, called by all at the same step.

        Args:
            urgent_only: heed SIGTERM and SIGINT alone.
        """
        reason = self.poll()
        if urgent_only and reason not in URGENT_REASONS:
            reason = ""
        if not max_over_ranks(1 if reason else 0):
            return ""
        return next(text for text in all_gather(reason) if text)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    """Stands in for the default action, which would end the process."""
