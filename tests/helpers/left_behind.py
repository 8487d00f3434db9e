"""What a session of tests must not leave behind: processes, shared memory, mounts."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.helpers.ranks import SHARED_MEMORY, mapped_files

TOKEN = "RATING_TRAIN_TEST_SESSION"  # in the environment of every process that this one starts


class Watch:
    """What is there when the session starts, and what of it is new at the end."""

    def __init__(self) -> None:
        self.token = os.environ[TOKEN] = secrets.token_hex(8)
        self._blocks = set(os.listdir(SHARED_MEMORY))
        self._mounts = set(mount_points())

    def found(self, temporary: Path, seconds: float = 10.0) -> list[str]:
        """One line for each thing left, after waiting for processes that are about to end.

        Args:
            temporary: the folder of the session's temporary files; mounts elsewhere are not the session's.
        """
        deadline = time.monotonic() + seconds
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        mounts = [m for m in mount_points() if m not in self._mounts and Path(m).is_relative_to(temporary)]
        return [
            *processes,
            *(f"mount {mount}" for mount in mounts),
            *(f"shared memory {block}" for block in self.blocks()),
        ]

    def processes(self) -> list[str]:
        """Living processes that were started by this session, directly or not, but for this one's own helper."""
        lines = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TOKEN) != self.token or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = " ".join(process.cmdline())
                if process.pid != os.getpid() and not (
                    process.ppid() == os.getpid() and "resource_tracker" in command
                ):
                    lines.append(f"process {process.pid}: {command[:200]}")
        return lines

    def blocks(self) -> list[str]:
        """New blocks of shared memory that no process has mapped: nobody will remove them.

        Empty while another session runs here: whose a block is cannot be seen.
        """
        new = set(os.listdir(SHARED_MEMORY)) - self._blocks
        if not new or any(other_sessions()):
            return []
        in_use = mapped_files()
        return sorted(str(SHARED_MEMORY / name) for name in new if str(SHARED_MEMORY / name) not in in_use)


def mount_points() -> list[str]:
    """Of this mount namespace."""
    return [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]


def other_sessions() -> Iterator[psutil.Process]:
    """Processes of pytest that are neither this one's parents nor its children."""
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    own |= {p.pid for p in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own and any("pytest" in word for word in process.cmdline()[:4]):
                yield process
