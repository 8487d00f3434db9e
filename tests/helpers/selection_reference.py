"""The rules of ``prepare/plan/selection.py`` in memory: the reference for ``planner.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.plan.selection import (
    cap_text,
    check_listing,
    hash64,
    split_of,
)
from rating_train.prepare.records.sources import Record
from rating_train.shards.schema import Dropped, Listing
from rating_train.shards.titles import title_key


def apply_rules(records: Iterable[Record], rules: PlanRules) -> Iterator[Record]:
    """Turn listings that break a rule into ``Dropped``; cap the texts of the others."""
    for record in records:
        item = record.item
        if isinstance(item, Listing):
            refusal = check_listing(item, rules)
            if refusal is None:
                item = cap_text(item, rules.max_text_chars)
            else:
                item = Dropped(record.source, record.line, item.id, *refusal)
        yield Record(record.source, record.line, item)


def drop_duplicates(records: Iterable[Record]) -> Iterator[Record]:
    """The first listing of an id wins; later ones become ``Dropped``. Keeps 64 bits per id."""
    seen: set[int] = set()
    for record in records:
        item = record.item
        if isinstance(item, Listing):
            key = hash64("id", item.id)
            if key in seen:
                item = Dropped(
                    record.source, record.line, item.id, "duplicate_id", "an earlier record has it"
                )
            seen.add(key)
        yield Record(record.source, record.line, item)


class Groups:
    """Listings that must stay on one side of a split: same group, or same title key in a category.

    A union-find over 64-bit hashes. A component is named by its smallest hash, so the result does not
    depend on the order of the records.
    """

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._items: Counter[int] = Counter()

    def add(self, listing: Listing) -> None:
        """Count the listing in, and join its group with those that share its title."""
        group = hash64("group", listing.group)
        self._items[group] += 1
        self._parent.setdefault(group, group)
        title = title_key(listing.title)
        if title:
            key = hash64("title", listing.category.casefold(), title)
            self._parent.setdefault(key, key)
            a, b = sorted((self._find(group), self._find(key)))
            self._parent[b] = a

    def root(self, listing: Listing) -> int:
        """The component of an added listing. Final only after all listings are added."""
        return self._find(hash64("group", listing.group))

    def sizes(self) -> Counter[int]:
        """Items per component."""
        sizes: Counter[int] = Counter()
        for group, items in self._items.items():
            sizes[self._find(group)] += items
        return sizes

    def _find(self, key: int) -> int:
        parent = self._parent
        while (above := parent[key]) != key:
            parent[key] = parent[above]  # path halving
            key = above
        return key


def split_counts(groups: Groups, rules: PlanRules) -> Counter[str]:
    """Items per split, before any image is opened."""
    counts: Counter[str] = Counter()
    for root, items in groups.sizes().items():
        counts[split_of(root, rules)] += items
    return counts
