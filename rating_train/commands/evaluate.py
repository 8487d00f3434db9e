"""``rating-train evaluate``: score a checkpoint or an export on a split, on any number of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.commands.shared import add_set_option, load_config_once, require_run
from rating_train.config.schema import Config
from rating_train.errors import EXIT_DONE, EXIT_REQUIREMENT
from rating_train.processes import without_collector
from rating_train.scoring.bootstrap import RESAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train evaluate``."""
    parser.add_argument("run", type=Path, help="run directory, or folder made by `rating-train export`")
    parser.add_argument("--checkpoint", default="best", help="of a run: best (default), latest or a step")
    parser.add_argument("--split", default="", help="split to score (default: that of the run's evaluations)")
    parser.add_argument("--data", default="", metavar="DIR", help="another prepared dataset to score")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="'plcc>=0.6'",
        help="exit with code 3 unless it holds; `plcc.low` is the lower end of the interval; may be repeated",
    )
    parser.add_argument(
        "--slices", action="store_true", help="print tables by category, ratings and text length"
    )
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--no-ridge", action="store_true", help="leave out the baseline that is fitted on the texts"
    )
    parser.add_argument(
        "--out", type=Path, help="of an export: folder of the results (default: EXPORT.evaluation)"
    )
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    """Score the checkpoint on all ranks; rank 0 prints the metrics. All ranks exit with the same code."""
    from rating_train.evaluation.gate import parse_requirements

    required = parse_requirements(args.require)
    config = _config(args)
    with without_collector():
        from rating_train.distributed.collectives import on_main
        from rating_train.evaluation.run import EvaluateOptions, evaluate_model
        from rating_train.evaluation.text import render

    options = EvaluateOptions(
        args.checkpoint, args.split, args.data, args.out, args.resamples, args.seed, not args.no_ridge
    )
    judgement = evaluate_model(args.run, config, options)
    judged = [(requirement.text, requirement.failure(judgement)) for requirement in required]
    failures = [failure for _, failure in judged if failure]
    lines = [render(judgement, args.slices), *(f"NOT MET {failure}" for failure in failures)]
    lines += [f"met     {text}" for text, failure in judged if not failure]
    on_main(lambda: print("\n".join(lines)))
    return EXIT_REQUIREMENT if failures else EXIT_DONE


def _config(args: argparse.Namespace) -> Config:
    from rating_train.weights.exported import exported_config, is_exported

    if is_exported(args.run):
        return exported_config(args.run, tuple(args.set))
    return load_config_once(require_run(args.run), args.set)
