"""Files that are either complete or absent: atomic writes, fsync, checksums, JSON.

A network file system may fail for a moment (a server restarts, a handle goes stale) and show what another host wrote
with a delay. Operations that can be repeated without harm are repeated here; see :func:`retry`.

Imports only ``errors`` from the package and nothing heavy, so that commands on a login node start fast.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from rating_train.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Errors after which the same operation may succeed: a file system that is away for a moment.
TRANSIENT_ERRORS = frozenset(
    {
        errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EAGAIN,
    }
)  # fmt: skip
RETRY_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds
_PATIENT_PAUSES = (3.2, 6.4, 12.8)  # after those, where nobody waits: a server restarts
#: How long a host may not see what another one wrote: NFS caches attributes for up to a minute (acdirmax).
VISIBLE_SECONDS = 90.0
_CHUNK_BYTES = 1 << 22


def retry(action: Callable[[], T], what: object, patient: bool = False) -> T:
    """Run ``action``, again after each transient error, for about three seconds.

    Only for what can be repeated without harm: reading, or writing all of a file anew. After a failed ``fsync`` the
    kernel may drop the data and report success the next time, so ``fsync`` alone must not be repeated.

    Args:
        action: the operation.
        what: the path or the operation, for the log.
        patient: for about half a minute, in a thread that nobody waits for.

    Raises:
        OSError: the last transient error, or at once any other one.
    """
    for pause in (*RETRY_PAUSES, *(_PATIENT_PAUSES if patient else ())):
        try:
            return action()
        except OSError as e:
            if e.errno not in TRANSIENT_ERRORS:
                raise
            log.warning("%s: %s; retrying", what, e)
            time.sleep(pause)
    return action()


class MarkerFile:
    """A file whose presence is a message, looked for again and again on a file system that may fail.

    ``pathlib``'s ``exists`` raises ESTALE, EIO and EACCES; here such a file counts as absent, and the first error is
    logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._logged = False

    def identity(self) -> tuple[int, int] | None:
        """Return inode and modification time (ns), or ``None`` if the file is absent or cannot be looked up."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            if not self._logged:
                self._logged = True
                log.warning("%s cannot be looked up (%s): treated as absent", self.path, e)
            return None
        return found.st_ino, found.st_mtime_ns

    def is_present(self) -> bool:
        """Return whether the file is there."""
        return self.identity() is not None


def path_exists(path: Path) -> bool:
    """Return whether a path exists, in spite of transient errors.

    Raises:
        OSError: the file system cannot tell.
    """
    try:
        retry(lambda: os.stat(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def wait_until_visible(path: Path, seconds: float) -> bool:
    """Wait for a file that another process is known to have written; return whether it appeared in time."""
    marker, deadline, pause = MarkerFile(path), time.monotonic() + seconds, 0.05
    while not marker.is_present():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return True


def file_size(path: Path) -> int | None:
    """Return the size of a regular file, ``None`` for anything else."""
    try:
        found = retry(lambda: os.stat(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_recent(path: Path) -> bool:
    """Return whether a path changed so recently that this host may not see all of it yet."""
    try:
        changed = retry(lambda: os.stat(path), path).st_mtime
    except OSError:
        return False
    return abs(time.time() - changed) < VISIBLE_SECONDS


def make_folder(path: Path) -> None:
    """Create a directory with its parents unless it is there, in spite of transient errors.

    Another host may have made it: it is waited for until this one sees it.

    Raises:
        OSError: it cannot be made, or the name is that of something else.
    """

    def make() -> None:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if wait_until_visible(path, VISIBLE_SECONDS) and not stat.S_ISDIR(os.stat(path).st_mode):
                raise

    retry(make, path)


def remove(path: Path) -> None:
    """Delete a file if it is there, in spite of transient errors."""
    retry(lambda: path.unlink(missing_ok=True), path)


def remove_tree(path: Path) -> None:
    """Delete a directory with all that it contains, in spite of transient errors."""

    def ignore_missing(_function: object, _path: object, error: Any) -> None:
        if not isinstance(
            error[1], FileNotFoundError
        ):  # gone, by an attempt that reported an error, or not visible
            raise error[1]

    def attempt() -> None:
        try:
            shutil.rmtree(path, onerror=ignore_missing)
        except OSError as e:
            if e.errno != errno.ENOTEMPTY:
                raise
            raise OSError(
                errno.EAGAIN, "it has files of another host that are not visible yet", str(path)
            ) from e

    retry(attempt, path)


def fsync_path(path: str | Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    """Flush a directory's entries. Unlike a file's data, they are not dropped by a failure, so it is repeated."""
    retry(lambda: fsync_path(directory), directory)


def rename(source: Path, target: Path, done: Callable[[], bool]) -> None:
    """Rename a file or directory and flush its parent. An error may come after the fact, so it is not simply repeated.

    Args:
        source: the file or directory.
        target: its new path.
        done: looks whether the rename took place.

    Raises:
        OSError: it did not take place, or nothing is known of it.
    """
    for pause in (*RETRY_PAUSES, None):
        try:
            os.rename(source, target)
            break
        except OSError as e:
            if path_exists(target) and done():
                break
            if pause is None or e.errno not in TRANSIENT_ERRORS:
                raise
            time.sleep(pause)
    fsync_directory(target.parent)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` so that a reader or a crash sees the old file or the new one, never a part.

    Writes a temporary file in the same directory, fsyncs it, renames it to ``path`` and fsyncs the directory; all of
    it anew after a transient error.
    """
    retry(lambda: _write_and_rename(Path(path), content), path)


def _write_and_rename(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:  # left in a checkpoint, it would be a file that nobody described
        with contextlib.suppress(OSError):  # the first error counts
            remove(temporary)
        raise
    fsync_path(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text by :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON by :func:`atomic_write_bytes`. ``NaN`` is refused: undefined is ``None``."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def hold_lock(file: int | IO[Any], *, shared: bool = False, wait: bool = False) -> bool | None:
    """Take ``flock`` on an open file or directory; the kernel drops it when the last descriptor closes.

    Args:
        file: a descriptor or an open file.
        shared: allow other shared holders.
        wait: wait for the present holder instead of returning.

    Returns:
        True if this process now holds the lock, False if another one does, None if the file system has no locks
        (some network file systems): the caller decides whether to assume that it is alone.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_json(path: str | Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not valid JSON.
    """
    try:
        return json.loads(retry(lambda: Path(path).read_text("utf-8"), path))
    except FileNotFoundError as e:
        raise UserError("file not found", where=path) from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"not valid JSON ({e})", where=path) from e


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, except a torn last line (from a crash while writing).

    Raises:
        UserError: another line is not valid JSON.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):  # of bytes: text may contain other line separators
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as e:
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"not valid JSON ({e})", where=f"{path}:{number}") from e


def sha256_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in chunks of 4 MiB."""

    def read() -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return retry(read, path)


def sha256_json(value: Any) -> str:
    """Return the hex SHA-256 of a value's canonical JSON (sorted keys, no spaces): a fingerprint."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def claim_folder(file: Path, identity: Mapping[str, Any], work: str, fix: str) -> None:
    """Record in ``file`` what the work in its folder depends on.

    Raises:
        UserError: an earlier start recorded another ``identity``; names each difference, and the ``fix``.
    """
    if not file.exists():
        atomic_write_json(file, identity)
    if changes := differences(read_json(file), identity):
        what = f"an unfinished {work} with other options or changed sources exists: {'; '.join(changes)}"
        raise UserError(what, where=file.parent, fix=f"{fix}, or remove {file.parent} to start over")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say of each key that differs, in order of the keys, what it was and what it is now."""
    changed = (name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
    return [f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in changed]
