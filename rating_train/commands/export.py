"""``rating-train export``: a checkpoint to a folder that ``transformers`` loads without this package."""

from __future__ import annotations

import argparse

from rating_train.commands.shared import add_options, options_from
from rating_train.errors import EXIT_DONE
from rating_train.export.options import ExportOptions
from rating_train.processes import without_collector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of :class:`ExportOptions`."""
    add_options(parser, ExportOptions, {"out": "DIR", "onnx_batch": "N", "data": "DATA"}, positional="run")


def run(args: argparse.Namespace) -> int:
    """Export the checkpoint and print how its scores compare."""
    options = options_from(ExportOptions, args)
    with without_collector():
        from rating_train.export.write import export

    size, table = export(options)
    print(f"{options.out}: {size / 2**20:.1f} MiB\n{table}")
    return EXIT_DONE
