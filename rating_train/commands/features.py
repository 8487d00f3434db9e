"""``rating-train features``: store the visual tokens of a frozen vision tower, for training of the decoder alone."""

from __future__ import annotations

import argparse
import json

from rating_train.commands.shared import add_set_option, load_config_once
from rating_train.errors import EXIT_DONE, UserError
from rating_train.log import process_rank
from rating_train.processes import without_collector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train features``."""
    parser.add_argument("config", help="YAML file of a recipe with `model.freeze: [vision, connector]`")
    add_set_option(parser)
    parser.add_argument(
        "--out", default="", metavar="DIR", help="the directory to make (default: the recipe's data.features)"
    )


def run(args: argparse.Namespace) -> int:
    """Encode every image once; a command that was stopped continues after the shards that it has finished."""
    given = [f"data.features={json.dumps(args.out)}"] if args.out else []
    config = load_config_once(args.config, [*args.set, *given])
    if not config.data.features:
        raise UserError("no directory is given", where="--out", fix="add --out DIR", on_all_ranks=True)
    with without_collector():
        from rating_train.features.run import make_features

    manifest = make_features(config)
    if process_rank() == 0:
        items = sum(split["items"] for split in manifest["splits"].values())
        size = sum(split["bytes"] for split in manifest["splits"].values())
        print(f"{config.data.features}: {items:,} items, {size / 2**20:,.1f} MiB")
        print(f"train with: --set data.features={config.data.features}")
    return EXIT_DONE
