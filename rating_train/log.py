"""Logging: lines of rank 0 on the terminal, lines of every rank in its own file.

The environment is read here and in ``world`` only, and never logged.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s r{rank} %(name)s: %(message)s"
# Libraries that narrate at INFO; their warnings still show.
_CHATTY = ("DeepSpeed", "deepspeed", "streaming", "transformers", "PIL", "matplotlib", "urllib3")


def set_up(rank: int = 0, file: Path | None = None, level: str = "") -> None:
    """Send the package's log to stderr (rank 0: INFO, others: warnings) and, whole, to ``file``.

    Called once by a command. ``RATING_TRAIN_LOG`` (DEBUG, INFO, ...) sets the level.
    """
    level = level or os.environ.get("RATING_TRAIN_LOG", "INFO")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    formatter = logging.Formatter(_FORMAT.format(rank=rank), datefmt="%Y-%m-%d %H:%M:%S")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [terminal]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: said once on stderr, not as a traceback for each line."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            print(f"{self.baseFilename} cannot be written ({error}): lines are lost", file=sys.stderr)


def process_rank() -> int:
    """This process's rank as the launcher names it, before anything is checked; 0 without a launcher."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def has_agent() -> bool:
    """Whether this is a process of torchrun's agent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_terminal() -> bool:
    """Whether a person watches: progress bars are drawn only then."""
    return sys.stderr.isatty()
