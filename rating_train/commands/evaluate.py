"""``rating-train evaluate``: score a checkpoint of a run on a split, on any number of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.commands.shared import add_set_option, load_config_once, require_run
from rating_train.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train evaluate``."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step")
    parser.add_argument("--split", default="", help="split to score (default: that of the run's evaluations)")
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    """Score the checkpoint on all ranks; rank 0 prints the metrics."""
    config = load_config_once(require_run(args.run), args.set)
    from rating_train.distributed.collectives import on_main
    from rating_train.training.evaluate_run import evaluate_run, render

    row = evaluate_run(args.run, config, args.checkpoint, args.split)
    on_main(lambda: print(render(row)))
    return EXIT_DONE
