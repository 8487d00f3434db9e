"""The memory that a rank and its DataLoader workers take, early and late."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence

import psutil

from rating_train.bench.result import Row

_MIB = 2**20


def family_bytes() -> int:
    """Return the memory of this process and of all that it has started; what they share is counted once.

    The sum of their proportional set sizes (Linux), which includes blocks of shared memory that one of them has mapped.
    """
    own, total = psutil.Process(), 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found = process.memory_full_info()
            total += getattr(found, "pss", found.rss)
    return total


def memory_rows(early: Sequence[int], late: Sequence[int]) -> list[Row]:
    """Return the memory after a tenth of each round's batches, and at its end as a share of that.

    Args:
        early, late: of each round, in bytes.
    """
    before, after = (statistics.median(values) / _MIB for values in (early, late))
    spreads = [(min(values) / _MIB, max(values) / _MIB) for values in (early, late)]
    name = "memory of the rank and its workers"
    return [
        Row("loader", f"{name} after 10%", before, "MiB", spreads[0], larger_is_better=None),
        Row(
            "loader",
            f"{name} at the end",
            after,
            "MiB",
            spreads[1],
            before,
            "after 10%",
            larger_is_better=None,
        ),
    ]
