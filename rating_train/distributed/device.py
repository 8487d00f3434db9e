"""The device of a rank: its own GPU, or the CPU; never the CPU by accident, never one GPU for two ranks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rating_train.errors import UserError

ROOT = Path("/")
#: CUDA's major version -> oldest major version of the driver that runs it.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_DRIVER_VERSION = re.compile(r"\b\d{3,}\.\d+(?:\.\d+)?\b")


@dataclass(frozen=True)
class Cuda:
    """What torch and the driver report in this process.

    Args:
        count: GPUs that torch can use; 0 if it cannot use any.
        version: CUDA version that torch was built for; ``""`` for a build without CUDA.
        driver: version of the NVIDIA driver; ``""`` if there is none.
        problem: why torch cannot use a GPU; ``""`` if it can.
    """

    count: int
    version: str = ""
    driver: str = ""
    problem: str = ""


def probe() -> Cuda:
    """Ask torch, and if it cannot use a GPU also the driver, for the message that explains it."""
    version = torch.version.cuda or ""
    if torch.cuda.is_available():
        return Cuda(torch.cuda.device_count(), version)
    try:
        torch.cuda.init()
        problem = "no GPU is visible"
    except (RuntimeError, AssertionError) as e:
        problem = str(e).partition(". ")[0].strip().rstrip(".")
    return Cuda(0, version, driver_version(), problem)


def driver_version(root: Path = ROOT) -> str:
    """Return the version of the NVIDIA driver, from /proc or nvidia-smi; ``""`` if there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        text = ""
    if root == ROOT and not text and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
    found = _DRIVER_VERSION.search(text)
    return found.group() if found else ""


def expected_gpu(env: Mapping[str, str], driver: str, root: Path = ROOT) -> str:
    """Return the evidence that this process should have a GPU, or ``""``.

    ``CUDA_VISIBLE_DEVICES`` empty or -1 states that it should not.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hidden = visible.strip() in ("", "NoDevFiles") or visible.strip().startswith("-1")
        return "" if hidden else f"CUDA_VISIBLE_DEVICES={visible}"
    for name, none in (
        ("SLURM_GPUS_ON_NODE", "0"),
        ("SLURM_JOB_GPUS", ""),
    ):  # a number, and a list of indices
        if env.get(name, "").strip() not in ("", none):
            return f"{name}={env[name]}"
    if (root / "dev/nvidia0").exists():
        return "/dev/nvidia0 exists"
    return f"an NVIDIA driver ({driver}) is present" if driver else ""


def choose_device(
    wanted: str, local_rank: int, env: Mapping[str, str], cuda: Cuda, root: Path = ROOT
) -> torch.device:
    """Return this rank's device.

    Where the launcher binds one GPU to each task, every rank sees a single device, number 0; where ranks see all
    GPUs of the node, each takes the one of its local rank. :func:`shared_devices` checks the outcome.

    Args:
        wanted: ``auto`` (a GPU if there is one), ``cuda`` or ``cpu``.
        local_rank: this rank's number on its node.
        env: the environment.
        cuda: result of :func:`probe`.
        root: root of the file system.

    Raises:
        UserError: a GPU is wanted or evidently expected, but torch cannot use one.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if cuda.count:
        return torch.device("cuda", local_rank % cuda.count)
    evidence = "train.device is cuda" if wanted == "cuda" else expected_gpu(env, cuda.driver, root)
    if not evidence:
        return torch.device("cpu")
    raise UserError(
        f"a GPU is expected ({evidence}), but torch cannot use one: {cuda.problem}",
        where=f"torch {torch.__version__} built for {f'CUDA {cuda.version}' if cuda.version else 'CPU only'}, "
        + (f"NVIDIA driver {cuda.driver}" if cuda.driver else "no NVIDIA driver found"),
        expected="a GPU, or train.device=cpu",
        fix=_fix(cuda),
    )


def _fix(cuda: Cuda) -> str:
    cpu = "to run on the CPU, set train.device=cpu"
    if not cuda.version:
        return f"install a CUDA build of torch; {cpu}"
    if not cuda.driver:
        return f"check the node's NVIDIA driver (nvidia-smi); {cpu}"
    driver = int(cuda.driver.partition(".")[0])
    if driver < OLDEST_DRIVER.get(int(cuda.version.partition(".")[0]), 0):
        runs = [major for major, oldest in OLDEST_DRIVER.items() if oldest <= driver]
        older = f"a torch build for CUDA {max(runs)}" if runs else "an older torch build"
        return f"this driver is too old for CUDA {cuda.version}: install {older}, or update the driver; {cpu}"
    return f"request a GPU from the scheduler or the container runtime (--gres=gpu:1, --gpus all); {cpu}"


def shared_devices(devices: Iterable[tuple[str, str]]) -> str:
    """Return which ranks share a GPU, or ``""``.

    Args:
        devices: (node, identifier of the GPU) of every rank, in rank order.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(devices):
        ranks.setdefault(place, []).append(rank)
    shared = [(node, group) for (node, _), group in ranks.items() if len(group) > 1]
    return "; ".join(f"ranks {', '.join(map(str, group))} on {node}" for node, group in shared)
