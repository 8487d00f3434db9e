"""``rating-train report``: the page of runs, of their comparison, or of datasets."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rating_train.errors import UserError
from rating_train.reports.run_report import make_report
from rating_train.shards.schema import MANIFEST_NAME

FOLLOW_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train report``."""
    parser.add_argument("run", type=Path, nargs="+", help="run directories, or dataset directories")
    parser.add_argument("--out", type=Path, help="of one dataset: folder of the page (default: DATA.report)")
    parser.add_argument(
        "--tokenizer", default="", help="of a dataset: folder or hub id; shows text lengths in tokens too"
    )
    parser.add_argument(
        "--follow",
        type=int,
        nargs="?",
        const=FOLLOW_SECONDS,
        default=0,
        metavar="SECONDS",
        help=f"while a run trains, write its page again and again (default: every {FOLLOW_SECONDS} s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page of every run or dataset, and one that compares several runs; print where they are."""
    runs = []
    for directory in args.run:
        if not directory.is_dir():
            what = (
                "a file is neither a run nor a dataset" if directory.exists() else "there is no such folder"
            )
            raise UserError(what, where=directory, fix="give run directories, or dataset directories")
        if (directory / MANIFEST_NAME).is_file():
            from rating_train.reports.dataset_report import make_data_report

            print(make_data_report(directory, args.out if len(args.run) == 1 else None, args.tokenizer))
        else:
            runs.append(directory)
    follow = args.follow if any(map(_trains, runs)) else 0
    _write(runs, follow, show=True)
    while follow:
        time.sleep(follow)
        follow = args.follow if any(map(_trains, runs)) else 0
        _write(runs, follow, show=False)
    return 0


def _write(runs: list[Path], refresh: int, show: bool) -> None:
    from rating_train.reports.runs.page import make_comparison_page, make_run_page

    for directory in runs:
        make_report(directory)
        page = make_run_page(directory, refresh)
        if show:
            print(page)
    if len(runs) > 1:
        page = make_comparison_page(runs)
        if show:
            print(page)


def _trains(run: Path) -> bool:
    from rating_train.reports.run_status import read_status

    try:
        return bool(read_status(run, quick=True)["owner"]["state"] == "alive")
    except UserError:  # logs without the rest of a run
        return False
