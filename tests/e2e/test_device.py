"""A job that should have a GPU and cannot use one is refused by every verb that computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU, which is not missing"),
]


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rating_train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


def test_a_gpu_job_without_a_usable_gpu_is_refused(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config()
    run = tmp_path / "evaluated"
    run.mkdir()
    shutil.copy(config, run / "config.yaml")
    started = {
        "train": start("train", config, CUDA_VISIBLE_DEVICES="0"),
        "train, cuda": start("train", config, "--set", "train.device=cuda", CUDA_VISIBLE_DEVICES=""),
        "evaluate": start("evaluate", run, SLURM_JOB_GPUS="0,1"),
        "preflight": start("preflight", tmp_path, SLURM_GPUS_ON_NODE="2"),
        "preflight, cpu": start("preflight", tmp_path, "--device", "cpu", SLURM_GPUS_ON_NODE="2"),
    }
    output = {
        name: (process.communicate(timeout=200)[0], process.returncode) for name, process in started.items()
    }
    evidence = {
        "train": "CUDA_VISIBLE_DEVICES=0",
        "train, cuda": "train.device is cuda",
        "evaluate": "SLURM_JOB_GPUS=0,1",
        "preflight": "SLURM_GPUS_ON_NODE=2",
    }
    for name, expected in evidence.items():
        text, code = output[name]
        assert code == (1 if name == "preflight" else 2), text
        assert f"a GPU is expected ({expected})" in text and "train.device=cpu" in text, text
        assert f"torch {torch.__version__}" in text and "Traceback" not in text, text
    assert not (tmp_path / "runs" / "run" / "LOCK").exists()
    assert output["preflight"][0].count("FAIL") == 1
    text, _ = output["preflight, cpu"]
    assert "a GPU is expected" not in text and "PASS  world" in text, text
