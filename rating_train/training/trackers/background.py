"""A thread for a tracker behind a network: training never waits for it, and outlives it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from rating_train.training.trackers.base import Listener

log = logging.getLogger(__name__)

#: To wait for the tracker to start. Afterwards DataLoader workers are forked, which should happen during no import of
#: another thread.
START_SECONDS = 60.0
#: To wait at the end for the rows that are not yet sent.
CLOSE_SECONDS = 60.0


class Background:
    """A listener that hands its rows to another one, in a thread; whatever that one raises ends it, and not the run.

    Args:
        name: the tracker's name, for messages.
        start: makes the listener, in the thread.
        start_seconds: to wait for it; a server that does not answer is waited for in the thread.
    """

    def __init__(
        self, name: str, start: Callable[[], Listener], start_seconds: float = START_SECONDS
    ) -> None:
        self._name, self._start = name, start
        self._rows: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._started, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()
        if not self._started.wait(start_seconds):
            log.warning("%s: no answer after %.0f s; training starts without waiting", name, start_seconds)

    def train(self, row: dict[str, Any]) -> None:
        """Queue a row of train.jsonl."""
        self._put("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Queue a row of eval.jsonl."""
        self._put("evaluation", row)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the rows that are queued, for a bounded time."""
        self._put("close")
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.error(
                "%s: about %d rows were not sent within %.0f s; train.jsonl and eval.jsonl have all of them",
                self._name, self._rows.qsize(), seconds,
            )  # fmt: skip

    def _put(self, method: str, *arguments: Any) -> None:
        if not self._failed:
            self._rows.put((method, arguments))

    def _run(self) -> None:
        try:
            listener = self._start()
            self._started.set()
            method = ""
            while method != "close":
                method, arguments = self._rows.get()
                getattr(listener, method)(*arguments)
        except Exception:
            self._failed = True
            log.exception(
                "%s failed and is told nothing more; train.jsonl and eval.jsonl have all rows", self._name
            )
        finally:
            self._started.set()
