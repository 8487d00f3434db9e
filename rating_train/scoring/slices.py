"""Parts of a scored split: by category, number of ratings, rating, and text length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rating_train.scoring.predictions import Prediction

MOST_CATEGORIES = 30
NO_CATEGORY = "(no category)"
OTHERS = "(all others)"

#: What is sliced by -> how tables call it.
SLICES = {
    "category": "main category",
    "rating_count": "number of ratings",
    "rating": "true rating",
    "text_chars": "characters of text",
}

#: Lower ends of the bins; the last is open.
RATING_COUNTS = (0, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
TEXT_CHARS = (0, 50, 100, 200, 400, 800, 1600, 3200)
_QUANTILES = 5


@dataclass(frozen=True)
class Slice:
    """Items that share a property.

    Attributes:
        name: for people, for example ``100 to 299 ratings``.
        members: (M,) int64 places in the split, ascending.
    """

    name: str
    members: npt.NDArray[np.int64]


def slices(rows: Sequence[Prediction], unit: str = "stars") -> dict[str, list[Slice]]:
    """Cut a split in each way that its rows allow: what -> its parts, none of them empty.

    ``unit`` is that of the ratings. Keys: ``category`` (largest first), ``rating_count``, ``rating`` and ``text_chars``
    (ascending).
    """
    found: dict[str, list[Slice]] = {}
    if any(row.category for row in rows):
        found["category"] = _by_category([row.category or NO_CATEGORY for row in rows])
    for key, ends, what in (
        ("rating_count", RATING_COUNTS, "ratings"),
        ("text_chars", TEXT_CHARS, "characters"),
    ):
        values = [getattr(row, key) for row in rows]
        if values and None not in values:
            found[key] = _binned(np.asarray(values, np.float64), ends, what)
    if rows and all(row.rating is not None for row in rows):
        found["rating"] = _by_rating(
            np.array([row.rating for row in rows], np.float64), f" {unit}" if unit else ""
        )
    return found


def _by_category(names: Sequence[str]) -> list[Slice]:
    ordered = [name for name, _ in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))]
    # One category more than fit is not worth a line that says "others".
    shown = ordered if len(ordered) <= MOST_CATEGORIES else ordered[: MOST_CATEGORIES - 1]
    labels = np.array([name if name in set(shown) else OTHERS for name in names])
    parts = [Slice(name, np.flatnonzero(labels == name)) for name in [*shown, OTHERS]]
    return [part for part in parts if part.members.size]


def _binned(values: npt.NDArray[np.float64], ends: Sequence[int], unit: str) -> list[Slice]:
    place = np.searchsorted(ends, values, side="right") - 1
    parts = []
    for i, low in enumerate(ends):
        members = np.flatnonzero(place == i)
        if members.size:
            high = f"{low:,} to {ends[i + 1] - 1:,}" if i + 1 < len(ends) else f"{low:,} or more"
            parts.append(Slice(f"{high} {unit}", members))
    return parts


def _by_rating(ratings: npt.NDArray[np.float64], unit: str) -> list[Slice]:
    """Cut by fifths of the items: averages crowd together near 4, where bins of equal width would hold them all."""
    ends = np.unique(np.quantile(ratings, np.linspace(0, 1, _QUANTILES + 1)))
    if len(ends) < 3:
        return [Slice(f"{ratings.min():.2f}{unit}", np.arange(len(ratings)))]
    place = np.clip(np.searchsorted(ends, ratings, side="right") - 1, 0, len(ends) - 2)
    parts = [np.flatnonzero(place == i) for i in range(len(ends) - 1)]
    return [Slice(f"{ratings[p].min():.2f} to {ratings[p].max():.2f}{unit}", p) for p in parts if p.size]
