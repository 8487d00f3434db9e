"""``rating-train prepare``: from catalogue files and a folder of images to a dataset directory.

Two passes over the sources: the first reads every record, applies the rules and learns which listings are
variants of one product (a split cannot be known earlier); the second makes the images and writes the
shards, in the order of the sources. Both hold hashes per item, never the items.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rating_train
from rating_train.data import select
from rating_train.data.images import ImageProblem, ImageRequest, ImageSpec, iter_images
from rating_train.data.schema import MANIFEST_VERSION, MDS_COLUMNS, SPLITS, Dropped, Listing
from rating_train.data.sources import Record, read_sources, source_kind
from rating_train.errors import UserError, one_error

if TYPE_CHECKING:
    from rating_train.data.writer import DatasetWriter

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class PrepareOptions:
    """What to make of which sources.

    Attributes:
        source: catalogue files, read in this order (Amazon-2023 JSON lines or CSV, also .gz, .zst).
        images: folder that holds the images; nothing outside it is opened.
        out: the dataset directory to make; it must not exist.
        image_size_px: side of the stored square, in pixels.
        jpeg_quality: of the stored images, 1 to 95.
        min_rating_count: listings with fewer ratings are left out.
        val_fraction: share of the product groups that goes to validation.
        test_fraction: share of the product groups that goes to the test split.
        split_seed: any text; another one gives another split.
        max_text_chars: every text field is cut to this many characters.
        max_dropped_fraction: stop if more than this share of the records is unusable; those left out by
            ``min_rating_count`` are not counted, neither as dropped nor as records.
        shard_size_mb: upper bound of a shard file, in MiB.
        workers: processes that make images; the result does not depend on it.
        limit: read at most this many records in all, for a trial; None reads everything.
        dry_run: only scan and count: no image is opened, nothing is written.
    """

    source: tuple[str, ...]
    images: str
    out: str
    image_size_px: int = 384
    jpeg_quality: int = 90
    min_rating_count: int = 10
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    split_seed: str = "rating_train"
    max_text_chars: int = 4000
    max_dropped_fraction: float = 0.5
    shard_size_mb: int = 64
    workers: int = 1
    limit: int | None = None
    dry_run: bool = False

    @property
    def rules(self) -> select.Rules:
        """The rules that a listing must keep."""
        return select.Rules(self.min_rating_count, self.max_text_chars)

    @property
    def fractions(self) -> select.Fractions:
        """Shares of the splits."""
        return select.Fractions(self.val_fraction, self.test_fraction)


@dataclass
class Tally:
    """Counts of one build; every record read ends in ``dropped`` or is a candidate for being kept."""

    rows: Counter[str] = field(default_factory=Counter)  # records per source
    dropped: Counter[str] = field(default_factory=Counter)  # records per reason
    kept: int = 0

    @property
    def read(self) -> int:
        """Records read over all sources."""
        return sum(self.rows.values())

    @property
    def candidates(self) -> int:
        """Records that are not dropped (so far)."""
        return self.read - sum(self.dropped.values())

    def over_limit(self, max_fraction: float) -> bool:
        """Whether more than this share of the records is unusable; those left out by choice aside."""
        chosen = sum(self.dropped[reason] for reason in select.CHOSEN_REASONS)
        return sum(self.dropped.values()) - chosen > max_fraction * (self.read - chosen)

    def reasons(self) -> str:
        """For example ``image_missing 12, bad_json 1``, the commonest first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common()) or "none"


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Build a dataset directory; its manifest, or the counts alone with ``dry_run``.

    The manifest's ``kept`` and the sum of ``dropped`` add up to ``read``. Nothing is left at ``out`` unless
    all went well; ``OUT.quarantine.jsonl`` remains when too many records were dropped.

    Errors: :class:`UserError` for impossible options, unreadable sources, an existing ``out``, too many
    dropped records, or when no item is left to train on.
    """
    check_options(options)
    tally, groups = Tally(), select.Groups()
    if options.dry_run:
        scan(options, tally, groups, lambda _: None)
        counts = select.split_counts(groups, options.fractions, options.split_seed)
        splits = {name: {"items": counts[name]} for name in SPLITS if counts[name]}
        return {
            **_summary(options, tally, groups),
            "kept": tally.candidates,
            "splits": splits,
            "dry_run": True,
        }

    # Imported late: it brings torch along, which neither --help nor a dry run needs.
    from rating_train.data.writer import DatasetWriter

    stamps = _stamps(options.source)
    with DatasetWriter(options.out, options.shard_size_mb << 20) as writer:
        scan(options, tally, groups, writer.quarantine)
        _stop_if_too_many(options, tally, writer)
        _refuse_no_training_item(select.split_counts(groups, options.fractions, options.split_seed), tally)
        kept = build(options, tally, groups, writer)
        if _stamps(options.source) != stamps:
            raise UserError(
                "a source changed while it was read", where=", ".join(options.source), fix="run again"
            )
        if tally.kept != tally.candidates:
            raise RuntimeError(f"{tally.kept} kept, but {tally.candidates} of {tally.read} were not dropped")
        _refuse_no_training_item(kept, tally)
        if options.val_fraction > 0 and not kept["val"]:
            logger.warning("the validation split is empty: too few product groups for val_fraction")
        return writer.commit({**_summary(options, tally, groups), "kept": tally.kept})


def records(options: PrepareOptions) -> Iterator[Record]:
    """Every record of the sources, with the rules applied: a ``Listing`` to keep or a ``Dropped``."""
    read = islice(read_sources(options.source), options.limit)
    return select.drop_duplicates(select.apply_rules(read, options.rules))


def scan(
    options: PrepareOptions, tally: Tally, groups: select.Groups, on_drop: Callable[[Dropped], None]
) -> None:
    """First pass: count the records in ``tally`` and join the variants in ``groups``."""
    for record in Progress(records(options), "scan", tally, total=None):
        tally.rows[record.source] += 1
        if isinstance(record.item, Listing):
            groups.add(record.item)
        else:
            tally.dropped[record.item.reason] += 1
            on_drop(record.item)


def build(
    options: PrepareOptions, tally: Tally, groups: select.Groups, writer: DatasetWriter
) -> Counter[str]:
    """Second pass: images and shards. Items per split."""
    total = tally.candidates
    kept: Counter[str] = Counter()
    spec = ImageSpec(options.images, options.image_size_px, options.jpeg_quality)
    listings = ((r, r.item) for r in records(options) if isinstance(r.item, Listing))
    made = iter_images(listings, lambda pair: ImageRequest(pair[1].image, pair[1].id), spec, options.workers)
    for (record, listing), image in Progress(made, "images", tally, total=total):
        if isinstance(image, ImageProblem):
            tally.dropped[image.reason] += 1
            writer.quarantine(Dropped(record.source, record.line, listing.id, image.reason, image.detail))
            _stop_if_too_many(options, tally, writer)
            continue
        try:
            root = groups.root(listing)
        except KeyError as e:
            raise UserError("a source changed while it was read", where=record.source, fix="run again") from e
        split = select.split_of(root, options.fractions, options.split_seed)
        writer.write(split, listing, image)
        kept[split] += 1
        tally.kept += 1
    return kept


def check_options(options: PrepareOptions) -> None:
    """All problems of the options in one :class:`UserError`; ``out`` is looked at when it is made."""
    for path in options.source:
        source_kind(path)
    if not Path(options.images).is_dir():
        raise UserError("images folder not found", where=options.images, fix="check --images")
    # Two samples of the largest possible size (raw pixels, four texts of 4-byte characters) fit a shard.
    least_mb = math.ceil(2 * (3 * options.image_size_px**2 + 16 * options.max_text_chars) / 2**20)
    shares = (options.val_fraction, options.test_fraction)
    checks = [
        (bool(options.source), "no source is given"),
        (len(set(options.source)) == len(options.source), "a source is given twice"),
        (16 <= options.image_size_px <= 4096, f"image_size_px {options.image_size_px} is not in 16..4096"),
        (1 <= options.jpeg_quality <= 95, f"jpeg_quality {options.jpeg_quality} is not in 1..95"),
        (options.min_rating_count >= 0, f"min_rating_count {options.min_rating_count} is negative"),
        (
            all(0 <= s < 1 for s in shares) and sum(shares) < 1,
            f"val and test fractions {shares} leave no train",
        ),
        (options.max_text_chars >= 1, f"max_text_chars {options.max_text_chars} is not positive"),
        (
            0 <= options.max_dropped_fraction <= 1,
            f"max_dropped_fraction {options.max_dropped_fraction} is not in 0..1",
        ),
        (
            least_mb <= options.shard_size_mb <= 4095,
            f"shard_size_mb {options.shard_size_mb} is not in {least_mb}..4095 (for this image size)",
        ),
        (options.workers >= 1, f"workers {options.workers} is not positive"),
        (options.limit is None or options.limit >= 1, f"limit {options.limit} is not positive"),
    ]
    problems = [problem for good, problem in checks if not good]
    if problems:
        raise one_error(problems, where="prepare options")


def _stop_if_too_many(options: PrepareOptions, tally: Tally, writer: DatasetWriter) -> None:
    if tally.over_limit(options.max_dropped_fraction):
        raise UserError(
            f"too many records dropped: already {sum(tally.dropped.values())} of {tally.read} ({tally.reasons()})",
            where=writer.keep_quarantine(),
            expected=f"at most {options.max_dropped_fraction:.0%} unusable records",
            fix="see the quarantine file; mend the sources or --images, or raise --max-dropped-fraction",
        )


def _refuse_no_training_item(splits: Counter[str], tally: Tally) -> None:
    if not splits["train"]:
        raise UserError(
            f"no item is left to train on: {tally.read} records read, dropped: {tally.reasons()}",
            fix="give more data, or lower --min-rating-count or the split fractions",
        )


def _stamps(paths: Iterable[str]) -> list[tuple[int, int]]:
    return [(s.st_size, s.st_mtime_ns) for s in (Path(p).stat() for p in paths)]


def _summary(options: PrepareOptions, tally: Tally, groups: select.Groups) -> dict[str, Any]:
    sizes = groups.sizes()
    return {
        "version": MANIFEST_VERSION,
        "created_by": f"rating_train {rating_train.__version__}",
        "image_size_px": options.image_size_px,
        "columns": dict(MDS_COLUMNS),
        "options": {**dataclasses.asdict(options), "source": list(options.source)},
        "sources": [
            {"name": path, "bytes": Path(path).stat().st_size, "rows": tally.rows[path]}
            for path in options.source
        ],
        "read": tally.read,
        "dropped": dict(tally.dropped.most_common()),
        "groups": {"count": len(sizes), "largest": max(sizes.values(), default=0)},
    }


class Progress:
    """Iterate with a bar on a terminal, or else with a log line every ~10 s."""

    def __init__(self, items: Iterable[Any], what: str, tally: Tally, total: int | None) -> None:
        self._items, self._what, self._tally, self._total = items, what, tally, total

    def __iter__(self) -> Iterator[Any]:
        return self._bar() if sys.stderr.isatty() else self._lines()

    def _bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        with tqdm(self._items, desc=self._what, total=self._total, unit=" records") as bar:
            for item in bar:
                yield item
                if bar.n % 64 == 0:
                    bar.set_postfix_str(f"dropped: {self._tally.reasons()}", refresh=False)

    def _lines(self) -> Iterator[Any]:
        began = said = time.monotonic()
        done = 0
        for done, item in enumerate(self._items, start=1):
            yield item
            now = time.monotonic()
            if now - said >= LOG_EVERY_SECONDS:
                said = now
                logger.info(self._line(done, now - began))
        logger.info(self._line(done, time.monotonic() - began))

    def _line(self, done: int, seconds: float) -> str:
        rate = done / max(seconds, 1e-9)
        of = f" of {self._total}" if self._total else ""
        left = f", {(self._total - done) / rate:.0f} s left" if self._total and rate else ""
        return f"{self._what}: {done}{of}, {rate:.0f}/s{left}, dropped: {self._tally.reasons()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb; the defaults are those of :class:`PrepareOptions`."""
    default = {f.name: f.default for f in dataclasses.fields(PrepareOptions)}
    files = "catalogues: .jsonl or .csv, also .gz, .zst"
    parser.add_argument("--source", nargs="+", required=True, metavar="FILE", help=files)
    parser.add_argument("--images", required=True, metavar="DIR", help="folder that holds the images")
    parser.add_argument(
        "--out", required=True, metavar="DATA", help="dataset directory to make; must not exist"
    )
    numbers: tuple[tuple[str, type, str], ...] = (
        ("image_size_px", int, "side of the stored square, in pixels"),
        ("jpeg_quality", int, "quality of the stored images, 1 to 95"),
        ("min_rating_count", int, "leave out listings with fewer ratings"),
        ("val_fraction", float, "share of the product groups for validation"),
        ("test_fraction", float, "share of the product groups for the test split"),
        ("split_seed", str, "another text gives another split"),
        ("max_text_chars", int, "cut every text field to so many characters"),
        ("max_dropped_fraction", float, "stop if more than this share of the records is unusable"),
        ("shard_size_mb", int, "upper bound of a shard file, in MiB"),
        ("workers", int, "processes that make images"),
        ("limit", int, "read at most so many records, for a trial"),
    )
    for name, kind, text in numbers:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default[name], help=f"{text} (default: {default[name]})")
    parser.add_argument("--dry-run", action="store_true", help="only scan and count; nothing is written")


def run(args: argparse.Namespace) -> int:
    """The verb: :func:`prepare`, then a short table on standard output. Exit code 0."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(PrepareOptions)}
    options = PrepareOptions(**{**given, "source": tuple(args.source)})
    print(summary_table(options.out, prepare(options)))
    return 0


def summary_table(out: str, manifest: dict[str, Any]) -> str:
    """The counts of a manifest, or of a dry run, as a few lines of text."""
    dry, groups = manifest.get("dry_run", False), manifest["groups"]
    lines = [f"{'would prepare' if dry else 'prepared'} {out}", f"  read     {manifest['read']:>9,}"]
    lines.append(f"  kept     {manifest['kept']:>9,}{'  (before images are opened)' if dry else ''}")
    for name, entry in manifest["splits"].items():
        more = (
            ""
            if dry
            else (
                f"  {entry['shards']} shards, {entry['bytes'] / 2**20:.1f} MiB,"
                f" rating {entry['rating_mean']:.3f} +- {entry['rating_std']:.3f}"
            )
        )
        lines.append(f"    {name:<7}{entry['items']:>9,}{more}")
    lines.append(f"  dropped  {sum(manifest['dropped'].values()):>9,}")
    lines += [f"    {count:>7,} {reason}" for reason, count in manifest["dropped"].items()]
    lines.append(f"  product groups {groups['count']:,}, the largest has {groups['largest']:,} items")
    if not dry:
        lines.append(f"  fingerprint {manifest['fingerprint'][:16]}")
    return "\n".join(lines)
