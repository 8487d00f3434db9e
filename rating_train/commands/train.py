"""``rating-train train``: train a regressor, in one process or as one rank of many."""

from __future__ import annotations

import argparse

from rating_train.commands.shared import add_set_option, load_config_once
from rating_train.errors import EXIT_DONE
from rating_train.processes import without_collector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train train``."""
    parser.add_argument("config", help="YAML file")
    add_set_option(parser)
    parser.add_argument(
        "--resume", default="auto", help="auto (default), never, must, or the path of a checkpoint directory"
    )


def run(args: argparse.Namespace) -> int:
    """Check the settings before torch is imported, so that a typo is answered at once; then train."""
    config = load_config_once(args.config, args.set)
    with without_collector():
        from rating_train.training.loop import train

    train(config, args.resume)
    return EXIT_DONE
