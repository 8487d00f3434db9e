"""What a site gives its jobs: slurm/cluster.env, and the command line over it. No torch: it runs on a login node."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import rating_train
from rating_train.errors import UserError

#: The checkout: the job scripts are in its slurm/ folder.
REPO = Path(rating_train.__file__).resolve().parents[1]

SITE_NAMES = (
    "CLUSTER_SBATCH",
    "CLUSTER_GPUS_PER_NODE",
    "CLUSTER_GPU_TYPE",
    "CLUSTER_TASKS_PER_NODE",
    "CLUSTER_CPUS_PER_TASK",
    "CLUSTER_TIME",
)


@dataclass(frozen=True)
class Place:
    """What one training job asks of the cluster.

    Args:
        nodes: number of nodes.
        tasks: of each node.
        gpus: of each node.
        gpu_type: as in ``--gpus-per-node=TYPE:N``; "" takes any.
        cpus: cores of each task.
        time: limit of one attempt; "" takes that of the script.
        sbatch: further options of sbatch.
        chosen: whether the site or the command line said what a node has.
    """

    nodes: int
    tasks: int
    gpus: int
    gpu_type: str
    cpus: int
    time: str
    sbatch: tuple[str, ...]
    chosen: bool

    def options(self, *, one_node: bool = False, with_time: bool = True) -> list[str]:
        """Return the options of sbatch."""
        options = [
            *self.sbatch,
            f"--nodes={1 if one_node else self.nodes}",
            f"--ntasks-per-node={self.tasks}",
            f"--cpus-per-task={self.cpus}",
        ]
        # 0 too: the scripts ask for one by themselves.
        kind = f"{self.gpu_type}:" if self.gpu_type and self.gpus else ""
        options.append(f"--gpus-per-node={kind}{self.gpus}")
        if self.time and with_time:
            options.append(f"--time={self.time}")
        return options


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; ``None`` or ``""`` takes the site's value (slurm/cluster.env).

    Args:
        nodes: of each training job.
        gpus_per_node: GPUs, and tasks, of each node; 0 trains on CPU.
        tasks_per_node: tasks of each node without GPUs.
        cpus_per_task: cores of each task; without it and a site's value, one and one for each DataLoader worker.
        time: limit of one attempt, as Slurm writes it.
        after: id of a job that must have ended well first.
        array: one job array of all configurations.
        parallel: with ``array``, jobs at the same time; 0 is all.
        evaluate: submit an evaluation after each training job.
        sbatch: further options of sbatch.
        dry_run: print what would be submitted; write and submit nothing.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str = ""
    after: str = ""
    array: bool = False
    parallel: int = 0
    evaluate: bool = True
    sbatch: tuple[str, ...] = ()
    dry_run: bool = False


def site_file() -> Path:
    """Return where the site's settings are, or would be."""
    return Path(os.environ.get("CLUSTER_ENV") or REPO / "slurm" / "cluster.env")


def read_site() -> dict[str, str]:
    """Return the values of ``SITE_NAMES`` after slurm/cluster.env was read (it is bash), "" where it sets none.

    Raises:
        UserError: bash cannot read it.
    """
    file = str(site_file())
    script = 'if [[ -f "$1" ]]; then source "$1"; fi; shift; for n; do printf "%s\\0" "${!n:-}"; done'
    done = subprocess.run(
        ["bash", "-euc", script, "submit", file, *SITE_NAMES], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError("the site's settings cannot be read", where=file, expected=done.stderr.strip()[-300:])
    return dict(zip(SITE_NAMES, done.stdout.split("\0"), strict=False))


def choose_place(request: Request, values: dict[str, str], workers: int) -> Place:
    """Combine the command line with slurm/cluster.env, the command line first.

    Args:
        request: the command line.
        values: what :func:`read_site` returned.
        workers: DataLoader workers of each task, from which its cores follow where nobody says how many.

    Raises:
        UserError: all problems in one.
    """
    problems = []

    def number(option: int | None, name: str, default: int, least: int) -> int:
        text = str(option) if option is not None else values[name] or str(default)
        if not text.isdigit() or int(text) < least:
            problems.append(f"{name} is {text!r}, expected an integer of at least {least}")
            return least
        return int(text)

    gpus = number(request.gpus_per_node, "CLUSTER_GPUS_PER_NODE", 0, 0)
    tasks = number(request.tasks_per_node, "CLUSTER_TASKS_PER_NODE", 1, 1)
    cpus = number(request.cpus_per_task, "CLUSTER_CPUS_PER_TASK", workers + 1, 1)
    if request.nodes < 1:
        problems.append(f"--nodes is {request.nodes}, expected an integer of at least 1")
    if request.after and not re.fullmatch(r"[0-9]+(_[0-9]+)?", request.after):
        problems.append(f"--after is {request.after!r}, expected the number of a job")
    if request.tasks_per_node is not None and gpus:
        problems.append("--tasks-per-node is for nodes without GPUs: with GPUs each has one task")
    time = request.time or values["CLUSTER_TIME"]
    if time and not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", time):
        problems.append(f"--time is {time!r}, expected a limit of Slurm: MINUTES, H:MM:SS or D-HH:MM:SS")
    if problems:
        raise UserError("; ".join(problems), where="options and slurm/cluster.env")
    more = (*shlex.split(values["CLUSTER_SBATCH"]), *request.sbatch)
    said = (request.gpus_per_node, request.tasks_per_node) != (None, None)
    chosen = said or bool(values["CLUSTER_GPUS_PER_NODE"] or values["CLUSTER_TASKS_PER_NODE"])
    return Place(request.nodes, gpus or tasks, gpus, values["CLUSTER_GPU_TYPE"], cpus, time, more, chosen)
