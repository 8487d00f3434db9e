"""Metrics of a run: append-only JSON lines, and the same numbers as TensorBoard events. Rank 0 only."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rating_train import run_dir
from rating_train.files import atomic_write_bytes, retry
from rating_train.row_files import RowFiles

log = logging.getLogger(__name__)

#: Of one start of a run, at most: a full disk would otherwise give an empty one for each row.
_EVENT_FILES = 20


class Listener(Protocol):
    """What follows a run from rank 0, beside the files: a tracker of a company, a message to a person."""

    def train(self, row: dict[str, Any]) -> None:
        """Take a row of train.jsonl."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Take a row of eval.jsonl."""

    def close(self) -> None:
        """The attempt ends."""


#: Functions (run directory) -> listener. An extension adds to it (docs/extending.md).
LISTENERS: list[Callable[[Path], Listener]] = []


class Tracker:
    """Writes ``train.jsonl``, ``eval.jsonl`` and TensorBoard events of one run.

    Args:
        run: the run directory.
        first_step: rows of later steps, left by a run that was resumed from an older checkpoint, are dropped
            at the start, so that each step stands there once.
        enabled: whether this is the rank that writes.
    """

    def __init__(self, run: Path, first_step: int, enabled: bool) -> None:
        self._run = run
        self._enabled = enabled
        self._writer: Any = None
        self._event_files = 0
        self._rows = RowFiles()
        self._listeners: list[Listener] = []
        if not enabled:
            return
        for name in (run_dir.TRAIN_LOG, run_dir.EVAL_LOG):
            _drop_rows_after(run / name, first_step)
        self._open_events(first_step + 1)
        self._listeners = [start(run) for start in LISTENERS]

    def train(self, row: dict[str, Any]) -> None:
        """One line of train.jsonl; ``row`` holds ``step``."""
        self._write(run_dir.TRAIN_LOG, "train", row)
        self._tell("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """One line of eval.jsonl; ``row`` holds ``step`` and ``split``."""
        self._write(run_dir.EVAL_LOG, f"eval_{row.get('split', '')}", row)
        self._tell("evaluation", row)

    def close(self) -> None:
        """Write the rows that wait, and flush the event file."""
        self._rows.close()
        self._draw("close")
        self._tell("close")

    def _write(self, file: str, prefix: str, row: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._rows.append(self._run / file, {**row, "time": round(time.time(), 3)})
        if self._writer is None:
            self._open_events()
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
                self._draw("add_scalar", f"{prefix}/{key}", value, row["step"])

    def _open_events(self, purge_step: int | None = None) -> None:
        """Begin a file of events, another one after an error; TensorBoard reads all that are there."""
        from torch.utils.tensorboard import SummaryWriter

        if self._event_files == _EVENT_FILES:
            return
        self._event_files += 1
        try:
            self._writer = SummaryWriter(str(self._run / run_dir.TENSORBOARD_DIR), purge_step=purge_step)
        except OSError as e:
            self._do_without_events(e)

    def _draw(self, method: str, *arguments: Any) -> None:
        """TensorBoard has a copy of the rows; it does without some, rather than end the run."""
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

    def _tell(self, method: str, *arguments: Any) -> None:
        """A listener that fails is dropped: it is no reason to lose a run."""
        for listener in list(self._listeners):
            try:
                getattr(listener, method)(*arguments)
            except Exception:
                self._listeners.remove(listener)
                log.exception("%s failed and is told nothing more", type(listener).__name__)


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to ``step``, atomically; a torn last line goes too."""
    try:
        content = retry(path.read_bytes, path)
    except FileNotFoundError:
        return
    kept, dropped = [], 0
    for line in content.splitlines(keepends=True):  # of bytes: at line ends alone, as they were written
        try:
            keep = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        log.info("%s: dropped %d rows after step %d (they will be written again)", path.name, dropped, step)
        atomic_write_bytes(path, b"".join(kept))
