"""``rating-train prepare``: from catalogue files and images to a dataset directory."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rating_train.prepare.options import STAGES, PrepareOptions
from rating_train.prepare.pipeline import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb; the defaults are those of :class:`PrepareOptions`."""
    default = {f.name: f.default for f in dataclasses.fields(PrepareOptions)}
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="FILE",
        help="catalogues: JSON lines, CSV (also .gz, .zst), Parquet",
    )
    parser.add_argument(
        "--images",
        default="",
        metavar="DIR",
        help="folder (or archive) with the images; not needed with --fetch",
    )
    parser.add_argument(
        "--out", required=True, metavar="DATA", help="dataset directory to make; must not exist"
    )
    values: tuple[tuple[str, type, str], ...] = (
        ("image_size_px", int, "side of the stored square, in pixels"),
        ("jpeg_quality", int, "quality of the stored images, 1 to 95"),
        ("min_rating_count", int, "leave out listings with fewer ratings"),
        ("top_per_category", int, "per category, take so many of the most rated (0 and 0: all)"),
        ("bottom_per_category", int, "per category, take so many of the least rated"),
        ("val_items", int, "listings for validation, instead of --val-fraction"),
        ("test_items", int, "listings for the test split, with --val-items"),
        ("val_fraction", float, "share of the product groups for validation"),
        ("test_fraction", float, "share of the product groups for the test split"),
        ("split_seed", str, "another text gives another split"),
        ("max_text_chars", int, "cut every text field to so many characters"),
        ("max_dropped_fraction", float, "stop if more than this share of the records is unusable"),
        ("shard_size_mb", int, "upper bound of a shard file, in MiB"),
        ("part_items", int, "listings per part"),
        ("memory_mb", int, "memory for sorting the catalogue, in MiB"),
        ("workers", int, "processes that make parts"),
        ("limit", int, "read at most so many records, for a trial"),
        ("only", str, "with --stage parts: A:B, or I/N for the share I of 0 to N - 1"),
    )
    for name, kind, text in values:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default[name], help=f"{text} (default: {default[name]})")
    parser.add_argument(
        "--fetch-set",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="with --fetch: per_host=16, retry_failed=true and so on, see docs/data_at_scale.md",
    )
    parser.add_argument("--stage", choices=STAGES, default="all", help="one stage only, for a job array")
    flags = {
        "require_image": "leave out records that name no image, before the window of a category is taken",
        "fetch": "fetch images that are URLs",
        "keep_build": "leave the working directory OUT.build in place",
        "verify_parts": "before merging, compare the SHA-256 of every shard",
        "dry_run": "only scan and count; nothing is left on the disk",
    }
    for name, text in flags.items():
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """The verb: :func:`prepare`, then a short table on standard output. Exit code 0."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(PrepareOptions)}
    lists = {"source": tuple(args.source), "fetch_set": tuple(args.fetch_set)}
    options = PrepareOptions(**{**given, **lists})
    print(summary_table(options.out, prepare(options)))
    return 0


def summary_table(out: str, manifest: dict[str, Any]) -> str:
    """The counts of a manifest, of a dry run or of one stage, as a few lines of text."""
    dry, groups, stage = manifest.get("dry_run", False), manifest["groups"], manifest.get("stage")
    did = {"plan": "planned", "parts": "made parts of"}.get(stage or "", "prepared")
    lines = [f"{'would prepare' if dry else did} {out}", f"  read     {manifest['read']:>9,}"]
    planned = dry or stage == "plan"
    lines.append(f"  kept     {manifest['kept']:>9,}{'  (before images are opened)' if planned else ''}")
    for name, entry in manifest["splits"].items():
        more = (
            ""
            if planned
            else (
                f"  {entry['shards']} shards, {entry['bytes'] / 2**20:.1f} MiB,"
                f" rating {entry['rating_mean']:.3f} +- {entry['rating_std']:.3f}"
            )
        )
        lines.append(f"    {name:<7}{entry['items']:>9,}{more}")
    lines.append(f"  dropped  {sum(manifest['dropped'].values()):>9,}")
    lines += [f"    {count:>7,} {reason}" for reason, count in manifest["dropped"].items()]
    images = manifest.get("images", {})
    if images.get("listings_with_several"):
        lines.append(
            f"  images   {images['listings_with_several']:>9,} listings name several: "
            f"{images['fell_back_to_a_later_one']:,} took a later one, {images['extra_unused']:,} images left unused"
        )
    lines.append(f"  product groups {groups['count']:,}, the largest has {groups['largest']:,} items")
    if "parts" in manifest:
        lines.append(f"  parts    {manifest['parts']:>9,}")
    if "fingerprint" in manifest:
        lines.append(f"  fingerprint {manifest['fingerprint'][:16]}")
    return "\n".join(lines)
