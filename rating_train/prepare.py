"""``rating-train prepare``: from catalogue files and images to a dataset directory.

Three stages, each resumable, under ``OUT.build``: the plan (which listings, on which side, in which order), the
parts (images and shards of fixed ranges of the plan, by several processes), and the merge (counts checked, shards
linked, manifest last, one rename). Given again, the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rating_train.catalogue.build import Build, make_plan, manifest_head, split_items
from rating_train.catalogue.full_disk import disk_full, is_full
from rating_train.catalogue.part_pool import stoppable
from rating_train.catalogue.prepare_options import PrepareOptions, add_arguments, check_options

__all__ = ["PrepareOptions", "add_arguments", "check_options", "prepare", "run", "summary_table"]


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Build a dataset directory; its manifest, or counts with ``dry_run`` and the stages ``plan`` and ``parts``.

    The manifest's ``kept`` and the sum of ``dropped`` add up to ``read``. Nothing is at ``out`` unless all went
    well. ``OUT.build`` remains of a build that was stopped; the same options continue it.
    ``OUT.quarantine.jsonl`` remains when too many records were dropped.

    Errors: :class:`UserError` for impossible options, unreadable sources, an existing ``out``, an unfinished build
    with other options, too many dropped records, no item to train on, SIGINT or SIGTERM, a full disk.
    """
    check_options(options)
    if options.dry_run:
        return _dry_run(options)
    with stoppable(), _full_disk_said(options.out):
        return Build(options).run()


def _dry_run(options: PrepareOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rating_train-dry-run-") as folder:
        plan = make_plan(options, Path(folder))
    counts = {name: plan[name] for name in ("read", "kept", "dropped")}
    return {**manifest_head(options, plan), **counts, "splits": split_items(plan["items"]), "dry_run": True}


@contextlib.contextmanager
def _full_disk_said(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if not is_full(e):
            raise
        raise disk_full(Path(e.filename or out)) from e


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
