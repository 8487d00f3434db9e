"""Merge all parts into one dataset: parts checked, shards linked under new numbers, manifest last, one rename."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rating_train.config.task import PAPER, Task
from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.prepare.images.choice import ImageCounts
from rating_train.prepare.parts.part import finished_parts, verify_part
from rating_train.prepare.plan.plan_dir import PLAN_NAME, part_name
from rating_train.shards.mds_read import read_columns, read_index
from rating_train.shards.schema import QUARANTINE_NAME
from rating_train.shards.writer import DatasetWriter, RatingStats


def merge_parts(
    plan_dir: Path,
    parts_dir: Path,
    out: str | Path,
    *,
    build: str = "",
    head: Mapping[str, Any] | None = None,
    task: Task = PAPER,
    check: Callable[[], None] = lambda: None,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Make the dataset directory ``out`` from a plan's parts.

    Shards are hard-linked where the file system supports it, so that a killed merge costs nothing and leaves the parts
    intact; their order is that of the plan. The quarantine is the plan's, then that of each part.

    Args:
        plan_dir: the plan.
        parts_dir: its finished parts.
        out: the directory to make.
        build: fingerprint of the parts to take, as in :class:`PartSpec`.
        head: more fields of the manifest; ``read``, ``dropped``, ``kept``, ``images`` (see
            :class:`~rating_train.prepare.images.choice.ImageCounts`), ``splits`` and ``fingerprint`` are added here.
        task: is added, with the statistics of the training split, unless it is the paper's.
        check: called before the manifest is written; if it raises, there is no ``out``.
        verify_hashes: read every shard and compare its SHA-256, not only its size.

    Returns:
        The manifest.

    Raises:
        UserError: parts are missing or damaged, counts do not add up, or ``out`` exists.
    """
    plan = read_json(plan_dir / PLAN_NAME)
    done = _all_parts(plan, parts_dir, build, verify_hashes)
    counts = _counts(plan, done, parts_dir)
    with DatasetWriter(out) as writer:
        writer.append_quarantine(plan_dir / QUARANTINE_NAME)
        for part in done:
            folder = parts_dir / part_name(part["part"])
            writer.append_quarantine(folder / QUARANTINE_NAME)
            for split, stats in part["splits"].items():
                writer.adopt(split, folder / split, RatingStats(**stats))
        check()
        trained = [parts_dir / part_name(p["part"]) / "train" for p in done if "train" in p["splits"]]
        return writer.commit({**(head or {}), **_task_entry(task, trained), **counts})


def _task_entry(task: Task, trained: list[Path]) -> dict[str, Any]:
    """Return what the manifest says of a task that is not the paper's: ``center`` and ``spread`` filled in."""
    if task.is_default:
        return {}
    stats = RatingStats()
    for folder in trained:
        for shard in read_index(folder):
            for sample in read_columns(folder / shard["raw_data"]["basename"], shard, ["rating"]):
                stats.add(task.target.forward(sample["rating"]))
    target = dataclasses.replace(task.target, center=stats.mean, spread=stats.std)
    return {"task": dataclasses.asdict(dataclasses.replace(task, target=target))}


def _counts(plan: Mapping[str, Any], done: list[dict[str, Any]], parts_dir: Path) -> dict[str, Any]:
    """Return what the plan and the parts say together: records read, dropped and kept, and the images."""
    dropped = Counter(plan["dropped"])
    images = ImageCounts()
    for part in done:
        dropped.update(part["dropped"])
        images.add(part["images"])
    kept = sum(stats["count"] for part in done for stats in part["splits"].values())
    items, planned = sum(part["items"] for part in done), sum(plan["items"].values())
    read = planned + sum(plan["dropped"].values())
    if items != planned or kept + sum(dropped.values()) != read:
        raise UserError(
            f"the parts contain {items} items, the plan has {planned}",
            where=parts_dir,
            fix="remove the build directory and prepare again",
        )
    ordered = dict(dropped.most_common())
    return {"read": read, "dropped": ordered, "kept": kept, "images": images.recorded()}


def _all_parts(
    plan: Mapping[str, Any], parts_dir: Path, build: str, verify_hashes: bool
) -> list[dict[str, Any]]:
    wanted, there = range(len(plan["parts"])), set(finished_parts(parts_dir))
    missing = [part for part in wanted if part not in there]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{len(missing)} of {len(wanted)} parts are missing: {shown}",
            where=parts_dir,
            fix="make them with the same command and --stage parts, then merge",
        )
    return [verify_part(parts_dir, part, build, hashes=verify_hashes) for part in wanted]
