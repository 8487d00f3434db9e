"""From catalogues of any size to a plan: which listings are taken, on which side, in which order. Out of core.

``make_plan`` reads the sources twice and holds no listing, and nothing else that grows with the rows, in Python:
pass 1 writes one compact line per record; DuckDB (bounded memory, spilling to the plan's folder) finds duplicates,
product groups, the per-category window and the split; pass 2 writes the taken listings in source order::

    PLAN/part_00000.jsonl ...  the taken listings: all fields of ``Listing`` and split, source, line
    PLAN/selection.parquet     id, category, rating, rating_count, image, group, split; in source order
    PLAN/summary.json          per category: rows, dropped by reason, selected, and items per split
    PLAN/quarantine.jsonl      every dropped record with its reason, in source order
    PLAN/plan.json             written last: a directory without it is not a plan

Legend of the columns: pos = source index * 2^40 + line; g, t = 64-bit hashes of the group and of (category, title
key), NULL where the title says too little; root = the smallest hash of a component, which names it.
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

from rating_train.catalogue import rows, select
from rating_train.catalogue.plan import (
    MIB_PER_THREAD,
    PART_PATTERN,
    PLAN_NAME,
    PLAN_VERSION,
    SELECTION_NAME,
    SUMMARY_NAME,
    WORK_NAME,
    PlanRules,
    alone,
    changed,
    finished,
    stamp,
    start_over,
)
from rating_train.catalogue.rows import LINE_BITS, OnProgress, Scanned
from rating_train.catalogue.sources import source_kind
from rating_train.data.schema import QUARANTINE_NAME, SPLITS
from rating_train.errors import UserError, one_error
from rating_train.files import atomic_write_json, fsync_path, sha256_json

__all__ = ["OnProgress", "PlanRules", "make_plan"]

logger = logging.getLogger(__name__)

BLOCK_LINES = 50_000  # source lines of which the wanted ones are fetched at once: bounds the memory of pass 2

_ROWS = """CREATE TABLE rows AS SELECT * FROM read_csv({files}, auto_detect=false, header=false, delim='\t', quote='',
    escape='', nullstr='\x01', new_line='\\n', buffer_size=8388608, max_line_size=1048576, columns={{
    'pos': 'UBIGINT', 'category': 'VARCHAR', 'reason': 'VARCHAR', 'id': 'VARCHAR', 'rating': 'DOUBLE',
    'rating_count': 'BIGINT', 'image': 'VARCHAR', 'id_hash': 'UBIGINT', 'g': 'UBIGINT', 't': 'UBIGINT'}})"""

# Every statement joins at most two large tables: several at once share the memory and fail instead of spilling.

# The first of an id by source order wins, among the records that keep the rules.
_ITEMS = """CREATE TABLE dups AS SELECT pos FROM rows JOIN (
    SELECT id_hash, min(pos) AS first FROM rows WHERE reason IS NULL GROUP BY id_hash HAVING count(*) > 1
    ) USING (id_hash) WHERE reason IS NULL AND pos <> first;
CREATE TABLE categories AS SELECT category, row_number() OVER (ORDER BY category) AS c FROM (
    SELECT DISTINCT category FROM rows WHERE reason IS NULL);
CREATE TABLE items AS SELECT pos, c, rating_count, id_hash, g, t
    FROM rows JOIN categories USING (category) ANTI JOIN dups USING (pos) WHERE reason IS NULL;"""

# Only titles that several groups share can join groups; min(g) <> max(g) says so without counting distinct ones.
_LINKS = """CREATE TABLE shared AS SELECT t FROM items WHERE t IS NOT NULL GROUP BY t HAVING min(g) <> max(g);
CREATE TABLE edges AS SELECT DISTINCT g, t FROM items SEMI JOIN shared USING (t);
CREATE TABLE label AS SELECT DISTINCT g, g AS l FROM edges;"""

# Every group takes the smallest label that shares a title with it, then that label's own label (pointer jumping:
# a chain of n groups needs about log n rounds instead of n).
_SPREAD = """CREATE OR REPLACE TABLE by_title AS SELECT t, min(l) AS l FROM edges JOIN label USING (g) GROUP BY t;
CREATE OR REPLACE TABLE near AS SELECT g, min(l) AS l FROM edges JOIN by_title USING (t) GROUP BY g;
CREATE OR REPLACE TABLE next AS SELECT near.g AS g, least(near.l, coalesce(far.l, near.l)) AS l
    FROM near LEFT JOIN near AS far ON far.g = near.l;"""

_ROOTS = """CREATE TABLE base AS SELECT g, min(least(g, coalesce(t, g))) AS root FROM items GROUP BY g;
CREATE TABLE linked AS SELECT l, min(root) AS root FROM label JOIN base USING (g) GROUP BY l;
CREATE TABLE joined AS SELECT g, root FROM label JOIN linked USING (l);
CREATE TABLE roots AS SELECT base.g AS g, coalesce(joined.root, base.root) AS root
    FROM base LEFT JOIN joined USING (g);"""

# One total order per category, so that its two ends never hold the same listing and ties fall the same way always.
_WINDOW = """CREATE TABLE chosen AS SELECT pos, g FROM (
    SELECT pos, g, c, row_number() OVER (PARTITION BY c ORDER BY rating_count DESC, id_hash) AS place FROM items
    ) JOIN (SELECT c, count(*) AS n FROM items GROUP BY c) USING (c) WHERE place <= {top} OR place > n - {bottom}"""

_GROUPS = """CREATE TABLE taken AS SELECT g, count(*) AS items FROM chosen GROUP BY g;
CREATE TABLE members AS SELECT g, root, items FROM taken JOIN roots USING (g);
CREATE TABLE groups AS SELECT root, sum(items)::BIGINT AS items FROM members GROUP BY root;"""

_PICKED = """CREATE TABLE member_sides AS SELECT g, root, split FROM members JOIN sides USING (root);
CREATE TABLE placed AS SELECT pos, root, split FROM chosen JOIN member_sides USING (g);
CREATE TABLE picked AS SELECT pos, id, category, rating, rating_count, image, root, split
    FROM rows JOIN placed USING (pos) ORDER BY pos;"""

_SELECTION = """COPY (SELECT id, category, rating, rating_count, image,
    lpad(lower(to_hex(root)), 16, '0') AS "group", split FROM picked ORDER BY pos)
    TO {file} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 20480)"""

_SUMMARY = """SELECT category, what, sum(n)::BIGINT FROM (
    SELECT category, reason AS what, count(*) AS n FROM rows WHERE reason IS NOT NULL GROUP BY ALL
    UNION ALL SELECT category, 'duplicate_id', count(*) FROM rows SEMI JOIN dups USING (pos) GROUP BY ALL
    UNION ALL SELECT category, 'not_selected', count(*) FROM items JOIN categories USING (c) GROUP BY ALL
    UNION ALL SELECT category, 'not_selected', -count(*) FROM picked GROUP BY ALL
    UNION ALL SELECT category, split, count(*) FROM picked GROUP BY ALL
    ) GROUP BY ALL HAVING sum(n) <> 0 ORDER BY category NULLS FIRST, what"""


def make_plan(
    sources: Sequence[str],
    plan_dir: str | Path,
    rules: PlanRules,
    on_progress: OnProgress = lambda phase, done, total: None,
    workers: int = 1,
) -> dict[str, Any]:
    """Make the plan, or give the finished one of the same sources and rules; the content of ``plan.json``.

    In it ``kept`` and the sum of ``dropped`` (which counts ``not_selected`` too) add up to ``read``. The files do not
    depend on ``workers`` (processes that read sources, one per file, and DuckDB's threads) or ``memory_mb``.

    Errors: :class:`UserError` for impossible rules, unreadable or changing sources, a plan of something else at
    ``plan_dir``, another process at work there, too little memory or disk.
    """
    import duckdb  # late: reading sources and showing help do not need it

    problems = rules.problems()
    problems += [] if sources else ["no source is given"]
    problems += [] if len(set(sources)) == len(sources) else ["a source is given twice"]
    problems += [] if workers >= 1 else [f"workers {workers} is not positive"]
    if problems:
        raise one_error(problems, where="plan rules")
    folder = Path(plan_dir)
    with alone(folder):
        before = [stamp(path) for path in sources if source_kind(path)]
        existing = finished(folder, before, rules)
        if existing is not None:
            return existing
        work = start_over(folder)
        scanned = rows.scan_sources(sources, rules, work, on_progress, workers)
        try:
            with _database(work, rules, workers) as db:
                plan = _select(db, rules, work, sum(s.rows for s in scanned), on_progress)
                _write_selection(db, folder, sources, scanned)
                plan["parts"] = _write_parts(db, folder, sources, scanned, rules, plan["kept"], on_progress)
        except (duckdb.OutOfMemoryException, duckdb.IOException) as e:
            said = str(e).partition("\n")[0]
            fix = "give more memory_mb, or more disk"
            raise UserError(f"the catalogue could not be sorted ({said})", where=work, fix=fix) from e
        if [stamp(path) for path in sources] != before:
            raise changed(", ".join(sources))
        entries = [{**entry, "rows": s.rows} for entry, s in zip(before, scanned)]
        plan = {"version": PLAN_VERSION, "sources": entries, "rules": rules.recorded(), **plan}
        # A copy of the same sources has another time of change, and is the same data.
        plan["fingerprint"] = sha256_json(
            {**plan, "sources": [{k: v for k, v in e.items() if k != "mtime_ns"} for e in entries]}
        )
        shutil.rmtree(work)
        atomic_write_json(folder / PLAN_NAME, plan)
        return plan


# --- DuckDB ---------------------------------------------------------------------------------------------


@contextmanager
def _database(work: Path, rules: PlanRules, workers: int) -> Iterator[Any]:
    """A database in a file (what is not in use leaves the memory), with the split functions of ``catalogue/select``."""
    import duckdb

    config: dict[str, Any] = {
        "memory_limit": f"{rules.memory_mb}MiB",
        "temp_directory": str(work / "spill"),
        "threads": max(1, min(workers, rules.memory_mb // MIB_PER_THREAD)),
        "preserve_insertion_order": False,  # needs memory; whatever must be in order says ORDER BY
    }
    db = duckdb.connect(str(work / "scan.duckdb"), config=config)
    fractions = select.Fractions(rules.val_fraction, rules.test_fraction)
    functions: dict[str, tuple[Callable[[int], object], str]] = {
        "split_hash": (lambda root: select.split_hash(root, rules.split_seed), "UBIGINT"),
        "split_of": (lambda root: select.split_of(root, fractions, rules.split_seed), "VARCHAR"),
    }
    try:
        for name, (function, result) in functions.items():
            db.create_function(name, function, ["UBIGINT"], result)
        yield db
    finally:
        for name in functions:  # or the interpreter complains of leaks when it ends
            db.remove_function(name)
        db.close()


def _select(db: Any, rules: PlanRules, work: Path, read: int, on_progress: OnProgress) -> dict[str, Any]:
    """Fill ``dups``, ``chosen`` and ``picked`` from the compact rows; the counts for the plan."""
    files = [str(path) for path in sorted(work.glob("rows_*.tsv"))]
    windowed = rules.top_per_category or rules.bottom_per_category
    window = _WINDOW.format(top=rules.top_per_category, bottom=rules.bottom_per_category)
    on_progress("select", 0, read)
    db.execute(_ROWS.format(files=files))
    for file in files:
        os.unlink(file)
    db.execute(_ITEMS)
    db.execute(_LINKS)
    while True:
        db.execute(_SPREAD)
        moved = _one(db, "SELECT count(*) FROM next JOIN label USING (g) WHERE next.l <> label.l")[0]
        db.execute("CREATE OR REPLACE TABLE label AS FROM next")
        if not moved:
            break
    db.execute(_ROOTS)
    db.execute(window if windowed else "CREATE VIEW chosen AS SELECT pos, g FROM items")
    db.execute(_GROUPS)
    if rules.val_items is None:
        db.execute("CREATE TABLE sides AS SELECT root, split_of(root) AS split FROM groups")
    else:
        _split_by_size(db, rules.val_items, rules.test_items)
    db.execute(_PICKED)
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
    count, largest = _one(db, "SELECT count(*), coalesce(max(items), 0) FROM groups")
    on_progress("select", read, read)
    return {
        "read": read,
        "kept": kept,
        "dropped": {reason: n for reason, n in sorted(dropped.items()) if n},
        "items": {name: splits[name] for name in SPLITS if name in splits},
        "groups": {"count": count, "largest": int(largest)},
    }


def _split_by_size(db: Any, val_items: int, test_items: int) -> None:
    """Fill ``sides``: the groups in the order of their hash; validation ends before the first that would exceed it."""
    db.execute("CREATE TABLE hashed AS SELECT root, items, split_hash(root) AS h FROM groups")
    # Every group has a listing at least, so no more of them can be needed.
    bounded = [val_items + test_items + 2]
    cursor = db.execute("SELECT h, root, items FROM hashed ORDER BY h, root LIMIT ?", bounded)
    groups = itertools.chain.from_iterable(iter(lambda: cursor.fetchmany(10_000), []))
    group, end, ends = next(groups, None), (-1, -1), []
    for size in (val_items, test_items):
        taken = 0
        while group is not None and taken + group[2] <= size:
            taken, end, group = taken + group[2], (group[0], group[1]), next(groups, None)
        if taken < size and group is not None:
            logger.info("%d of %d items: the next product group has %d", taken, size, group[2])
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
    """Rows of one source ordered by pos, fetched in blocks of source lines: the memory is that of one block."""
    sql = f"SELECT {columns} FROM {table} WHERE pos >= ? AND pos < ? ORDER BY pos"
    for line in range(0, last_line + 1, BLOCK_LINES):
        start = index << LINE_BITS | line
        yield from db.execute(sql, [start, start + BLOCK_LINES]).fetchall()


# --- what comes out ---------------------------------------------------------------------------------------


def _write_selection(db: Any, folder: Path, sources: Sequence[str], scanned: Sequence[Scanned]) -> None:
    """``selection.parquet``, ``summary.json`` and ``quarantine.jsonl``."""
    categories: dict[str | None, dict[str, Any]] = {}
    for category, what, count in db.execute(_SUMMARY).fetchall():
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
    db.execute("SET threads = 1")  # several write the same rows in other row groups: not the same bytes
    file = str(folder / SELECTION_NAME).replace("'", "''")
    db.execute(_SELECTION.format(file=f"'{file}'"))
    db.execute(f"SET threads = {threads}")
    db.execute("CREATE TABLE duplicates AS SELECT pos, id FROM rows SEMI JOIN dups USING (pos) ORDER BY pos")
    with open(folder / QUARANTINE_NAME, "w", encoding="utf-8", newline="\n") as out:
        for index, (path, seen) in enumerate(zip(sources, scanned)):
            twice = _of_source(db, "pos, id", "duplicates", index, seen.last_line)
            out.writelines(
                rows.quarantine_lines(folder / WORK_NAME / f"dropped_{index:05d}.jsonl", path, twice)
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
    """``part_NNNNN.jsonl`` of ``part_items`` listings (the last may be shorter); name, items and hash of each."""
    lines = itertools.chain.from_iterable(
        rows.selected(
            i, path, _of_source(db, "pos, id, split", "picked", i, seen.last_line), rules.max_text_chars
        )
        for i, (path, seen) in enumerate(zip(sources, scanned))
    )
    parts: list[dict[str, Any]] = []
    for start in range(0, total, rules.part_items):
        path, digest, items = folder / PART_PATTERN.format(len(parts)), hashlib.sha256(), 0
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
        raise RuntimeError(f"the parts do not hold the {total} listings of the selection")
    return parts
