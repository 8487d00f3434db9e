"""``rating-train prepare``: from catalogue files and images to a dataset directory."""

from __future__ import annotations

import argparse
import math
from typing import Any

from rating_train.commands.shared import add_options, options_from
from rating_train.config.data_schema import DataConfig
from rating_train.errors import EXIT_DONE
from rating_train.extensions import load_extensions
from rating_train.prepare.images.embedded import have_images
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.propose import propose_task
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.run import prepare

FIELD_CHARS = DataConfig().field_chars  # of the rows that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of :class:`PrepareOptions`."""
    add_options(parser, PrepareOptions, metavars={"source": "FILE", "images": "DIR", "out": "DATA"})
    parser.add_argument(
        "--init-task",
        metavar="FILE",
        default="",
        help="only propose a task file from the columns of the source, and show how its first rows would read",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the dataset and print a short table. Exit code 0."""
    options = options_from(PrepareOptions, args)
    load_extensions(options.extension)
    if args.init_task:
        print(_proposal(args.init_task, options))
        return EXIT_DONE
    print(summary_table(options.out, prepare(options)))
    return EXIT_DONE


def _proposal(file: str, options: PrepareOptions) -> str:
    """Write a task file; return how the first rows of the source would read."""
    from rating_train.data.prompt import prompt_words, readable  # late: imports torch

    task, listings = propose_task(file, options.source, options.reading)
    words, unit = prompt_words(task, task.inputs), task.target.suffix
    lines = [f"{file}, read from the first rows:"]
    for listing in listings:
        number = "not known" if math.isnan(listing.rating) else f"{listing.rating:g}{unit}"
        lines.append(f"  {readable(words, listing.texts, FIELD_CHARS)}  ->  {number}")
    images = " --images DIR" if task.images and not have_images(options.source, Reading(task)) else ""
    return "\n".join(
        [
            *lines,
            f"Check the file, then: rating-train prepare --task {file} --source "
            f"{' '.join(options.source)}{images} --out DATA",
        ]
    )


def summary_table(out: str, manifest: dict[str, Any]) -> str:
    """Return the counts of a manifest, of a dry run or of one stage as a few lines of text."""
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
