"""Bins, axes and captions of a dataset report, in the unit of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rating_train.config.task import PAPER, Target, Task


def rating_edges(target: Target, ratings: Sequence[float]) -> list[float]:
    """Return the edges of the bins: tenths of a star, or 40 equal ones between the bounds (or the extremes)."""
    if target == PAPER.target:
        return np.arange(0.95, 5.1, 0.1).tolist()
    low, high = min(ratings), max(ratings)
    if target.bounds and target.transform == "none":
        low, high = target.bounds
    return np.linspace(low, max(high, low + 1e-6), 41).tolist()


def target_label(target: Target) -> str:
    """Return what an axis of targets is called."""
    return f"{'average ' if target == PAPER.target else ''}{target.name}{target.label}"


def caption(sample: Mapping[str, Any], task: Task) -> str:
    """Return the target of a sample, and its number of ratings where there is one."""
    count = f", {sample['rating_count']:,} ratings" if task.counted else ""
    return f"{sample['rating']:.1f}{task.target.suffix}{count}"
