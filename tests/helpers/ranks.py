"""Jobs of several ranks on this machine's CPU: started, waited for, killed, and what they leave removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.helpers.forked import REPO, Forked, zygote

SHARED_MEMORY = Path("/dev/shm")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")

Process = subprocess.Popen[str] | Forked


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's words: one thread, no network, and ``more``."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def script_env(**more: str) -> dict[str, str]:
    """The environment of a script under test: this Python, nothing installed, no network, no launcher's leftovers."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    fixed = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}",
        "RATING_TRAIN_PYTHON": sys.executable,
        "RATING_TRAIN_SKIP_INSTALL": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**env, **fixed, **more}


class Ranks:
    """Starts jobs of several ranks, each job in a session of its own, and ends what is left.

    By default the ranks are forked (see :mod:`tests.helpers.zygote`); torchrun starts real interpreters.
    """

    def __init__(self) -> None:
        self.started: list[Process] = []
        self._folder = tempfile.mkdtemp(prefix="rt-")  # short: sockets are made in it

    def close(self) -> None:
        """Kill what still runs, and remove the files that killed jobs left."""
        for process in self.started:
            if process.poll() is None:
                self.kill(process)
                process.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(
        self,
        ranks: int,
        *command: object,
        env: dict[str, str] | None = None,
        max_restarts: int = 0,
        torchrun: bool = True,
        cwd: Path = REPO,
    ) -> Process:
        """Start ``python COMMAND`` on so many ranks, by torchrun or forked, and return at once."""
        environment = clean_environment(
            TMPDIR=self._folder,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # as launch/env.sh has it
        )
        environment |= env or {}
        if torchrun:
            process: Process = start_torchrun(ranks, command, environment, max_restarts, cwd)
        else:
            process = zygote().start(command, environment, ranks=ranks, cwd=cwd)
        self.started.append(process)
        return process

    def start_script(
        self, name: str, *words: object, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a script of launch/ in this checkout, and return at once."""
        env = script_env(OMP_NUM_THREADS="1", TMPDIR=self._folder)
        process = in_own_session(["bash", str(REPO / "launch" / name), *map(str, words)], env, output=output)
        self.started.append(process)
        return process

    def run(
        self,
        ranks: int,
        *command: object,
        timeout: float = 240,
        env: dict[str, str] | None = None,
        code: int = 0,
        cwd: Path = REPO,
    ) -> str:
        """Run to the end, expecting exit code ``code`` of the launcher (0, or 1 for any failure); its output."""
        process = self.start(ranks, *command, env=env, torchrun=False, cwd=cwd)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill(process)
            output, _ = process.communicate()
            pytest.fail(f"no end after {timeout} s: {command}\n{output[-6000:]}")
        assert process.returncode == code, f"exit code {process.returncode}: {command}\n{output[-6000:]}"
        return output

    def train(self, ranks: int, config: Path, *options: object, **more: object) -> str:
        """``rating-train train`` on so many ranks."""
        return self.run(ranks, "-m", "rating_train", "train", config, *options, **more)  # type: ignore[arg-type]

    @staticmethod
    def kill(process: Process) -> None:
        """kill -9 of the launcher and all that it started (torchrun's ranks live in sessions of their own)."""
        try:
            launcher = psutil.Process(process.pid)
            family = [*launcher.children(recursive=True), launcher]
        except psutil.NoSuchProcess:
            return
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)


def start_torchrun(
    ranks: int, command: tuple[object, ...], env: dict[str, str], max_restarts: int, cwd: Path = REPO
) -> subprocess.Popen[str]:
    """Start torchrun itself, in a session of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    return in_own_session([*launcher, *map(str, command)], env, cwd=cwd)


def in_own_session(
    command: list[str], env: dict[str, str], cwd: Path = REPO, output: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a command in a session of its own, as a shell does; all that it prints is one stream."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int, process: Process) -> None:
    """Wait until a run has logged so many steps, while its job lives."""
    log = run / "train.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"step {step} was not reached in 120 s"
        time.sleep(0.05)


def mapped_files() -> set[str]:
    """Files of shared memory that some process on this machine has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has just ended, or is another user's
            found |= {
                line.split(maxsplit=5)[5].strip()
                for line in maps.read_text().splitlines()
                if "/dev/shm/" in line
            }
    return found
