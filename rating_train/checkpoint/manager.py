"""Saving and restoring by all ranks together: decide on rank 0, broadcast, act everywhere."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rating_train import seeding
from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import read_shards, write_shards, writer_of
from rating_train.checkpoint.state import STATE_FILE, Identity, TrainState, check_identity, from_json, to_json
from rating_train.collectives import all_or_none, gather, on_main
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, read_json
from rating_train.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: where, how many bytes over all ranks, how many seconds training stood still."""

    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Checkpointer:
    """Reads and writes the checkpoints of one run. Every method is a collective."""

    root: Path
    world: World
    keep_last: int
    keep_every: int

    def save(self, ds: Any, state: TrainState, identity: Identity, total_steps: int, best: bool) -> Saved:
        """Commit a checkpoint of the current step, point to it, prune old ones."""
        started = time.monotonic()
        temporary = on_main(lambda: store.begin(self.root, state.step))

        def write() -> None:
            write_shards(ds, temporary)
            torch.save(seeding.capture(), temporary / _rank_file(self.world.rank))
            if self.world.is_main:
                atomic_write_json(temporary / STATE_FILE, to_json(state, identity, total_steps))

        all_or_none(write)

        def seal() -> store.Files:
            # Listed after all ranks have written (all_or_none is a barrier); each seals what it wrote itself.
            mine = [n for n in store.relative_files(temporary) if writer_of(n) == self.world.rank]
            return store.seal(temporary, mine)

        described = gather(all_or_none(seal))

        def finish() -> tuple[Path, int]:
            assert described is not None
            files = {name: entry for part in described for name, entry in part.items()}
            path = store.commit(temporary, state.step, files)
            store.point(self.root, store.LATEST, state.step)
            if best:
                store.point(self.root, store.BEST, state.step, value=state.best_value)
            removed = store.prune(self.root, self.keep_last, self.keep_every)
            if removed:
                log.info("pruned the checkpoints of steps %s", ", ".join(map(str, removed)))
            return path, sum(e["bytes"] for e in files.values())

        path, size = on_main(finish)
        return Saved(path, size, time.monotonic() - started)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to go on from, or ``None`` to start at step 0.

        Args:
            resume: ``auto`` takes the newest that verifies, if there is any; ``must`` insists on one;
                ``never`` refuses to start where there is one; anything else is a checkpoint's path.

        Raises:
            UserError: on every rank.
        """
        return on_main(lambda: self._find(resume))

    def _find(self, resume: str) -> Path | None:
        for name in store.sweep(self.root):
            log.warning("removed %s: a save that never ended", name)
        if resume == "never":
            if store.steps_present(self.root):
                raise UserError(
                    "the run has checkpoints already",
                    where=self.root,
                    fix="give another `name`, remove the run directory, or leave out --resume never",
                )
            return None
        if resume not in ("auto", "must"):
            path = Path(resume)
            try:
                store.verify(path)
            except store.InvalidCheckpoint as e:
                raise UserError(f"the checkpoint cannot be trusted: {e}", where=path) from e
            if path.resolve().parent == self.root.resolve():
                for name in store.set_aside_after(self.root, int(path.name.partition("_")[2])):
                    log.warning("set aside %s: the run goes back to %s", name, path.name)
            return path
        found, skipped = store.newest_valid(self.root)
        for bad in skipped:
            log.error("skipped %s: %s", bad.path, bad.problem)
        if found is None and resume == "must":
            raise UserError(
                "there is no checkpoint to go on from", where=self.root, fix="leave out --resume must"
            )
        return found.path if found else None

    def read_state(self, path: Path) -> dict[str, Any]:
        """state.json of a verified checkpoint, on every rank."""
        return on_main(lambda: read_json(path / STATE_FILE))

    def restore(self, ds: Any, path: Path, content: dict[str, Any], identity: Identity) -> TrainState:
        """Load a verified checkpoint into the engine and the random number generators.

        Raises:
            UserError: the checkpoint belongs to other data, another order or another topology.
        """
        check_identity(content, identity, path)
        read_shards(ds, path)
        rank_state = torch.load(path / _rank_file(self.world.rank), map_location="cpu", weights_only=True)
        seeding.restore(rank_state)
        return from_json(content)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"
