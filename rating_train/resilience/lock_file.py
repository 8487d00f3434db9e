"""Read LOCK and heartbeat.json, and compare two looks at them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rating_train.files import retry


class LockState:
    """A snapshot of LOCK or heartbeat.json. Two snapshots are equal if nothing happened in between.

    ``raw``: bytes and modification time (ns). ``content``: the JSON object; empty if the file is torn.
    """

    def __init__(self, data: bytes, mtime_ns: int) -> None:
        self.raw = (data, mtime_ns)
        try:
            value = json.loads(data)
        except ValueError:  # UnicodeDecodeError is one
            value = {}
        self.content: dict[str, Any] = value if isinstance(value, dict) else {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LockState) and self.raw == other.raw

    __hash__ = None  # type: ignore[assignment]


def read_state(path: Path) -> LockState | None:
    """Read LOCK or heartbeat.json; ``None`` if there is none. Opens it: a mere stat may be answered by NFS's cache.

    Raises:
        OSError: it cannot be read, also after some retries.
    """

    def read() -> LockState | None:
        try:
            with open(path, "rb") as f:
                return LockState(f.read(), os.fstat(f.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    return retry(read, path)


def describe(owner: dict[str, Any]) -> str:
    """Describe the owner of a lock."""
    if not owner:
        return "an unknown owner (its lock is torn)"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since', 'unknown')}"
