"""The tests' side of :mod:`tests.helpers.zygote`: processes that it forks, used as ``subprocess.Popen`` is."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

REPO = Path(__file__).resolve().parents[2]
READY_SECONDS = 120


def readable(fd: int, seconds: float | None) -> bool:
    """Wait until a descriptor can be read; whether it can. ``select`` would take none from 1,024 on."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


class Forked:
    """A process that the zygote started, used as a ``subprocess.Popen[str]`` is.

    Args:
        args: what it runs.
        pid: of the process, a child of the zygote.
        answer: the socket on which the zygote tells how it ended.
        stdout: its output, or ``None`` where that goes elsewhere.
    """

    def __init__(self, args: Sequence[str], pid: int, answer: socket.socket, stdout: TextIO | None) -> None:
        self.args, self.pid, self.stdout = args, pid, stdout
        self.returncode: int | None = None
        self._answer = answer
        self._output: list[bytes] = []

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or ``None`` while it runs."""
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Read its output to the end, wait for it, return (output, None). May be called again after a time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        assert self.stdout is not None
        if not self.stdout.closed:
            fd = self.stdout.fileno()
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not readable(fd, left):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                piece = os.read(fd, 1 << 16)
                if not piece:
                    break
                self._output.append(piece)
            self.stdout.close()
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return b"".join(self._output).decode(errors="replace"), None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and readable(self._answer.fileno(), timeout):
            message = self._answer.recv(1 << 10)
            self._answer.close()
            if not message:
                raise RuntimeError(f"the zygote died while it ran {self.args}")
            self.returncode = json.loads(message)["code"]
        return self.returncode


class Zygote:
    """The server: started by the first job, ended by :meth:`close` or with this process."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.helpers.zygote", str(theirs.fileno())]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with theirs:
            self.process = subprocess.Popen(
                command, cwd=REPO, env=env, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self.control.settimeout(READY_SECONDS)
        if self.control.recv(1 << 10) != b"ready":
            raise RuntimeError(f"the zygote did not start: exit code {self.process.wait(timeout=30)}")

    def start(
        self,
        arguments: Sequence[object],
        env: Mapping[str, str],
        *,
        ranks: int = 0,
        cwd: Path = REPO,
        files: tuple[int, int] | None = None,
    ) -> Forked:
        """Start ``python ARGUMENTS``, or a launcher of so many ranks of it, and return at once.

        Args:
            env: all of its environment.
            files: where stdout and stderr go; by default both to ``Forked.stdout``.
        """
        assert env.get("OMP_NUM_THREADS") == "1", "the zygote has imported torch with one thread"
        words = [str(word) for word in arguments]
        job = {"arguments": words, "ranks": ranks, "env": dict(env), "cwd": str(cwd)}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader = None
        if files is None:
            read, write = os.pipe()
            files, reader = (write, write), open(read, encoding="utf-8", errors="replace")  # noqa: SIM115
        with theirs:
            socket.send_fds(self.control, [json.dumps(job).encode()], [theirs.fileno(), *files])
        if reader is not None:
            os.close(files[0])
        ours.settimeout(30)
        pid = json.loads(ours.recv(1 << 10))["pid"]
        return Forked(words, pid, ours, reader)

    def close(self) -> None:
        """End the server, and with it whatever it has started."""
        self.control.close()
        self.process.wait(timeout=30)


@functools.lru_cache(maxsize=1)
def zygote() -> Zygote:
    """The one of this session."""
    return Zygote()


def close_zygote() -> None:
    """End it, if it was started."""
    if zygote.cache_info().currsize:
        zygote().close()
        zygote.cache_clear()
