"""``rating-train status``: how far a run is, whether it moves, and which of its checkpoints are valid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rating_train.errors import EXIT_DONE
from rating_train.reports.run_status import read_status, render

EXIT_NOTHING_VALID = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train status``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="check the sizes of checkpoint files, not their SHA-256"
    )


def run(args: argparse.Namespace) -> int:
    """Print the status; 1 where checkpoints exist and none is valid."""
    status = read_status(args.run, args.quick)
    print(json.dumps(status, indent=2) if args.json else render(status))
    checkpoints = status["checkpoints"]
    return EXIT_NOTHING_VALID if checkpoints and not any(c["valid"] for c in checkpoints) else EXIT_DONE
