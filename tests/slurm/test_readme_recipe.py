"""The README's recipe for a cluster, followed line by line in a fresh checkout on the real Slurm."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_settings
from tests.repo.conftest import copy_checkout
from tests.repo.pages import RECIPES, command_lines, section
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.timeout(900)

SITE = """
CLUSTER_GPUS_PER_NODE=0
CLUSTER_TASKS_PER_NODE=1
CLUSTER_CPUS_PER_TASK=1
"""


def test_the_recipe(cluster: Cluster, demo: Path) -> None:
    """The lines are those of the page; the site is this cluster, and the configuration's content a tiny model's."""
    checkout = cluster.folder / "recipe"
    copy_checkout(checkout)
    settings = tiny_settings("full_ft_228m", Path("runs"), demo)
    settings |= {"data": {**settings["data"], "workers": 1}, "train": {"epochs": 1, "eval_every_steps": 0}}  # type: ignore[dict-item]
    (checkout / "configs" / "full_ft_228m.yaml").write_text(yaml.safe_dump(settings))

    def run(*words: str) -> str:
        env = {
            name: value for name, value in cluster.env.items() if name not in ("CLUSTER_ENV", "PYTHONPATH")
        }
        done = subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    copy, submit, _, evaluate = (
        shlex.split(line) for line in command_lines(section("README.md", RECIPES[2]))
    )
    run(*copy)
    site = checkout / copy[-1]
    site.write_text(site.read_text() + SITE)
    jobs = re.findall(r"^full_ft_228m: (train|evaluate) (\d+)$", run(*submit), flags=re.M)
    assert [verb for verb, _ in jobs] == ["train", "evaluate"]
    for _, job in jobs:
        assert cluster.wait_for_end(job, 200)["JobState"] == "COMPLETED", cluster.logs()
    folder = checkout / "runs" / "full_ft_228m"
    (log,) = (folder / "logs").glob("slurm-full_ft_228m-*.log")
    text = log.read_text()
    assert "2 ranks, 2 nodes on cpu" in text
    assert "warning: each rank has 1 of the 2 cores" in text and "CLUSTER_CPUS_PER_TASK=2" in text

    (job,) = run("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", *evaluate[1:]).split()
    assert cluster.wait_for_end(job, 200)["JobState"] == "COMPLETED", cluster.logs()
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows].count("evaluate") == 2


def test_a_job_without_options_asks_for_a_gpu_and_cores(cluster: Cluster) -> None:
    """This cluster has neither, so Slurm itself says what was asked for."""
    scripts = Path(__file__).resolve().parents[2] / "slurm"
    for name in ("train", "evaluate", "ablations"):
        refused = cluster.user("sbatch", scripts / f"{name}.sbatch", "x", check=False)
        assert refused.returncode != 0 and "generic resource (gres)" in refused.stderr
        job = cluster.user(
            "sbatch", "--parsable", "--gpus-per-node=0", scripts / f"{name}.sbatch", "x"
        ).stdout
        assert cluster.job(job.strip())["Task"] == "9"  # CPUs/Task
        cluster.user("scancel", job.strip())
