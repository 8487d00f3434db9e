"""This rank's decoded batches: parts claimed one after the other, rows read once, images decoded by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rating_train.data.workers.reading import read_in_workers
from rating_train.prediction.decode import Decoded, Decoder, Unit, units
from rating_train.prediction.rows import Row, Rows
from rating_train.prediction.work_dir import WorkDir
from rating_train.prepare.images.fetch_options import FetchOptions
from rating_train.prepare.images.lookup import is_url

_PREFETCH = 4  # units that each worker holds ready


def claimed_parts(work: WorkDir, claims: str, wanted: list[int]) -> Iterator[int]:
    """Yield the parts of ``wanted`` that this rank is the first to claim, in ascending order."""
    for number in wanted:
        if work.claim(claims, number):
            yield number


def read_units(
    rows: Rows,
    parts: Iterator[int],
    part_rows: int,
    total: int,
    batch_items: int,
    fetched: Callable[[int, list[Row]], str] | None,
) -> Iterator[Unit]:
    """Yield the units of the claimed parts.

    Args:
        rows: the input.
        parts: numbers of the parts, ascending; the next is asked for when its rows are about to be read.
        part_rows: rows of a part; the last one has fewer.
        total: rows of the input.
        batch_items: rows of a unit.
        fetched: fetches the images of a part's rows; the folder that they are in. Called in a thread, for the next part
            while the units of one are handed out.
    """

    def read(part: int) -> tuple[int, list[Row]]:
        first = part * part_rows
        return part, list(rows.read(first, min(first + part_rows, total)))

    if fetched is None:
        for part in parts:
            yield from units(*read(part), batch_items, "")
        return
    with ThreadPoolExecutor(1, "fetch") as pool:
        ahead: list[Any] = []
        for part in parts:
            number, listed = read(part)
            ahead.append((number, listed, pool.submit(fetched, number, listed)))
            if len(ahead) > 1:
                number, listed, cache = ahead.pop(0)
                yield from units(number, listed, batch_items, cache.result())
        for number, listed, cache in ahead:
            yield from units(number, listed, batch_items, cache.result())


def fetcher(work: WorkDir, options: FetchOptions) -> Callable[[int, list[Row]], str]:
    """Return a function that fetches the images of a part's rows that are URLs; it gives their folder."""
    from rating_train.prepare.images.fetch import fetch_all  # late: local images need no client

    def fetched(part: int, rows: list[Row]) -> str:
        requests = [
            (row.id, image)
            for row in rows
            if row.listing
            for image in (row.listing.image, *row.listing.more_images)
            if is_url(image)
        ]
        fetch_all(requests, work.images(part), options)
        return str(work.images(part))

    return fetched


def decoded_units(decoder: Decoder, todo: Iterator[Unit], workers: int, pinned: bool) -> Iterator[Decoded]:
    """Yield the units decoded, in their order, by worker processes where there are some.

    Args:
        decoder: decodes one unit.
        todo: the units.
        workers: number of processes; 0 decodes here.
        pinned: whether the batches are made in pinned memory: for a GPU.
    """
    yield from read_in_workers(decoder.decode, todo, workers, _PREFETCH, pinned)
