"""A full disk: how to recognise it by the error, and what to say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from rating_train.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
SAME_COMMAND = "run the same command again: it resumes at the first missing part"
#: DuckDB's errors have no number. The last is its name for the disk space that it may spill to.
_MESSAGES = (*(os.strerror(number) for number in FULL), "max_temp_directory_size")


def is_full(error: BaseException) -> bool:
    """Whether an ``OSError`` or an error of DuckDB says that the disk is full or the quota is used up."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(words in str(error) for words in _MESSAGES)


def disk_full(where: Path, expected: str = "", then: str = SAME_COMMAND) -> UserError:
    """Return the error of a full disk.

    Args:
        where: what could not be written.
        expected: how much space is needed, if that is known.
        then: what to run afterwards.
    """
    return UserError(
        "the disk is full (or the quota is used up)",
        where=where,
        expected=expected,
        fix=f"free disk space, then {then}",
    )
