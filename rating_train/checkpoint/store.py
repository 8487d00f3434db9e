"""The directory protocol of checkpoints. Handles files only: no torch, no collectives.

Commit, then point, then prune::

    1. rank 0 creates a temporary directory  step_00000500.tmp-<nonce>  and every rank writes its files into it
    2. sizes and SHA-256 of all files are recorded in COMPLETE.json, which is fsynced
    3. the directory is renamed to step_00000500 and its parent fsynced     <- the commit
    4. latest.json (and best.json) are replaced atomically
    5. old checkpoints are pruned: renamed to a temporary name, then deleted, their COMPLETE.json first

A directory without a valid COMPLETE.json is not a checkpoint. A crash at any point leaves either the old
checkpoint or the new one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import atomic_write_json, fsync_path, sha256_file

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE.json"
LATEST = "latest.json"
BEST = "best.json"
VERSION = 1
_STEP = re.compile(r"^step_(\d{8,})$")
_TEMPORARY = re.compile(r"^step_\d{8,}\.tmp-[0-9a-f]+$")
_TORN_POINTER = re.compile(rf"^\.({re.escape(LATEST)}|{re.escape(BEST)})\.tmp-[0-9a-f-]+$")

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
    temporary = root / f"{step_name(step)}.tmp-{secrets.token_hex(6)}"
    temporary.mkdir(parents=True)
    return temporary


def check_free_space(root: Path, needed_bytes: int) -> None:
    """Refuse to begin a checkpoint that does not fit on the disk.

    Raises:
        OSError: ENOSPC; names the path, the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC, f"a checkpoint needs {needed_bytes:,} bytes, but {free:,} are free", str(root)
        )


def relative_files(directory: Path) -> list[str]:
    """Return the paths of all files below a directory, relative to it and sorted, without COMPLETE.json."""
    files = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return sorted(f for f in files if f != COMPLETE)


def seal(directory: Path, names: Iterable[str]) -> Files:
    """Flush files to disk and describe them. Every rank calls this for the files that it wrote."""
    result: Files = {}
    for name in names:
        fsync_path(directory / name)
        result[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
    return result


def commit(temporary: Path, step: int, files: Files) -> Path:
    """Turn a written temporary directory into a checkpoint; return its final path.

    Raises:
        InvalidCheckpoint: the directory's content does not match ``files``.
    """
    present = relative_files(temporary)
    if present != sorted(files):
        odd = sorted(set(present) ^ set(files))
        raise InvalidCheckpoint(f"the files written are not the files described: {', '.join(odd[:5])}")
    for name, entry in files.items():
        size = (temporary / name).stat().st_size
        if size != entry["bytes"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes, but was described with {entry['bytes']}")
    for folder in {(temporary / name).parent for name in files}:
        fsync_path(folder)
    atomic_write_json(temporary / COMPLETE, {"version": VERSION, "step": step, "files": files})
    final = temporary.parent / step_name(step)
    old = None
    if (
        final.exists()
    ):  # this step was saved before: moved aside, and deleted only once the new one is committed
        old = temporary.with_name(f"{final.name}.tmp-{secrets.token_hex(6)}")
        os.rename(final, old)
    os.rename(temporary, final)
    fsync_path(final.parent)
    if old is not None:
        discard(old)
    return final


def verify(directory: Path, hashes: bool = True) -> dict[str, Any]:
    """Check every file's size and, with ``hashes``, its SHA-256 against COMPLETE.json; return its content.

    Raises:
        InvalidCheckpoint: a file is missing, truncated, or has other bytes, or there is an additional ``.pt`` file.
        OSError: the disk cannot read it.
    """
    step, files = _read_marker(directory)
    if step_name(step) != directory.name:
        raise InvalidCheckpoint(f"{COMPLETE} belongs to step {step}")
    _verify_files(directory, files, hashes)
    return {"version": VERSION, "step": step, "files": files}


def problem(directory: Path, hashes: bool = True) -> str:
    """Return why a checkpoint must not be loaded, read errors of the disk included; ``""`` if it verifies."""
    try:
        verify(directory, hashes)
    except InvalidCheckpoint as e:
        return str(e)
    except OSError as e:
        return f"it cannot be read ({e})"
    return ""


def _read_marker(directory: Path) -> tuple[int, Files]:
    """Return step and files of COMPLETE.json, with every entry of the right type."""
    try:
        content = json.loads((directory / COMPLETE).read_text("utf-8"))
        step, files = content["step"], content["files"]
        if content["version"] != VERSION or not isinstance(step, int) or not files:
            raise ValueError("not of this version, or empty")
        checked = {str(n): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for n, e in files.items()}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"it has no {COMPLETE}: it was never committed") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise InvalidCheckpoint(f"{COMPLETE} cannot be read: {type(e).__name__}: {e}") from e
    return step, checked


def _verify_files(directory: Path, files: Files, hashes: bool = True) -> None:
    # DeepSpeed and `Shards` find files by their names, so a foreign one would be loaded too.
    foreign = [name for name in relative_files(directory) if name.endswith(".pt") and name not in files]
    if foreign:
        raise InvalidCheckpoint(f"it contains files that were not saved with it: {', '.join(foreign[:5])}")
    for name, entry in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise InvalidCheckpoint(f"{name} {found}")
    for name, entry in files.items() if hashes else ():  # sizes first: they are cheap and find most damage
        if sha256_file(directory / name) != entry["sha256"]:
            raise InvalidCheckpoint(f"{name} does not have the bytes that were saved (SHA-256 differs)")


def steps_present(root: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of every directory named like a checkpoint, newest first."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := _STEP.match(p.name))]
    return sorted(found, reverse=True)


def newest_valid(root: Path) -> tuple[Found | None, list[Found]]:
    """Return the newest checkpoint that verifies, and the newer ones that were skipped, with reasons.

    Raises:
        UserError: checkpoints exist, but none verifies: a start at step 0 must be requested explicitly.
    """
    skipped: list[Found] = []
    for step, path in steps_present(root):
        reason = problem(path)
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


def point(root: Path, name: str, step: int, **more: Any) -> None:
    """Replace a pointer (latest.json, best.json) atomically."""
    atomic_write_json(root / name, {"step": step, "directory": step_name(step), **more})


def pointed_step(root: Path, name: str) -> int | None:
    """Return the step that a pointer names; ``None`` if the pointer is missing, torn, or dangling."""
    try:
        step = int(json.loads((root / name).read_text("utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if is_committed(root, step) else None


def is_committed(root: Path, step: int) -> bool:
    """Return whether there is a checkpoint of ``step`` with its marker; its files are not verified."""
    return (root / step_name(step) / COMPLETE).is_file()


def prune(root: Path, keep_last: int, keep_every: int) -> list[int]:
    """Delete the committed checkpoints that need not be kept; return their steps.

    Kept are the ``keep_last`` newest, those that latest.json and best.json point to, and, if ``keep_every`` is
    not 0, those at its multiples. Directories that were never committed do not count among the newest.
    """
    committed = [(s, p) for s, p in steps_present(root) if (p / COMPLETE).is_file()]
    keep = {step for step, _ in committed[:keep_last]}
    keep |= {s for name in (LATEST, BEST) if (s := pointed_step(root, name)) is not None}
    keep |= {step for step, _ in committed if keep_every and step % keep_every == 0}
    removed = []
    for step, path in committed:
        if step not in keep:
            discard(path)
            removed.append(step)
    return removed


def discard(directory: Path) -> None:
    """Delete a checkpoint: rename it, so that remains of a crash are swept, then delete its marker, then the rest."""
    if not _TEMPORARY.match(directory.name):
        directory = directory.rename(directory.with_name(f"{directory.name}.tmp-{secrets.token_hex(6)}"))
        fsync_path(directory.parent)
    (directory / COMPLETE).unlink(missing_ok=True)
    fsync_path(directory)
    shutil.rmtree(directory)


def sweep(root: Path) -> list[str]:
    """Delete what interrupted saves left under temporary names; call before a run saves.

    A directory that is complete except for its name (a crash just before the commit, or just before its deletion)
    gets its final name.
    """
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if _TORN_POINTER.match(path.name):
            path.unlink()
            removed.append(path.name)
            continue
        if not (path.is_dir() and _TEMPORARY.match(path.name)):
            continue
        final = root / path.name.partition(".")[0]
        if not final.exists() and _is_complete(path, final.name):
            os.rename(path, final)
            fsync_path(root)
            log.warning("%s was complete except for its name; renamed to %s", path.name, final.name)
        else:
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def _is_complete(directory: Path, name: str) -> bool:
    try:
        step, files = _read_marker(directory)
        _verify_files(directory, files)
    except (InvalidCheckpoint, OSError):
        return False
    return step_name(step) == name


def set_aside_after(root: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps to ``abandoned-*`` when a run returns to ``step``.

    Otherwise the next start would resume from the newest of them.
    """
    later = [path for found, path in steps_present(root) if found > step]
    for path in later:
        os.rename(path, path.with_name(f"abandoned-{secrets.token_hex(3)}_{path.name}"))
    return [path.name for path in later]
