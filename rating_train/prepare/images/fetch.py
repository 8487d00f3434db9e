"""Fetch images from URLs into a cache: many at once, politely, each at most once, and each with an outcome.

Every URL ends as bytes in the :class:`~rating_train.prepare.images.stores.CacheStore` or as a named problem recorded
beside them, so that a restart requests only what was in flight. How one request is made, and which ones are refused,
is in ``prepare/images/http_client.py``.

Reasons given here. Final at once: ``fetch_bad_url``, ``fetch_address_refused``, ``fetch_redirect``, ``fetch_gone``
(404, 410), ``fetch_refused`` (other statuses), ``fetch_not_an_image``, ``image_too_large``, ``image_empty``. After all
retries: ``fetch_failed`` (408, 425, 429, 5xx, time-outs, resets, truncation).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from rating_train.errors import UserError
from rating_train.prepare.images.fetch_options import FetchOptions
from rating_train.prepare.images.http_client import ImageClient, Transient
from rating_train.prepare.images.lookup import ImageProblem
from rating_train.prepare.images.stores import CacheStore

__all__ = ["FetchOptions", "FetchProgress", "fetch_all"]

logger = logging.getLogger(__name__)

_WRITERS = 8  # threads that write the cache: each write waits for the disk


class FetchProgress(NamedTuple):
    """Of ``total`` requests, ``kept`` are in the cache and ``problems`` failed so far, also in earlier calls."""

    total: int
    kept: int
    problems: int
    fetched: int  # URLs whose bytes came over the network in this call


def fetch_all(
    requests: Sequence[tuple[str, str]],
    cache: str | Path,
    options: FetchOptions | None = None,
    on_progress: Callable[[FetchProgress], None] | None = None,
) -> dict[str, ImageProblem]:
    """Bring every URL into the cache. Interrupted at any moment (Ctrl-C, kill -9), it holds complete files only.

    Args:
        requests: pairs of item id (for the log) and URL; a URL may come more than once.
        cache: its folder, made if needed. What is settled there is not requested again.
        options: see :class:`FetchOptions`.
        on_progress: called after every request, in this thread.

    Returns:
        The problems of the URLs that cannot be fetched, by URL.

    Raises:
        UserError: the cache cannot be written.
    """
    fetch = _Fetch(requests, CacheStore(cache), options or FetchOptions(), on_progress)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        asyncio.run(fetch.run())
    except OSError as e:  # those of the network are caught where they arise
        raise UserError(
            f"the image cache cannot be written ({e})",
            where=cache,
            fix="free disk space or fix the permissions, then run again",
        ) from e
    return fetch.problems


class _Turns:
    """Hands out URLs: hosts take turns, and at most ``per_host`` URLs of one host are in flight at a time."""

    def __init__(self, requests: Sequence[tuple[str, str]], per_host: int) -> None:
        self._per_host = per_host
        self._waiting: dict[str, deque[tuple[str, str]]] = {}
        for request in requests:
            self._waiting.setdefault(_host_of(request[1]), deque()).append(request)
        self._ready = deque(self._waiting)  # hosts with URLs waiting and fewer than per_host in flight
        self._out: Counter[str] = Counter()
        self._changed = asyncio.Event()

    async def take(self) -> tuple[str, str, str] | None:
        """Wait until a URL may be requested; return (host, item id, URL), or ``None`` when none is left."""
        while not self._ready:
            if not self._waiting:
                return None
            self._changed.clear()
            await self._changed.wait()
        host = self._ready.popleft()
        request = self._waiting[host].popleft()
        self._out[host] += 1
        if not self._waiting[host]:
            del self._waiting[host]
            self._changed.set()
        elif self._out[host] < self._per_host:
            self._ready.append(host)
        return host, *request

    def give_back(self, host: str) -> None:
        """Count one URL of the host as done."""
        if self._out[host] == self._per_host and host in self._waiting:
            self._ready.append(host)
            self._changed.set()
        self._out[host] -= 1


class _Fetch:
    """One call of :func:`fetch_all`."""

    def __init__(
        self,
        requests: Sequence[tuple[str, str]],
        store: CacheStore,
        options: FetchOptions,
        on_progress: Callable[[FetchProgress], None] | None,
    ) -> None:
        self.problems: dict[str, ImageProblem] = {}
        self._requests, self._store, self._options = requests, store, options
        self._on_progress = on_progress
        self._kept = self._failed = self._fetched = 0
        self._in_flight: dict[str, asyncio.Event] = {}

    async def run(self) -> None:
        """Settle every request."""
        o = self._options
        self._turns = _Turns(self._requests, o.per_host)
        with ThreadPoolExecutor(_WRITERS, "image-cache") as self._writers:
            async with ImageClient(o) as self._client:
                workers = [asyncio.create_task(self._work()) for _ in range(o.concurrency)]
                try:
                    await asyncio.gather(*workers)
                finally:  # one failed, or all are cancelled
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        while (turn := await self._turns.take()) is not None:
            host, item_id, url = turn
            try:
                problem = await self._settle_once(url)
            finally:
                self._turns.give_back(host)
            if problem is None:
                self._kept += 1
            else:
                self._failed += 1
                self.problems[url] = problem
                logger.debug("item %s: %s (%s): %s", item_id, problem.reason, problem.detail, url)
            if self._on_progress:
                counts = (self._kept, self._failed, self._fetched)
                self._on_progress(FetchProgress(len(self._requests), *counts))
            await asyncio.sleep(0)  # otherwise a pass over settled URLs could not be interrupted

    async def _settle_once(self, url: str) -> ImageProblem | None:
        """Settle a URL, or wait for the task that is fetching the same one for another item."""
        while url in self._in_flight:
            await self._in_flight[url].wait()
        if url in self.problems:
            return self.problems[url]
        if self._store.has(url):
            return None
        if not self._options.retry_failed and (known := self._store.problem(url)):
            return known
        done = self._in_flight[url] = asyncio.Event()
        try:
            return await self._settle(url)
        finally:
            del self._in_flight[url]
            done.set()

    async def _settle(self, url: str) -> ImageProblem | None:
        write = asyncio.get_running_loop().run_in_executor
        try:
            data = await self._with_retries(url)
        except ImageProblem as problem:
            await write(self._writers, self._store.put_problem, url, problem)
            self.problems[url] = bare = ImageProblem(problem.reason, problem.detail)  # no traceback kept
            return bare
        await write(self._writers, self._store.put, url, data)
        self._fetched += 1
        return None

    async def _with_retries(self, url: str) -> bytes:
        for attempt in range(self._options.retries + 1):
            try:
                return await self._client.get(url)
            except Transient as e:
                if attempt == self._options.retries:
                    raise ImageProblem("fetch_failed", f"{e} ({attempt + 1} requests)") from e
                await asyncio.sleep(self._options.wait_s(url, attempt, e.asked_s))
        raise AssertionError("unreachable")


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
