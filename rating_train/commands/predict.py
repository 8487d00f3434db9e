"""``rating-train predict``: score the rows of a catalogue, or of a prepared dataset, into one CSV or Parquet file."""

from __future__ import annotations

import argparse
import dataclasses

from rating_train.commands.shared import add_set_option
from rating_train.errors import EXIT_DONE
from rating_train.prediction.options import DEVICES, PredictOptions
from rating_train.scoring.ces import CONVENTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train predict``; the defaults are those of :class:`PredictOptions`."""
    default = {f.name: f.default for f in dataclasses.fields(PredictOptions)}
    parser.add_argument("model", help="run directory, or folder made by `rating-train export`")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, .csv or .parquet")
    parser.add_argument("--checkpoint", default="best", help="of a run: best (default), latest or a step")
    parser.add_argument(
        "--source",
        nargs="+",
        default=(),
        metavar="FILE",
        help="catalogues: JSON lines, CSV (also .gz, .zst), Parquet",
    )
    parser.add_argument("--images", default="", metavar="DIR", help="folder (or archive) with the images")
    parser.add_argument("--fetch", action="store_true", help="fetch images that are URLs")
    parser.add_argument(
        "--fetch-set", nargs="+", default=(), metavar="NAME=VALUE", help="with --fetch: per_host=16 and so on"
    )
    parser.add_argument(
        "--data", default="", metavar="DATA", help="prepared dataset to score instead of --source"
    )
    parser.add_argument("--split", default="", help="its split (default: that of the run's evaluations)")
    for name, text in (
        ("batch_items", "items of a forward pass"),
        ("part_rows", "rows of a part: what a killed command does again, at most, for each rank"),
        ("workers", "processes of each rank that read and decode images"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default[name], help=f"{text} (default: {default[name]})")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto (default): a GPU if there is one"
    )
    parser.add_argument(
        "--submission", action="store_true", help="write the challenge's file: item_id, score, params, flops"
    )
    parser.add_argument(
        "--convention",
        choices=tuple(CONVENTIONS),
        default=default["convention"],
        help=f"how a submission counts its operations (default: {default['convention']})",
    )
    parser.add_argument(
        "--fill", type=float, metavar="SCORE", help="in a submission, the score of rows that cannot be scored"
    )
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    """Score the rows on all ranks; rank 0 prints what was written."""
    names = [f.name for f in dataclasses.fields(PredictOptions) if f.name != "settings"]
    given = {name: getattr(args, name) for name in names}
    given |= {name: tuple(given[name]) for name in ("source", "fetch_set")}
    options = PredictOptions(**given, settings=tuple(args.set))
    from rating_train.distributed.collectives import on_main
    from rating_train.prediction.run import predict

    summary = predict(options)
    if summary is not None:
        lines = [f"{options.out}: {summary.rows} rows, {summary.without_score} without a score"]
        lines += [f"  {reason}" for reason in summary.first_reasons]
        on_main(lambda: print("\n".join(lines)))
    return EXIT_DONE
