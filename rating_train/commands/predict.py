"""``rating-train predict``: score the rows of a catalogue, or of a prepared dataset, into one CSV or Parquet file."""

from __future__ import annotations

import argparse

from rating_train.commands.shared import add_options, options_from
from rating_train.errors import EXIT_DONE
from rating_train.prediction.options import PredictOptions
from rating_train.processes import without_collector

_METAVARS = {
    "out": "FILE",
    "source": "FILE",
    "images": "DIR",
    "fetch_set": "NAME=VALUE",
    "data": "DATA",
    "fill": "SCORE",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of :class:`PredictOptions`."""
    add_options(parser, PredictOptions, _METAVARS, positional="model")


def run(args: argparse.Namespace) -> int:
    """Score the rows on all ranks; rank 0 prints what was written."""
    options = options_from(PredictOptions, args)
    with without_collector():
        from rating_train.distributed.collectives import on_main
        from rating_train.prediction.run import predict

    summary = predict(options)
    if summary is not None:
        lines = [f"{options.out}: {summary.rows} rows, {summary.without_score} without a score"]
        lines += [f"  {reason}" for reason in summary.first_reasons]
        on_main(lambda: print("\n".join(lines)))
    return EXIT_DONE
