"""From catalogues of any size to a plan: which listings are taken, in which split, in which order. Out of core.

``make_plan`` reads the sources twice and keeps nothing in Python's memory that grows with the rows. Pass 1 writes one
compact line per record; DuckDB (bounded memory, spilling to the plan's folder) finds duplicates, product groups, the
window of each category and the split; pass 2 writes the taken listings in source order::

    PLAN/part_00000.jsonl ...  the taken listings: the fields of ``Listing`` and split, source, line
    PLAN/selection.parquet     id, category, rating, rating_count, image, group, split; in source order
    PLAN/summary.json          per category: rows, dropped by reason, selected, and items per split
    PLAN/quarantine.jsonl      every dropped record with its reason, in source order
    PLAN/plan.json             written last: a directory without it is not a plan

The SQL is in ``prepare/plan/plan_sql.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rating_train.errors import UserError, one_error
from rating_train.files import atomic_write_json, fsync_path, sha256_json
from rating_train.prepare.full_disk import disk_full, is_full
from rating_train.prepare.plan import passes, plan_sql, selection
from rating_train.prepare.plan.passes import LINE_BITS, OnProgress, Scanned
from rating_train.prepare.plan.plan_dir import (
    PLAN_NAME,
    PLAN_VERSION,
    SELECTION_NAME,
    SUMMARY_NAME,
    WORK_NAME,
    changed,
    finished,
    locked,
    part_name,
    stamp,
    start_over,
)
from rating_train.prepare.plan.rules import MIB_PER_THREAD, PlanRules
from rating_train.prepare.records.sources import source_kind
from rating_train.shards.schema import QUARANTINE_NAME, SPLITS

__all__ = ["OnProgress", "PlanRules", "make_plan"]

logger = logging.getLogger(__name__)

BLOCK_LINES = 50_000  # source lines whose wanted rows are fetched at once: bounds the memory of pass 2


def make_plan(
    sources: Sequence[str],
    plan_dir: str | Path,
    rules: PlanRules,
    on_progress: OnProgress = lambda phase, done, total: None,
    workers: int = 1,
) -> dict[str, Any]:
    """Make the plan, or take the finished one of the same sources and rules.

    Args:
        sources: catalogue files, in this order.
        plan_dir: the folder to make.
        rules: what to take, and how to split it.
        on_progress: called as :data:`OnProgress` says.
        workers: processes that read sources, one per file, and threads of DuckDB. The files do not depend on it.

    Returns:
        The content of ``plan.json``. Its ``kept`` and all of ``dropped`` add up to ``read``.

    Raises:
        UserError: impossible rules, unreadable or changing sources, a plan of something else at ``plan_dir``, another
            process at work there, too little memory or disk space.
    """
    problems = rules.problems()
    problems += [] if sources else ["no source is given"]
    problems += [] if len(set(sources)) == len(sources) else ["a source is given twice"]
    problems += [] if workers >= 1 else [f"workers {workers} is not positive"]
    if problems:
        raise one_error(problems, where="plan rules")
    folder = Path(plan_dir)
    with locked(folder):
        before = [stamp(path) for path in sources if source_kind(path)]
        existing = finished(folder, before, rules)
        if existing is not None:
            return existing
        with _work_folder(folder) as work:
            scanned = passes.scan_sources(sources, rules, work, on_progress, workers)
            with _database(work, rules, workers) as db:
                plan = _select(db, rules, work, sum(s.rows for s in scanned), on_progress)
                _write_selection(db, folder, sources, scanned)
                plan["parts"] = _write_parts(db, folder, sources, scanned, rules, plan["kept"], on_progress)
        if [stamp(path) for path in sources] != before:
            raise changed(", ".join(sources))
        entries = [{**entry, "rows": s.rows} for entry, s in zip(before, scanned)]
        plan = {"version": PLAN_VERSION, "sources": entries, "rules": rules.recorded(), **plan}
        # A copy of the same sources has another time of change but is the same data.
        plan["fingerprint"] = sha256_json(
            {**plan, "sources": [{k: v for k, v in e.items() if k != "mtime_ns"} for e in entries]}
        )
        atomic_write_json(folder / PLAN_NAME, plan)
        return plan


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Make the plan's work folder and remove it at the end, also after a failure: the next attempt cannot use it.

    Raises:
        UserError: a full disk or too little memory, reported by DuckDB or the file system.
    """
    import duckdb  # late: reading sources and showing help do not need it

    free = shutil.disk_usage(folder).free
    try:
        work = start_over(folder)
        yield work
    except (duckdb.Error, OSError) as e:
        if is_full(e):
            needed = f"more than the {free / 2**20:.1f} MiB that were free at the start"
            raise disk_full(
                folder, needed, "run the same command again: it makes the plan from the start"
            ) from e
        if not isinstance(e, duckdb.OutOfMemoryException | duckdb.IOException):
            raise
        said = str(e).partition("\n")[0]
        raise UserError(
            f"the catalogue could not be sorted ({said})", where=folder, fix="raise --memory-mb"
        ) from e
    finally:
        shutil.rmtree(folder / WORK_NAME, ignore_errors=True)


# --- DuckDB ---------------------------------------------------------------------------------------------


@contextmanager
def _database(work: Path, rules: PlanRules, workers: int) -> Iterator[Any]:
    """Open a database in a file, so that unused blocks leave the memory, with the split functions of ``select``."""
    import duckdb

    config: dict[str, Any] = {
        "memory_limit": f"{rules.memory_mb}MiB",
        "temp_directory": str(work / "spill"),
        "threads": max(1, min(workers, rules.memory_mb // MIB_PER_THREAD)),
        "preserve_insertion_order": False,  # costs memory; every query whose order matters has ORDER BY
    }
    db = duckdb.connect(str(work / "scan.duckdb"), config=config)
    functions: dict[str, tuple[Callable[[int], object], str]] = {
        "split_hash": (lambda root: selection.split_hash(root, rules.split_seed), "UBIGINT"),
        "split_of": (lambda root: selection.split_of(root, rules), "VARCHAR"),
    }
    try:
        for name, (function, result) in functions.items():
            db.create_function(name, function, ["UBIGINT"], result)
        yield db
    finally:
        for name in functions:  # otherwise the interpreter reports leaks at exit
            db.remove_function(name)
        db.close()


def _select(db: Any, rules: PlanRules, work: Path, read: int, on_progress: OnProgress) -> dict[str, Any]:
    """Fill ``dups``, ``chosen`` and ``picked`` from the compact rows; return the counts for the plan."""
    files = [str(path) for path in sorted(work.glob("rows_*.tsv"))]
    windowed = rules.top_per_category or rules.bottom_per_category
    window = plan_sql.WINDOW.format(top=rules.top_per_category, bottom=rules.bottom_per_category)
    on_progress("select", 0, read)
    count = "BIGINT" if rules.reading.task.counted else "DOUBLE"
    db.execute(plan_sql.ROWS.format(files=files, count=count))
    for file in files:
        os.unlink(file)
    db.execute(plan_sql.ITEMS)
    db.execute(plan_sql.LINKS)
    while True:
        db.execute(plan_sql.SPREAD)
        moved = _one(db, "SELECT count(*) FROM next JOIN label USING (g) WHERE next.l <> label.l")[0]
        db.execute("CREATE OR REPLACE TABLE label AS FROM next")
        if not moved:
            break
    db.execute(plan_sql.ROOTS)
    db.execute(window if windowed else plan_sql.ALL)
    db.execute(plan_sql.GROUPS)
    if rules.val_items is None:
        db.execute("CREATE TABLE sides AS SELECT root, split_of(root) AS split FROM groups")
    else:
        _split_by_size(db, rules.val_items, rules.test_items)
    db.execute(plan_sql.PICKED)
    if rules.sample:
        db.execute(plan_sql.SAMPLE.format(sample=rules.sample))
    splits = dict(db.execute("SELECT split, count(*) FROM picked GROUP BY split").fetchall())
    dropped = Counter(
        dict(
            db.execute(
                "SELECT reason, count(*) FROM rows WHERE reason IS NOT NULL GROUP BY reason"
            ).fetchall()
        )
    )
    kept = sum(splits.values())
    dropped["duplicate_id"] = _one(db, "SELECT count(*) FROM dups")[0]
    dropped["not_selected"] = _one(db, "SELECT count(*) FROM items")[0] - kept
    count, largest = _one(db, "SELECT count(*), coalesce(max(listings), 0) FROM groups")
    on_progress("select", read, read)
    return {
        "read": read,
        "kept": kept,
        "dropped": {reason: n for reason, n in sorted(dropped.items()) if n},
        "items": {name: splits[name] for name in SPLITS if name in splits},
        "groups": {"count": count, "largest": int(largest)},
    }


def _split_by_size(db: Any, val_items: int, test_items: int) -> None:
    """Fill ``sides`` with groups in the order of their hash; validation ends before the first that would exceed it."""
    db.execute("CREATE TABLE hashed AS SELECT root, items, split_hash(root) AS h FROM groups")
    # Each of these groups has at least one item, so more groups than this cannot be needed.
    bounded = [val_items + test_items + 2]
    cursor = db.execute("SELECT h, root, items FROM hashed WHERE items > 0 ORDER BY h, root LIMIT ?", bounded)
    groups = itertools.chain.from_iterable(iter(lambda: cursor.fetchmany(10_000), []))
    group, end, ends = next(groups, None), (-1, -1), []
    for size in (val_items, test_items):
        taken = 0
        while group is not None and taken + group[2] <= size:
            taken, end, group = taken + group[2], (group[0], group[1]), next(groups, None)
        if taken < size and group is not None:
            logger.info(
                "split by size: %d of %d items; the next product group has %d and would exceed it",
                taken,
                size,
                group[2],
            )
        ends.append(end)
    below = "(h::HUGEINT < {0} OR (h::HUGEINT = {0} AND root::HUGEINT <= {1}))"
    val, test = (below.format(*at) for at in ends)
    db.execute(
        f"CREATE TABLE sides AS SELECT root, CASE WHEN {val} THEN 'val' WHEN {test} THEN 'test' ELSE 'train' END "
        "AS split FROM hashed"
    )


def _one(db: Any, sql: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] = db.execute(sql).fetchone()
    return row


def _of_source(db: Any, columns: str, table: str, index: int, last_line: int) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of one source ordered by pos, in blocks of source lines: one block is in memory."""
    sql = f"SELECT {columns} FROM {table} WHERE pos >= ? AND pos < ? ORDER BY pos"
    for line in range(0, last_line + 1, BLOCK_LINES):
        start = index << LINE_BITS | line
        yield from db.execute(sql, [start, start + BLOCK_LINES]).fetchall()


# --- the plan's files ---------------------------------------------------------------------------------------


def _write_selection(db: Any, folder: Path, sources: Sequence[str], scanned: Sequence[Scanned]) -> None:
    """Write ``selection.parquet``, ``summary.json`` and ``quarantine.jsonl``."""
    categories: dict[str | None, dict[str, Any]] = {}
    for category, what, count in db.execute(plan_sql.SUMMARY).fetchall():
        entry = categories.setdefault(
            category,
            {"category": category, "rows": 0, "dropped": {}, "selected": 0, **dict.fromkeys(SPLITS, 0)},
        )
        entry["rows"] += count
        if what in SPLITS:
            entry[what] = count
            entry["selected"] += count
        else:
            entry["dropped"][what] = count
    atomic_write_json(folder / SUMMARY_NAME, {"categories": list(categories.values())})
    threads = _one(db, "SELECT current_setting('threads')")[0]
    db.execute("SET threads = 1")  # several threads cut other row groups: the bytes would differ
    file = str(folder / SELECTION_NAME).replace("'", "''")
    db.execute(plan_sql.SELECTION.format(file=f"'{file}'"))
    db.execute(f"SET threads = {threads}")
    db.execute("CREATE TABLE duplicates AS SELECT pos, id FROM rows SEMI JOIN dups USING (pos) ORDER BY pos")
    with open(folder / QUARANTINE_NAME, "w", encoding="utf-8", newline="\n") as out:
        for index, (path, seen) in enumerate(zip(sources, scanned)):
            twice = _of_source(db, "pos, id", "duplicates", index, seen.last_line)
            out.writelines(
                passes.quarantine_lines(folder / WORK_NAME / f"dropped_{index:05d}.jsonl", path, twice)
            )
    for name in (SELECTION_NAME, QUARANTINE_NAME):
        fsync_path(folder / name)


def _write_parts(
    db: Any,
    folder: Path,
    sources: Sequence[str],
    scanned: Sequence[Scanned],
    rules: PlanRules,
    total: int,
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    """Write ``part_NNNNN.jsonl`` of ``part_items`` listings each (the last may have fewer).

    Returns:
        Name, items and SHA-256 of each.
    """
    lines = itertools.chain.from_iterable(
        passes.selected(i, path, _of_source(db, "pos, id, split", "picked", i, seen.last_line), rules)
        for i, (path, seen) in enumerate(zip(sources, scanned))
    )
    parts: list[dict[str, Any]] = []
    for start in range(0, total, rules.part_items):
        path, digest, items = folder / f"{part_name(len(parts))}.jsonl", hashlib.sha256(), 0
        with open(path, "wb") as file:
            for line in itertools.islice(lines, rules.part_items):
                raw = line.encode("utf-8")
                file.write(raw)
                digest.update(raw)
                items += 1
        fsync_path(path)
        parts.append({"name": path.name, "items": items, "sha256": digest.hexdigest()})
        on_progress("parts", start + items, total)
    if sum(part["items"] for part in parts) != total or next(lines, None) is not None:
        raise RuntimeError(f"the parts do not contain the {total} listings of the selection")
    return parts
