"""launch/multi_node.sh: two "machines" that are this one, a process on each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks
from tests.slurm.conftest import free_ports, wait_until


@pytest.fixture
def machine(ranks: Ranks, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as on machine K of two; ``ranks`` kills what is left."""
    (port,) = free_ports(1)

    def start(k: int, *words: object) -> subprocess.Popen[str]:
        where = ["--nodes", "2", "--node-rank", str(k), "--head", f"127.0.0.1:{port}", "-n", "1"]
        log = tmp_path / f"machine-{k}.log"
        with open(log, "w") as output:
            return ranks.start_script("multi_node.sh", *where, *words, output=output)

    return start


@pytest.mark.timeout(600)
def test_two_machines_resume_after_a_process_was_killed(
    machine: Callable[..., subprocess.Popen[str]], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(train={"epochs": 4000, "save_every_steps": 5, "stop_check_steps": 5})
    run, logs = tmp_path / "runs" / "run", [tmp_path / "machine-0.log", tmp_path / "machine-1.log"]
    explain = lambda: "\n".join(log.read_text()[-3000:] for log in logs if log.exists())  # noqa: E731
    second = machine(1, "--max-restarts", "3", "train", config)
    time.sleep(1)  # machine 1 waits for machine 0
    first = machine(0, "--max-restarts", "3", "train", config)
    wait_until(lambda: (run / "checkpoints" / "latest.json").is_file(), 250, "a checkpoint", explain)
    (rank,) = psutil.Process(second.pid).children()
    os.kill(rank.pid, signal.SIGKILL)
    wait_until(lambda: "resuming from step" in logs[0].read_text(), 250, "a restart", explain)
    (run / "STOP").touch()
    for process in (first, second):
        assert process.wait(timeout=250) == 0, explain()
    text = explain() + "".join(log.read_text() for log in logs)
    assert "2 ranks, 2 nodes on cpu" in text and "resuming from step" in text
    last = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    steps = [json.loads(line)["step"] for line in (run / "train.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 1))
