"""How images are fetched: the settings, and reading them from the command line. Imports no HTTP client."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rating_train.config.fields import bound_problems, read, setting
from rating_train.config.yaml_reader import parse_setting
from rating_train.errors import one_error


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch.

    One URL takes at most ``(retries + 1) * (connect_timeout_s + total_timeout_s) + retries * max_wait_s``.
    """

    concurrency: int = setting(
        64, "Requests in flight in all; memory is bounded by this times `max_bytes`.", low=1
    )
    per_host: int = setting(
        8, "Requests in flight to one host; a host that asks for a pause (429) is slowed down by it.", low=1
    )
    connect_timeout_s: float = setting(10.0, "For looking up the host's name, and for connecting.", low=0.001)
    read_timeout_s: float = setting(20.0, "Between two pieces of a response.", low=0.001)
    total_timeout_s: float = setting(
        60.0, "For one complete request: a slow drip of bytes ends here.", low=0.001
    )
    retries: int = setting(4, "Further requests after a failure that may be temporary.", low=0)
    backoff_s: float = setting(
        0.5, "Wait before the first retry, doubled for each next one, times a jitter in 0.5..1.5.", low=0
    )
    max_wait_s: float = setting(
        60.0, "Upper bound of a wait, also of one that the server asks for (`Retry-After`).", low=0
    )
    max_bytes: int = setting(20 << 20, "Size limit of one image; a longer response is cut off.", low=1)
    max_redirects: int = setting(
        0, "Redirects to follow, each target checked like the URL itself; 0 refuses them.", low=0
    )
    allow_private: bool = setting(
        False, "Connect to private, loopback, link-local and reserved addresses as well."
    )
    retry_failed: bool = setting(False, "Request again what is recorded as failed.")
    jitter_seed: int = setting(0, "Equal seeds give equal waits.")
    user_agent: str = setting("rating-train", "Sent with every request.")

    def __post_init__(self) -> None:
        if problems := bound_problems(self):
            raise one_error(list(problems.values()), where="fetch options")

    def wait_s(self, url: str, attempt: int, asked_s: float) -> float:
        """Return the seconds before retry ``attempt`` (0 is the first): back-off with jitter, or what was asked."""
        jitter = random.Random(f"{self.jitter_seed} {attempt} {url}").uniform(0.5, 1.5)
        return min(max(self.backoff_s * 2**attempt * jitter, asked_s), self.max_wait_s)


def parse_fetch_options(settings: Iterable[str]) -> FetchOptions:
    """Return the options that texts ``NAME=VALUE`` give; the last of a name counts.

    Raises:
        UserError: all problems of the settings.
    """
    options, problems = read_fetch_options(settings)
    if problems:
        raise one_error(problems, where="fetch options")
    return options


def read_fetch_options(settings: Iterable[str]) -> tuple[FetchOptions, list[str]]:
    """Return what :func:`parse_fetch_options` returns, and the problems, which keep their defaults."""
    given: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            problems[f"--fetch-set {text}"] = f"{text!r} is not of the form NAME=VALUE"
        elif name == "user_agent":  # any text
            given[name] = value
        else:
            given[name] = parse_setting(value)
    options = read(FetchOptions, given, problems)
    return options, list(problems.values())
