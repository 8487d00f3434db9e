"""One part of a dataset: a fixed range of the plan's items, made completely or not at all.

A finished part is a folder that does not change any more::

    PARTS/part_00000/train/shard.00000.mds ... index.json    and val/, test/ where it has such items
    PARTS/part_00000/quarantine.jsonl                        items whose image could not be used
    PARTS/part_00000/DONE.json                               counts, sizes and SHA-256 of the files; written last

It is made under a temporary name, flushed to the disk and renamed, so a part that exists is complete. Its bytes depend
only on the plan, the images and the :class:`PartSpec`: not on the process, the time or the number of attempts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.config.task import PAPER, Task
from rating_train.errors import UserError
from rating_train.files import fsync_path, read_json, read_json_lines, sha256_file
from rating_train.prepare.images import square
from rating_train.prepare.images.choice import ImageCounts, first_usable
from rating_train.prepare.images.lookup import ImageProblem, ImageStore
from rating_train.prepare.images.square import DEFAULT_MAX_PIXELS, grey_square
from rating_train.prepare.plan.plan_dir import PLAN_NAME, part_name
from rating_train.shards.mds_write import write_synced
from rating_train.shards.schema import QUARANTINE_NAME, SPLITS, Dropped, Listing, sample_columns
from rating_train.shards.writer import SplitWriter, make_temporary

DONE_NAME = "DONE.json"
DONE_VERSION = 2

_LISTING_FIELDS = tuple(Listing.__dataclass_fields__)
_PART = re.compile(r"part_(\d{5,})")


@dataclass(frozen=True)
class PartSpec:
    """What decides the bytes of a part, besides the plan and the images.

    Attributes:
        size_px: side S of the stored square, in pixels.
        quality: of the JPEG, 1 to 95.
        shard_bytes: upper bound of one shard file.
        build: fingerprint of all that the items depend on; parts of another build are refused.
        max_pixels: larger pictures are refused before a pixel is decoded.
        task: what of a listing becomes a sample.
        keep_aspect: in place of squares, pictures in their own shape, S pixels on the longest side at most.
    """

    size_px: int
    quality: int
    shard_bytes: int
    build: str = ""
    max_pixels: int = DEFAULT_MAX_PIXELS
    task: Task = PAPER
    keep_aspect: bool = False


#: Called once per item: with the dropped record, or None for a kept item.
OnItem = Callable[[Dropped | None], None]


def build_part(
    plan_dir: Path,
    part: int,
    parts_dir: Path,
    store: ImageStore,
    spec: PartSpec,
    on_item: OnItem | None = None,
) -> dict[str, Any]:
    """Make one part and put it in place.

    Whatever ends it early (an error, a signal that raises) removes its temporary folder; what kill -9 leaves is swept
    by the next build. If another process has put the same part in place meanwhile, that one is kept.

    Args:
        plan_dir: the plan.
        part: number of the part.
        parts_dir: where the part is put.
        store: reads the images.
        spec: see :class:`PartSpec`.
        on_item: called once per item.

    Returns:
        The content of its ``DONE.json``.

    Raises:
        OSError: the part cannot be written, for example because the disk is full.
        UserError: the plan's file of the part is damaged.
    """
    final = parts_dir / part_name(part)
    folder, lock = make_temporary(final)
    try:
        done = _fill(folder, plan_dir, part, store, spec, on_item or (lambda _: None))
        fsync_path(folder)
        try:
            os.rename(folder, final)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return read_done(parts_dir, part, spec.build)
        fsync_path(parts_dir)
        return done
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after the rename there is no such folder
        os.close(lock)


def _fill(
    folder: Path, plan_dir: Path, part: int, store: ImageStore, spec: PartSpec, on_item: OnItem
) -> dict[str, Any]:
    splits: dict[str, SplitWriter] = {}
    dropped: list[Dropped] = []
    counts = ImageCounts()
    items = 0

    def convert(data: bytes) -> bytes:
        return square.square_jpeg(data, spec.size_px, spec.quality, spec.max_pixels, spec.keep_aspect)

    columns = sample_columns(spec.task)
    grey = convert(grey_square(spec.size_px)) if spec.task.missing_image == "grey" else None

    def keep(split: str, listing: Listing, image: bytes) -> None:
        if split not in splits:
            splits[split] = SplitWriter(folder / split, spec.shard_bytes, columns)
        splits[split].write(listing, image)
        on_item(None)

    for row in read_json_lines(_input(plan_dir, part)):
        fields = {name: row[name] for name in _LISTING_FIELDS if name != "more_images"}
        # `more_images` is written only where it is not empty.
        listing = Listing(**fields, more_images=tuple(row.get("more_images", ())))
        items += 1
        try:
            image = first_usable(listing, store, convert, counts) if columns.get("image") else b""
        except ImageProblem as e:
            if grey is not None:
                counts.placeholders += 1
                keep(row["split"], listing, grey)
                continue
            dropped.append(Dropped(row["source"], row["line"], listing.id, e.reason, e.detail))
            on_item(dropped[-1])
            continue
        keep(row["split"], listing, image)
    for split in splits.values():
        split.finish()
    quarantine = "".join(json.dumps(vars(d), ensure_ascii=False) + "\n" for d in dropped).encode("utf-8")
    write_synced(folder / QUARANTINE_NAME, quarantine)
    hashes = {f"{name}/{file}": h for name, w in splits.items() for file, h in w.shards.sha256.items()}
    hashes[QUARANTINE_NAME] = hashlib.sha256(quarantine).hexdigest()
    done = {
        "version": DONE_VERSION,
        "build": spec.build,
        "part": part,
        "items": items,
        "splits": {name: vars(splits[name].stats) for name in SPLITS if name in splits},
        "dropped": dict(Counter(d.reason for d in dropped)),
        "images": counts.recorded(),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in sorted(hashes.items())
        },
    }
    write_synced(folder / DONE_NAME, json.dumps(done, indent=2).encode("utf-8"))
    return done


def _input(plan_dir: Path, part: int) -> Path:
    """Return the plan's file of a part, its content checked: a damaged plan must not pass as a short part."""
    path = plan_dir / f"{part_name(part)}.jsonl"
    if not path.is_file() or sha256_file(path) != read_json(plan_dir / PLAN_NAME)["parts"][part]["sha256"]:
        raise UserError(
            f"the plan's part {part} is missing or damaged",
            where=path,
            fix="remove the build directory and prepare again",
        )
    return path


def finished_parts(parts_dir: Path) -> list[int]:
    """Return the numbers of the parts that are in place, ascending."""
    if not parts_dir.is_dir():
        return []
    found = (_PART.fullmatch(p.name) for p in parts_dir.iterdir())
    return sorted(int(match[1]) for match in found if match)


def read_done(parts_dir: Path, part: int, build: str) -> dict[str, Any]:
    """Return ``DONE.json`` of a part in place.

    Raises:
        UserError: it is missing, damaged, or of another build.
    """
    path = parts_dir / part_name(part) / DONE_NAME
    done = read_json(path)
    if (done.get("version"), done.get("part"), done.get("build")) != (DONE_VERSION, part, build):
        raise UserError(
            f"part {part} belongs to another build",
            where=path,
            fix="remove the build directory and prepare again",
        )
    return done


def verify_part(parts_dir: Path, part: int, build: str, *, hashes: bool = False) -> dict[str, Any]:
    """Check a part's files and return its ``DONE.json``: all sizes, and the SHA-256 of the small files.

    Args:
        parts_dir: where the parts are.
        part: number of the part.
        build: fingerprint of the build that it must belong to.
        hashes: check the SHA-256 of the shards as well, which reads all of them.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    done = read_done(parts_dir, part, build)
    folder = parts_dir / part_name(part)
    for name, entry in done["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        problem = ""
        if size != entry["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
        elif (hashes or not name.endswith(".mds")) and sha256_file(file) != entry["sha256"]:
            problem = "has another SHA-256 than when it was written"
        if problem:
            raise UserError(
                f"part {part}: {name} {problem}",
                where=file,
                fix=f"remove {folder} and run the same command again: only this part is made again",
            )
    kept = sum(stats["count"] for stats in done["splits"].values())
    if kept + sum(done["dropped"].values()) != done["items"]:
        raise UserError(f"part {part}: the counts do not add up", where=folder, fix=f"remove {folder}")
    return done
