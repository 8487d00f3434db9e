"""Training jobs of Slurm, and an evaluation after each, with the configuration frozen as it is now.

For each CONFIG: its resolved copy and what is known about it (git commit, versions, command) are written into the run
directory as submitted-DIGEST.yaml and .json, which no later submission overwrites; a training job of that copy is
submitted, and an evaluation that starts when it has ended well. --array makes one job array of all. Jobs of the same
run wait for each other. What the site decides is read from slurm/cluster.env. No torch is imported: it runs on a
login node.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rating_train
from rating_train import run_dir
from rating_train.config.load import dump_config, load_config
from rating_train.config.resolve import plan_batch, total_steps
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, atomic_write_text
from rating_train.shards.manifest import read_manifest
from rating_train.training.provenance import provenance

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
    """What one training job asks of the cluster. ``tasks``, ``gpus``: of each node."""

    nodes: int
    tasks: int
    gpus: int
    gpu_type: str
    cpus: int  # of each task
    time: str  # "" takes that of the script
    sbatch: tuple[str, ...]  # further options

    def options(self, *, one_node: bool = False, with_time: bool = True) -> list[str]:
        """Options of sbatch."""
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
        cpus_per_task: cores of each task.
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


@dataclass(frozen=True)
class Submission:
    """One configuration, resolved, and where its frozen copy goes."""

    source: str
    config: Config
    text: str

    @property
    def run(self) -> Path:
        return Path(self.config.runs_dir, self.config.name)

    @property
    def frozen(self) -> Path:
        digest = hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:8]
        return self.run / f"submitted-{digest}.yaml"


def site() -> dict[str, str]:
    """The values of ``SITE_NAMES`` after slurm/cluster.env has been read (it is bash), "" where there is none."""
    script = 'if [[ -f "$1" ]]; then source "$1"; fi; shift; for n; do printf "%s\\0" "${!n:-}"; done'
    file = os.environ.get("CLUSTER_ENV") or str(REPO / "slurm" / "cluster.env")
    done = subprocess.run(
        ["bash", "-euc", script, "submit", file, *SITE_NAMES], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError("the site's settings cannot be read", where=file, expected=done.stderr.strip()[-300:])
    return dict(zip(SITE_NAMES, done.stdout.split("\0"), strict=False))


def choose_place(request: Request, values: dict[str, str]) -> Place:
    """The command line over slurm/cluster.env. Errors: :class:`UserError`, all problems in one."""
    problems = []

    def number(option: int | None, name: str, default: int, least: int) -> int:
        text = str(option) if option is not None else values[name] or str(default)
        if not text.isdigit() or int(text) < least:
            problems.append(f"{name} is {text!r}, expected a whole number from {least} on")
            return least
        return int(text)

    gpus = number(request.gpus_per_node, "CLUSTER_GPUS_PER_NODE", 0, 0)
    tasks = number(request.tasks_per_node, "CLUSTER_TASKS_PER_NODE", 1, 1)
    cpus = number(request.cpus_per_task, "CLUSTER_CPUS_PER_TASK", 1, 1)
    if request.nodes < 1:
        problems.append(f"--nodes is {request.nodes}, expected a whole number from 1 on")
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
    return Place(request.nodes, gpus or tasks, gpus, values["CLUSTER_GPU_TYPE"], cpus, time, more)


def resolve(paths: list[str], overrides: list[str], place: Place) -> list[Submission]:
    """The configurations, checked against the number of ranks that they will have."""
    found, problems = [], []
    for path in paths:
        try:
            config = load_config(path, overrides)
            plan_batch(config.batch.global_items, config.batch.micro_items, place.nodes * place.tasks)
            found.append(Submission(path, config, dump_config(config)))
        except UserError as e:
            problems.append(str(e))
    runs = [s.run for s in found]
    problems += [
        f"two configurations have the run directory {run}" for run in sorted(set(runs)) if runs.count(run) > 1
    ]
    if problems:
        raise UserError("; ".join(problems))
    return found


def facts(submission: Submission, place: Place) -> dict[str, Any]:
    """What is known about a submission, for people and for its .json."""
    config, ranks = submission.config, place.nodes * place.tasks
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, ranks)
    steps: int | str
    try:
        split = read_manifest(config.data.path)["splits"][config.data.train_split]
        steps = total_steps(config, split["items"])
    except (UserError, KeyError) as e:
        steps = f"unknown until the data is there ({e})"
    return {
        "config": submission.source,
        "frozen": str(submission.frozen),
        "folder": os.getcwd(),
        "ranks": ranks,
        "batch": f"{plan.global_items} = {plan.ranks} ranks x {plan.micro_items} x {plan.accumulation} accumulation",
        "steps": steps,
        "place": dataclasses.asdict(place),
        "git": git_state(),
    }


def git_state() -> dict[str, Any]:
    """Commit of the checkout and the files that differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPO), *words], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(changed), "changed": changed}
    except (OSError, subprocess.CalledProcessError) as e:
        return {"commit": None, "reason": f"git does not say ({e})"}


def freeze(submission: Submission, place: Place) -> None:
    """Write the resolved configuration and its provenance into the run directory."""
    run_dir.make(submission.run)
    atomic_write_text(submission.frozen, submission.text)
    atomic_write_json(submission.frozen.with_suffix(".json"), provenance(**facts(submission, place)))


def sbatch(command: list[str], dry_run: bool, placeholder: str) -> str:
    """Print the command, run it, and return the id of the job (a placeholder in a dry run)."""
    print(shlex.join(command), flush=True)
    if dry_run:
        return placeholder
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"sbatch refused the job: {done.stderr.strip()}",
            where=shlex.join(command),
            fix="see slurm/cluster.env",
        )
    return done.stdout.strip().partition(";")[0]  # "id;cluster" on federated clusters


def submit_one(submission: Submission, place: Place, request: Request) -> list[str]:
    """One training job and its evaluation; returns the lines to print."""
    run, name = submission.run.resolve(), submission.config.name
    # Jobs of one name and user run one at a time: two jobs must not write one run directory together.
    waits = ["singleton", *([f"afterok:{request.after}"] if request.after else [])]
    common = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", f"--output={run}/logs/slurm-%x-%j.log"]
    train = sbatch(
        [*common, *place.options(), f"--job-name={name}", f"--dependency={','.join(waits)}",
         str(REPO / "slurm" / "train.sbatch"), str(submission.frozen.resolve())],
        request.dry_run, f"<train {name}>",
    )  # fmt: skip
    lines = [f"{name}: train {train}"]
    if request.evaluate:
        evaluate = sbatch(
            [*common, *place.options(one_node=True, with_time=False), f"--job-name=evaluate-{name}",
             f"--dependency=afterok:{train}", str(REPO / "slurm" / "evaluate.sbatch"), str(run)],
            request.dry_run, f"<evaluate {name}>",
        )  # fmt: skip
        lines.append(f"{name}: evaluate {evaluate}")
    return [*lines, f"{name}: logs in {submission.run}/logs"]


def submit_array(submissions: list[Submission], place: Place, request: Request) -> list[str]:
    """One array of all configurations; each evaluation waits for the training of the same index."""
    parallel = f"%{request.parallel}" if request.parallel else ""
    array = f"--array=0-{len(submissions) - 1}{parallel}"
    waits = [f"--dependency=afterok:{request.after}"] if request.after else []
    common = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", array]
    train = sbatch(
        [*common, *place.options(), *waits, str(REPO / "slurm" / "ablations.sbatch"),
         *(str(s.frozen.resolve()) for s in submissions)],
        request.dry_run, "<train>",
    )  # fmt: skip
    lines = [f"train {train}_{i}: {s.run}" for i, s in enumerate(submissions)]
    if request.evaluate:
        evaluate = sbatch(
            [*common, "--output=%x-%A_%a.log", *place.options(one_node=True, with_time=False),
             f"--dependency=aftercorr:{train}", str(REPO / "slurm" / "evaluate.sbatch"),
             *(str(s.run.resolve()) for s in submissions)],
            request.dry_run, "<evaluate>",
        )  # fmt: skip
        lines += [f"evaluate {evaluate}_{i}: {s.run}" for i, s in enumerate(submissions)]
    return lines


def submit(paths: list[str], overrides: list[str], request: Request) -> list[str]:
    """Resolve, freeze and submit every configuration.

    Returns:
        lines for people: the ids of the jobs and where their logs are.

    Raises:
        UserError: settings that do not fit, no sbatch, no checkout, a job that Slurm refuses.
    """
    if not (REPO / "slurm" / "train.sbatch").is_file():
        raise UserError(
            "the job scripts are not there",
            where=REPO / "slurm",
            expected="a checkout of the project, installed with `pip install -e .`",
        )
    place = choose_place(request, site())
    submissions = resolve(paths, overrides, place)
    if not request.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "sbatch not found", fix="run this on a login node of a Slurm cluster, or with --dry-run"
        )
    for submission in submissions:
        known = facts(submission, place)
        for key in ("config", "frozen", "batch", "steps"):
            print(f"{submission.config.name}: {key}: {known[key]}")
        if not request.dry_run:
            freeze(submission, place)
    if request.array:
        return submit_array(submissions, place, request)
    return [line for s in submissions for line in submit_one(s, place, request)]
