"""``rating-train bench``: how fast a configuration runs here, each part against a limit of the same run."""

from __future__ import annotations

import argparse
from pathlib import Path

from rating_train.bench.result import (
    MORE_PARTS,
    PARTS,
    as_json,
    compare,
    is_slower,
    read_result,
    render,
    render_comparison,
)
from rating_train.commands.shared import add_set_option, load_config_once
from rating_train.errors import EXIT_DONE, EXIT_REQUIREMENT, UserError
from rating_train.files import atomic_write_json
from rating_train.log import process_rank
from rating_train.processes import without_collector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train bench``."""
    parser.add_argument("config", help="YAML file; without its data or backbone, synthetic ones are measured")
    add_set_option(parser)
    parser.add_argument(
        "--part",
        action="append",
        choices=(*PARTS, *MORE_PARTS),
        help=f"measure this part; may be repeated (default: {', '.join(PARTS)})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: 5)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a round (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to a file")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="of --part profile: write its trace, for ui.perfetto.dev"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="compare with a result of --json; exit code 3 if slower"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="X",
        help="of --compare: share by which a figure may be slower (default: 0.1)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and compare; 3 where a figure is slower than before by more than the tolerance."""
    config = load_config_once(args.config, args.set)
    before = read_result(args.compare) if args.compare else {}
    with without_collector():
        from rating_train.bench.run import run_bench

    if args.trace and "profile" not in (args.part or ()):
        raise UserError("--trace needs a profile", where="--trace", fix="add --part profile")
    parts = [part for part in (*PARTS, *MORE_PARTS) if part in (args.part or PARTS)]
    machine, rows = run_bench(config, parts, max(1, args.rounds), max(1, args.steps), args.trace)
    if process_rank() != 0:
        return EXIT_DONE
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(render(rows))
    if args.json:
        atomic_write_json(args.json, as_json(machine, rows))
    if not args.compare:
        return EXIT_DONE
    differences = compare(before, rows)
    print("\n" + render_comparison(differences, args.tolerance))
    return EXIT_REQUIREMENT if any(is_slower(d, args.tolerance) for d in differences) else EXIT_DONE
