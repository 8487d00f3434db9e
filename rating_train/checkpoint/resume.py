"""Choose the checkpoint that a start resumes from, or that is scored. Handles files only: no torch, no collectives."""

from __future__ import annotations

import logging
from pathlib import Path

from rating_train.checkpoint import cleanup, store
from rating_train.errors import UserError

log = logging.getLogger(__name__)


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """Sweep what interrupted saves left, and return the checkpoint to resume from, or ``None`` to start at step 0.

    Args:
        root: the run's checkpoints directory.
        resume: ``auto`` takes the newest checkpoint that verifies, if there is one; ``must`` requires one; ``never``
            refuses to start if there is one; anything else is a checkpoint's path.

    Raises:
        UserError: there is no such checkpoint, or none that verifies, or the disk cannot read them.
    """
    try:
        return _find(root, resume)
    except OSError as e:
        raise UserError(
            f"the checkpoints cannot be read ({e})",
            where=root,
            fix="start again once the file system is back",
        ) from e


def _find(root: Path, resume: str) -> Path | None:
    for name in cleanup.sweep(root):
        log.warning("removed %s, left by a save that was interrupted", name)
    if resume == "never":
        if store.steps_present(root):
            raise UserError(
                "the run has checkpoints already",
                where=root,
                fix="choose another `name`, remove the run directory, or drop --resume never",
            )
        return None
    if resume not in ("auto", "must"):
        path = named_checkpoint(resume)
        # Only what is named like a checkpoint can be one that another host has just committed.
        if problem := store.problem(path, wait=path.name.startswith("step_")):
            raise UserError(f"the checkpoint cannot be trusted: {problem}", where=path)
        if path.resolve().parent == root.resolve():
            for name in cleanup.set_aside_after(root, int(path.name.partition("_")[2])):
                log.warning("set aside %s: the run returns to %s", name, path.name)
        return path
    found, skipped = store.newest_valid(root)
    for bad in skipped:
        log.error("skipped %s: %s", bad.path, bad.problem)
    if found is None and resume == "must":
        raise UserError("there is no checkpoint to resume from", where=root, fix="drop --resume must")
    return found.path if found else None


def named_checkpoint(resume: str) -> Path:
    """Return the directory that ``--resume PATH`` names.

    Raises:
        UserError: there is none.
    """
    path = Path(resume)
    if not path.is_dir():
        raise UserError(
            f"there is no checkpoint directory {resume!r}",
            where="--resume",
            expected="auto, never, must, or the path of a checkpoint, as RUN/checkpoints/step_00000500",
        )
    return path


def choose_checkpoint(root: Path, wanted: str) -> Path:
    """Return the directory of ``best``, ``latest`` or a step, after verifying it.

    Raises:
        UserError: no such checkpoint, or one whose bytes are not those that were saved.
    """
    names = {"best": store.BEST, "latest": store.LATEST}
    if wanted in names:
        step = store.pointed_step(root, names[wanted])
    elif wanted.isdigit():
        step = int(wanted)
    else:
        raise UserError(
            f"{wanted!r} names no checkpoint", where="--checkpoint", expected="best, latest or a step"
        )
    present = [s for s, _ in store.steps_present(root)]
    if step is None or step not in present:
        raise UserError(
            f"there is no checkpoint {wanted}",
            where=root,
            expected=f"one of the steps {', '.join(map(str, present))}" if present else "a trained run",
        )
    directory = root / store.step_name(step)
    if problem := store.problem(directory):
        raise UserError(f"the checkpoint cannot be trusted: {problem}", where=directory)
    return directory
