"""From all parts to one dataset: checked, linked under new numbers, manifest last, one rename."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.prepare.images.choice import ImageCounts
from rating_train.prepare.parts.part import finished_parts, part_name, verify_part
from rating_train.prepare.plan.rules import PLAN_NAME
from rating_train.shards.schema import QUARANTINE_NAME
from rating_train.shards.writer import DatasetWriter, RatingStats


def merge_parts(
    plan_dir: Path,
    parts_dir: Path,
    out: str | Path,
    *,
    build: str = "",
    head: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Make the dataset directory ``out`` of a plan's parts; its manifest.

    Shards are hard-linked where the file system can, so that a merge that is killed costs nothing and the parts
    stay whole; their order is that of the plan. The quarantine is the plan's, then that of each part.

    Args:
        build: fingerprint of the parts to take, as in :class:`PartSpec`.
        head: more fields of the manifest; ``read``, ``dropped``, ``kept``, ``images`` (see
            :class:`~rating_train.prepare.images.choice.ImageCounts`), ``splits`` and ``fingerprint`` are added here.
        check: called before the manifest is written; what it raises leaves no ``out``.
        verify_hashes: read every shard and compare its SHA-256, not only its size.

    Errors: :class:`UserError` if parts are missing or damaged, counts do not add up, or ``out`` exists.
    """
    plan = read_json(plan_dir / PLAN_NAME)
    done = _all_parts(plan, parts_dir, build, verify_hashes)
    dropped = Counter(plan["dropped"])
    images = ImageCounts()
    for part in done:
        dropped.update(part["dropped"])
        images.add(part["images"])
    kept = Counter({name: sum(_count(part, name) for part in done) for name in plan["items"]})
    items, total = sum(part["items"] for part in done), sum(plan["items"].values())
    read = total + sum(plan["dropped"].values())
    if items != total or sum(kept.values()) + sum(dropped.values()) != read:
        raise UserError(
            f"the parts hold {items} items, the plan has {total}",
            where=parts_dir,
            fix="remove the build directory and prepare again",
        )
    with DatasetWriter(out, shard_bytes=0) as writer:
        writer.append_quarantine(plan_dir / QUARANTINE_NAME)
        for part in done:
            folder = parts_dir / part_name(part["part"])
            writer.append_quarantine(folder / QUARANTINE_NAME)
            for split, stats in part["splits"].items():
                writer.adopt(split, folder / split, RatingStats(**stats))
        check()
        return writer.commit(
            {
                **(head or {}),
                "read": read,
                "dropped": dict(dropped.most_common()),
                "kept": sum(kept.values()),
                "images": images.recorded(),
            }
        )


def _count(part: Mapping[str, Any], split: str) -> int:
    return part["splits"].get(split, {"count": 0})["count"]


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
            fix="make them (the same command with --stage parts), then merge",
        )
    return [verify_part(parts_dir, part, build, hashes=verify_hashes) for part in wanted]
