"""How images are fetched: data, and what the command line gives of it. Imports no HTTP client."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rating_train.errors import one_error


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch.

    One URL takes at most ``(retries + 1) * (connect_timeout_s + total_timeout_s) + retries * max_wait_s``.

    Attributes:
        concurrency: requests under way in all; memory is bounded by this times ``max_bytes``.
        per_host: requests under way to one host; a host that asks for a pause (429) is slowed by it.
        connect_timeout_s: for looking up the host's name, and for connecting.
        read_timeout_s: between two pieces of an answer.
        total_timeout_s: for one whole request: a slow drip of bytes ends here.
        retries: further requests after a failure that may pass.
        backoff_s: wait before the first retry, doubled for each next, times a jitter in 0.5..1.5.
        max_wait_s: upper bound of a wait, also of one that the server asks for (``Retry-After``).
        max_bytes: of one image; a longer answer is stopped.
        max_redirects: redirects to follow, each target checked like the URL itself; 0 refuses them.
        allow_private: connect to private, loopback, link-local and reserved addresses as well.
        retry_failed: ask again for what is recorded as failed.
        jitter_seed: equal seeds give equal waits.
        user_agent: sent with every request.
    """

    concurrency: int = 64
    per_host: int = 8
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    total_timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 0.5
    max_wait_s: float = 60.0
    max_bytes: int = 20 << 20
    max_redirects: int = 0
    allow_private: bool = False
    retry_failed: bool = False
    jitter_seed: int = 0
    user_agent: str = "rating-train"

    def __post_init__(self) -> None:
        least = {
            "concurrency": 1, "per_host": 1, "max_bytes": 1, "retries": 0, "backoff_s": 0, "max_wait_s": 0,
            "max_redirects": 0, "connect_timeout_s": 0.001, "read_timeout_s": 0.001, "total_timeout_s": 0.001,
        }  # fmt: skip
        values = {name: getattr(self, name) for name in least}
        problems = [f"{n} {values[n]} is less than {low}" for n, low in least.items() if not values[n] >= low]
        if problems:
            raise one_error(problems, where="fetch options")

    def wait_s(self, url: str, attempt: int, asked_s: float) -> float:
        """Seconds before retry ``attempt`` (0 is the first): back-off with jitter, or what the server asked."""
        jitter = random.Random(f"{self.jitter_seed} {attempt} {url}").uniform(0.5, 1.5)
        return min(max(self.backoff_s * 2**attempt * jitter, asked_s), self.max_wait_s)


def parse_fetch_options(settings: Iterable[str]) -> FetchOptions:
    """Options from texts ``NAME=VALUE``; the last of a name counts. Errors: :class:`UserError` with all problems."""
    defaults = {f.name: f.default for f in dataclasses.fields(FetchOptions)}
    given: dict[str, Any] = {}
    problems = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in defaults:
            problems.append(f"{setting!r} is not NAME=VALUE with one of {', '.join(defaults)}")
            continue
        try:
            given[name] = _value(text, type(defaults[name]))
        except ValueError:
            problems.append(f"{setting!r}: the value is not of the kind of {defaults[name]!r}")
    if problems:
        raise one_error(problems, where="fetch options")
    return FetchOptions(**given)


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return kind(text)
