"""Logging: rank 0 writes to the terminal, every rank to its own file.

The environment is read only here and in ``world``, and never logged.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0

_FORMAT = "%(asctime)s %(levelname)s r{rank} %(name)s: %(message)s"
# Libraries that are verbose at INFO; their warnings are shown.
_CHATTY = ("DeepSpeed", "deepspeed", "streaming", "transformers", "PIL", "matplotlib", "urllib3")


def set_up(rank: int = 0, file: Path | None = None) -> None:
    """Send the log to stderr (rank 0: INFO, others: warnings) and, at full detail, to ``file``.

    Called once by a command. ``RATING_TRAIN_LOG`` (DEBUG, INFO, ...) sets the level.
    """
    level = os.environ.get("RATING_TRAIN_LOG", "INFO")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    formatter = logging.Formatter(_FORMAT.format(rank=rank), datefmt="%Y-%m-%d %H:%M:%S")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [terminal]
    if file is not None:
        handlers.append(_LogFile(file))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """A log file that cannot fail the run: an error is reported once on stderr, and the next line tries again."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        self._failed = False
        try:
            self.stream = self._open()
        except OSError as e:
            self._report(e)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as e:  # from opening the file; others come by `handleError`
            self._report(e)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(error)
        else:
            super().handleError(record)

    def _report(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            print(f"{self.baseFilename} cannot be written ({error}): log lines are lost", file=sys.stderr)


def process_rank() -> int:
    """Return the rank that the launcher gives this process, unchecked; 0 without a launcher."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def has_agent() -> bool:
    """Return whether torchrun's agent started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_terminal() -> bool:
    """Return whether stderr is a terminal: only then are progress bars drawn."""
    return sys.stderr.isatty()


class Progress:
    """The progress of long work: a bar on a terminal, else a log line about every ten seconds.

    Args:
        what: the work, for example ``images``.
        total: total units of work, ``None`` if unknown.
        unit: what is counted, for example ``items`` or ``MB``.
        done: units finished by an earlier attempt; they do not count for the rate.
        details: returns text to show after the numbers; called whenever a line is shown.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str = "items",
        done: float = 0,
        details: Callable[[], str] = lambda: "",
    ) -> None:
        self._what, self._total, self._unit, self._details = what, total, unit, details
        self._before = self._done = done
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        if on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}")

    def add(self, amount: float) -> None:
        """Count ``amount`` more units as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(self._details(), refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._shown >= LOG_EVERY_SECONDS:
            self._shown = time.monotonic()
            _log.info(self.line())

    def close(self, complete: bool = True) -> None:
        """Remove the bar, or log a last line if the work is complete."""
        if self._bar is not None:
            self._bar.close()
        elif complete:
            _log.info(self.line())

    def line(self) -> str:
        """Return, for example, ``images: 40 of 60 items, 20/s, 1 s left, kept 39``."""
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
        of = f" of {self._total:.0f}" if self._total is not None else ""
        left = f", {max(0.0, self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
        details = self._details()
        return (
            f"{self._what}: {self._done:.0f}{of} {self._unit}, {rate:.{0 if rate >= 10 else 1}f}/s{left}"
            + (f", {details}" if details else "")
        )


def number(value: float | None) -> str:
    """Return a number as people read it, in four significant digits: ``0.08731``, ``412.5``, ``3e-05``, ``12,345``."""
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time as people read it: ``0.4 s``, ``55 s``, ``12 min 5 s``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, small_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns as wide as their widest cell, the first left-aligned, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:]))]).rstrip()

    return [line(header), "  ".join("-" * w for w in widths), *map(line, rows)]
