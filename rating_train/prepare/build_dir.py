"""The working directory of a build, ``OUT.build``: who may write it, and which build it belongs to.

::

    OUT.build/build.json    what the items depend on; a command with other options does not resume this build
    OUT.build/lock          held by the command: exclusively, or shared by several that make parts
    OUT.build/workers.lock  held (shared) by every worker process while it lives
    OUT.build/plan/  OUT.build/parts/  OUT.build/fetch/
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import claim_folder, hold_lock, sha256_json
from rating_train.prepare.full_disk import disk_full, is_full

BUILD_NAME = "build.json"
ORPHAN_SECONDS = 60.0  # for workers of a killed command to notice that it is gone


class BuildDir:
    """Paths of one build, and its lock."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.path = self.out.with_name(f"{self.out.name}.build")
        self.plan = self.path / "plan"
        self.parts = self.path / "parts"
        self.cache = self.path / "fetch"
        self.workers_lock = self.path / "workers.lock"

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the build while the block runs, after the worker processes of a killed command have ended.

        Args:
            shared: hold it together with other commands that only make parts.

        Raises:
            UserError: another command holds the build, or the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock_file(self.path / "lock", shared, 0.0)
        except OSError as e:
            if is_full(e):
                raise disk_full(self.path) from e
            raise UserError(f"cannot write here ({e})", where=self.path, fix="choose another --out") from e
        try:
            if not shared:
                os.close(self._lock_file(self.workers_lock, False, ORPHAN_SECONDS))
            yield
        finally:
            os.close(lock)

    def _lock_file(self, path: Path, shared: bool, wait_seconds: float) -> int:
        deadline = time.monotonic() + wait_seconds
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            held = hold_lock(lock, shared=shared)
            if held is None:  # no locks on this file system: the user's care is what remains
                return lock
            # A build that ended between open and flock has removed the file: then the lock protects nothing.
            if held and path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
            os.close(lock)
            if held:
                self.path.mkdir(parents=True, exist_ok=True)
            elif time.monotonic() >= deadline:
                raise UserError(
                    "another command is working on this build",
                    where=path,
                    fix="wait until it ends, or stop it; the lock ends with it and needs no removal",
                )
            else:
                time.sleep(0.05)

    def belongs_to(self, identity: Mapping[str, Any]) -> str:
        """Record what the build is made of, or compare with what was recorded; return its fingerprint.

        Raises:
            UserError: the build was started with other options or sources; the message has each difference.
        """
        claim_folder(self.path / BUILD_NAME, identity, "build", "run with that build's options to resume it")
        return sha256_json(dict(identity))

    def remove(self) -> None:
        """Remove the build; the file that says whose it is goes last, so that a killed removal can be finished."""
        for folder in (self.parts, self.plan, self.cache):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.workers_lock, self.path / "lock", self.path / BUILD_NAME):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.path)
