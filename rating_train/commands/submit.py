"""``rating-train submit``: training, and an evaluation after it, as jobs of Slurm."""

from __future__ import annotations

import argparse
import dataclasses

from rating_train.cluster.site import Request
from rating_train.cluster.submission import submit
from rating_train.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rating-train submit``."""
    add = parser.add_argument
    add("config", nargs="+", help="YAML files")
    add("--set", action="append", default=[], metavar="A.B=V", help="override one setting, of all of them")
    add("--nodes", type=int, default=1, help="nodes of each training job (default: 1)")
    add("--gpus-per-node", type=int, help="GPUs, and tasks, of each node; 0 trains on CPU")
    add("--tasks-per-node", type=int, help="tasks of each node without GPUs")
    add("--cpus-per-task", type=int, help="cores of each task")
    add(
        "--time",
        default="",
        help="time limit of one attempt, as Slurm writes it; the job is requeued at its end",
    )
    add("--after", default="", metavar="JOB", help="start when this job has ended well (data, for example)")
    add("--array", action="store_true", help="one job array of all configurations")
    add(
        "--parallel", type=int, default=0, metavar="N", help="with --array: N at the same time (default: all)"
    )
    add("--no-evaluate", dest="evaluate", action="store_false", help="only train")
    add(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more option, --sbatch=--qos=NAME"
    )
    add("--dry-run", action="store_true", help="print what would be submitted; write and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Submit and print the ids of the jobs."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Request)}
    print("\n".join(submit(args.config, args.set, Request(**{**given, "sbatch": tuple(args.sbatch)}))))
    return EXIT_DONE
