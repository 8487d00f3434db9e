"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import UserError


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set A.B=V``, which may be given several times."""
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="override one setting")


def load_config_once(path: str | Path, overrides: list[str]) -> Config:
    """Load the configuration on a rank; every rank reads the same file, so rank 0 alone reports its problems."""
    try:
        return load_config(path, overrides)
    except UserError as e:
        e.on_all_ranks = True
        raise
