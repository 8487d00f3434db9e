"""Slices: every item is in exactly one part of each cut."""

from __future__ import annotations

import numpy as np

from rating_train.scoring.predictions import Prediction
from rating_train.scoring.slices import MOST_CATEGORIES, OTHERS, slices


def rows(n: int, categories: int = 3, seed: int = 0) -> list[Prediction]:
    generator = np.random.default_rng(seed)
    return [
        Prediction(
            f"{i}",
            4.0,
            float(np.round(generator.uniform(1, 5), 1)),
            f"c{i % categories:03}",
            int(generator.integers(0, 5000)),
            int(generator.integers(0, 4000)),
        )
        for i in range(n)
    ]


def test_every_item_is_in_exactly_one_part() -> None:
    for n, categories in ((1, 1), (2, 2), (300, 3), (300, 100)):
        found = slices(rows(n, categories))
        assert set(found) == {"category", "rating_count", "rating", "text_chars"}
        for parts in found.values():
            assert sorted(np.concatenate([p.members for p in parts]).tolist()) == list(range(n))
            assert all(p.members.size for p in parts) and len({p.name for p in parts}) == len(parts)


def test_names_say_what_is_inside() -> None:
    items = rows(400)
    found = slices(items)
    for part in found["rating_count"]:
        low, _, high = part.name.removesuffix(" ratings").replace(",", "").partition(" to ")
        counts = [items[i].rating_count or 0 for i in part.members]
        if high:
            assert int(low) <= min(counts) and max(counts) <= int(high)
    assert [p.name for p in found["category"]] == ["c000", "c001", "c002"], "the largest first"


def test_small_categories_beyond_the_limit_are_put_together() -> None:
    parts = slices(rows(400, categories=100))["category"]
    assert len(parts) == MOST_CATEGORIES and parts[-1].name == OTHERS
    exactly = slices(rows(400, categories=MOST_CATEGORIES))["category"]
    assert OTHERS not in {p.name for p in exactly}


def test_what_is_not_known_is_not_sliced_by() -> None:
    assert set(slices([Prediction("a", 4.0, 4.0), Prediction("b", 4.0, 3.0)])) == {"rating"}
    assert set(slices([Prediction("a", 4.0)])) == set() and slices([]) == {}


def test_equal_ratings_are_one_part() -> None:
    (part,) = slices([Prediction(f"{i}", 4.0, 4.5) for i in range(9)])["rating"]
    assert part.name == "4.50 stars" and part.members.size == 9
