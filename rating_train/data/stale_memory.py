"""Shared memory that killed jobs left: removed at the next start, without touching a living neighbour's.

Streaming makes blocks ``/dev/shm/NNNNNN_NAME`` and lock files ``TMPDIR/NNNNNN_NAME_filelock`` of one number for each
dataset and node. A process that ends in order removes its blocks; one that is killed with all its helpers leaves them.

Whether a process *looks* dead from here says little: /dev/shm may be shared with containers whose processes cannot be
seen. So every process of ours holds a shared file lock (flock) on its ``locals`` block, which the kernel drops when the
last process that has it ends, in whichever container, and the block is marked (:func:`claim_blocks`). The sweep removes

1. marked blocks whose lock is free: certainly of a dead job;
2. unmarked blocks (a job killed while it was opening its data, or another program) only from where all processes of the
   machine can be seen (the first PID namespace), if they are ours, older than ``young_seconds``, and neither mapped nor
   open in any process, twice in a row. Streaming keeps every block open and mapped while its dataset lives;
3. the lock file of a number, if the claim beside it is free.

Not covered, and left alone: other users' blocks; unmarked blocks seen from a container, or while a process of ours
cannot be looked into; unmarked lock files; a dead job's unmarked blocks that a living process has mapped as well
(streaming's own search for a free number maps all of its neighbours' blocks, until its process ends).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
LOCALS = "locals"
LOCK_FILE = "cache_filelock"
CLAIM_FILE = "rating_train"
#: All names of streaming 0.13 (``SHM_TO_CLEAN``).
BLOCKS = (
    "barrier cache_usage epoch_data epoch_shape locals next_epoch resume shard_access_times shard_states"
).split()
_MARK = b"\0rating_train"
_BLOCK = re.compile(rf"(\d{{6}})_({'|'.join(BLOCKS)})")
_CLAIM = re.compile(rf"(\d{{6}})_{CLAIM_FILE}")
_HASHED = re.compile(
    r"rating_train-hashed-[a-z0-9_]{8}"
)  # the bytes of data.streams; without a name after a moment
_HASHED_SECONDS = 3600.0  # far beyond the longest wait of a collective
_SETTLE_SECONDS = (
    1.0  # a killed process's helper (Python's resource tracker) removes blocks by name a moment later
)
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel
_PROC = Path("/proc")


class Claim:
    """Holds the locks; the process's end drops them, and so does :meth:`close`."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    def close(self) -> None:
        """Drop the locks of this process; loader processes that were forked from it keep theirs."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def claim_blocks(datasets: Iterable[Any]) -> Claim:
    """Mark the blocks of open datasets as ours, and in use until this process and its loaders end.

    Every rank calls it, right after the data is opened, before loader processes are started.

    Args:
        datasets: streaming datasets. One that downloads also gets its lock file claimed.
    """
    held = []
    for dataset in datasets:
        number = f"{dataset._shm_prefix_int:06d}"  # streaming has no public name for it
        held.append(_hold(FOLDER / f"{number}_{LOCALS}"))
        if any(stream.remote for stream in dataset.streams):
            lock_file = Path(dataset._cache_filelock_path)
            lock_file.touch(0o600)  # made now, so that the claim can say which file it is
            content = str(lock_file.stat().st_ino).encode()
            held.append(_hold(lock_file.with_name(f"{number}_{CLAIM_FILE}"), content))
    return Claim([fd for fd in held if fd is not None])


def _hold(path: Path, content: bytes | None = None) -> int | None:
    """Lock a file, then mark it: a mark without a lock means a dead job. With ``content`` it is made if missing."""
    make = 0 if content is None else os.O_CREAT
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | make, 0o600)
        except OSError as e:
            log.warning("%s cannot be claimed (%s): it would stay if this job were killed", path, e)
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if content is None or _same_file(fd, path):
            break
        os.close(fd)  # a sweep has just removed the one of a dead job
    if not _is_marked(fd):
        os.lseek(fd, 0, os.SEEK_END)  # of a block, streaming reads as many bytes as the first four say
        os.write(fd, (content or b"") + _MARK)
    return fd


def sweep_stale(temporary: Path | None = None, young_seconds: float = 60.0) -> list[str]:
    """Remove what dead jobs left in /dev/shm and ``temporary``; returns the paths removed.

    One process of each node calls it, before the data is opened. What a living process uses, or might use, stays (see
    the module's text). Where there is something to remove it first waits a second.

    Args:
        temporary: where streaming puts its lock files; ``None`` takes TMPDIR, as streaming does.
        young_seconds: unmarked blocks that are younger are left alone.
    """
    temporary = temporary or Path(tempfile.gettempdir())
    removed: list[str] = []
    candidates = _unmarked_and_unused(young_seconds)
    if candidates or _has_dead_claims(temporary):
        time.sleep(_SETTLE_SECONDS)
        removed += _sweep_blocks()
        removed += _sweep_lock_files(temporary)
        again = _unmarked_and_unused(young_seconds)
        removed += _remove(path for path, identity in candidates.items() if again.get(path) == identity)
    removed += _remove(_forgotten(temporary))
    for path in removed:
        log.info("removed %s: a dead job left it", path)
    return removed


def _has_dead_claims(temporary: Path) -> bool:
    for path in [*_locals(), *_claims(temporary)]:
        with _if_dead(path) as dead:
            if dead:
                return True
    return False


def _sweep_blocks() -> list[str]:
    removed = []
    for path in _locals():
        with _if_dead(path) as dead:
            if dead:
                number = path.name[:6]
                # Its `locals` last: while it exists, no job takes the number, and a crash here is mended next time.
                names = [name for name in BLOCKS if name != LOCALS] + [LOCALS]
                removed += _remove(FOLDER / f"{number}_{name}" for name in names)
    return removed


def _sweep_lock_files(temporary: Path) -> list[str]:
    removed = []
    for path in _claims(temporary):
        with _if_dead(path) as dead:
            if dead:
                lock_file = temporary / f"{path.name[:6]}_{LOCK_FILE}"
                # The claim first: while the lock file exists, no job takes the number and claims it anew.
                inode = lock_file.stat().st_ino if lock_file.exists() else None
                same = path.read_bytes() == str(inode).encode() + _MARK
                removed += _remove([path, lock_file] if same else [path])
    return removed


@contextlib.contextmanager
def _if_dead(path: Path) -> Iterator[bool]:
    """Whether a file of ours is marked and nobody holds it; if so, nobody else sweeps it meanwhile."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone, or not for us
        yield False
        return
    try:
        dead = os.fstat(fd).st_uid == os.geteuid() and _is_marked(fd) and _lock_at_once(fd)
        yield dead and _same_file(fd, path)
    finally:
        os.close(fd)


def _is_marked(fd: int) -> bool:
    return os.pread(fd, len(_MARK), max(0, os.fstat(fd).st_size - len(_MARK))) == _MARK


def _lock_at_once(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(fd: int, path: Path) -> bool:
    """Whether the name still stands for the open file: it may have been removed and made anew."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _unmarked_and_unused(young_seconds: float) -> dict[Path, tuple[int, int]]:
    """Blocks of ours whose number no process has open, and nobody claimed -> (inode, change time in ns)."""
    found: dict[Path, tuple[int, int]] = {}
    blocks = [p for p in _listing(FOLDER) if _BLOCK.fullmatch(p.name)]
    if not blocks or not _sees_all_processes():
        return found
    claimed = {path.name[:6] for path in _locals() if _has_mark(path)}
    now = _now(FOLDER)
    for path in blocks:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path, follow_symlinks=False)
            young = now - max(status.st_ctime, status.st_mtime) < young_seconds
            if status.st_uid == os.geteuid() and path.name[:6] not in claimed and not young:
                found[path] = (status.st_ino, status.st_ctime_ns)
    if not found:
        return found
    used = _numbers_in_use()
    if used is None:
        log.info("%d unmarked blocks in %s stay: not every process can be looked into", len(found), FOLDER)
        return {}
    return {path: identity for path, identity in found.items() if path.name[:6] not in used}


def _has_mark(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _is_marked(fd)
    finally:
        os.close(fd)


def _sees_all_processes() -> bool:
    try:
        return os.readlink(_PROC / "self" / "ns" / "pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def _numbers_in_use() -> set[str] | None:
    """Numbers of blocks that any process has mapped or open; ``None`` where one of ours cannot be looked into.

    Names are compared, not paths: a process in a container may have /dev/shm elsewhere.
    """
    names: set[str] = set()
    for process in _PROC.glob("[0-9]*"):
        try:
            # Of `status`: the files of a process that may not be looked into belong to root.
            uid = re.search(r"^Uid:\t\d+\t(\d+)", (process / "status").read_text("utf-8", "replace"), re.M)
            if uid and int(uid.group(1)) != os.geteuid() and os.geteuid() != 0:
                continue  # another user's: it cannot open our blocks, which are for us alone
            lines = (process / "maps").read_text("utf-8", "replace").splitlines()
            names |= {line.rpartition("/")[2] for line in lines}
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    names.add(os.readlink(fd).rpartition("/")[2])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        except PermissionError:
            return None
    return {name[:6] for name in names if _BLOCK.match(name)}


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # no /dev/shm here
        return []


def _locals() -> list[Path]:
    return [p for p in _listing(FOLDER) if (m := _BLOCK.fullmatch(p.name)) and m.group(2) == LOCALS]


def _claims(temporary: Path) -> list[Path]:
    return [p for p in _listing(temporary) if _CLAIM.fullmatch(p.name)]


def _forgotten(temporary: Path) -> Iterator[Path]:
    """Files of data.streams whose removal a crash prevented. Whoever needs one has it mapped."""
    names = [p for p in _listing(temporary) if _HASHED.fullmatch(p.name)]
    now = _now(temporary) if names else 0.0
    for path in names:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path, follow_symlinks=False)
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if ours and now - status.st_mtime > _HASHED_SECONDS:
                yield path


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder."""
    with tempfile.TemporaryFile(dir=folder) as f:
        return os.fstat(f.fileno()).st_mtime


def _remove(paths: Iterable[Path]) -> list[str]:
    removed = []
    for path in paths:
        try:
            if os.stat(path, follow_symlinks=False).st_uid == os.geteuid():
                path.unlink()
                removed.append(str(path))
        except FileNotFoundError:
            continue  # somebody else was faster
        except OSError as e:
            log.warning("%s stays: %s", path, e)  # no reason not to train
    return removed
