"""The folder of a plan: the names in it, its lock, and whether it is finished.

A folder without ``plan.json``, which is written last, is not a plan. What is in it: ``prepare/plan/planner.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import hold_lock, read_json
from rating_train.prepare.full_disk import disk_full, is_full
from rating_train.prepare.plan.rules import PlanRules

PLAN_VERSION = 3
PLAN_NAME = "plan.json"
SELECTION_NAME = "selection.parquet"
SUMMARY_NAME = "summary.json"
WORK_NAME = "work"  # inside the plan's folder while it is made: compact rows, the database, what it spills


def part_name(part: int) -> str:
    """Return ``part_00000``: the stem of a part's input in the plan, and the folder of the finished part."""
    return f"part_{part:05d}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the plan's folder, which is made if absent.

    Raises:
        UserError: the folder cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as e:
        if is_full(e):
            raise disk_full(folder) from e
        raise UserError(f"cannot write here ({e})", where=folder, fix="choose another directory") from e
    try:
        if hold_lock(lock) is False:
            raise UserError(
                "another process is making this plan", where=folder, fix="wait until it ends, then run again"
            )
        yield
    finally:
        os.close(lock)


def stamp(path: str) -> dict[str, Any]:
    """Return a source's name, size in bytes and time of change: equal stamps are taken for equal content."""
    stat = os.stat(path)
    return {"name": path, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def finished(folder: Path, stamps: list[dict[str, Any]], rules: PlanRules) -> dict[str, Any] | None:
    """Return the finished plan of the same sources and rules, or ``None``.

    Raises:
        UserError: the folder holds a plan of other sources or rules.
    """
    if not (folder / PLAN_NAME).exists():
        return None
    plan: dict[str, Any] = read_json(folder / PLAN_NAME)
    entries = [{k: v for k, v in entry.items() if k != "rows"} for entry in plan.get("sources", [])]
    ours = {"version": PLAN_VERSION, "sources": stamps, "rules": rules.recorded()}
    theirs = {"version": plan.get("version"), "sources": entries, "rules": plan.get("rules")}
    if ours == theirs:
        return plan
    other = ", ".join(key for key in ours if ours[key] != theirs[key])
    raise UserError(
        f"the directory holds a plan that differs in its {other}",
        where=folder,
        fix="choose another directory, or remove this one if it is not needed",
    )


def start_over(folder: Path) -> Path:
    """Remove what an unfinished plan left (only names that plans have) and return a new, empty work folder."""
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    for left in (*folder.glob("part_*.jsonl"), *(folder / n for n in (SELECTION_NAME, SUMMARY_NAME))):
        left.unlink(missing_ok=True)
    work = folder / WORK_NAME
    work.mkdir()
    return work


def changed(where: str) -> UserError:
    """Return the error of a source that differs from what it was in the first pass."""
    return UserError("a source changed while it was read", where=where, fix="run again")
