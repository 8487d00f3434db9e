"""One shortened quickstart, made once, that several tests of this folder look at and go on from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHORT = {
    "QUICKSTART_ITEMS": "240",
    "QUICKSTART_SET": "train.epochs=0.5 train.log_every_steps=1 batch.global_items=16",
    "QUICKSTART_CHECK": "0",
}


def script_env(**more: str) -> dict[str, str]:
    """The environment of a script under test: this Python, nothing installed, no network, no launcher's leftovers."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    fixed = {
        "PATH": path,
        "RATING_TRAIN_PYTHON": sys.executable,
        "RATING_TRAIN_SKIP_INSTALL": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**env, **fixed, **more}


@dataclass(frozen=True)
class Quickstart:
    """A finished (shortened) run of launch/quickstart.sh: its folder, what it printed, how long it took."""

    folder: Path
    output: str
    seconds: float

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "demo_cpu"


def run_quickstart(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the script in ``folder`` with the short settings."""
    return subprocess.run(
        ["bash", str(REPO / "launch" / "quickstart.sh")],
        env=script_env(**{"QUICKSTART_DIR": str(folder), **SHORT, **env}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The shortened quickstart. ``configs`` and ``launch`` are linked beside its demo/ and runs/."""
    folder = tmp_path_factory.mktemp("quickstart")
    started = time.monotonic()
    done = run_quickstart(folder)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout[-6000:]
    for name in ("configs", "launch"):
        (folder / name).symlink_to(REPO / name)
    return Quickstart(folder, done.stdout, seconds)
