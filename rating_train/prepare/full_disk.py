"""A disk that is full: how to know it by the error, and what to say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from rating_train.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
SAME_COMMAND = "give the same command again: it continues at the first missing part"
#: DuckDB's errors have no number. The last is its name for the room on the disk that it may spill to.
_SAID = (*(os.strerror(number) for number in FULL), "max_temp_directory_size")


def is_full(error: BaseException) -> bool:
    """Whether an ``OSError`` or an error of DuckDB says that the disk is full, or the quota used up."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(words in str(error) for words in _SAID)


def disk_full(where: Path, expected: str = "", then: str = SAME_COMMAND) -> UserError:
    """The error of a full disk; ``expected``: how much room is needed, if that is known."""
    return UserError(
        "the disk is full (or the quota is used up)",
        where=where,
        expected=expected,
        fix=f"make room, then {then}",
    )
