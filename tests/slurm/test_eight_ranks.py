"""Eight ranks as two nodes of four on a real Slurm, then four as two of two: the run reads what one rank would read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPO, full
from tests.helpers.runs import global_batches, losses
from tests.slurm.conftest import running_cluster

TRAIN = REPO / "slurm" / "train.sbatch"
SECTIONS = {
    "batch": {"global_items": 24},
    "optim": {"schedule": "constant", "warmup_fraction": 0.0},
}


@full
@pytest.mark.timeout(1500)
def test_two_nodes_of_four_then_of_two(tiny_config: Callable[..., Path]) -> None:
    """Eight processes that import torch share the cores of this machine: it takes minutes."""
    with running_cluster(cpus=4) as cluster:
        runs = cluster.folder / "runs"
        train = {"epochs": 9, "max_steps": 4, "precision": "fp32"}
        path = tiny_config("eight", runs_dir=str(runs), train=train, **SECTIONS)
        for tasks, last in ((4, 4), (2, 8)):
            options = ("--nodes=2", f"--ntasks-per-node={tasks}", f"--output=eight-{tasks}.log")
            job = cluster.sbatch(*options, TRAIN, path, "--set", f"train.max_steps={last}")
            assert cluster.wait_for_end(job, 600)["JobState"] == "COMPLETED", cluster.logs()
            log = (cluster.folder / f"eight-{tasks}.log").read_text()
            assert f"{2 * tasks} ranks, 2 nodes on cpu" in log
        assert "loading a checkpoint of 8 ranks" in log
        path = tiny_config("one", runs_dir=str(runs), train={**train, "max_steps": 8}, **SECTIONS)
        job = cluster.sbatch("--nodes=1", "--ntasks-per-node=1", "--output=one.log", TRAIN, path)
        assert cluster.wait_for_end(job, 300)["JobState"] == "COMPLETED", cluster.logs()
        assert global_batches(runs / "eight") == global_batches(runs / "one")
        assert losses(runs / "eight") == pytest.approx(losses(runs / "one"), rel=1e-5)
