"""Metrics of a run: append-only JSON lines, and the same rows for the trackers that are named. Rank 0 only."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.config.schema import Config, to_dict
from rating_train.files import atomic_write_bytes, retry
from rating_train.row_files import RowFiles
from rating_train.training.trackers import start_trackers
from rating_train.training.trackers.base import Listener as Listener
from rating_train.training.trackers.base import TrackedRun

log = logging.getLogger(__name__)

#: Functions (run directory) -> listener. An extension adds to it (docs/extending.md).
LISTENERS: list[Callable[[Path], Listener]] = []


class Tracker:
    """Writes ``train.jsonl`` and ``eval.jsonl`` of one run, and tells their rows to its trackers and listeners.

    Args:
        run: the run directory.
        first_step: rows of later steps, left by a run that was resumed from an older checkpoint, are dropped
            at the start, so that each step stands there once.
        enabled: whether this is the rank that writes.
        config: the run's configuration; `tracking` names the trackers.
    """

    def __init__(self, run: Path, first_step: int, enabled: bool, config: Config | None = None) -> None:
        self._run = run
        self._enabled = enabled
        self._rows = RowFiles()
        self._listeners: list[Listener] = []
        if not enabled:
            return
        for name in (run_dir.TRAIN_LOG, run_dir.EVAL_LOG):
            _drop_rows_after(run / name, first_step)
        config = config or Config()
        tracked = TrackedRun(run, config.name, first_step, to_dict(config))
        self._listeners = start_trackers(config.tracking, tracked) + [start(run) for start in LISTENERS]

    def train(self, row: dict[str, Any]) -> None:
        """One line of train.jsonl; ``row`` holds ``step``."""
        self._write(run_dir.TRAIN_LOG, row)
        self._tell("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """One line of eval.jsonl; ``row`` holds ``step`` and ``split``."""
        self._write(run_dir.EVAL_LOG, row)
        self._tell("evaluation", row)

    def close(self) -> None:
        """Write the rows that wait, and close the trackers."""
        self._rows.close()
        self._tell("close")

    def _write(self, file: str, row: dict[str, Any]) -> None:
        if self._enabled:
            self._rows.append(self._run / file, {**row, "time": round(time.time(), 3)})

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
