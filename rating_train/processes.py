"""Identify a process, check whether it lives, tie it to its parent, start it fast, and what memory it may still take.

Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, for whatever reason. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def without_collector(freeze: bool = True) -> Iterator[None]:
    """Import large libraries without the garbage collector of cycles.

    It would run hundreds of times over objects that stay to the end: a sixth of the CPU time of a start.

    Args:
        freeze: leave all objects that are there at the end out of later collections too, which then cost less, and
            DataLoader workers, which are forked, share their pages. Only for a process of this project's own, before
            it has made anything that is ever to be freed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, for the next step of a model on the CPU. glibc only.

    A tensor of some MiB would otherwise be mapped for each use, and given back when it is freed. The kernel clears its
    pages every time: 280,000 of them in a step of the 228M model. What the process takes at its peak stays the same;
    before it forks, :func:`give_back_freed_memory`.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """Give what malloc keeps back to the system, before a fork. glibc only.

    A child would hold those pages as they were, and this process get others as soon as it writes to them: the memory of
    a training step would be taken twice.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may still take: of its node, and of its control groups.

    A job under Slurm, or in a container, may take less than its node has: ``--mem`` limits a control group above that
    of its tasks. Linux only.

    Args:
        root: of the file system.
    """
    fields = (root / "proc/meminfo").read_text().split()
    of_node = int(fields[fields.index("MemAvailable:") + 1]) << 10
    return min([of_node, *_left_in_control_groups(root)])


def _left_in_control_groups(root: Path) -> Iterator[int]:
    """Yield what each control group of this process, and each one above it, may still take; versions 1 and 2."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                top /= "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            # In a container, the groups outside are named, but not there; its own is the top.
            group = top / path.strip("/") if ".." not in path else top
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (left := _left_in(folder, *names)) is not None:
                    yield left


def _left_in(group: Path, limit_name: str, used_name: str, cached_name: str) -> int | None:
    """Return what a control group may still take; ``None`` where it has no limit, or is not there."""
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
        stat = (group / "memory.stat").read_text().split()
    except OSError:
        return None
    if limit == "max":
        return None
    cached = int(stat[stat.index(cached_name) + 1])  # files that were read: the kernel gives it back
    return max(0, int(limit) - int(used) + cached)


def allow_descriptors() -> tuple[int, int]:
    """Raise this process's limit of open files to what the system allows it; return the old and the new limit.

    Gloo connects each rank to every other one, once for each process group: at the usual limit of 1,024, a job of some
    hundreds of ranks could not start.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def this_process() -> dict[str, Any]:
    """Return what identifies this process: host, boot, PID namespace, pid and start time (clock ticks)."""
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
    """Return whether the owner's process is alive; ``None`` if that cannot be seen (another host or container)."""
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
    """Return the start time of a process in clock ticks since boot; ``None`` if it does not exist or is a zombie."""
    # Field 22 of stat. The name, in parentheses, may contain any character.
    fields = _read_text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
