"""``rating-train cost``: parameters, operations, CES by convention; what training takes: hours, memory, disk, cores."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train import log as logs
from rating_train.commands.shared import add_set_option
from rating_train.config.load import load_config
from rating_train.data.lengths import text_tokens_of
from rating_train.errors import UserError
from rating_train.reports.cost_report import cost_report
from rating_train.reports.planning import ASSUMED_MFU, GPUS, make_plan, render_plan
from rating_train.shards.task import with_task_of_data

#: Training items of the paper, for an epoch where --items is not given.
PAPER_ITEMS = 16_455_671


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train cost``."""
    parser.add_argument("config", help="YAML file")
    add_set_option(parser)
    parser.add_argument("--plcc", type=float, default=None, help="a PLCC, to print CES in every convention")
    parser.add_argument(
        "--budget", action="store_true", help="print the PLCC that a CES needs, and what C <= 1 affords"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="A.B=V,V",
        help="print a table over these values; may be repeated: all combinations",
    )
    parser.add_argument("--out", type=Path, help="of --sweep: folder for a CSV and a plot")
    parser.add_argument("--memory", action="store_true", help="predict the memory of a rank instead")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="of --memory and --items: GPUs (default: 1)"
    )
    parser.add_argument(
        "--gpu-gib",
        type=float,
        default=0,
        metavar="G",
        help="of --memory: of one GPU (default: a table of GPUs)",
    )
    plan = parser.add_argument_group("what training takes: hours, memory, disk, network, cores")
    plan.add_argument("--items", type=int, metavar="N", help="items of the training split; prints the plan")
    plan.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default: h100)")
    assumed = ", ".join(map(str, ASSUMED_MFU))
    plan.add_argument(
        "--mfu", type=float, help=f"share of the GPU's bf16 speed that training reaches (default: {assumed})"
    )
    plan.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="in place of --mfu: items/s of one GPU, from samples_per_second in train.jsonl of a short run",
    )
    plan.add_argument(
        "--network-gbit",
        type=float,
        metavar="G",
        help="network of a node of 8 GPUs, in Gbit/s: prints how training scales up to --gpus",
    )


def run(args: argparse.Namespace) -> int:
    """Print the costs of a configuration."""
    if args.sweep:
        return _sweep(args)
    from rating_train.model.architecture import read_architecture

    config = with_task_of_data(load_config(args.config, args.set))
    if config.data.tiling_px and (args.memory or args.budget or args.items is not None):
        raise UserError(
            "memory, hours and budgets are not counted for tiled images",
            where="data.tiling_px",
            fix="leave out --memory, --budget and --items; the operations of an item are counted",
        )
    arch = read_architecture(config.model)
    if args.memory:
        from rating_train.reports.memory_report import measure_memory, render_memory

        logs.set_up()
        print(render_memory(measure_memory(config, arch, args.gpus, args.gpu_gib)), end="")
        return 0
    text_tokens = text_tokens_of(config)
    print(cost_report(arch, config.model_px, text_tokens, args.plcc, config.data.tiles_per_side))
    if args.items is not None:
        print(render_plan(make_plan(config, arch, args.items, args.gpus, args.gpu, args.mfu, args.rate)))
    if args.network_gbit is not None:
        from rating_train.reports.cost.scale import render_scale, scale

        mfu = args.mfu or ASSUMED_MFU[-1]
        found = scale(config, arch, args.gpu, args.gpus, args.network_gbit, mfu)
        print(render_scale(found, args.gpu, args.network_gbit, mfu, args.items or PAPER_ITEMS))
    if args.budget:
        from rating_train.reports.cost import budget as cost_budget
        from rating_train.reports.cost.sweep import measure_config

        measured, _ = measure_config(config, (50, 100, 200, 400))
        print("\n".join(cost_budget.needed_lines(arch, config.model_px, text_tokens)), "\n")
        print("\n".join(cost_budget.affordable_lines(arch, config.model_px, measured)))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from rating_train.reports.cost.sweep import parse_sweep, render_sweep, run_sweep, write_sweep

    found = run_sweep(args.config, args.set, parse_sweep(args.sweep))
    print(render_sweep(found, args.plcc))
    if args.out is not None:
        print("\n".join(map(str, write_sweep(found, args.out, args.plcc))))
    return 0
