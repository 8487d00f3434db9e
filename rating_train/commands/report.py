"""``rating-train report``: the figures of runs, or the page of datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.errors import UserError
from rating_train.reports.run_report import make_report
from rating_train.shards.schema import MANIFEST_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train report``."""
    parser.add_argument("run", type=Path, nargs="+", help="run directories, or dataset directories")
    parser.add_argument("--out", type=Path, help="of one dataset: folder of the page (default: DATA.report)")
    parser.add_argument(
        "--tokenizer", default="", help="of a dataset: folder or hub id; shows text lengths in tokens too"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the report of every run, or the page of every dataset, and print where it is."""
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
            print(make_report(directory))
    return 0
