"""``rating-train preflight``: check the nodes of a job. Every rank runs it, and rank 0 prints PASS or FAIL lines.

::

    srun rating-train preflight [RUN] [--config FILE]     in an allocation (PREFLIGHT=1 does it in the jobs of slurm/)
    torchrun ... -m rating_train preflight [RUN] [--config FILE]
    rating-train preflight [RUN] [--config FILE]          this machine alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train import run_dir
from rating_train.commands.shared import add_set_option, load_config_once
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
    parser.add_argument(
        "--config",
        type=Path,
        help="configuration of the job: what it needs of cores and memory (default: RUN/config.yaml, if present)",
    )
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check; exit code 0 if all checks passed, else 1."""
    file = args.config or args.run / run_dir.CONFIG_FILE
    config = load_config_once(file, args.set) if args.config or file.is_file() else None
    from rating_train.cluster.node_checks import preflight

    wanted = args.device if args.device != "auto" or config is None else config.train.device
    return EXIT_DONE if preflight(args.run, config, wanted) else EXIT_BUG
