"""Which listings become samples, and which split they belong to. Pure functions: no files, no images.

The rules of one listing, its hashes, and the split of a group. What needs all listings at once (duplicates, groups,
the window of a category) runs out of core in ``prepare/plan/planner.py``.

Reasons given here: ``few_ratings``, ``no_image``, ``empty_text``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import blake2b

from rating_train.prepare.plan.rules import PlanRules
from rating_train.shards.schema import Listing

# Dropped because the user asked for it, not because the record is broken: not counted against the limit on dropped
# records (most of a real catalogue has fewer than ten ratings).
CHOSEN_REASONS = frozenset({"few_ratings", "no_image", "not_selected"})


def check_listing(listing: Listing, rules: PlanRules) -> tuple[str, str] | None:
    """Return (reason, detail) if the listing breaks a rule, else ``None``."""
    task = rules.reading.task
    count = listing.rating_count if task.counted else None  # any other weight is no number of ratings
    if count is not None and not math.isnan(listing.rating) and count < rules.min_rating_count:
        return "few_ratings", f"{count} ratings, at least {rules.min_rating_count} are needed"
    if rules.require_image and not listing.image:
        return "no_image", "the record names no main image"
    names = task.field_names
    # A category alone says too little of a product; a task of one field has nothing else.
    wanted = [name for name in names if name != task.category] or names
    if wanted and not any(listing.texts[name].strip() for name in wanted):
        shown = f"{', '.join(wanted[:-1])} and {wanted[-1]} are all" if wanted[1:] else f"{wanted[0]} is"
        return "empty_text", f"{shown} blank"
    return None


def cap_text(listing: Listing, max_chars: int) -> Listing:
    """Cut every text field to ``max_chars`` characters (code points)."""
    if all(len(text) <= max_chars for text in (listing.category, *listing.texts.values())):
        return listing
    texts = {name: text[:max_chars] for name, text in listing.texts.items()}
    return replace(listing, texts=texts, category=listing.category[:max_chars])


def hash64(*parts: str) -> int:
    """Return a stable 64-bit hash of some texts: the same in every process, on every machine."""
    # The lengths keep ("ab", "c") and ("a", "bc") apart.
    framed = b"".join(len(b).to_bytes(8, "big") + b for b in (p.encode("utf-8") for p in parts))
    return int.from_bytes(blake2b(framed, digest_size=8).digest(), "big")


def split_hash(root: int, seed: str) -> int:
    """Return the place of a component in the order in which splits are filled: 64 bits, ``val`` at the low end."""
    return hash64("split", seed, f"{root:016x}")


def split_of(root: int, rules: PlanRules) -> str:
    """Return ``"train"``, ``"val"`` or ``"test"`` of a component: a pure function of its hash and the rules.

    ``val`` has the low end of the unit interval and ``test`` follows it, so that adding a test split later leaves
    the validation items as they were.
    """
    unit = split_hash(root, rules.split_seed) / 2**64
    if unit < rules.val_fraction:
        return "val"
    return "test" if unit < rules.val_fraction + rules.test_fraction else "train"
