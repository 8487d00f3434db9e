"""One rank's files of a checkpoint: written in a thread, without collectives; and which files a host reads."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import Shard
from rating_train.checkpoint.state import STATE_FILE
from rating_train.files import (
    VISIBLE_SECONDS,
    atomic_write_json,
    is_recent,
    make_folder,
    retry,
    wait_until_visible,
)

_OF_A_RANK = re.compile(r"(?:^|zero_pp_)rank_(\d+)")


def write_rank_files(temporary: Path, shard: Shard, state: dict[str, Any] | None) -> store.Files:
    """Write one rank's files (rank 0's with ``state``), flush them to disk and describe them.

    Raises:
        OSError: names the file, the first error and the free space. What was written is removed at once, before all
            ranks have finalized, because the logs need that space too.
    """
    names = [*shard, STATE_FILE] if state is not None else list(shard)
    name = problem = ""
    try:
        wait_until_visible(temporary, VISIBLE_SECONDS)  # rank 0 may be on another host
        for folder in {(temporary / name).parent for name in shard}:
            make_folder(folder)  # another rank may have been faster
        described: store.Files = {}
        for name in list(shard):
            described |= _write(temporary, name, shard[name], _save)
            del shard[name]  # its memory is freed once it is written
        if state is not None:
            name = STATE_FILE
            described |= _write(temporary, name, state, atomic_write_json)
        return described
    except Exception as e:
        problem = f"{name}: {type(e).__name__}: {e}; {_free_space(temporary)}"
    # After the except block: the error's frames hold the file open, and an open file keeps its space on disk.
    for written in names:
        with contextlib.suppress(OSError):  # rank 0 removes the directory later, with anything left in it
            (temporary / written).unlink()
    raise OSError(problem)


def _free_space(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,} bytes were free"
    except OSError as e:
        return f"how much space was free is not known ({e})"


def _write(directory: Path, name: str, content: Any, write: Callable[[Path, Any], None]) -> store.Files:
    """Write, flush and describe a file; all of it anew after a transient error, as a failed fsync may lose data."""

    def once() -> store.Files:
        write(directory / name, content)
        return store.seal(directory, [name])

    return retry(once, directory / name, patient=True)


def _save(path: Path, content: Any) -> None:
    """Write a file with ``torch.save``, which hides errors of the disk behind its own: raise the former."""
    try:
        with open(path, "wb") as f:
            torch.save(content, f)
    except RuntimeError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or e from None


def rank_file(rank: int) -> str:
    """Return the name of a rank's own file: the states of its random number generators."""
    return f"rank_{rank:05d}.pt"


def rank_of(name: str) -> int | None:
    """Return the rank that a file of a checkpoint belongs to, ``None`` for what all ranks read."""
    found = _OF_A_RANK.search(name)
    return int(found[1]) if found else None


def unseen_files(directory: Path, wanted: Callable[[str], bool]) -> str:
    """Wait until this host sees a committed checkpoint; return what it does not see, or "".

    Args:
        directory: the checkpoint.
        wanted: whether this host is going to read a file. Looking at all files on every host would take the square of
            the number of ranks.
    """
    try:
        if is_recent(directory):
            wait_until_visible(directory / store.COMPLETE, VISIBLE_SECONDS)
        files = {name: entry for name, entry in store.read_marker(directory)[1].items() if wanted(name)}
        if is_recent(directory / store.COMPLETE):
            store.await_files(directory, files)
        store.check_sizes(directory, files)
    except store.InvalidCheckpoint as e:
        return str(e)
    except OSError as e:
        return f"it cannot be read ({e})"
    return ""
