"""Save and restore checkpoints on all ranks: decide on rank 0, broadcast, act everywhere.

A save has two halves. Only the first blocks training::

    save       copy this rank's state to memory; rank 0 creates the temporary directory; a thread of each rank
               writes, fsyncs and hashes its own files
    finalize   at a step boundary, once all threads are done: rank 0 commits, updates the pointers, and has its
               thread prune

Threads never take part in collectives, and at most one save is pending.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.checkpoint import cleanup, safe_load, store
from rating_train.checkpoint.deepspeed_io import Shard, capture_shards, read_shards, tensor_bytes
from rating_train.checkpoint.rank_files import rank_file, rank_of, unseen_files, write_rank_files
from rating_train.checkpoint.resume import find_checkpoint
from rating_train.checkpoint.state import STATE_FILE, Identity, TrainState, check_identity, from_json, to_json
from rating_train.distributed import seeding
from rating_train.distributed.collectives import all_gather, gather, max_over_ranks, on_main, sum_over_ranks
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.files import make_folder, read_json, remove_tree

log = logging.getLogger(__name__)

#: Content of best.json beside the step: the ``metric`` of the best checkpoint, and its ``value``.
Best = dict[str, Any]


class SaveFailed(UserError):
    """A save that left nothing behind; earlier checkpoints are unchanged. Raised on all ranks.

    Where the message says so, the checkpoint is complete, but latest.json or best.json does not point to it.

    Attributes:
        step: the step whose checkpoint is missing, or not pointed to.
    """

    step = -1


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    Args:
        path: its directory.
        step: its step.
        best: the content of best.json for it; ``None`` if it was not saved as the best.
        bytes: its size, over all ranks.
        blocked_seconds: how long the copy to memory blocked training.
        seconds: time from its beginning to its commit.
    """

    path: Path
    step: int
    best: Best | None
    bytes: int
    blocked_seconds: float
    seconds: float


@dataclass(frozen=True)
class _Pending:
    """A save between its two halves."""

    step: int
    best: Best | None
    temporary: Path
    written: Future[store.Files]
    needed_bytes: int
    started: float
    blocked_seconds: float


class Checkpointer:
    """Reads and writes the checkpoints of one run. Every method is a collective.

    Args:
        root: the run's checkpoints directory.
        world: this process among the ranks.
        keep_last: see :func:`~.cleanup.prune`.
        keep_every: see :func:`~.cleanup.prune`.
        background: whether :meth:`save` returns as soon as the state is copied.
    """

    def __init__(self, root: Path, world: World, keep_last: int, keep_every: int, background: bool) -> None:
        self.root = root
        self.world = world
        self._keep = (keep_last, keep_every)
        self._background = background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._pending: _Pending | None = None
        self._pruning: Future[list[int]] | None = None

    def save(
        self, ds: Any, state: TrainState, identity: Identity, total_steps: int, best: Best | None = None
    ) -> Saved | None:
        """Begin a checkpoint of this step, after finalizing the pending one.

        Args:
            ds: the DeepSpeed engine.
            state: the training state of this step.
            identity: what a run that loads the checkpoint must agree on.
            total_steps: steps of the run, for the schedule.
            best: the content of best.json, if the checkpoint is the best one.

        Returns:
            The checkpoint, where saves are not made in the background.

        Raises:
            SaveFailed: this save or the pending one failed.
        """
        self.finalize()
        started = time.monotonic()
        shard: Shard = {**capture_shards(ds), rank_file(self.world.rank): seeding.capture()}
        content = to_json(state, identity, total_steps) if self.world.is_main else None
        needed = int(sum_over_ranks([tensor_bytes(shard)])[0])
        try:
            temporary = on_main(lambda: self._begin(state.step, needed))
        except OSError as e:
            raise self._failure(state.step, f"rank 0: {e}", needed) from e
        written = self._thread.submit(write_rank_files, temporary, shard, content)
        blocked = time.monotonic() - started
        self._pending = _Pending(state.step, best, temporary, written, needed, started, blocked)
        return None if self._background else self.finalize()

    def finalize_if_done(self) -> Saved | None:
        """Finalize the pending save if the threads of all ranks are done. Call at step boundaries."""
        if self._pending is None or max_over_ranks(0 if self._pending.written.done() else 1):
            return None
        return self.finalize()

    def finalize(self) -> Saved | None:
        """Wait for the pending save, if there is one, and commit it.

        Raises:
            SaveFailed: a rank could not write, or rank 0 could not commit; the temporary directory is removed.
        """
        save, self._pending = self._pending, None
        if save is None:
            return None
        error = save.written.exception()
        errors = all_gather(str(error) or type(error).__name__ if error else "")
        problem = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)
        if not problem:
            described = gather(save.written.result())
            path, size, problem = on_main(lambda: self._commit(save, described or []))
            if not problem:
                seconds = time.monotonic() - save.started
                return Saved(path, save.step, save.best, size, save.blocked_seconds, seconds)
        on_main(lambda: self._remove(save.temporary))
        raise self._failure(save.step, problem, save.needed_bytes)

    def mark_best(self, step: int, best: Best) -> bool:
        """Point best.json to a committed checkpoint that was evaluated after its save.

        Returns:
            False if there is no such checkpoint.

        Raises:
            SaveFailed: best.json cannot be written.
        """

        def point() -> bool:
            if not store.is_committed(self.root, step):
                return False
            store.point(self.root, store.BEST, step, **best)
            return True

        try:
            return on_main(point)
        except OSError as e:
            raise self._failure(
                step, f"rank 0: it is complete, but {store.BEST} is not updated: {e}", 0
            ) from e

    def committed(self, step: int) -> bool:
        """Return whether the run has a committed checkpoint of ``step``."""
        return on_main(lambda: store.is_committed(self.root, step))

    def best(self) -> Best:
        """Return the content of best.json; empty if it does not point to a committed checkpoint."""

        def read() -> Best:
            known = store.pointed_step(self.root, store.BEST) is not None
            return dict(read_json(self.root / store.BEST)) if known else {}

        return on_main(read)

    def close(self) -> None:
        """Wait for the thread (at the end of a run it may still prune)."""
        self._thread.shutdown(wait=True)
        if self._pruning is not None:
            self._report_pruning()

    def _begin(self, step: int, needed_bytes: int) -> Path:
        make_folder(self.root)
        store.check_free_space(self.root, needed_bytes)
        return store.begin(self.root, step)

    def _commit(self, save: _Pending, described: list[store.Files]) -> tuple[Path, int, str]:
        """Commit on rank 0; return (final path, bytes, problem)."""
        if self._pruning is not None:
            self._report_pruning()
        files = {name: entry for part in described for name, entry in part.items()}
        size = sum(e["bytes"] for e in files.values())
        try:
            path = store.commit(save.temporary, save.step, files)
        except (OSError, store.InvalidCheckpoint) as e:
            return save.temporary, 0, f"rank 0: {type(e).__name__}: {e}"
        try:
            if save.best:
                store.point(self.root, store.BEST, save.step, **save.best)
            store.point(self.root, store.LATEST, save.step)
        except OSError as e:
            return (
                path,
                size,
                f"rank 0: it is complete, but {store.LATEST} or {store.BEST} is not updated: {e}",
            )
        self._pruning = self._thread.submit(cleanup.prune, self.root, *self._keep)
        return path, size, ""

    def _remove(self, temporary: Path) -> None:
        try:
            remove_tree(temporary)
        except OSError as e:
            log.warning("%s cannot be removed now (%s): the next start does it", temporary, e)

    def _report_pruning(self) -> None:
        assert self._pruning is not None
        error = self._pruning.exception()
        if error is not None:
            log.error("old checkpoints could not be removed: %s", error)
        elif removed := self._pruning.result():
            log.info("pruned the checkpoints of steps %s", ", ".join(map(str, removed)))
        self._pruning = None

    def _failure(self, step: int, problem: str, needed_bytes: int) -> SaveFailed:
        failure = SaveFailed(
            f"the checkpoint of step {step} could not be written ({problem})",
            where=self.root,
            expected=f"{needed_bytes:,} bytes of free space, and a directory that all ranks can write to",
            fix="free some space; earlier checkpoints are intact",
            on_all_ranks=True,
        )
        failure.step = step
        return failure

    def find(self, resume: str) -> Path | None:
        """Return the checkpoint to resume from, or ``None`` to start at step 0.

        Args:
            resume: auto, must, never or a path; see :func:`~.resume.find_checkpoint`.

        Raises:
            UserError: there is no such checkpoint, or none that verifies. Raised on every rank.
        """
        return on_main(lambda: find_checkpoint(self.root, resume))

    def read_state(self, path: Path) -> dict[str, Any]:
        """Return state.json of a verified checkpoint, on every rank."""
        return on_main(lambda: read_json(path / STATE_FILE))

    def restore(self, ds: Any, path: Path, content: dict[str, Any], identity: Identity) -> TrainState:
        """Load a verified checkpoint into the engine and the random number generators.

        Raises:
            UserError: the checkpoint belongs to other data, another sample order or another kind of weights, or some
                host does not see all of its files.
        """
        check_identity(content, identity, path)
        saved = content["identity"]["topology"]
        self._await_on_all_hosts(path, same_layout=saved == identity.topology)
        if saved != identity.topology:
            log.info(
                "loading a checkpoint of %d ranks at ZeRO stage %d into %d ranks at stage %d",
                saved["ranks"], saved["zero_stage"], self.world.size, identity.topology["zero_stage"],
            )  # fmt: skip
        read_shards(ds, path, saved["zero_stage"], saved["ranks"])
        state = from_json(content)
        on_main(lambda: self._repair_pointers(path, state))
        if saved["ranks"] == self.world.size:
            own = path / rank_file(self.world.rank)
            seeding.restore(safe_load.load(own, mmap=False))
        return state

    def _await_on_all_hosts(self, path: Path, same_layout: bool) -> None:
        """Wait until every host sees the files that its ranks read: others may have written them a moment ago."""
        ranks = range(self.world.rank, self.world.rank + self.world.local_size)

        def wanted(name: str) -> bool:
            return not same_layout or rank_of(name) in (None, *ranks)

        unseen = unseen_files(path, wanted) if self.world.local_rank == 0 else ""
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(all_gather(unseen)) if text]
        if problems:
            raise UserError(
                f"not all hosts can read the checkpoint: {'; '.join(problems)}",
                where=path,
                expected="a file system that all nodes mount at the same path",
                fix="rating-train preflight on these nodes shows which one does not",
                on_all_ranks=True,
            )

    def _repair_pointers(self, path: Path, state: TrainState) -> None:
        """Set the pointers that a crash after a commit left outdated: pruning keeps what they point to."""
        if path.resolve().parent != self.root.resolve():
            return
        if store.pointed_step(self.root, store.LATEST) != state.step:
            store.point(self.root, store.LATEST, state.step)
        best = state.best_step
        committed = best is not None and store.is_committed(self.root, best)
        if best is not None and committed and store.pointed_step(self.root, store.BEST) != best:
            store.point(self.root, store.BEST, best, value=state.best_value)
