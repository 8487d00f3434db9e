"""Append rows to files of JSON lines, which several processes may share and a crash may tear."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

from rating_train.files import hold_lock, retry

log = logging.getLogger(__name__)


def append_json_line(path: str | Path, value: dict[str, Any], again: bool = False) -> None:
    """Append one object as one line, in a single ``write``, so that readers see complete lines.

    A torn last line, left by a crash or a full disk, is removed first. Several processes may append: a lock on the
    file makes them take turns, so that none mistakes another's unfinished line for a torn one.

    After a transient error it is tried again, unless the line is there: an error may come after the fact.

    Args:
        path: the file.
        value: the object.
        again: whether an earlier call with this value failed, so that its line may be the last one already.
    """
    line = (json.dumps(value, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")
    if again:  # once: who comes back with a line does not wait for it
        _append_line(path, line, unless_last=True)
        return
    attempts = itertools.count()
    retry(lambda: _append_line(path, line, unless_last=next(attempts) > 0), path)


def _append_line(path: str | Path, line: bytes, unless_last: bool) -> None:
    with open(path, "ab+") as f:
        hold_lock(f, wait=True)
        size = f.seek(0, os.SEEK_END)
        if size > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.seek(0)
                size = f.truncate(f.read().rfind(b"\n") + 1)
        if unless_last:
            f.seek(max(0, size - len(line) - 1))
            if f.read(len(line) + 1) in (line, b"\n" + line):
                return
        f.write(line)


class RowFiles:
    """Appends rows to JSON-lines files, in order.

    Rows wait in memory while the disk is full or away: whether training stops is for the saves to say.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, dict[str, Any]]] = []
        self._failed = False  # whether the first of them was tried

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Append a row, after those that wait."""
        self._waiting.append((path, row))
        self._append_waiting()

    def close(self) -> None:
        """Append the rows that wait, if that is possible now."""
        self._append_waiting()
        if self._waiting:
            log.error("%d rows are lost: %s cannot be written", len(self._waiting), self._waiting[0][0])

    def _append_waiting(self) -> None:
        while self._waiting:
            path, row = self._waiting.pop(0)
            try:
                append_json_line(path, row, again=self._failed)
            except OSError as e:
                if not self._failed:
                    log.error("%s cannot be written (%s): rows wait in memory", path, e)
                self._failed = True
                self._waiting.insert(0, (path, row))
                return
            self._failed = False
