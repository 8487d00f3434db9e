"""One build from its options to the dataset: plan, parts, merge, and the checks between them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rating_train
from rating_train.errors import UserError
from rating_train.files import read_json, read_json_lines, sha256_json
from rating_train.log import Progress
from rating_train.prepare.build_dir import BUILD_NAME, BuildDir
from rating_train.prepare.counts import BuildCounts
from rating_train.prepare.images.fetch_options import parse_fetch_options
from rating_train.prepare.images.lookup import ImageStore, is_url
from rating_train.prepare.images.stores import NoStore, open_store
from rating_train.prepare.options import PrepareOptions, stamps
from rating_train.prepare.parts.merge import merge_parts
from rating_train.prepare.parts.part import PartSpec, finished_parts, read_done
from rating_train.prepare.parts.pool import Event, build_parts
from rating_train.prepare.plan import planner
from rating_train.prepare.plan.plan_dir import PLAN_NAME, part_name
from rating_train.shards.schema import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    QUARANTINE_NAME,
    SPLITS,
    Dropped,
    sample_columns,
)
from rating_train.shards.writer import refuse_existing

logger = logging.getLogger(__name__)

_FETCH_PARTS = 16  # parts whose URLs are fetched at once: bounds the memory


class GivenUp(UserError):
    """The data is not what was asked for: resuming the build would end the same way."""


class Build:
    """The work of one command on one ``OUT.build``."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options = options
        self.dir = BuildDir(options.out)
        self.counts = BuildCounts()
        # Of the parts in progress: dropped records that no finished part's quarantine has yet.
        self._fresh: dict[int, list[Dropped]] = {}

    def run(self) -> dict[str, Any]:
        """Run the stages that were asked for; see :func:`rating_train.prepare.run.prepare`."""
        merged = self._merged_before()
        if merged is not None:
            return merged
        refuse_existing(self.dir.out)
        with self.dir.locked(shared=self.options.stage == "parts"):
            try:
                return self._run()
            except GivenUp:
                # The stages of a job array and fetched images took long: the user decides when to remove them.
                if self.options.stage == "all" and not self.options.fetch:
                    self.dir.remove()
                raise

    def _run(self) -> dict[str, Any]:
        stage = self.options.stage
        refuse_existing(self.dir.out)  # another command may have finished meanwhile
        self.build = self.dir.belongs_to(self.options.identity())
        plan = self._planned()
        if stage == "plan":
            return {**self._counts(plan), "kept": plan["kept"], "splits": split_items(plan["items"])}
        if stage in ("all", "parts"):
            self._make_parts(plan)
        if stage == "parts":
            return {**self._counts(plan), "kept": self.counts.kept, "splits": {}}
        return self._merge(plan)

    def _merged_before(self) -> dict[str, Any] | None:
        """Return the manifest if this same build was stopped after its merge, when only the removal was left."""
        file = self.dir.out / MANIFEST_NAME
        if self.options.keep_build or not (file.is_file() and self.dir.path.is_dir()):
            return None
        manifest = read_json(file)
        if manifest.get("build") != sha256_json(self.options.identity()):
            return None
        with self.dir.locked():
            self.dir.remove()
        return manifest

    def _planned(self) -> dict[str, Any]:
        if self.options.stage in ("parts", "merge"):
            if not (self.dir.plan / PLAN_NAME).exists():
                raise UserError(
                    "there is no finished plan",
                    where=self.dir.plan,
                    fix="first run the same command with --stage plan",
                )
            plan = read_json(self.dir.plan / PLAN_NAME)
        else:
            try:
                plan = make_plan(self.options, self.dir.plan)
            except UserError:
                if not (self.dir.plan / PLAN_NAME).exists():
                    self.dir.remove()  # an unfinished plan is not resumed
                raise
        self.counts = BuildCounts(plan["read"], Counter(plan["dropped"]))
        self._stop_if_too_many()
        self._refuse_no_training_item(plan["items"])
        return plan

    def _make_parts(self, plan: dict[str, Any]) -> None:
        options, wanted = self.options, self.options.part_range(len(plan["parts"]))
        spec = PartSpec(
            options.image_size_px,
            options.jpeg_quality,
            options.shard_size_mb << 20,
            build=self.build,
            task=options.reading.task,
            keep_aspect=options.keep_aspect,
        )
        before = 0
        for part in set(finished_parts(self.dir.parts)).intersection(wanted):
            done = read_done(self.dir.parts, part, self.build)
            self.counts.kept += sum(stats["count"] for stats in done["splits"].values())
            self.counts.dropped.update(done["dropped"])
            before += done["items"]
        todo = sum(plan["parts"][part]["items"] for part in wanted)
        if options.fetch:
            self._fetch(wanted)
        store: ImageStore = NoStore()
        if options.reading.task.images:
            cache = self.dir.cache if options.fetch else None
            store = open_store(options.images, cache, sources=options.source)
        progress = Progress("images", todo, done=before, details=self.counts.line)

        def on_event(event: Event) -> None:
            self._take(event)
            progress.add(event.kept + len(event.dropped))

        complete = False
        try:
            build_parts(
                self.dir.plan,
                self.dir.parts,
                store,
                spec,
                options.workers,
                wanted,
                on_event,
                self.dir.workers_lock,
            )
            complete = True
        finally:
            progress.close(complete)

    def _fetch(self, wanted: range) -> None:
        """Fetch the URLs of the parts that are still to be made, some parts at a time to bound the memory."""
        there = set(finished_parts(self.dir.parts))
        missing = [part for part in wanted if part not in there]
        for first in range(0, len(missing), _FETCH_PARTS):
            self._fetch_parts(missing[first : first + _FETCH_PARTS])

    def _fetch_parts(self, parts: list[int]) -> None:
        from rating_train.prepare.images.fetch import fetch_all  # late: local images need no HTTP client

        # All images of a listing: whether its first one decodes is known only when its part is made.
        requests = [
            (row["id"], image)
            for part in parts
            for row in read_json_lines(self.dir.plan / f"{part_name(part)}.jsonl")
            for image in (row["image"], *row.get("more_images", ()))
            if is_url(image)
        ]
        counts = BuildCounts()
        progress = Progress(f"fetch, parts {parts[0]} to {parts[-1]}", len(requests), details=counts.line)

        def on_progress(news: Any) -> None:
            counts.kept, counts.dropped["fetch"] = news.kept, news.problems
            progress.add(1)

        fetch_all(requests, self.dir.cache, parse_fetch_options(self.options.fetch_set), on_progress)
        progress.close()

    def _take(self, event: Event) -> None:
        self.counts.kept += event.kept
        self.counts.dropped.update(d.reason for d in event.dropped)
        self._fresh.setdefault(event.part, []).extend(event.dropped)
        if event.dropped:
            self._stop_if_too_many()
        if event.finished:
            del self._fresh[event.part]

    def _merge(self, plan: dict[str, Any]) -> dict[str, Any]:
        def check() -> None:
            if stamps(self.options.source) != self.options_stamps:
                raise UserError(
                    "a source changed while it was read",
                    where=", ".join(self.options.source),
                    fix=f"remove {self.dir.path}, then run again",
                )

        self.options_stamps = read_json(self.dir.path / BUILD_NAME)["sources"]
        self._judge_parts(plan)
        manifest = merge_parts(
            self.dir.plan,
            self.dir.parts,
            self.dir.out,
            build=self.build,
            head={**manifest_head(self.options, plan), "build": self.build},
            task=self.options.reading.task,
            check=check,
            verify_hashes=self.options.verify_parts,
        )
        if self.options.wants_val and "val" not in manifest["splits"]:
            logger.warning("the validation split is empty: there are too few product groups for its size")
        if not self.options.keep_build:
            self.dir.remove()
        return manifest

    def _judge_parts(self, plan: dict[str, Any]) -> None:
        """Refuse a dataset of which too little is left, now that all images were opened."""
        self.counts = BuildCounts(plan["read"], Counter(plan["dropped"]))
        items: Counter[str] = Counter()
        for part in finished_parts(self.dir.parts):
            done = read_done(self.dir.parts, part, self.build)
            self.counts.dropped.update(done["dropped"])
            items.update({name: stats["count"] for name, stats in done["splits"].items()})
        self._stop_if_too_many()
        if len(finished_parts(self.dir.parts)) == len(plan["parts"]):
            self._refuse_no_training_item(items)

    def _refuse_no_training_item(self, splits: Mapping[str, int]) -> None:
        if not splits.get("train"):
            raise GivenUp(
                f"no item is left to train on: {self.counts.read} records read, dropped: {self.counts.reasons()}",
                fix="add data, or lower --min-rating-count or the sizes of the splits",
            )

    def _stop_if_too_many(self) -> None:
        if not self.counts.over_limit(self.options.max_dropped_fraction):
            return
        raise GivenUp(
            f"too many records dropped: {sum(self.counts.dropped.values())} of {self.counts.read}"
            f" ({self.counts.reasons()})",
            where=self._keep_quarantine(),
            expected=f"at most {self.options.max_dropped_fraction:.0%} unusable records",
            fix="read the quarantine file; fix the sources or --images, or raise --max-dropped-fraction",
        )

    def _keep_quarantine(self) -> Path:
        """Write all rows so far beside ``out``, where they survive the removal of the build; return the path."""
        path = self.dir.out.with_name(f"{self.dir.out.name}.{QUARANTINE_NAME}")
        made = [self.dir.parts / part_name(part) for part in finished_parts(self.dir.parts)]
        with open(path, "wb") as f:
            for folder in (self.dir.plan, *made):
                f.write((folder / QUARANTINE_NAME).read_bytes())
            for part, rows in sorted(self._fresh.items()):
                if part_name(part) not in {folder.name for folder in made}:
                    f.writelines(
                        (json.dumps(vars(d), ensure_ascii=False) + "\n").encode("utf-8") for d in rows
                    )
        return path

    def _counts(self, plan: dict[str, Any]) -> dict[str, Any]:
        counts = {"read": plan["read"], "dropped": dict(self.counts.dropped.most_common())}
        return {
            **manifest_head(self.options, plan),
            **counts,
            "parts": len(plan["parts"]),
            "stage": self.options.stage,
        }


def make_plan(options: PrepareOptions, folder: Path) -> dict[str, Any]:
    """Make the plan in a folder and show progress; see :func:`rating_train.prepare.plan.planner.make_plan`."""
    bars: dict[str, Progress] = {}
    done = Counter[str]()

    def on_progress(phase: str, records: int, total: int | None) -> None:
        if phase not in bars:
            bars[phase] = Progress(phase, total, "records")
        bars[phase].add(records - done[phase])
        done[phase] = records

    try:
        plan = planner.make_plan(options.source, folder, options.rules, on_progress, options.workers)
    finally:
        for bar in bars.values():
            bar.close(complete=False)
    _warn_of_target_drops(plan, options)
    return plan


def _warn_of_target_drops(plan: Mapping[str, Any], options: PrepareOptions) -> None:
    """Warn where records were dropped for the value of their target: what is left is another distribution."""
    target, dropped = options.reading.task.target, plan["dropped"].get("bad_rating", 0)
    if dropped:
        logger.warning(
            "%d of %d records were dropped for their %s, which is outside %s or no number: the dataset lacks that part "
            "of the distribution. If the scale is another one, give it by --scale LOWER:UPPER or in the task file",
            dropped, plan["read"], target.name, target.range_text,
        )  # fmt: skip


def split_items(items: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the items per split as a manifest has them, without empty splits."""
    return {name: {"items": items[name]} for name in SPLITS if items.get(name)}


def manifest_head(options: PrepareOptions, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says about the options and the sources."""
    return {
        "version": MANIFEST_VERSION,
        "created_by": f"rating_train {rating_train.__version__}",
        "image_size_px": options.image_size_px,
        "columns": dict(sample_columns(options.reading.task)),
        "options": options.stated(),
        "sources": [{key: entry[key] for key in ("name", "bytes", "rows")} for entry in plan["sources"]],
        "groups": plan["groups"],
    }
