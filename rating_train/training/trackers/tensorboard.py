"""TensorBoard: the numbers of the rows as event files in the run directory. Needs no network, and no thread."""

from __future__ import annotations

import logging
from typing import Any

from rating_train import run_dir
from rating_train.training.trackers.base import TrackedRun, evaluation_prefix, numbers

log = logging.getLogger(__name__)

#: Of one start of a run, at most: a full disk would otherwise give an empty one for each row.
_EVENT_FILES = 20


class TensorBoard:
    """Writes events. It has a copy of the rows: it does without some, rather than end the run."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._folder = str(tracked.path / run_dir.TENSORBOARD_DIR)
        self._writer: Any = None
        self._event_files = 0
        self._open_events(tracked.first_step + 1)

    def train(self, row: dict[str, Any]) -> None:
        """Draw a row of train.jsonl."""
        self._add("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Draw a row of eval.jsonl."""
        self._add(evaluation_prefix(row), row)

    def close(self) -> None:
        """Flush the event file."""
        self._draw("close")

    def _add(self, prefix: str, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._open_events()
        for tag, value in numbers(prefix, row).items():
            self._draw("add_scalar", tag, value, row["step"])

    def _open_events(self, purge_step: int | None = None) -> None:
        """Begin a file of events, another one after an error; TensorBoard reads all that are there."""
        from torch.utils.tensorboard import SummaryWriter

        if self._event_files == _EVENT_FILES:
            return
        self._event_files += 1
        try:
            self._writer = SummaryWriter(self._folder, purge_step=purge_step)
        except OSError as e:
            self._do_without_events(e)

    def _draw(self, method: str, *arguments: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except OSError as e:
            self._do_without_events(e)

    def _do_without_events(self, error: OSError) -> None:
        self._writer = None
        if self._event_files in (1, _EVENT_FILES):
            log.error("TensorBoard lacks some events (%s): train.jsonl and eval.jsonl have all rows", error)
