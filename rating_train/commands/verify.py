"""``rating-train verify``: every byte of a dataset against the hashes that its build wrote."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rating_train.errors import EXIT_DONE, UserError
from rating_train.log import on_terminal
from rating_train.shards.verify import VerifyReport, verify_dataset

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0
DECODE_DEFAULT = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``rating-train verify``."""
    parser.add_argument("data", type=Path, metavar="DATA", help="dataset directory")
    parser.add_argument(
        "--decode",
        type=_samples,
        default=DECODE_DEFAULT,
        metavar="N|all",
        help=f"samples to decode, image and text (default {DECODE_DEFAULT}; 0 none, all: every one)",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads (default 4)")


def run(args: argparse.Namespace) -> int:
    """Verify and print the result; problems are printed one per line, then raised as one error."""
    report = verify_dataset(args.data, args.decode, args.workers, _progress())
    for problem in report.problems:
        print(f"DAMAGED {problem}")
    if not report.ok:
        raise UserError(
            f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}, "
            f"the first: {report.problems[0]}",
            where=args.data,
            fix="copy the named files again from where the dataset came from, or prepare it again",
        )
    print(render(report))
    return EXIT_DONE


def render(report: VerifyReport) -> str:
    """One line for a dataset that is whole."""
    return (
        f"{report.path} is whole: {report.items} items in {report.shards} shards, {report.bytes / 1e6:.1f} MB "
        f"hashed, {report.decoded} samples decoded, in {report.seconds:.1f} s ({report.mb_per_second:.0f} MB/s)"
    )


def _samples(text: str) -> int | None:
    if text == "all":
        return -1
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor `all`")
    return int(text) or None


def _progress() -> Callable[[int, int], None]:
    """A bar on a terminal, or else a log line every ~10 s."""
    started = said = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        rate = done / max(now - started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        line = f"verified {done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
        if on_terminal():
            print(f"\r{line}  ", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif now - said >= LOG_EVERY_SECONDS:
            said = now
            logger.info(line)

    return on_progress
