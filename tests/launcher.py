"""Starts ranks as Slurm's srun does: one process each, told its place by the environment. For tests.

torchrun imports torch before it starts anything, two seconds for each of the many short jobs of the tests.

Usage: python launcher.py RANKS PYTHON-ARGUMENTS...
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


def main(ranks: int, command: list[str]) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **{k: str(v) for k, v in {**common, "RANK": i, "LOCAL_RANK": i}.items()}},
        )
        for i in range(ranks)
    ]
    failed = False
    while running := [p for p in processes if p.poll() is None]:
        if not failed and any(p.returncode not in (0, None) for p in processes):
            failed, killed_at = True, time.monotonic() + 10
            for p in running:
                p.terminate()
        if failed and time.monotonic() > killed_at:
            for p in running:
                p.kill()
        time.sleep(0.02)
    return int(any(p.returncode for p in processes))  # 0 or 1, as torchrun has it


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2:]))
