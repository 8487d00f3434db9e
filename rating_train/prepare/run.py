"""``rating-train prepare``: from catalogue files and images to a dataset directory.

Three stages, each resumable, under ``OUT.build``: the plan (which listings, in which split, in which order), the
parts (images and shards of fixed ranges of the plan, by several processes), and the merge (counts checked, shards
linked, manifest last, one rename). Run again after an interruption, the same command resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rating_train.prepare.build import Build, make_plan, manifest_head, split_items
from rating_train.prepare.full_disk import disk_full, is_full
from rating_train.prepare.options import PrepareOptions, check_options
from rating_train.prepare.parts.pool import stoppable
from rating_train.prepare.records.folders import expand_sources


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Build a dataset directory.

    Nothing is at ``out`` unless the build succeeded. ``OUT.build`` remains after an interruption, and the same options
    resume it. ``OUT.quarantine.jsonl`` remains when too many records were dropped.

    Returns:
        The manifest, or counts with ``dry_run`` and the stages ``plan`` and ``parts``. Its ``kept`` and the sum of
        ``dropped`` add up to ``read``.

    Raises:
        UserError: impossible options, unreadable sources, an existing ``out``, an unfinished build with other
            options, too many dropped records, no item to train on, SIGINT or SIGTERM, a full disk.
    """
    options = dataclasses.replace(options, source=expand_sources(options.source))
    check_options(options)
    if options.dry_run:
        return _dry_run(options)
    with stoppable(), _full_disk_reported(options.out):
        return Build(options).run()


def _dry_run(options: PrepareOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rating_train-dry-run-") as folder:
        plan = make_plan(options, Path(folder))
    counts = {name: plan[name] for name in ("read", "kept", "dropped")}
    return {**manifest_head(options, plan), **counts, "splits": split_items(plan["items"]), "dry_run": True}


@contextlib.contextmanager
def _full_disk_reported(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if not is_full(e):
            raise
        raise disk_full(Path(e.filename or out)) from e
