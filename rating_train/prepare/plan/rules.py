"""What a plan is asked for (``PlanRules``) and the folder that holds one: its names, its lock, whether it is finished.

A folder without ``plan.json``, which is written last, is not a plan. What is in it: ``prepare/plan/scan.py``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.prepare.full_disk import disk_full, is_full

PLAN_VERSION = 2
PLAN_NAME = "plan.json"
SELECTION_NAME = "selection.parquet"
SUMMARY_NAME = "summary.json"
PART_PATTERN = "part_{:05d}.jsonl"
WORK_NAME = "work"  # inside the plan's folder while it is made: compact rows, the database, what it spills

MIB_PER_THREAD = 128  # of DuckDB: with less per thread its operators fail instead of spilling
MIN_MEMORY_MB = 96  # seen working with one thread


@dataclass(frozen=True)
class PlanRules:
    """What is taken of the sources.

    Attributes:
        min_rating_count: listings with fewer ratings are left out.
        top_per_category: listings with the most ratings taken per main category; see ``bottom_per_category``.
        bottom_per_category: those with the fewest; a category with fewer than both is taken whole, and 0 with 0
            takes everything.
        require_image: leave out records that name no main image.
        val_items: size of the validation split in listings; whole product groups by smallest hash, up to the
            first that would exceed it. None: by ``val_fraction``.
        test_items: with ``val_items``, the same of the groups that follow.
        val_fraction: share of the product groups that goes to validation, if ``val_items`` is None.
        test_fraction: share of the product groups that goes to the test split, if ``val_items`` is None.
        split_seed: any text; another one gives another split.
        max_text_chars: every text field is cut to this many characters.
        part_items: listings per part file.
        memory_mb: bound on DuckDB's memory, in MiB; the result does not depend on it. The default is enough for 48
            million rows, and more is hardly faster: what does not fit goes to the disk.
        limit: read at most this many records in all, for a trial; None reads everything.
    """

    min_rating_count: int = 10
    top_per_category: int = 0
    bottom_per_category: int = 0
    require_image: bool = False
    val_items: int | None = None
    test_items: int = 0
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    split_seed: str = "rating_train"
    max_text_chars: int = 4000
    part_items: int = 4096
    memory_mb: int = MIN_MEMORY_MB
    limit: int | None = None

    def problems(self) -> list[str]:
        """What is impossible about the values, one sentence each."""
        shares = (self.val_fraction, self.test_fraction)
        least = {"max_text_chars": 1, "part_items": 1, "memory_mb": MIN_MEMORY_MB, "limit": 1}
        counts = {k: v for k, v in self._values().items() if isinstance(v, int) and not isinstance(v, bool)}
        found = [f"{k} {v} is below {least.get(k, 0)}" for k, v in counts.items() if v < least.get(k, 0)]
        if not (all(0 <= s < 1 for s in shares) and sum(shares) < 1):
            found.append(f"val and test fractions {shares} leave no train")
        if self.test_items and self.val_items is None:
            found.append("test_items needs val_items (shares are test_fraction's)")
        return found

    def recorded(self) -> dict[str, Any]:
        """What decides the result: all but ``memory_mb``."""
        return {k: v for k, v in self._values().items() if k != "memory_mb"}

    def _values(self) -> dict[str, Any]:
        """The fields named here, and not those that a subclass adds."""
        return {f.name: getattr(self, f.name) for f in fields(PlanRules)}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the plan's folder, made if absent. Errors: :class:`UserError` if it cannot be, or another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as e:
        if is_full(e):
            raise disk_full(folder) from e
        raise UserError(f"cannot write here ({e})", where=folder) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise UserError("another process is making this plan", where=folder, fix="wait for it") from e
    except OSError:  # no locks on this file system
        pass
    try:
        yield
    finally:
        os.close(lock)


def stamp(path: str) -> dict[str, Any]:
    """A source's name, size in bytes and time of change: two equal stamps are taken for the same content."""
    stat = os.stat(path)
    return {"name": path, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def finished(folder: Path, stamps: list[dict[str, Any]], rules: PlanRules) -> dict[str, Any] | None:
    """The finished plan of the same sources and rules, else None. Errors: :class:`UserError` if it is of others."""
    if not (folder / PLAN_NAME).exists():
        return None
    plan: dict[str, Any] = read_json(folder / PLAN_NAME)
    entries = [{k: v for k, v in entry.items() if k != "rows"} for entry in plan.get("sources", [])]
    ours = {"version": PLAN_VERSION, "sources": stamps, "rules": rules.recorded()}
    theirs = {"version": plan.get("version"), "sources": entries, "rules": plan.get("rules")}
    if ours == theirs:
        return plan
    other = ", ".join(key for key in ours if ours[key] != theirs[key])
    fix = "choose another directory, or remove this one if it is of no use"
    raise UserError(f"here is a plan that differs in its {other}", where=folder, fix=fix)


def start_over(folder: Path) -> Path:
    """Remove what an unfinished plan left (only names that plans have); the work folder, made anew."""
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    for left in (*folder.glob("part_*.jsonl"), *(folder / n for n in (SELECTION_NAME, SUMMARY_NAME))):
        left.unlink(missing_ok=True)
    work = folder / WORK_NAME
    work.mkdir()
    return work


def changed(where: str) -> UserError:
    """The error of a source that is not what it was in the first pass."""
    return UserError("a source changed while it was read", where=where, fix="run again")
