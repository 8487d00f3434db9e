"""``rating-train demo``: the demo catalogue and a tiny model; nothing is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.demo.model import CATALOGUE_DIR, MODEL_DIR, make_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to make (default: demo)")
    parser.add_argument("--items", type=int, default=3000, help="listings in the catalogue (default: 3000)")
    parser.add_argument(
        "--seed", type=int, default=17, help="the same seed gives the same bytes (default: 17)"
    )


def run(args: argparse.Namespace) -> int:
    """Make the demo and print what a perfect model would reach."""
    upper_bounds = make_demo(args.out, args.items, args.seed)
    print(f"catalogue: {args.out / CATALOGUE_DIR / 'catalogue.jsonl'}")
    print(f"model:     {args.out / MODEL_DIR}")
    for name, value in upper_bounds.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return 0
