"""Which process is it, does it live, and with whom does it end. Imports nothing of the package."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def this_process() -> dict[str, Any]:
    """What tells this process from all others: host, boot, PID namespace, pid and start time (clock ticks)."""
    pid = os.getpid()
    namespace = _PROC / "self" / "ns" / "pid"
    return {
        "host": socket.gethostname(),
        "boot_id": _read_text(_PROC / "sys" / "kernel" / "random" / "boot_id"),
        "pid_namespace": os.readlink(namespace) if namespace.exists() else "",
        "pid": pid,
        "start_ticks": start_ticks(pid),
    }


def process_lives(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process lives; ``None`` where it cannot be seen from here (another host or container)."""
    here = this_process()
    same = all(here[k] and owner.get(k) == here[k] for k in ("host", "boot_id", "pid_namespace"))
    if not same or not isinstance(owner.get("pid"), int) or not isinstance(owner.get("start_ticks"), int):
        return None
    started = start_ticks(owner["pid"])
    if started is None:
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return None  # another user's, and hidden from us
    return started == owner["start_ticks"]


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of its stat); ``None`` for none or a zombie."""
    fields = _read_text(_PROC / str(pid) / "stat").rpartition(")")[2].split()  # its name may hold anything
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
