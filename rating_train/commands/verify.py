"""``rating-train verify``: every byte of a dataset against the hashes that its build wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.errors import EXIT_DONE, UserError
from rating_train.log import Progress
from rating_train.shards.verify import VerifyReport, verify_dataset

DECODE_DEFAULT = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
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
    report = _verified(args)
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


def _verified(args: argparse.Namespace) -> VerifyReport:
    progress: Progress | None = None
    before = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal progress, before
        progress = progress or Progress("verified", total / 1e6, "MB")
        progress.add((done - before) / 1e6)
        before = done

    try:
        return verify_dataset(args.data, args.decode, args.workers, on_progress)
    finally:
        if progress is not None:
            progress.close(complete=False)


def render(report: VerifyReport) -> str:
    """Return one line about a dataset without problems."""
    return (
        f"{report.path} is valid: {report.items} items in {report.shards} shards, {report.bytes / 1e6:.1f} MB "
        f"hashed, {report.decoded} samples decoded, in {report.seconds:.1f} s ({report.mb_per_second:.0f} MB/s)"
    )


def _samples(text: str) -> int | None:
    if text == "all":
        return -1
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor `all`")
    return int(text) or None
