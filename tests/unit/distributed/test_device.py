"""The device of a rank: a GPU job never runs on the CPU by accident, and two ranks never share a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rating_train.distributed.device import (
    Cuda,
    choose_device,
    driver_version,
    expected_gpu,
    probe,
    shared_devices,
)
from rating_train.errors import UserError

CPU = torch.device("cpu")
NO_GPU = Cuda(0)
PROC = "proc/driver/nvidia/version"
#: The first line of /proc/driver/nvidia/version of the two kinds of kernel modules.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.239.06  Sat Feb  3 06:03:07 UTC 2024\nGCC version: 12.2.0"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"
)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a file system without GPUs."""
    for folder in ("dev", "proc/driver/nvidia"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def choose(
    wanted: str = "auto",
    env: dict[str, str] | None = None,
    cuda: Cuda = NO_GPU,
    root: Path = Path("/nowhere"),
) -> torch.device:
    return choose_device(wanted, 0, env or {}, cuda, root)


@pytest.mark.parametrize(
    ("env", "evidence"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5a"}, "CUDA_VISIBLE_DEVICES=GPU-5a"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_JOB_GPUS": "0,2"}, "SLURM_JOB_GPUS=0,2"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"SLURM_GPUS_ON_NODE": ""}, ""),
        ({}, ""),
    ],
)
def test_variables_that_promise_a_gpu(env: dict[str, str], evidence: str, root: Path) -> None:
    assert expected_gpu(env, "", root) == evidence


@pytest.mark.parametrize("hidden", ["", " ", "-1", "-1,0", "NoDevFiles"])
def test_hidden_gpus_are_not_expected_whatever_else_is_there(hidden: str, root: Path) -> None:
    (root / "dev/nvidia0").touch()
    env = {"CUDA_VISIBLE_DEVICES": hidden, "SLURM_GPUS_ON_NODE": "8"}
    assert expected_gpu(env, "580.65.06", root) == ""
    assert choose(env=env, cuda=Cuda(0, "13.0", "580.65.06", "no GPU is visible"), root=root) == CPU


def test_a_device_file_or_a_driver_is_evidence(root: Path) -> None:
    assert "580.65.06" in expected_gpu({}, "580.65.06", root)
    (root / "dev/nvidia0").touch()
    assert expected_gpu({}, "", root) == "/dev/nvidia0 exists"


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "470.239.06"), (OPEN, "580.65.06"), ("rubbish", "")])
def test_the_driver_version_is_read_from_proc(text: str, version: str, root: Path) -> None:
    assert driver_version(root) == ""
    (root / PROC).write_text(text)
    assert driver_version(root) == version


def test_this_host_is_probed_as_torch_sees_it() -> None:
    found = probe()
    assert (found.count > 0) == torch.cuda.is_available() == (not found.problem)
    assert found.version == (torch.version.cuda or "")


def test_without_evidence_it_is_the_cpu() -> None:
    assert choose() == CPU


def test_the_cpu_can_be_requested_where_a_gpu_is_expected_or_present() -> None:
    assert choose("cpu", {"SLURM_GPUS_ON_NODE": "4"}, Cuda(0, "13.0", "470.82", TOO_OLD)) == CPU
    assert choose("cpu", cuda=Cuda(4, "13.0")) == CPU


def test_a_driver_that_is_too_old_is_refused_with_both_versions_and_a_fitting_build() -> None:
    with pytest.raises(UserError) as caught:
        choose(env={"SLURM_GPUS_ON_NODE": "4"}, cuda=Cuda(0, "13.0", "535.104.05", TOO_OLD))
    for part in (
        "SLURM_GPUS_ON_NODE=4", "too old", "driver 535.104.05", "CUDA 13.0", f"torch {torch.__version__}",
        "install a torch build for CUDA 12", "update the driver", "train.device=cpu",
    ):  # fmt: skip
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("cuda", "fix"),
    [
        (Cuda(0, "", "580.65.06", "Torch not compiled with CUDA enabled"), "install a CUDA build of torch"),
        (Cuda(0, "13.0", "", "Found no NVIDIA driver on your system"), r"driver \(nvidia-smi\)"),
        (Cuda(0, "13.0", "580.65.06", "no GPU is visible"), "request a GPU from the scheduler"),
        (Cuda(0, "12.8", "390.48", TOO_OLD), "install an older torch build"),
    ],
)
def test_each_cause_has_its_fix(cuda: Cuda, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        choose(env={"CUDA_VISIBLE_DEVICES": "0"}, cuda=cuda)


def test_cuda_without_a_gpu_is_refused_even_without_evidence() -> None:
    with pytest.raises(UserError, match=r"train\.device is cuda"):
        choose("cuda", cuda=Cuda(0, "13.0", "", "Found no NVIDIA driver on your system"))


def test_ranks_take_the_gpu_of_their_local_rank_or_the_only_one_that_they_see() -> None:
    whole_node = [choose_device("auto", rank, {}, Cuda(4, "13.0")).index for rank in range(4)]
    bound = [choose_device("auto", rank, {}, Cuda(1, "13.0")).index for rank in range(4)]
    assert (whole_node, bound) == ([0, 1, 2, 3], [0, 0, 0, 0])


def test_ranks_that_share_a_gpu_are_named_by_node() -> None:
    own = [(node, f"GPU-{node}{i}") for node in ("a", "b") for i in range(2)]
    assert shared_devices(own) == ""
    assert shared_devices([("a", "GPU-1"), ("b", "GPU-1")]) == "", "the same number on two nodes"
    assert shared_devices([*own, ("b", "GPU-b0")]) == "ranks 2, 4 on b"
