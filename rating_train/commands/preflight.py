"""``rating-train preflight``: check the nodes of a job. Every rank runs it, and rank 0 prints PASS or FAIL lines.

::

    srun rating-train preflight [RUN]        in an allocation (PREFLIGHT=1 does it in the jobs of slurm/)
    torchrun ... -m rating_train preflight [RUN]
    rating-train preflight [RUN]             this machine alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.errors import EXIT_BUG, EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train preflight``."""
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="a folder that all nodes must share (default: runs)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="as `train.device`: with auto (default), a missing GPU fails where one is evidently expected",
    )


def run(args: argparse.Namespace) -> int:
    """Check; exit code 0 if all passed, else 1."""
    from rating_train.cluster.node_checks import preflight

    return EXIT_DONE if preflight(args.run, args.device) else EXIT_BUG
