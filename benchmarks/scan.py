"""Cost of planning a catalogue: rows per second, peak memory, and the ratio to plain gzip and JSON parsing.

    python benchmarks/scan.py --rows 200000 [--workers 2] [--folder DIR]

Makes a metadata set in the schema of Amazon Reviews 2023 (one gzip file per category, about 1 KB per record, the same
bytes for the same number of rows), plans it in a process of its own, and parses the same files plainly in another.
One record in three has too few ratings; one title in eight is a variant of another one's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rating_train.prepare.plan.planner import PlanRules, make_plan

CATEGORIES = (
    "All Beauty;Books;Cell Phones & Accessories;Clothing, Shoes & Jewelry;Electronics;Home & Kitchen;"
    "Sports & Outdoors;Toys & Games"
).split(";")
WORDS = [
    f"{a}{b}{c}"
    for a in ("ka", "mo", "ri", "tel", "su")
    for b in ("n", "br", "st", "l")
    for c in ("a", "ed", "ing", "or")
]


def make_set(folder: Path, rows: int) -> list[str]:
    """Write ``rows`` records in one file per category; the files, reused if they are there."""
    files = []
    for index, category in enumerate(CATEGORIES):
        share = rows // len(CATEGORIES) + (index < rows % len(CATEGORIES))
        path = folder / f"meta_{index}_{rows}.jsonl.gz"
        files.append(str(path))
        if path.exists():
            continue
        part = path.with_suffix(".part")
        chosen = random.Random(f"{rows}-{index}")
        with open(part, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as out:
            for row in range(share):
                out.write(json.dumps(record(chosen, index, category, row)).encode() + b"\n")
        part.rename(path)
    return files


def record(chosen: random.Random, index: int, category: str, row: int) -> dict[str, Any]:
    """One record of the 2023 metadata schema, about 1 KB as JSON."""
    text = lambda words: " ".join(chosen.choices(WORDS, k=words))  # noqa: E731
    variant_of = row - 1 if row % 8 == 1 else row
    product = f"{category.split()[0]} {WORDS[variant_of % len(WORDS)]} product {variant_of}"
    url = f"https://m.media-amazon.com/images/I/{chosen.getrandbits(48):012x}"
    return {
        "main_category": category,
        "title": f"{product} ({chosen.choice(WORDS)}, {row % 90} pieces)",
        "average_rating": round(chosen.uniform(1, 5), 1),
        "rating_number": int(chosen.lognormvariate(3, 1.7)),
        "features": [text(8) for _ in range(4)],
        "description": [text(40)],
        "price": round(chosen.uniform(1, 200), 2),
        "images": [
            {"thumb": f"{url}_t.jpg", "large": f"{url}_l.jpg", "variant": "MAIN", "hi_res": f"{url}_h.jpg"},
            {"thumb": f"{url}a_t.jpg", "large": f"{url}a_l.jpg", "variant": "PT01", "hi_res": None},
        ],
        "videos": [],
        "store": text(2),
        "categories": [category, text(1), text(2)],
        "details": {"Brand": text(1), "Item Weight": f"{row % 70} ounces"},
        "parent_asin": f"B{index}{row - (row % 1000 == 999):08d}",
        "bought_together": None,
    }


def parse_plainly(files: list[str]) -> dict[str, Any]:
    """The least that any reader does: unpack, split into lines, parse each."""
    rows = 0
    for path in files:
        with gzip.open(path, "rb") as stream:
            for line in stream:
                json.loads(line)
                rows += 1
    return {"read": rows}


def plan(files: list[str], out: str, rules: PlanRules, workers: int) -> dict[str, Any]:
    """``make_plan``, with the seconds at which each phase was first and last heard of."""
    began = time.perf_counter()
    seen: dict[str, list[float]] = {}
    made = make_plan(
        files,
        out,
        rules,
        lambda phase, *_: seen.setdefault(phase, []).append(time.perf_counter() - began),
        workers,
    )
    phases = {"scan": seen["scan"][-1], "select": seen["select"][-1] - seen["scan"][-1]}
    phases["write"] = time.perf_counter() - began - seen["select"][-1]
    return {**{k: made[k] for k in ("read", "kept", "dropped", "items", "groups")}, "phases_s": phases}


def _child(send: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    began = time.perf_counter()
    result = work(*arguments)
    seconds = time.perf_counter() - began
    peak = {
        who: resource.getrusage(which).ru_maxrss / 1024
        for who, which in (("self", resource.RUSAGE_SELF), ("workers", resource.RUSAGE_CHILDREN))
    }
    # CPU time too: other work on the machine stretches the clock, and hardly this.
    cpu = sum(
        sum(resource.getrusage(which)[:2]) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    send.send({**result, "seconds": seconds, "cpu_s": cpu, "peak_mib": peak})


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process; its result, seconds and peak resident memory in MiB (its own, and its workers')."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, work, arguments))
    child.start()
    send.close()
    result: dict[str, Any] = receive.recv()
    child.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory-mb", type=int, default=PlanRules().memory_mb)
    parser.add_argument("--folder", help="keep the set and the plan here, and reuse the set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_set(folder, options.rows)
        packed = sum(Path(f).stat().st_size for f in files)
        print(f"{options.rows:,} rows in {len(files)} files, {packed / 2**20:,.0f} MiB packed", flush=True)
        end = options.rows // 40  # of each category's eighth a fifth at each end
        rules = PlanRules(
            top_per_category=end,
            bottom_per_category=end,
            val_items=min(10_000, options.rows // 20),
            memory_mb=options.memory_mb,
        )
        out = tempfile.mkdtemp(prefix="plan_", dir=folder)
        planned = in_a_process(plan, files, out, rules, options.workers)
        plain = in_a_process(parse_plainly, files)
    print(json.dumps(planned, indent=2))
    rate, plain_rate = (options.rows / r["seconds"] for r in (planned, plain))
    print(f"plan: {rate:,.0f} rows/s in {planned['seconds']:.1f} s, {options.workers} workers")
    own, worker = planned["peak_mib"]["self"], planned["peak_mib"]["workers"]
    together = own + (options.workers * worker if options.workers > 1 else 0)
    print(f"peak: {own:.0f} MiB, largest worker {worker:.0f} MiB; at most {together:.0f} MiB together")
    print(
        f"plain gzip + json: {plain_rate:,.0f} rows/s in {plain['seconds']:.1f} s, {plain['peak_mib']['self']:.0f} MiB"
    )
    ratio, cpu_ratio = (planned[key] / plain[key] for key in ("seconds", "cpu_s"))
    print(
        f"ratio of the times: {ratio:.2f}; of the CPU times ({plain['cpu_s']:.1f} s plain): {cpu_ratio:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
