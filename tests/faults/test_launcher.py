"""Signals to launch/local.sh as a terminal or a person sends them, and failures: real torchrun, real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks
from tests.faults.test_stop import LONG, wait_for_step

pytestmark = pytest.mark.timeout(300)


def end(process: subprocess.Popen[str], code: int, timeout: float = 120) -> str:
    """Wait for the end; the output, which holds neither a traceback nor torchrun's table of failures."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output[-4000:]
    assert "Traceback" not in output and "ChildFailedError" not in output and "=====" not in output, output[
        -4000:
    ]
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_stops_in_order(
    number: signal.Signals, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    process = ranks.start_script("local.sh", "-n", "2", "train", tiny_config(train=LONG))
    wait_for_step(run, 3, process)
    os.killpg(process.pid, number)
    output = end(process, 0)
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    assert f"signal {number.name} at step {step}" in output
    (line,) = (line for line in output.splitlines() if line.startswith("launcher: "))
    assert (
        line == f"launcher: stopped by {number.name}: all ranks exited with code 0; the same command resumes"
    )
    # A person who pressed Ctrl-C does not want the run back; what sends TERM does.
    assert (run / "REQUEUE").exists() == (number == signal.SIGTERM)


def test_ranks_that_cannot_stop_yet_end_and_are_not_restarted(
    ranks: Ranks, tiny_config: Callable[..., Path]
) -> None:
    """With restarts allowed; the first signal comes before any rank could install a handler."""
    where = [
        "--nodes",
        "1",
        "--node-rank",
        "0",
        "--head",
        "localhost:29871",
        "-n",
        "2",
        "--max-restarts",
        "3",
    ]
    process = ranks.start_script("multi_node.sh", *where, "train", tiny_config(train=LONG))
    deadline = time.monotonic() + 120
    while len(psutil.Process(process.pid).children()) < 2 or "launcher" not in cmdline(process.pid):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (130, 128 + signal.SIGTERM), output[-4000:]
    assert "step 1/" not in output and re.search(r"^launcher: ", output, flags=re.M), output[-4000:]


def cmdline(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def test_a_user_error_is_shown_once_with_its_exit_code(
    ranks: Ranks, tiny_config: Callable[..., Path], demo: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo / "data", data)
    (data / "manifest.json").unlink()
    output = end(ranks.start_script("local.sh", "-n", "2", "train", tiny_config(data={"path": str(data)})), 2)
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 2 and "manifest.json" in errors[0], output
    assert re.fullmatch(
        r"launcher: error: rank \d ended with exit code 2; its message is above \(.*\)", errors[1]
    )
