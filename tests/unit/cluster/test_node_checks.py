"""What preflight asks of a node for one configuration: memory and cores, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.cluster import node_checks
from rating_train.cluster.node_checks import Report, check_cores, check_memory, check_shared_memory
from rating_train.config.load import config_from_dict
from rating_train.config.schema import Config
from rating_train.data.workers.memory_need import shared_memory_need
from rating_train.distributed.world import World
from rating_train.training.checks import available_memory


def config(**data: object) -> Config:
    return config_from_dict({"name": "run", "data": data, "batch": {"global_items": 64}})


def checked(
    check: Callable[..., None], capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    report = Report(is_main=True)
    check(report, World(), *arguments)
    return report.failures, capsys.readouterr().out


def test_memory_is_what_the_loaders_of_the_configuration_need(capsys: pytest.CaptureFixture[str]) -> None:
    small = config(workers=1, prefetch_batches=1, image_px=64)
    failures, line = checked(check_memory, capsys, small)
    assert failures == 0 and line.startswith("PASS  memory: at least ")
    assert f"{shared_memory_need(small, 1, 1) / 2**30:.2f} GiB needed for batches (for data.workers=1" in line

    large = config(workers=256, prefetch_batches=1024, image_px=384)
    needed = shared_memory_need(large, 1, 1)
    assert needed > available_memory(), "the case is as large as a configuration can be"
    failures, line = checked(check_memory, capsys, large)
    assert failures == 1 and line.startswith("FAIL  memory: ")
    assert f"expected {needed / 2**30:.2f} GiB (for data.workers=256 and data.prefetch_batches=1024" in line
    assert "lower data.workers or data.prefetch_batches" in line

    failures, line = checked(check_memory, capsys, config(workers=0))
    assert failures == 0 and "0.00 GiB needed" in line


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_dev_shm_is_for_nccl_between_the_gpus_of_a_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(device: str, gpus: int) -> tuple[int, str]:
        report = Report(is_main=True)
        check_shared_memory(report, World(local_size=gpus), torch.device(device))
        return report.failures, capsys.readouterr().out

    assert said("cpu", 8) == (0, "") and said("cuda", 1) == (0, "")
    monkeypatch.setattr(node_checks, "NCCL_SHARED_MEMORY_GIB", 0.0)
    failures, line = said("cuda", 8)
    assert failures == 0 and line.startswith("PASS  /dev/shm: at least ")
    monkeypatch.setattr(node_checks, "NCCL_SHARED_MEMORY_GIB", 2.0**20)
    failures, line = said("cuda", 8)
    assert failures == 1 and "expected 1048576.00 GiB for NCCL" in line and "--shm-size=1g" in line


def test_cores_are_those_that_the_job_may_use(capsys: pytest.CaptureFixture[str]) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        failures, line = checked(check_cores, capsys, config(workers=8))
        assert failures == 1 and "FAIL  cores: " in line and ": 1 cores for 1 ranks with 8" in line
        assert "--cpus-per-task=9" in line and "CLUSTER_CPUS_PER_TASK" in line
        failures, line = checked(check_cores, capsys, config(workers=0))
        assert failures == 0 and line == "PASS  cores: at least 1 for each rank (data.workers=0)\n"
    finally:
        os.sched_setaffinity(0, allowed)
