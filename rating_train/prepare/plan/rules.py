"""What a plan is asked for: which listings are taken, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rating_train.config.fields import Rule, bound_problems, broken_rules, setting
from rating_train.prepare.records.reading import Reading

MIB_PER_THREAD = 128  # of DuckDB: with less per thread its operators fail instead of spilling
MIN_MEMORY_MB = 96  # seen working with one thread

_RULES = (
    Rule(
        "val_fraction test_fraction",
        lambda c: c.val_fraction + c.test_fraction < 1,
        "`val_fraction` {c.val_fraction} and `test_fraction` {c.test_fraction} leave nothing to train on",
    ),
    Rule(
        "test_items val_items",
        lambda c: not c.test_items or c.val_items is not None,
        "`test_items` needs `val_items` (a share of the groups is `test_fraction`)",
    ),
)


@dataclass(frozen=True)
class PlanRules:
    """What is taken of the sources. Each field documents itself; ``rating-train prepare --help`` lists them."""

    min_rating_count: int = setting(10, "leave out listings with fewer ratings", low=0)
    require_image: bool = setting(
        False, "leave out records that name no image, before the window of a category is taken"
    )
    top_per_category: int = setting(
        0, "listings with the most ratings to take from each category (0 for both ends: take all)", low=0
    )
    bottom_per_category: int = setting(
        0, "listings with the fewest ratings to take from each category", low=0
    )
    val_items: int | None = setting(
        None, "listings for validation, in complete product groups, instead of --val-fraction", low=0
    )
    test_items: int = setting(0, "listings for the test split, with --val-items", low=0)
    val_fraction: float = setting(0.05, "share of the product groups for validation", low=0, high=1)
    test_fraction: float = setting(0.0, "share of the product groups for the test split", low=0, high=1)
    split_seed: str = setting("rating_train", "any text; another text gives another split")
    sample: int = setting(
        0,
        "training listings to keep, evenly over categories and half stars (0: all). A smaller sample is part of a "
        "larger one of the same sources and rules; validation and test stay as they are",
        low=0,
    )
    max_text_chars: int = setting(4000, "cut every text field to this many characters", low=1)
    part_items: int = setting(4096, "listings per part", low=1)
    memory_mb: int = setting(
        MIN_MEMORY_MB,
        "memory for sorting the catalogue, in MiB; the result does not depend on it. The default is enough for 48 "
        "million rows, and more is hardly faster",
        low=MIN_MEMORY_MB,
    )
    limit: int | None = setting(None, "read at most this many records in all, for a trial", low=1)

    @property
    def reading(self) -> Reading:
        """How sources are read: of plain rules, the paper's task."""
        return Reading()

    def problems(self) -> list[str]:
        """Return what is impossible about the values, one sentence each."""
        invalid = bound_problems(self)
        return [*invalid.values(), *broken_rules(self, _RULES, invalid)]

    def recorded(self) -> dict[str, Any]:
        """Return what decides the result: all fields but ``memory_mb``, and none that a subclass adds.

        ``sample`` is there where it does something: plans from before there was one keep their fingerprint.
        """
        left_out = {"memory_mb"} if self.sample else {"memory_mb", "sample"}
        own = {f.name: getattr(self, f.name) for f in fields(PlanRules) if f.name not in left_out}
        return {**own, **self.reading.recorded()}
