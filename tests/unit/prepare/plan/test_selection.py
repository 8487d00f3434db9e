"""Selecting and splitting: pure, stable, and variants of one product never straddle a split."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.plan.selection import cap_text, hash64, split_of
from rating_train.prepare.records.sources import Record
from rating_train.shards.schema import Dropped, Listing
from tests.helpers.cli import fresh_python
from tests.helpers.listings import changed, listing
from tests.helpers.selection_reference import Groups, apply_rules, drop_duplicates, split_counts

BASE = listing("B1", "A title of some length", "d", "f", "Toys", "1.jpg", 4.0, 10, "B1")


def run(items: list[Listing | Dropped], rules: PlanRules | None = None) -> list[Listing | Dropped]:
    records = [Record("s", n, item) for n, item in enumerate(items, start=1)]
    out = list(drop_duplicates(apply_rules(records, rules or PlanRules())))
    assert [r.line for r in out] == list(range(1, len(items) + 1)), "every record comes out again, in order"
    return [r.item for r in out]


def reasons(items: list[Listing | Dropped]) -> list[str]:
    return [item.reason if isinstance(item, Dropped) else "" for item in items]


def test_rules() -> None:
    items: list[Listing | Dropped] = [
        BASE,
        changed(BASE, id="B2", rating_count=9),
        changed(BASE, id="B3", title=" ", description="", features="\n\t"),
        changed(BASE, id="B4", title="", description="", features="x"),
        Dropped("s", 5, "B5", "bad_json", ""),
    ]
    assert reasons(run(items)) == ["", "few_ratings", "empty_text", "", "bad_json"]


def test_the_first_of_an_id_wins_among_those_that_pass() -> None:
    items: list[Listing | Dropped] = [
        changed(BASE, rating_count=1),
        changed(BASE, title="first"),
        changed(BASE, title="second"),
    ]
    out = run(items)
    assert reasons(out) == ["few_ratings", "", "duplicate_id"]
    assert isinstance(out[1], Listing) and out[1].title == "first"


def test_texts_are_capped_in_characters() -> None:
    capped = cap_text(changed(BASE, title="é" * 9, main_category="c" * 9), 4)
    assert (capped.title, capped.category, capped.texts["description"]) == ("é" * 4, "c" * 4, "d")
    assert cap_text(BASE, 4000) is BASE


@pytest.mark.parametrize(
    ("change", "together"),
    [
        ({"group": "g"}, False),
        ({"group": "B1", "title": "Another thing altogether"}, True),
        ({"title": "A TITLE of some length (red)"}, True),
        ({"title": "A TITLE of some length (red)", "main_category": "Books"}, False),
        ({"title": "A title of some other length"}, False),
    ],
)
def test_who_stays_together(change: dict[str, Any], together: bool) -> None:
    first = (
        changed(BASE, title="A title of some length (blue)")
        if "title" in change
        else changed(BASE, title="x")
    )
    second = changed(BASE, **dict[str, Any]({"id": "B2", "group": "B2", "title": "y"}, **change))
    groups = Groups()
    for item in (first, second):
        groups.add(item)
    assert (groups.root(first) == groups.root(second)) is together


def test_groups_do_not_depend_on_the_order_and_join_in_chains() -> None:
    chain = [
        changed(BASE, id=f"B{i}", group=f"g{i // 2}", title=f"Quite a long title number {(i + 1) // 2}")
        for i in range(40)
    ]
    roots = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(chain, len(chain))
        groups = Groups()
        for item in shuffled:
            groups.add(item)
        roots.append({item.id: groups.root(item) for item in chain})
        assert list(groups.sizes().values()) == [40]
    assert roots[0] == roots[1] == roots[2]


def test_split_shares_seed_and_stability() -> None:
    roots = [hash64("group", str(i)) for i in range(20_000)]
    rules = PlanRules(val_fraction=0.1, test_fraction=0.05, split_seed="s")
    split = [split_of(r, rules) for r in roots]
    counts = Counter(split)
    assert counts["val"] == pytest.approx(2000, abs=150) and counts["test"] == pytest.approx(1000, abs=110)
    assert split != [split_of(r, replace(rules, split_seed="other")) for r in roots]
    without_test = [split_of(r, replace(rules, test_fraction=0.0)) for r in roots]
    assert [s == "val" for s in split] == [s == "val" for s in without_test], "a test split leaves val alone"
    assert {split_of(r, PlanRules(val_fraction=0.0)) for r in roots} == {"train"}


def test_hash_is_the_same_in_another_process_and_frames_its_parts() -> None:
    code = "from rating_train.prepare.plan.selection import hash64; print(hash64('a', 'bé'))"
    assert int(fresh_python(code)) == hash64("a", "bé")
    assert hash64("ab", "c") != hash64("a", "bc")


def test_split_counts_add_up() -> None:
    groups = Groups()
    for i in range(500):
        groups.add(changed(BASE, id=f"B{i}", group=f"g{i // 5}", title=""))
    counts = split_counts(groups, PlanRules(val_fraction=0.2, test_fraction=0.2))
    assert sum(counts.values()) == 500 and all(n % 5 == 0 for n in counts.values()) and len(counts) == 3
