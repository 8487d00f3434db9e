"""Counts of a build and the lines that say how far it is."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rating_train.prepare.plan import select

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0


@dataclass
class BuildCounts:
    """Counts of one build; every record read ends in ``dropped`` or is a candidate for being kept."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # records per reason
    kept: int = 0

    @property
    def candidates(self) -> int:
        """Records that are not dropped (so far)."""
        return self.read - sum(self.dropped.values())

    def over_limit(self, max_fraction: float) -> bool:
        """Whether more than this share of the records is unusable; those left out by choice aside."""
        chosen = sum(self.dropped[reason] for reason in select.CHOSEN_REASONS)
        return sum(self.dropped.values()) - chosen > max_fraction * (self.read - chosen)

    def reasons(self) -> str:
        """For example ``image_missing 12, bad_json 1``, the commonest first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common()) or "none"


class Progress:
    """A bar on a terminal, or else a log line every ~10 s: done, rate, time left, kept, dropped by reason.

    Args:
        total: items in all, None if unknown; ``done``: items that an earlier run did (not in the rate).
    """

    def __init__(self, what: str, counts: BuildCounts, total: int | None, done: int = 0) -> None:
        self._what, self._counts_so_far, self._total = what, counts, total
        self._before = self._done = done
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, initial=done, unit=" items")

    def add(self, items: int) -> None:
        """So many more items are done."""
        self._done += items
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(items)
        elif time.monotonic() - self._said >= LOG_EVERY_SECONDS:
            self._said = time.monotonic()
            logger.info(self.line())

    def close(self, whole: bool = True) -> None:
        """Take the bar away; say the last counts if the work was done to its end."""
        if self._bar is not None:
            self._bar.close()
        elif whole:
            logger.info(self.line())

    def line(self) -> str:
        """For example ``images: 40 of 60, 20/s, 1 s left, kept 39, dropped: image_missing 1``."""
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
        of = f" of {self._total}" if self._total is not None else ""
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
        return f"{self._what}: {self._done}{of}, {rate:.0f}/s{left}, {self._counts()}"

    def _counts(self) -> str:
        return f"kept {self._counts_so_far.kept}, dropped: {self._counts_so_far.reasons()}"
