"""``rating-train compare``: which run is better on the same items, by how much, and what was configured apart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rating_train.errors import EXIT_DONE
from rating_train.reports.comparison import as_json, compare_runs, render
from rating_train.scoring.bootstrap import RESAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train compare``."""
    parser.add_argument("run", type=Path, nargs="+", help="run directories; the first is the baseline")
    parser.add_argument(
        "--split", default="", help="split to compare (default: the one that all runs evaluated)"
    )
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the metrics of every run, each difference as a sentence with its interval, and the settings that differ."""
    found = compare_runs(args.run, args.split, args.resamples)
    print(json.dumps(as_json(found), indent=2) if args.json else render(found))
    return EXIT_DONE
