"""Files that are either complete or absent: atomic writes, fsync, checksums, JSON lines.

Imports only ``errors`` from the package and nothing heavy, so that commands on a login node start fast.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rating_train.errors import UserError

_CHUNK_BYTES = 1 << 22


def fsync_path(path: str | Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` so that a reader or a crash sees the old file or the new one, never a part.

    Writes a temporary file in the same directory, fsyncs it, renames it to ``path`` and fsyncs the directory.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as e:
        raise UserError("file not found", where=path) from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"not valid JSON ({e})", where=path) from e


def append_json_line(path: str | Path, value: dict[str, Any]) -> None:
    """Append one object as one line, in a single ``write``, so that readers see complete lines.

    A torn last line, left by a crash or a full disk, is removed first. Several processes may append: a lock on the
    file makes them take turns, so that none mistakes another's unfinished line for a torn one.
    """
    line = json.dumps(value, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n"
    with open(path, "ab+") as f:
        hold_lock(f, wait=True)
        if f.seek(0, os.SEEK_END) > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        f.write(line.encode("utf-8"))


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, except a torn last line (from a crash while writing).

    Raises:
        UserError: another line is not valid JSON.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(
            f, start=1
        ):  # split at "\n" only: text may contain other line separators
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
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hex SHA-256 of a value's canonical JSON (sorted keys, no spaces): a fingerprint."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
