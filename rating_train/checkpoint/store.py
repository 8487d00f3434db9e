"""The directory protocol of checkpoints. Handles files only: no torch, no collectives.

Commit, then point, then prune::

    1. rank 0 creates a temporary directory  step_00000500.tmp-<nonce>  and every rank writes its files into it
    2. sizes and SHA-256 of all files are recorded in COMPLETE.json, which is fsynced
    3. the directory is renamed to step_00000500 and its parent fsynced     <- the commit
    4. latest.json (and best.json) are replaced atomically
    5. old checkpoints are pruned (cleanup.py): renamed to a temporary name, then deleted, COMPLETE.json first

A directory without a valid COMPLETE.json is not a checkpoint. A crash at any point leaves either the old
checkpoint or the new one.

Network file systems fail for a moment and show other hosts' files late. What can be repeated is (see ``files.retry``);
the commit is repeated only after a look at what it did; and files known to exist are waited for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import (
    VISIBLE_SECONDS,
    atomic_write_json,
    file_size,
    fsync_directory,
    fsync_path,
    is_recent,
    make_folder,
    path_exists,
    read_json,
    remove,
    remove_tree,
    rename,
    retry,
    sha256_file,
    wait_until_visible,
)

COMPLETE = "COMPLETE.json"
LATEST = "latest.json"
BEST = "best.json"
VERSION = 1
_STEP = re.compile(r"^step_(\d{8,})$")
TEMPORARY = re.compile(r"^step_\d{8,}\.tmp-[0-9a-f]+$")

Files = dict[str, dict[str, Any]]  # relative path -> {"bytes": int, "sha256": hex}


class InvalidCheckpoint(Exception):
    """A directory that must not be loaded; the message gives the reason."""


@dataclass(frozen=True)
class Found:
    """A directory named like a checkpoint; ``problem`` is ``""`` if it verified."""

    step: int
    path: Path
    problem: str = ""


def step_name(step: int) -> str:
    """Return ``step_00000500``, a name that sorts by step."""
    return f"step_{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Create the temporary directory of a new checkpoint. Called by one process of the job."""
    temporary = temporary_name(root / step_name(step))
    make_folder(temporary)
    return temporary


def temporary_name(directory: Path) -> Path:
    """Return a new temporary name for a checkpoint."""
    return directory.with_name(f"{directory.name}.tmp-{secrets.token_hex(6)}")


def check_free_space(root: Path, needed_bytes: int) -> None:
    """Refuse to begin a checkpoint that does not fit on the disk.

    Raises:
        OSError: ENOSPC; names the path, the bytes needed and the bytes free.
    """
    free = retry(lambda: shutil.disk_usage(root), root).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC, f"a checkpoint needs {needed_bytes:,} bytes, but {free:,} are free", str(root)
        )


def relative_files(directory: Path) -> list[str]:
    """Return the paths of all files below a directory, relative to it and sorted, without COMPLETE.json."""

    def find() -> list[str]:
        found = []
        for folder, _, names in os.walk(directory, onerror=_raise):
            found += [Path(folder, name).relative_to(directory).as_posix() for name in names]
        return sorted(name for name in found if name != COMPLETE)

    return retry(find, directory)


def _raise(error: OSError) -> None:
    raise error


def seal(directory: Path, names: Iterable[str]) -> Files:
    """Flush files to disk and describe them. Every rank calls this for the files that it wrote."""
    result: Files = {}
    for name in names:
        path = directory / name
        fsync_path(path)
        size = retry(lambda path=path: path.stat().st_size, path)  # type: ignore[misc]
        result[name] = {"bytes": size, "sha256": sha256_file(path)}
    return result


def commit(temporary: Path, step: int, files: Files) -> Path:
    """Turn a written temporary directory into a checkpoint; return its final path.

    Raises:
        InvalidCheckpoint: the directory's content does not match ``files``, also after a wait for files that other
            hosts wrote.
        OSError: it could not be renamed. Where that is not known, a later start finds out.
    """
    await_files(temporary, files)
    for name, entry in files.items():
        size = file_size(temporary / name)
        if size is not None and size != entry["bytes"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes, but was described with {entry['bytes']}")
    present = relative_files(temporary)
    if present != sorted(files):
        odd = sorted(set(present) ^ set(files))
        raise InvalidCheckpoint(f"the files written are not the files described: {', '.join(odd[:5])}")
    for folder in {(temporary / name).parent for name in files}:
        fsync_directory(folder)
    marker = {"version": VERSION, "step": step, "files": files}
    atomic_write_json(temporary / COMPLETE, marker)
    final = temporary.parent / step_name(step)
    old = None
    if path_exists(final):  # this step was saved before: set aside, and deleted once the new one is committed
        old = temporary_name(final)
        rename(final, old, lambda: path_exists(old) and not path_exists(final))
    rename(temporary, final, lambda: read_json(final / COMPLETE) == marker)
    if old is not None:
        discard(old)
    return final


def verify(directory: Path, hashes: bool = True, wait: bool = False) -> dict[str, Any]:
    """Check every file of a checkpoint against COMPLETE.json.

    Args:
        directory: the checkpoint.
        hashes: check SHA-256 too, not only sizes.
        wait: wait for files that this host does not see yet, if the checkpoint is as young as that.

    Returns:
        The content of COMPLETE.json.

    Raises:
        InvalidCheckpoint: a file is missing, truncated, or has other bytes, or there is an additional ``.pt`` file.
        OSError: the disk cannot read it.
    """
    if wait and is_recent(directory):
        wait_until_visible(directory / COMPLETE, VISIBLE_SECONDS)
    step, files = read_marker(directory)
    if step_name(step) != directory.name:
        raise InvalidCheckpoint(f"{COMPLETE} belongs to step {step}")
    if wait and is_recent(directory / COMPLETE):
        await_files(directory, files)
    verify_files(directory, files, hashes)
    return {"version": VERSION, "step": step, "files": files}


def await_files(directory: Path, files: Files) -> None:
    """Wait until this host sees all files that are known to be there, but no longer than caches live."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    listed: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # a folder that is listed, and not visible yet
        listed = relative_files(directory)  # one listing instead of a look at each file
    for name in sorted(set(files) - set(listed)):
        wait_until_visible(directory / name, max(0.0, deadline - time.monotonic()))


def problem(directory: Path, hashes: bool = True, wait: bool = False) -> str:
    """Return why a checkpoint must not be loaded, read errors of the disk included; ``""`` if it verifies."""
    try:
        verify(directory, hashes, wait)
    except InvalidCheckpoint as e:
        return str(e)
    except OSError as e:
        return f"it cannot be read ({e})"
    return ""


def read_marker(directory: Path) -> tuple[int, Files]:
    """Return step and files of COMPLETE.json, with every entry of the right type.

    Raises:
        InvalidCheckpoint: it is missing, torn, or of another version.
        OSError: the disk cannot read it.
    """
    marker = directory / COMPLETE
    try:
        content = json.loads(retry(lambda: marker.read_text("utf-8"), marker))
        step, files = content["step"], content["files"]
        if content["version"] != VERSION or not isinstance(step, int) or not files:
            raise ValueError("not of this version, or empty")
        checked = {str(n): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for n, e in files.items()}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"it has no {COMPLETE}: it was never committed") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidCheckpoint(f"{COMPLETE} cannot be read: {type(e).__name__}: {e}") from e
    return step, checked


def verify_files(directory: Path, files: Files, hashes: bool = True) -> None:
    """Compare a directory with what COMPLETE.json says of its files; see :func:`verify`."""
    # DeepSpeed and `Shards` find files by their names, so a foreign one would be loaded too.
    foreign = [name for name in relative_files(directory) if name.endswith(".pt") and name not in files]
    if foreign:
        raise InvalidCheckpoint(f"it contains files that were not saved with it: {', '.join(foreign[:5])}")
    check_sizes(directory, files)
    for name, entry in files.items() if hashes else ():  # sizes first: they are cheap and find most damage
        if sha256_file(directory / name) != entry["sha256"]:
            raise InvalidCheckpoint(f"{name} does not have the bytes that were saved (SHA-256 differs)")


def check_sizes(directory: Path, files: Files) -> None:
    """Compare the sizes of files with those recorded; see :func:`verify`."""
    for name, entry in files.items():
        size = file_size(directory / name)
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise InvalidCheckpoint(f"{name} {found}")


def steps_present(root: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of every directory named like a checkpoint, newest first."""
    found = [(int(m.group(1)), p) for p in entries(root) if (m := _STEP.match(p.name))]
    return sorted(found, reverse=True)


def entries(root: Path, files: bool = False) -> list[Path]:
    """Return the directories (or the files) in ``root``, sorted; none if it does not exist."""

    def find() -> list[Path]:
        try:
            with os.scandir(root) as found:
                return sorted(Path(e.path) for e in found if (e.is_file() if files else e.is_dir()))
        except (FileNotFoundError, NotADirectoryError):
            return []

    return retry(find, root)


def newest_valid(root: Path) -> tuple[Found | None, list[Found]]:
    """Return the newest checkpoint that verifies, and the newer ones that were skipped, with reasons.

    Raises:
        UserError: checkpoints exist, but none verifies: a start at step 0 must be requested explicitly.
    """
    skipped: list[Found] = []
    _await_latest(root)
    for step, path in steps_present(root):
        reason = problem(path, wait=True)
        if not reason:
            return Found(step, path), skipped
        skipped.append(Found(step, path, reason))
    if skipped:
        reasons = "; ".join(f"{f.path.name}: {f.problem}" for f in skipped)
        raise UserError(
            f"there are checkpoints, but none can be trusted: {reasons}",
            where=root,
            fix="restore one from a backup, or start a new run with --resume never and another name",
        )
    return None, []


def _await_latest(root: Path) -> None:
    """Wait for the checkpoint that latest.json names: another host may have committed it a moment ago."""
    step = _named_step(root, LATEST)
    newest = max((present for present, _ in steps_present(root)), default=-1)
    if step is not None and step > newest and is_recent(root / LATEST):
        wait_until_visible(root / step_name(step) / COMPLETE, VISIBLE_SECONDS)


def point(root: Path, name: str, step: int, **more: Any) -> None:
    """Replace a pointer (latest.json, best.json) atomically."""
    atomic_write_json(root / name, {"step": step, "directory": step_name(step), **more})


def pointed_step(root: Path, name: str) -> int | None:
    """Return the step that a pointer names; ``None`` if the pointer is missing, torn, or dangling.

    Raises:
        OSError: the disk cannot read it.
    """
    step = _named_step(root, name)
    return step if step is not None and is_committed(root, step) else None


def _named_step(root: Path, name: str) -> int | None:
    pointer = root / name
    try:
        return int(json.loads(retry(lambda: pointer.read_text("utf-8"), pointer))["step"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def is_committed(root: Path, step: int) -> bool:
    """Return whether there is a checkpoint of ``step`` with its marker; its files are not verified."""
    return file_size(root / step_name(step) / COMPLETE) is not None


def discard(directory: Path) -> None:
    """Delete a checkpoint: rename it, so that remains of a crash are swept, then delete its marker, then the rest."""
    if not TEMPORARY.match(directory.name):
        aside = temporary_name(directory)
        rename(directory, aside, lambda: not path_exists(directory))
        directory = aside
    remove(directory / COMPLETE)
    fsync_directory(directory)
    remove_tree(directory)
