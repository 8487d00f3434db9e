"""``rating-train cost``: parameters, operations, C, E and CES of a configuration, in every counting convention."""

from __future__ import annotations

import argparse

from rating_train.commands.shared import add_set_option
from rating_train.config.load import load_config
from rating_train.reports.cost_report import cost_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train cost``."""
    parser.add_argument("config", help="YAML file")
    add_set_option(parser)
    parser.add_argument("--plcc", type=float, default=None, help="a PLCC, to print CES in every convention")


def run(args: argparse.Namespace) -> int:
    """Print the costs of a configuration."""
    from rating_train.model.load import read_architecture

    config = load_config(args.config, args.set)
    arch = read_architecture(config.model)
    print(cost_report(arch, config.data.image_px, config.data.text_tokens, args.plcc))
    return 0
