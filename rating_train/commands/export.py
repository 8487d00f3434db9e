"""``rating-train export``: a checkpoint to a folder that ``transformers`` loads without this package."""

from __future__ import annotations

import argparse
import dataclasses

from rating_train.commands.shared import add_set_option
from rating_train.errors import EXIT_DONE
from rating_train.export.options import ONNX_PRECISIONS, ExportOptions
from rating_train.prediction.options import DEVICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train export``; the defaults are those of :class:`ExportOptions`."""
    default = {f.name: f.default for f in dataclasses.fields(ExportOptions)}
    parser.add_argument("run", help="run directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; must not exist")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step")
    parser.add_argument(
        "--onnx",
        nargs="+",
        default=(),
        choices=ONNX_PRECISIONS,
        help="precisions to write as ONNX graphs too",
    )
    parser.add_argument(
        "--onnx-batch",
        type=int,
        default=0,
        metavar="N",
        help="items that a graph takes (default: any number)",
    )
    parser.add_argument(
        "--data", default="", metavar="DATA", help="dataset to compare on (default: the run's)"
    )
    parser.add_argument(
        "--items",
        type=int,
        default=default["items"],
        help=f"items to compare on (default: {default['items']})",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where both are scored (default: auto)"
    )
    parser.add_argument("--licence", default="", help="licence for the model card (default: the backbone's)")
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    """Export the checkpoint and print how its scores compare."""
    names = [f.name for f in dataclasses.fields(ExportOptions) if f.name != "settings"]
    given = {name: getattr(args, name) for name in names} | {"onnx": tuple(args.onnx)}
    options = ExportOptions(**given, settings=tuple(args.set))
    from rating_train.export.write import export

    exported = export(options)
    print(f"{exported.folder}: {exported.bytes / 2**20:.1f} MiB\n{exported.table}")
    return EXIT_DONE
