"""The out-of-core plan against the same rules in memory, on small catalogues full of ties, doubles and chains."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from rating_train.config.task import PAPER, Task
from rating_train.errors import UserError
from rating_train.files import read_json, read_json_lines
from rating_train.prepare.plan import planner, selection
from rating_train.prepare.plan.plan_dir import locked
from rating_train.prepare.plan.planner import PlanRules, make_plan
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.sources import read_source
from rating_train.shards.schema import Dropped, Listing
from tests.helpers import selection_reference

pytestmark = pytest.mark.timeout(60)

TITLES = [f"A title that is long enough, number {i}" for i in range(16)]
WINDOWED = PlanRules(top_per_category=6, bottom_per_category=4, val_items=15, test_items=7, part_items=16)


def record(chosen: random.Random, number: int) -> dict[str, Any]:
    """Few ids, titles, groups and counts, so that all of them meet."""
    title = (
        chosen.choice(TITLES) + chosen.choice(["", " (Red)", " [2 pack]"])
        if chosen.random() < 0.6
        else f"x{number}"
    )
    made = {
        "parent_asin": f"B{chosen.randrange(250):04d}",
        "title": title,
        "description": [],
        "features": ["tab\there", 'a "quote"', "back\\slash"],
        "main_category": chosen.choice(["Toys", 'Books "q"', "É\x00A", None, "toys"]),
        "average_rating": chosen.choice([1.0, 3.3, 4.7, 5, 7]),
        "rating_number": chosen.choice([3, 10, 10, 10, 11, 50, 2**40]),
        "images": [{"variant": "MAIN", "large": f"http://x/{number}.jpg"}] if chosen.random() < 0.8 else [],
    }
    return {**made, "group_id": f"g{chosen.randrange(45)}"} if chosen.random() < 0.4 else made


def write(folder: Path, seed: int, files: int = 3, rows: int = 70) -> list[str]:
    chosen, paths = random.Random(seed), []
    for index in range(files):
        lines = [json.dumps(record(chosen, index * rows + n)) for n in range(rows)]
        lines.insert(chosen.randrange(rows), "{ broken")
        lines.insert(chosen.randrange(rows), "")
        paths.append(str(folder / f"s{index}.jsonl.gz"))
        Path(paths[-1]).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return paths


def naive(
    sources: list[str], rules: PlanRules
) -> tuple[dict[tuple[str, int], tuple[Listing, int, str]], Counter[str]]:
    """{(source, line): (listing, root, split)} of what is taken, and the dropped by reason: everything in memory."""
    read = itertools.islice((r for path in sources for r in read_source(path)), rules.limit)
    records = list(selection_reference.drop_duplicates(selection_reference.apply_rules(read, rules)))
    dropped = Counter(r.item.reason for r in records if isinstance(r.item, Dropped))
    items = {(r.source, r.line): r.item for r in records if isinstance(r.item, Listing)}
    groups = selection_reference.Groups()
    for item in items.values():
        groups.add(item)
    taken = set(items)
    if rules.top_per_category or rules.bottom_per_category:
        taken = set()
        for category in {item.category for item in items.values()}:
            order = sorted(
                (at for at in items if items[at].category == category),
                key=lambda at: (-items[at].rating_count, selection.hash64("id", items[at].id)),
            )
            taken |= set(order[: rules.top_per_category])
            taken |= set(order[max(0, len(order) - rules.bottom_per_category) :])
    sizes = Counter(groups.root(items[at]) for at in taken)
    split = naive_split(sizes, rules)
    dropped["not_selected"] = len(items) - len(taken)
    result = {
        at: (items[at], groups.root(items[at]), split[groups.root(items[at])]) for at in items if at in taken
    }
    return result, +dropped


def naive_split(sizes: Counter[int], rules: PlanRules) -> dict[int, str]:
    if rules.val_items is None:
        return {root: selection.split_of(root, rules) for root in sizes}
    split, left = (
        dict.fromkeys(sizes, "train"),
        sorted(sizes, key=lambda r: selection.split_hash(r, rules.split_seed)),
    )
    for name, size in (("val", rules.val_items), ("test", rules.test_items)):
        while left and sizes[left[0]] <= size:
            size -= sizes[left[0]]
            split[left.pop(0)] = name
    return split


def lines_of(plan_dir: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(plan_dir.glob("part_*.jsonl")) for line in read_json_lines(path)]


def contents(plan_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(plan_dir.iterdir())}


def table(plan_dir: Path) -> list[tuple[Any, ...]]:
    return duckdb.sql(f"SELECT * FROM '{plan_dir}/selection.parquet'").fetchall()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "rules",
    [
        WINDOWED,
        PlanRules(min_rating_count=0, val_fraction=0.2, test_fraction=0.1, max_text_chars=30, split_seed="é"),
        replace(
            WINDOWED,
            val_items=None,
            test_items=0,
            val_fraction=0.3,
            bottom_per_category=0,
            require_image=True,
            limit=150,
        ),
    ],
)
def test_equal_to_the_rules_in_memory(tmp_path: Path, seed: int, rules: PlanRules) -> None:
    sources = write(tmp_path, seed)
    plan = make_plan(sources, tmp_path / "plan", rules)
    expected, dropped = naive(sources, rules)
    lines = lines_of(tmp_path / "plan")
    assert [(line["source"], line["line"]) for line in lines] == list(expected), "what, and in which order"
    for line, (listing, _, split) in zip(lines, expected.values()):
        assert {k: line.get(k, ()) for k in asdict(listing)} == asdict(listing) and line["split"] == split
    assert plan["dropped"] == dict(sorted(dropped.items()))
    assert plan["kept"] == len(lines) == plan["read"] - sum(dropped.values())
    assert plan["read"] == sum(s["rows"] for s in plan["sources"])
    assert plan["items"] == dict(Counter(line["split"] for line in lines))
    roots = Counter(root for _, root, _ in expected.values())
    assert plan["groups"] == {"count": len(roots), "largest": max(roots.values())}
    assert [p["items"] for p in plan["parts"]][:-1] == [rules.part_items] * (len(plan["parts"]) - 1)
    selection = table(tmp_path / "plan")
    assert [(row[0], row[5], row[6]) for row in selection] == [
        (listing.id, f"{root:016x}", split) for listing, root, split in expected.values()
    ]
    sides: dict[str, set[str]] = {}
    for row in selection:
        sides.setdefault(row[5], set()).add(row[6])
    assert all(len(side) == 1 for side in sides.values()), "no group is on two sides"
    assert {"work", "plan.json"} & {p.name for p in (tmp_path / "plan").iterdir()} == {"plan.json"}


def test_the_cases_do_meet(tmp_path: Path) -> None:
    _, dropped = naive(sources := write(tmp_path, 0), WINDOWED)
    assert set(dropped) == {"bad_json", "bad_rating", "few_ratings", "duplicate_id", "not_selected"}
    expected, _ = naive(sources, replace(WINDOWED, top_per_category=0, bottom_per_category=0))
    assert max(Counter(root for _, root, _ in expected.values()).values()) > 5


def test_a_long_chain_is_one_group(tmp_path: Path) -> None:
    order = random.Random(5).sample(range(300), 300)
    lines = [
        {
            "parent_asin": f"B{i}",
            "group_id": f"g{i // 2}",
            "title": f"Quite a long title number {(i + 1) // 2}",
            "average_rating": 4,
            "rating_number": 10,
        }
        for i in order
    ]
    source = tmp_path / "s.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    rounds = []
    rules = PlanRules(val_items=100)
    plan = make_plan([str(source)], tmp_path / "plan", rules, lambda *a: rounds.append(a))
    assert plan["groups"] == {"count": 1, "largest": 300}
    assert plan["items"] == {"train": 300}, "a group larger than the validation split does not enter it"
    assert ("parts", 300, 300) in rounds and ("scan", 300, None) in rounds


def test_selection_summary_and_quarantine(tmp_path: Path) -> None:
    sources = write(tmp_path, 1)
    plan = make_plan(sources, tmp_path / "plan", WINDOWED)
    relation = duckdb.sql(f"SELECT * FROM '{tmp_path}/plan/selection.parquet'")
    assert relation.columns == ["id", "category", "rating", "rating_count", "image", "group", "split"]
    assert [str(t) for t in relation.types] == ["VARCHAR", "VARCHAR", "DOUBLE", "BIGINT", *["VARCHAR"] * 3]
    categories = read_json(tmp_path / "plan" / "summary.json")["categories"]
    names = [c["category"] for c in categories]
    assert names == [None, "", 'Books "q"', "Toys", "toys", "É A"], "None: lost before the category was read"
    for entry in categories:
        assert entry["selected"] == entry["train"] + entry["val"] + entry["test"] <= 10
        assert entry["rows"] == entry["selected"] + sum(entry["dropped"].values())
    assert sum(c["rows"] for c in categories) == plan["read"]
    for split in ("train", "val", "test"):
        assert sum(c[split] for c in categories) == plan["items"][split]
    quarantine = list(read_json_lines(tmp_path / "plan" / "quarantine.jsonl"))
    at = [(sources.index(q["source"]), q["line"]) for q in quarantine]
    assert at == sorted(at), "in the order of the sources"
    counts = dict(Counter(q["reason"] for q in quarantine))
    assert counts == {k: v for k, v in plan["dropped"].items() if k != "not_selected"}
    broken = [q for q in quarantine if q["reason"] == "bad_json"]
    assert len(broken) == 3 and all("line" in q and q["detail"] for q in broken)


def test_the_same_bytes_whatever_the_workers_and_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write(tmp_path, 2)
    one = make_plan(sources, tmp_path / "one", WINDOWED)
    two = make_plan(sources, tmp_path / "two", replace(WINDOWED, memory_mb=256), workers=2)
    monkeypatch.setattr(planner, "BLOCK_LINES", 7)
    three = make_plan(sources, tmp_path / "three", WINDOWED)
    assert one == two == three
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_more_rows_leave_the_split_by_share_as_it_was(tmp_path: Path) -> None:
    """Unless a new listing joins two groups, which then have one name: here the new ones have titles of their own."""
    sources = write(tmp_path, 3)
    more = tmp_path / "more.jsonl"
    more.write_text(
        "\n".join(
            json.dumps({"parent_asin": f"N{i}", "title": f"n{i}", "average_rating": 4, "rating_number": 99})
            for i in range(300)
        ),
        "utf-8",
    )
    for name, rules in {"share": PlanRules(val_fraction=0.3), "size": PlanRules(val_items=25)}.items():
        make_plan(sources, tmp_path / name, rules)
        make_plan([*sources, str(more)], tmp_path / f"{name}_more", rules)
        before = {row[0]: row[6] for row in table(tmp_path / name)}
        after = {row[0]: row[6] for row in table(tmp_path / f"{name}_more")}
        assert len(after) == len(before) + 300
        if name == "share":
            assert before == {item: after[item] for item in before}
        else:  # of a fixed size: some leave validation, none of the old training items enters it
            assert not [i for i in before if before[i] == "train" and after[i] == "val"]
            assert [i for i in before if before[i] == "val" and after[i] == "train"]


def test_a_finished_plan_is_reused_and_an_unfinished_one_redone(tmp_path: Path) -> None:
    sources, out = write(tmp_path, 0), tmp_path / "plan"
    plan = make_plan(sources, out, WINDOWED)
    first = contents(out)
    (out / "part_00000.jsonl").write_text("touched", "utf-8")
    assert make_plan(sources, out, replace(WINDOWED, memory_mb=1024), workers=2) == plan, (
        "it is not made again"
    )
    assert (out / "part_00000.jsonl").read_text("utf-8") == "touched"
    with pytest.raises(UserError, match="differs in its rules"):
        make_plan(sources, out, replace(WINDOWED, val_items=16))
    with pytest.raises(UserError, match="differs in its sources"):
        make_plan(sources[:2], out, WINDOWED)
    (out / "plan.json").unlink()
    (out / "part_00099.jsonl").write_text("left over", "utf-8")
    (out / "work").mkdir()
    assert make_plan(sources, out, WINDOWED) == plan
    assert contents(out) == first


def test_a_source_that_changes_is_an_error(tmp_path: Path) -> None:
    sources = write(tmp_path, 0)

    def change(phase: str, done: int, total: int | None) -> None:
        if phase == "select" and done:
            Path(sources[0]).write_bytes(gzip.compress(b"{}\n"))

    with pytest.raises(UserError, match="changed while it was read"):
        make_plan(sources, tmp_path / "plan", WINDOWED, change)
    assert not (tmp_path / "plan" / "plan.json").exists()


def test_one_at_a_time_in_a_directory(tmp_path: Path) -> None:
    with locked(tmp_path / "plan"), pytest.raises(UserError, match="another process"):
        make_plan(write(tmp_path, 0), tmp_path / "plan", WINDOWED)


def test_nothing_to_take(tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text("{ broken\n", "utf-8")
    plan = make_plan([str(source)], tmp_path / "plan", WINDOWED)
    assert (plan["kept"], plan["dropped"], plan["parts"], plan["items"]) == (0, {"bad_json": 1}, [], {})
    assert table(tmp_path / "plan") == []


def test_impossible_rules_are_named_together(tmp_path: Path) -> None:
    rules = PlanRules(top_per_category=-1, part_items=0, val_fraction=0.9, test_fraction=0.2, memory_mb=1)
    with pytest.raises(UserError) as error:
        make_plan([], tmp_path / "plan", rules, workers=0)
    for word in (
        "`top_per_category` is -1",
        "`part_items` is 0",
        "nothing to train on",
        "`memory_mb` is 1",
        "no source",
        "workers 0",
    ):
        assert word in str(error.value)
    with pytest.raises(UserError, match="source file not found"):
        make_plan([str(tmp_path / "s.jsonl")], tmp_path / "plan", WINDOWED)


def stratum(row: tuple[Any, ...]) -> tuple[str, int]:
    """(category, half star) of a row of the selection."""
    return row[1], int(2 * row[2])


@pytest.mark.parametrize("rules", [PlanRules(val_fraction=0.2), WINDOWED])
def test_a_sample_is_nested_stratified_and_leaves_validation_alone(tmp_path: Path, rules: PlanRules) -> None:
    sources = write(tmp_path, seed=5, files=4, rows=150)
    make_plan(sources, tmp_path / "all", rules)
    everything = table(tmp_path / "all")
    train = [row for row in everything if row[-1] == "train"]
    others = [row for row in everything if row[-1] != "train"]
    sizes = Counter(stratum(row) for row in train)
    assert len(train) > 20 and len(sizes) > 6 and others
    within: set[tuple[Any, ...]] = set()
    for sample in (1, 7, len(train) // 2, len(train) - 1, len(train), len(train) + 9):
        plan = make_plan(sources, tmp_path / f"{sample}", replace(rules, sample=sample))
        rows = table(tmp_path / f"{sample}")
        assert [row for row in rows if row[-1] != "train"] == others
        kept = [row for row in rows if row[-1] == "train"]
        share = len(kept) / len(train)
        assert len(kept) == min(sample, len(train)) and within <= set(kept) <= set(train)
        assert kept == sorted(kept, key=train.index), "in the order of the sources"
        counts = Counter(stratum(row) for row in kept)
        assert all(abs(counts[name] - size * share) <= 1 for name, size in sizes.items())
        assert plan["kept"] == len(rows) and plan["kept"] + sum(plan["dropped"].values()) == plan["read"]
        assert plan["groups"]["count"] == len({row[-2] for row in rows})
        within = set(kept)
    make_plan(sources, tmp_path / "again", replace(rules, sample=7, memory_mb=300), workers=2)
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "7").keys()
    differing = {n for n, b in contents(tmp_path / "7").items() if contents(tmp_path / "again")[n] != b}
    assert differing <= {"plan.json"}


@dataclass(frozen=True)
class Predicting(PlanRules):
    """Rules that keep records without a target, of any task."""

    task: Task = PAPER

    @property
    def reading(self) -> Reading:
        return Reading(task=self.task, unrated="predict")


def write_partly_rated(folder: Path, rated: int, unrated: int) -> list[str]:
    """Items of their own groups; those without a rating come first."""
    lines: list[dict[str, Any]] = [{"parent_asin": f"B{n}", "title": f"x{n}"} for n in range(rated + unrated)]
    for n, line in enumerate(lines[unrated:]):
        line.update(average_rating=1 + n % 5, rating_number=10 + n)
    path = folder / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return [str(path)]


def test_items_to_predict_count_neither_for_validation_nor_for_the_window(tmp_path: Path) -> None:
    sources = write_partly_rated(tmp_path, rated=40, unrated=160)
    plan = make_plan(sources, tmp_path / "sized", Predicting(val_items=12, test_items=6))
    assert plan["items"] == {"train": 22, "val": 12, "test": 6, "predict": 160}
    assert plan["groups"] == {"count": 200, "largest": 1} and plan["dropped"] == {}
    rules = Predicting(bottom_per_category=10, top_per_category=5, val_items=3)
    plan = make_plan(sources, tmp_path / "windowed", rules)
    assert plan["items"] == {"train": 12, "val": 3, "predict": 160}
    assert plan["dropped"] == {"not_selected": 25}
    counts = sorted(row[3] for row in table(tmp_path / "windowed") if row[-1] != "predict")
    assert counts == [*range(10, 20), *range(45, 50)]
    plan = make_plan(sources, tmp_path / "sampled", Predicting(val_items=12, sample=8))
    assert plan["items"] == {"train": 8, "val": 12, "predict": 160}


def test_an_item_to_predict_is_so_in_a_group_of_validation_too(tmp_path: Path) -> None:
    """It stays in its group, and what is rated there is what counts."""
    source = tmp_path / "s.jsonl"
    lines = [{"parent_asin": f"B{n}", "title": f"x{n}", "group_id": f"g{n // 4}"} for n in range(40)]
    rated = [{**line, "average_rating": 4, "rating_number": 10} for line in lines[::2]]
    source.write_text("\n".join(map(json.dumps, [*lines[1::2], *rated])), "utf-8")
    plan = make_plan([str(source)], tmp_path / "plan", Predicting(val_items=6))
    assert plan["items"] == {"train": 14, "val": 6, "predict": 20}
    assert plan["groups"] == {"count": 10, "largest": 4}


def test_a_sample_of_targets_beyond_integers_of_32_bits(tmp_path: Path) -> None:
    task = replace(PAPER, target=replace(PAPER.target, lower=None, upper=None))
    source = tmp_path / "s.jsonl"
    prices = [1.5e9 + n for n in range(30)] + [-1e30, 1e30]
    lines = [
        {"parent_asin": f"B{n}", "title": f"x{n}", "average_rating": price, "rating_number": 10}
        for n, price in enumerate(prices)
    ]
    source.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    rules = Predicting(task=task, val_items=0, sample=10)
    assert make_plan([str(source)], tmp_path / "plan", rules)["items"] == {"train": 10}
