"""The options of ``rating-train prepare``: data, checked once with all problems in one error."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError, one_error
from rating_train.prepare.images.fetch_options import parse_fetch_options
from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.records.sources import read_source

STAGES = ("all", "plan", "parts", "merge")
_RANGE = re.compile(r"(\d+):(\d+)")
_SHARE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PlanRules):
    """What to make of which sources: the rules of the plan (:class:`PlanRules`), and where and how the rest is done.

    Attributes:
        source: catalogue files, read in this order (JSON lines, CSV and so on, also .gz, .zst).
        images: folder or archive that holds the images; nothing outside it is opened. "" with ``fetch``: all
            images are URLs.
        out: the dataset directory to make; it must not exist. ``OUT.build`` beside it holds the work.
        image_size_px: side of the stored square, in pixels.
        jpeg_quality: of the stored images, 1 to 95.
        max_dropped_fraction: stop if more than this share of the records is unusable; those left out by
            choice are not counted, neither as dropped nor as records.
        shard_size_mb: upper bound of a shard file, in MiB.
        workers: processes that make parts; the result does not depend on it.
        fetch: fetch images that are URLs into ``OUT.build/fetch`` first.
        fetch_set: ``NAME=VALUE``, settings of :class:`~rating_train.prepare.images.fetch_options.FetchOptions`.
        stage: ``all``, or one of ``plan``, ``parts``, ``merge``, for a job array.
        only: with stage ``parts``, these parts: ``A:B`` (B left out), or ``I/N``, the share I of 0 to N - 1.
        keep_build: leave ``OUT.build`` where it is after the merge.
        verify_parts: read all shards of the parts before the merge and compare their SHA-256.
        dry_run: only scan and count: no image is opened, nothing is left on the disk.
    """

    source: tuple[str, ...]
    images: str
    out: str
    image_size_px: int = 384
    jpeg_quality: int = 90
    max_dropped_fraction: float = 0.5
    shard_size_mb: int = 64
    workers: int = 1
    fetch: bool = False
    fetch_set: tuple[str, ...] = ()
    stage: str = "all"
    only: str = ""
    keep_build: bool = False
    verify_parts: bool = False
    dry_run: bool = False

    @property
    def rules(self) -> PlanRules:
        """What is taken of the sources, and how it is split: these options without the rest."""
        return PlanRules(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PlanRules)})

    @property
    def wants_val(self) -> bool:
        """Whether a validation split is asked for."""
        return self.val_fraction > 0 if self.val_items is None else self.val_items > 0

    def identity(self) -> dict[str, Any]:
        """All that the dataset's items depend on: what a build that is continued must have in common."""
        names = "image_size_px jpeg_quality shard_size_mb fetch images".split()
        return {
            **self.rules.recorded(),
            **{name: getattr(self, name) for name in names},
            "sources": stamps(self.source),
        }

    def part_range(self, parts: int) -> range:
        """The parts to make, of so many. Errors: :class:`UserError` for a range outside them."""
        if share := _SHARE.fullmatch(self.only):
            i, n = int(share[1]), int(share[2])
            return range(parts * i // n, parts * (i + 1) // n)
        if pair := _RANGE.fullmatch(self.only):
            if int(pair[2]) > parts:
                raise UserError(
                    f"--only {self.only}: the plan has {parts} parts", expected=f"0:{parts} at most"
                )
            return range(int(pair[1]), int(pair[2]))
        return range(parts)


def stamps(paths: tuple[str, ...]) -> list[list[Any]]:
    """Name, size in bytes and time of change of every source."""
    found = [(path, Path(path).stat()) for path in paths]
    return [[path, s.st_size, s.st_mtime_ns] for path, s in found]


def check_options(options: PrepareOptions) -> None:
    """All problems of the options in one :class:`UserError`; ``out`` is looked at when it is made."""
    for path in options.source:
        next(
            read_source(path), None
        )  # a wrong kind or header shows here, not after hours of the sources before it
    if options.images and not Path(options.images).exists():
        raise UserError("images folder not found", where=options.images, fix="check --images")
    # Two samples of the largest possible size (raw pixels, four texts of 4-byte characters) fit a shard.
    least_mb = math.ceil(2 * (3 * options.image_size_px**2 + 16 * options.max_text_chars) / 2**20)
    checks = [
        (bool(options.source), "no source is given"),
        (len(set(options.source)) == len(options.source), "a source is given twice"),
        (bool(options.images) or options.fetch, "neither --images nor --fetch is given"),
        (16 <= options.image_size_px <= 4096, f"image_size_px {options.image_size_px} is not in 16..4096"),
        (1 <= options.jpeg_quality <= 95, f"jpeg_quality {options.jpeg_quality} is not in 1..95"),
        *((False, problem) for problem in options.rules.problems()),
        (
            0 <= options.max_dropped_fraction <= 1,
            f"max_dropped_fraction {options.max_dropped_fraction} is not in 0..1",
        ),
        (
            least_mb <= options.shard_size_mb <= 4095,
            f"shard_size_mb {options.shard_size_mb} is not in {least_mb}..4095 (for this image size)",
        ),
        (options.workers >= 1, f"workers {options.workers} is not positive"),
        (options.stage in STAGES, f"stage {options.stage!r} is not one of {', '.join(STAGES)}"),
        (not options.only or _is_range(options.only), f"only {options.only!r} is neither A:B nor I/N"),
        (not options.only or options.stage == "parts", "--only goes with --stage parts"),
        (not options.fetch_set or options.fetch, "--fetch-set goes with --fetch"),
    ]
    problems = [problem for good, problem in checks if not good]
    try:
        parse_fetch_options(options.fetch_set)
    except UserError as e:
        problems.append(e.what)
    if problems:
        raise one_error(problems, where="prepare options")


def _is_range(only: str) -> bool:
    pair, share = _RANGE.fullmatch(only), _SHARE.fullmatch(only)
    return bool(pair and int(pair[1]) <= int(pair[2])) or bool(share and int(share[1]) < int(share[2]))
