"""The options of ``rating-train prepare``: declared once, checked once with all problems in one error."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rating_train.config.fields import Rule, bound_problems, broken_rules, setting
from rating_train.config.task import PAPER, Task, load_task
from rating_train.errors import UserError, one_error
from rating_train.prepare.images.embedded import have_images
from rating_train.prepare.images.fetch_options import read_fetch_options
from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.records.reading import Reading, with_map, with_scale
from rating_train.prepare.records.sources import read_source


@dataclass(frozen=True, kw_only=True)
class _RulesOfTask(PlanRules):
    """The rules of a plan whose sources are read in another way than the paper's."""

    how: Reading = Reading()

    @property
    def reading(self) -> Reading:
        return self.how


_SHOWN_SOURCES = 3  # of a folder of many, whose dialect and unread columns are shown
_RANGE = re.compile(r"(\d+):(\d+)")
_SHARE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PlanRules):
    """What to make from which sources: the rules of the plan, and where and how the rest is done."""

    source: tuple[str, ...] = setting(
        doc="catalogues, read in this order: JSON lines, CSV, TSV (also .gz, .zst), Parquet, Arrow; folders and "
        "patterns of them; a folder saved by Hugging Face `datasets`"
    )
    task: str = setting(
        "", "YAML file that says what is predicted from what (docs/tasks.md); default: stars of products"
    )
    map: tuple[str, ...] = setting(
        (),
        "NAME=COLUMN, for sources whose columns have other names: rating=score title=film_title image=poster",
    )
    scale: str = setting("", "LOWER:UPPER, the bounds of the number to predict: 1:10")
    unrated: Literal["drop", "predict"] = setting(
        "drop", "records without the number to predict: leave them out, or put them into the split `predict`"
    )
    delimiter: str = setting("", "of CSV files: one character, or tab (default: found out and shown)")
    decimal: Literal["", ".", ","] = setting("", "decimal sign of CSV files (default: found out and shown)")
    encoding: str = setting("", "of CSV files, such as latin-1 (default: found out and shown)")
    images: str = setting(
        "",
        "folder or archive (.zip, .tar) that holds the images; nothing outside it is opened. "
        "Not needed with --fetch if all images are URLs",
    )
    out: str = setting("", "dataset directory to make; it must not exist. OUT.build beside it holds the work")
    image_size_px: int = setting(384, "side of the stored square, in pixels", low=16, high=4096)
    keep_aspect: bool = setting(
        False,
        "store images with their aspect ratio, `image_size_px` on the longest side at most (data.tiling_px)",
    )
    jpeg_quality: int = setting(90, "quality of the stored images", low=1, high=95)
    max_dropped_fraction: float = setting(
        0.5,
        "stop if more than this share of the records is unusable; records left out by choice are not counted",
        low=0,
        high=1,
    )
    shard_size_mb: int = setting(64, "upper bound of a shard file, in MiB", low=1, high=4095)
    workers: int = setting(1, "processes that make parts; the result does not depend on it", low=1)
    fetch: bool = setting(False, "first fetch images that are URLs into OUT.build/fetch")
    fetch_set: tuple[str, ...] = setting(
        (), "with --fetch: NAME=VALUE, such as per_host=16; docs/data_at_scale.md has all names"
    )
    stage: Literal["all", "plan", "parts", "merge"] = setting("all", "run one stage only, for a job array")
    only: str = setting("", "with --stage parts: A:B (B excluded), or I/N for the share I of 0 to N - 1")
    keep_build: bool = setting(False, "leave the working directory OUT.build in place")
    verify_parts: bool = setting(False, "before merging, compare the SHA-256 of every shard")
    extension: tuple[str, ...] = setting(
        (), "Python modules to import first, for further kinds of source (docs/extending.md)"
    )
    dry_run: bool = setting(False, "only scan and count; no image is opened, nothing is left on the disk")

    @property
    def rules(self) -> PlanRules:
        """What is taken of the sources, and how it is split: these options without the rest."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(PlanRules)}
        return _RulesOfTask(**own, how=self.reading)

    @property
    def reading(self) -> Reading:
        """How the sources are read: the task file or the paper's task, with the columns and bounds given here.

        Raises:
            UserError: as :func:`rating_train.config.task.load_task`; or the columns, bounds, delimiter
                or encoding is none.
        """
        task = _task(self.task, self.map, self.scale)
        return Reading(
            task, unrated=self.unrated, delimiter=self.delimiter, decimal=self.decimal, encoding=self.encoding
        )

    def stated(self) -> dict[str, Any]:
        """Return all options for the manifest, without those that only other tasks than the paper's need."""
        rare = {"task", "map", "scale", "unrated", "delimiter", "decimal", "encoding"}
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        return {name: v for name, v in given.items() if name not in rare or v not in ("", [], "drop")}

    @property
    def wants_val(self) -> bool:
        """Whether a validation split is asked for."""
        return self.val_fraction > 0 if self.val_items is None else self.val_items > 0

    def identity(self) -> dict[str, Any]:
        """Return all that the dataset's items depend on: what a resumed build must have in common."""
        names = "image_size_px keep_aspect jpeg_quality shard_size_mb fetch images".split()
        return {
            **self.rules.recorded(),
            **{name: getattr(self, name) for name in names},
            "sources": stamps(self.source),
        }

    def part_range(self, parts: int) -> range:
        """Return the parts to make, of so many.

        Raises:
            UserError: ``only`` names parts that the plan does not have.
        """
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

    @property
    def least_shard_mb(self) -> int:
        """MiB that two samples of the largest possible size take: raw pixels, four texts of 4-byte characters."""
        return math.ceil(2 * (3 * self.image_size_px**2 + 16 * self.max_text_chars) / 2**20)


_RULES = (
    Rule("out", lambda c: c.out, "no dataset directory is given: --out DATA"),
    Rule("source", lambda c: c.source, "no source is given"),
    Rule("source", lambda c: len(set(c.source)) == len(c.source), "a source is given twice"),
    Rule(
        "images",
        lambda c: c.images or c.fetch or not c.reading.task.images or have_images(c.source, c.reading),
        "neither --images nor --fetch is given",
    ),
    Rule(
        "shard_size_mb image_size_px max_text_chars",
        lambda c: c.shard_size_mb >= c.least_shard_mb,
        "`shard_size_mb` is {c.shard_size_mb}, expected at least {c.least_shard_mb} for this image size",
    ),
    Rule(
        "top_per_category bottom_per_category",
        lambda c: c.reading.task.weight or not (c.top_per_category or c.bottom_per_category),
        "a window of a category needs a number of ratings, or another weight, of each item",
    ),
    Rule("only", lambda c: not c.only or _is_range(c.only), "`only` is {c.only!r}, expected A:B or I/N"),
    Rule("only", lambda c: not c.only or c.stage == "parts", "--only goes with --stage parts"),
    Rule("fetch_set", lambda c: not c.fetch_set or c.fetch, "--fetch-set goes with --fetch"),
)


@lru_cache(maxsize=4)  # of an options object, whose task is asked for again and again
def _task(file: str, columns: tuple[str, ...], scale: str) -> Task:
    task = load_task(file) if file else PAPER
    task = with_map(task, columns) if columns else task
    return with_scale(task, scale) if scale else task


def stamps(paths: tuple[str, ...]) -> list[list[Any]]:
    """Return the name, size in bytes and time of change of every source."""
    found = [(path, Path(path).stat()) for path in paths]
    return [[path, s.st_size, s.st_mtime_ns] for path, s in found]


def check_options(options: PrepareOptions) -> None:
    """Check everything but ``out``, which is looked at when it is made.

    Raises:
        UserError: all problems of the options; or the first source that is missing, unreadable or of no known kind.
    """
    for number, path in enumerate(options.source):
        # A wrong kind or header is reported now, not after hours of the sources before it.
        next(read_source(path, dataclasses.replace(options.reading, shown=number < _SHOWN_SOURCES)), None)
    if options.images and not Path(options.images).exists():
        raise UserError("images folder not found", where=options.images, fix="check --images")
    invalid = bound_problems(options)
    problems = [
        *options.rules.problems(),
        *(v for k, v in invalid.items() if k not in options.rules.recorded()),
    ]
    problems += [*broken_rules(options, _RULES, invalid), *read_fetch_options(options.fetch_set)[1]]
    if problems:
        raise one_error(problems, where="prepare options")


def _is_range(only: str) -> bool:
    pair, share = _RANGE.fullmatch(only), _SHARE.fullmatch(only)
    return bool(pair and int(pair[1]) <= int(pair[2])) or bool(share and int(share[1]) < int(share[2]))
