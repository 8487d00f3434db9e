"""Submit training jobs to Slurm, and an evaluation after each, with the configuration frozen as it is now.

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
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.cluster.site import REPO, Place, Request, choose_place, read_site, site_file
from rating_train.config.load import dump_config, load_config
from rating_train.config.resolve import plan_batch, total_steps
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, atomic_write_text, make_folder
from rating_train.shards.manifest import read_manifest
from rating_train.training.provenance import provenance


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


def warnings(place: Place, submissions: list[Submission]) -> list[str]:
    """Return what is probably not meant, each with what to set."""
    found = []
    if not place.chosen:
        file = site_file()
        found.append(
            f"neither {file} nor an option says what a node has: this plans {place.tasks} task without a GPU on each | "
            f"fix: copy {REPO / 'slurm' / 'cluster.env.example'} to {file} and set CLUSTER_GPUS_PER_NODE, or give "
            "--gpus-per-node (0 and --tasks-per-node for nodes without GPUs)"
        )
    found += [
        f"{s.source}: a task has {place.cpus} cores for data.workers={s.config.data.workers} and itself | "
        f"fix: give --cpus-per-task={s.config.data.workers + 1} (CLUSTER_CPUS_PER_TASK), or lower data.workers"
        for s in submissions
        if place.cpus < s.config.data.workers + 1
    ]
    return found


def load(paths: list[str], overrides: list[str]) -> list[Submission]:
    """Load the configurations.

    Raises:
        UserError: the problems of all of them in one.
    """
    found, problems = [], []
    for path in paths:
        try:
            config = load_config(path, overrides)
            found.append(Submission(path, config, dump_config(config)))
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise UserError("; ".join(problems))
    return found


def check(submissions: list[Submission], place: Place) -> None:
    """Check the configurations against the number of ranks that they will have, and against each other.

    Raises:
        UserError: a batch that does not divide, or two configurations of one run; all problems in one.
    """
    problems = []
    for s in submissions:
        try:
            plan_batch(s.config.batch.global_items, s.config.batch.micro_items, place.nodes * place.tasks)
        except UserError as e:
            problems.append(str(e))
    runs = [s.run for s in submissions]
    problems += [
        f"two configurations have the run directory {run}" for run in sorted(set(runs)) if runs.count(run) > 1
    ]
    if problems:
        raise UserError("; ".join(problems))


def facts(submission: Submission, place: Place) -> dict[str, Any]:
    """Return what is known about a submission, for people and for its .json."""
    config, ranks = submission.config, place.nodes * place.tasks
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, ranks)
    steps: int | str
    try:
        manifests = [read_manifest(source.path) for source in config.data.train_sources]
        items = sum(manifest["splits"][config.data.train_split]["items"] for manifest in manifests)
        steps = total_steps(config, items)
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
    """Return the commit of the checkout, and the files that differ from it."""

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
    for folder in run_dir.folders(submission.run):
        make_folder(folder)
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
    """Submit one training job and its evaluation; returns the lines to print."""
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
    """Submit one array of all configurations; each evaluation waits for the training of the same index."""
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
    submissions = load(paths, overrides)
    place = choose_place(request, read_site(), max(s.config.data.workers for s in submissions))
    check(submissions, place)
    if not request.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "sbatch not found", fix="run this on a login node of a Slurm cluster, or with --dry-run"
        )
    for text in warnings(place, submissions):
        if not place.chosen and not request.dry_run:
            raise UserError(text)
        print(f"rating-train submit: warning: {text}", file=sys.stderr)
    for submission in submissions:
        known = facts(submission, place)
        for key in ("config", "frozen", "batch", "steps"):
            print(f"{submission.config.name}: {key}: {known[key]}")
        if not request.dry_run:
            freeze(submission, place)
    if request.array:
        return submit_array(submissions, place, request)
    return [line for s in submissions for line in submit_one(s, place, request)]
