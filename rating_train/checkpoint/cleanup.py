"""Delete checkpoints that are not needed, and what interrupted saves left. Handles files only: no torch."""

from __future__ import annotations

import logging
import re
import secrets
from pathlib import Path

from rating_train.checkpoint import store
from rating_train.files import path_exists, remove, remove_tree, rename

log = logging.getLogger(__name__)

_TORN_POINTER = re.compile(rf"^\.({re.escape(store.LATEST)}|{re.escape(store.BEST)})\.tmp-[0-9a-f-]+$")


def prune(root: Path, keep_last: int, keep_every: int) -> list[int]:
    """Delete the committed checkpoints that need not be kept; return their steps.

    Kept are the ``keep_last`` newest, those that latest.json and best.json point to, and, if ``keep_every`` is
    not 0, those at its multiples. Directories that were never committed do not count among the newest.

    Raises:
        OSError: a pointer cannot be read, so that what it names is not known: nothing is deleted.
    """
    committed = [(s, p) for s, p in store.steps_present(root) if store.is_committed(root, s)]
    keep = {step for step, _ in committed[:keep_last]}
    keep |= {s for name in (store.LATEST, store.BEST) if (s := store.pointed_step(root, name)) is not None}
    keep |= {step for step, _ in committed if keep_every and step % keep_every == 0}
    removed = []
    for step, path in committed:
        if step not in keep:
            store.discard(path)
            removed.append(step)
    return removed


def sweep(root: Path) -> list[str]:
    """Delete what interrupted saves left under temporary names; call before a run saves.

    A directory that is complete except for its name (a crash just before the commit, or just before its deletion)
    gets its final name. What cannot be read or deleted now is left for the next start, and logged.

    Returns:
        The names of what was deleted.
    """
    removed = []
    leftovers = [path for path in store.entries(root) if store.TEMPORARY.match(path.name)]
    torn = [path for path in store.entries(root, files=True) if _TORN_POINTER.match(path.name)]
    for path in sorted(leftovers + torn):
        try:
            if path in torn:
                remove(path)
            elif _restored(path):
                continue
            else:
                remove_tree(path)
        except OSError as e:
            log.warning("%s is left by an interrupted save and cannot be removed now (%s)", path, e)
            continue
        removed.append(path.name)
    return removed


def _restored(path: Path) -> bool:
    """Give a directory that is complete its final name, if that is free; return whether it has it now.

    Raises:
        OSError: that cannot be found out.
    """
    final = path.parent / path.name.partition(".")[0]
    if path_exists(final):
        return False
    try:
        step, files = store.read_marker(path)
        store.verify_files(path, files)
    except store.InvalidCheckpoint:
        return False
    if store.step_name(step) != final.name:
        return False
    rename(path, final, lambda: not path_exists(path))
    log.warning("%s was complete except for its name; renamed to %s", path.name, final.name)
    return True


def set_aside_after(root: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps to ``abandoned-*`` when a run returns to ``step``; return their names.

    Otherwise the next start would resume from the newest of them.
    """
    later = [path for found, path in store.steps_present(root) if found > step]
    for path in later:
        aside = path.with_name(f"abandoned-{secrets.token_hex(3)}_{path.name}")
        rename(path, aside, lambda path=path: not path_exists(path))  # type: ignore[misc]
    return [path.name for path in later]
