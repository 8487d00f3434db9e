"""The two passes over the sources that a plan needs, as streams. What they select is decided in ``planner.py``.

Pass 1 (:func:`scan_sources`) turns every record into one compact line; pass 2 (:func:`selected`) reads the sources
again alongside the ordered list of what was taken. Neither holds more than one record in memory.

A compact line is tab-separated: pos, category, reason, id, rating, rating_count, image, and the 64-bit hashes id_hash,
g (group) and t (category and title key). Legend: pos = source index * 2^40 + line. Absent values are ``NULL_MARK``.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rating_train.errors import UserError
from rating_train.prepare.plan import selection
from rating_train.prepare.plan.plan_dir import changed
from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.records.sources import read_source
from rating_train.shards.schema import Dropped, Listing
from rating_train.shards.titles import title_key

NULL_MARK = "\x01"
LINE_BITS = 40

#: (phase, records done, total number of records or None); the phases are scan, select, parts.
OnProgress = Callable[[str, int, "int | None"], None]

REPORT_EVERY = 20_000  # records between two reports of progress

_MAX_NAME_CHARS = 200  # of a category; two that differ only after that are one in the window
_MAX_IMAGE_CHARS = 2000  # of the image in selection.parquet; the parts have all of it
_CONTROL = dict.fromkeys((*range(32), 127), " ")  # what would break the lines


class Scanned(NamedTuple):
    """Of one source: records read, and the line of the last one (0 if there is none)."""

    rows: int
    last_line: int


def scan_sources(
    sources: Sequence[str], rules: PlanRules, work: Path, on_progress: OnProgress, workers: int
) -> list[Scanned]:
    """Run pass 1: write ``rows_NNNNN.tsv`` and ``dropped_NNNNN.jsonl`` of every source to ``work``.

    Sources are read in parallel, by up to ``workers`` processes; with a ``limit`` one after the other, because how
    much of a source is read then depends on those before it.

    Returns:
        What was read of each source, in their order.
    """
    if workers == 1 or len(sources) == 1 or rules.limit is not None:
        scanned: list[Scanned] = []
        for index, path in enumerate(sources):
            done = sum(s.rows for s in scanned)
            left = None if rules.limit is None else rules.limit - done
            scanned.append(
                _scan_source(index, path, rules, work, left, lambda n: on_progress("scan", n, None), done)
            )
        return scanned
    pool = ProcessPoolExecutor(min(workers, len(sources)), mp_context=get_context("spawn"))
    try:
        # The largest first: a long file that starts last would keep one process busy alone.
        order = sorted(range(len(sources)), key=lambda i: -Path(sources[i]).stat().st_size)
        futures = {pool.submit(_scan_source, i, sources[i], rules, work, None): i for i in order}
        done = 0
        for future in as_completed(futures):
            done += future.result().rows
            on_progress("scan", done, None)
        return [future.result() for future in sorted(futures, key=futures.__getitem__)]
    except BrokenProcessPool as e:
        raise UserError(
            "a process that reads sources died", where=work, fix="run again with fewer --workers"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _scan_source(
    index: int,
    path: str,
    rules: PlanRules,
    work: Path,
    limit: int | None,
    report: Callable[[int], None] = lambda done: None,
    before: int = 0,
) -> Scanned:
    count = last = 0
    with (
        open(work / f"rows_{index:05d}.tsv", "w", encoding="utf-8", newline="\n") as rows,
        open(work / f"dropped_{index:05d}.jsonl", "w", encoding="utf-8", newline="\n") as dropped,
    ):
        # The summary needs the category of a dropped listing too, so the rules are applied here.
        for count, (source, line, item) in enumerate(
            islice(read_source(path, rules.reading), limit), start=1
        ):
            last = line
            pos = index << LINE_BITS | line
            refusal = selection.check_listing(item, rules) if isinstance(item, Listing) else None
            if isinstance(item, Listing) and refusal is None:
                rows.write(_compact(pos, selection.cap_text(item, rules.max_text_chars)))
            else:
                category = (
                    _plain(item.category[: rules.max_text_chars]) if isinstance(item, Listing) else NULL_MARK
                )
                drop = Dropped(source, line, item.id, *refusal) if refusal else item
                assert isinstance(drop, Dropped)
                rows.write("\t".join((str(pos), category, drop.reason, *(NULL_MARK,) * 7)) + "\n")
                dropped.write(_json_line(vars(drop)))
            if count % REPORT_EVERY == 0:
                report(before + count)
    report(before + count)
    return Scanned(count, last)


def _compact(pos: int, listing: Listing) -> str:
    key = title_key(listing.title)
    title = selection.hash64("title", listing.category.casefold(), key) if key else NULL_MARK
    rating = NULL_MARK if math.isnan(listing.rating) else repr(listing.rating)
    count = NULL_MARK if listing.rating_count is None else listing.rating_count
    return (
        f"{pos}\t{_plain(listing.category)}\t{NULL_MARK}\t{listing.id}\t{rating}\t"
        f"{count}\t{_plain(listing.image, _MAX_IMAGE_CHARS)}\t{selection.hash64('id', listing.id)}\t"
        f"{selection.hash64('group', listing.group)}\t{title}\n"
    )


def _plain(text: str, max_chars: int = _MAX_NAME_CHARS) -> str:
    return text[:max_chars].translate(_CONTROL)


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def quarantine_lines(dropped: Path, source: str, duplicates: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield the JSON lines of one source's dropped records in the order of the source.

    Args:
        dropped: the file of pass 1.
        source: the source's path.
        duplicates: (pos, id) of the records whose id an earlier record has, ordered.
    """
    mask = (1 << LINE_BITS) - 1
    with open(dropped, encoding="utf-8", newline="\n") as file:
        of_rules = ((json.loads(line)["line"], line) for line in file)
        of_ids = (
            (
                pos & mask,
                _json_line(
                    vars(Dropped(source, pos & mask, item, "duplicate_id", "an earlier record has it"))
                ),
            )
            for pos, item in duplicates
        )
        for _, line in heapq.merge(of_rules, of_ids):
            yield line


def selected(
    index: int, path: str, wanted: Iterator[tuple[int, str, str]], rules: PlanRules
) -> Iterator[str]:
    """Run pass 2: yield the JSON lines of one source's taken listings, in its order.

    Args:
        index: the source's place among the sources.
        path: the source.
        wanted: (pos, id, split) of the listings to take, ordered by pos.
        rules: how the source is read, and to how many characters every text is cut.

    Raises:
        UserError: a record is not what it was in pass 1.
    """
    want = next(wanted, None)
    if want is None:
        return
    for source, line, item in read_source(path, rules.reading):
        if index << LINE_BITS | line < want[0]:
            continue
        if index << LINE_BITS | line > want[0] or not isinstance(item, Listing) or item.id != want[1]:
            raise changed(path)
        listing = selection.cap_text(item, rules.max_text_chars)
        fields = {name: value for name, value in vars(listing).items() if name != "more_images" or value}
        yield _json_line({**fields, "split": want[2], "source": source, "line": line})
        want = next(wanted, None)
        if want is None:
            return
    raise changed(path)
