"""The directory protocol of checkpoints. Knows files only: no torch, no collectives.

Commit, then point, then prune::

    1. a temporary directory  step_00000500.tmp-<nonce>  is made; every rank writes its files into it
    2. sizes and SHA-256 of all files go into COMPLETE.json, which is fsynced
    3. the directory is renamed to step_00000500, and the parent fsynced     <- the commit
    4. latest.json (and best.json) are replaced atomically
    5. old checkpoints are pruned, their COMPLETE.json first

A directory without a valid COMPLETE.json does not exist. A crash at any point leaves either the old
checkpoint or the new one.
"""

from __future__ import annotations

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

Files = dict[str, dict[str, Any]]  # relative path -> {"bytes": int, "sha256": hex}


class InvalidCheckpoint(Exception):
    """A directory that must not be loaded; the message says why."""


@dataclass(frozen=True)
class Found:
    """A checkpoint directory by its name; ``problem`` is ``""`` where it verified."""

    step: int
    path: Path
    problem: str = ""


def step_name(step: int) -> str:
    """``step_00000500``: sorts by step."""
    return f"step_{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Make the temporary directory of a new checkpoint. One process of the job calls this."""
    temporary = root / f"{step_name(step)}.tmp-{secrets.token_hex(6)}"
    temporary.mkdir(parents=True)
    return temporary


def relative_files(directory: Path) -> list[str]:
    """Every file below a directory, relative to it, sorted; COMPLETE.json itself left out."""
    files = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return sorted(f for f in files if f != COMPLETE)


def seal(directory: Path, names: Iterable[str]) -> Files:
    """Flush files to the disk and describe them. Every rank does this for the files that it wrote."""
    result: Files = {}
    for name in names:
        fsync_path(directory / name)
        result[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
    return result


def commit(temporary: Path, step: int, files: Files) -> Path:
    """Turn a written temporary directory into a checkpoint; returns its final path.

    Raises:
        InvalidCheckpoint: what lies in the directory is not what was described.
    """
    present = relative_files(temporary)
    if present != sorted(files):
        odd = sorted(set(present) ^ set(files))
        raise InvalidCheckpoint(f"files written and files described differ: {', '.join(odd[:5])}")
    for name, entry in files.items():
        size = (temporary / name).stat().st_size
        if size != entry["bytes"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes, described with {entry['bytes']}")
    final = temporary.parent / step_name(step)
    if final.exists():  # saved before at this step, by a run that was then resumed from an older one
        discard(final)
    for folder in {(temporary / name).parent for name in files}:
        fsync_path(folder)
    atomic_write_json(temporary / COMPLETE, {"version": VERSION, "step": step, "files": files})
    os.rename(temporary, final)
    fsync_path(final.parent)
    return final


def verify(directory: Path) -> dict[str, Any]:
    """Read COMPLETE.json and check every file's size and SHA-256 against it; returns its content.

    Raises:
        InvalidCheckpoint: anything is missing, torn, of another size, or has other bytes.
    """
    marker = directory / COMPLETE
    try:
        content = json.loads(marker.read_text("utf-8"))
        files = content["files"]
        if content["version"] != VERSION or not isinstance(files, dict) or not files:
            raise ValueError("not of this version, or empty")
    except FileNotFoundError:
        raise InvalidCheckpoint(f"it has no {COMPLETE}: it was never committed") from None
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise InvalidCheckpoint(f"{COMPLETE} cannot be read: {e}") from e
    if step_name(content["step"]) != directory.name:
        raise InvalidCheckpoint(f"{COMPLETE} is that of step {content['step']}")
    for name, entry in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise InvalidCheckpoint(f"{name} {found}")
    for name, entry in files.items():  # sizes first: they are cheap and find most damage
        if sha256_file(directory / name) != entry["sha256"]:
            raise InvalidCheckpoint(f"{name} does not have the bytes that were saved (SHA-256 differs)")
    return content


def steps_present(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every directory that is named like a checkpoint, newest first."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := _STEP.match(p.name))]
    return sorted(found, reverse=True)


def newest_valid(root: Path) -> tuple[Found | None, list[Found]]:
    """The newest checkpoint that verifies, and the newer ones that were skipped, with reasons.

    Raises:
        UserError: checkpoints exist and none verifies: starting again from step 0 must be asked for.
    """
    skipped = []
    for step, path in steps_present(root):
        try:
            verify(path)
        except InvalidCheckpoint as e:
            skipped.append(Found(step, path, str(e)))
            continue
        return Found(step, path), skipped
    if skipped:
        reasons = "; ".join(f"{f.path.name}: {f.problem}" for f in skipped)
        raise UserError(
            f"there are checkpoints, and none can be trusted: {reasons}",
            where=root,
            fix="restore one from a backup, or start anew with --resume never and another name",
        )
    return None, []


def point(root: Path, name: str, step: int, **more: Any) -> None:
    """Replace a pointer (latest.json, best.json) atomically."""
    atomic_write_json(root / name, {"step": step, "directory": step_name(step), **more})


def pointed_step(root: Path, name: str) -> int | None:
    """The step that a pointer names; ``None`` where the pointer is missing, torn, or points nowhere."""
    try:
        step = int(json.loads((root / name).read_text("utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if (root / step_name(step) / COMPLETE).is_file() else None


def prune(root: Path, keep_last: int, keep_every: int) -> list[int]:
    """Delete committed checkpoints that nothing keeps; returns their steps.

    Kept: the ``keep_last`` newest, those that latest.json and best.json point to, and, if ``keep_every`` is
    not 0, every multiple of it. Directories that were never committed are not counted among the newest.
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
    """Delete a checkpoint, its marker first: a crash in between leaves a directory that does not exist."""
    (directory / COMPLETE).unlink(missing_ok=True)
    fsync_path(directory)
    shutil.rmtree(directory)


def sweep(root: Path) -> list[str]:
    """Delete temporary directories of saves that never ended; called before a run starts to save."""
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_dir() and _TEMPORARY.match(path.name):
            shutil.rmtree(path)
            removed.append(path.name)
    return removed
