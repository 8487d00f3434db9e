"""When a checkpoint is written, which one is the best, and what a save that fails means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from rating_train.checkpoint.manager import Best, Saved, SaveFailed
from rating_train.checkpoint.state import TrainState
from rating_train.resilience.supervisor import Supervisor
from rating_train.scoring.metrics import LARGER_IS_BETTER
from rating_train.training.job import Job

log = logging.getLogger(__name__)

T = TypeVar("T")


class Saver:
    """Saves the checkpoints of a run. Every method is a collective.

    The best checkpoint is the best of those *on disk*: where the save of a new best fails, the next evaluation that
    beats what best.json names is saved in its place.
    """

    def __init__(self, job: Job, state: TrainState, supervisor: Supervisor) -> None:
        self._job, self._state, self._supervisor = job, state, supervisor
        self._on_disk = state.step if state.step == 0 or job.checkpointer.committed(state.step) else -1
        self._failed_steps: set[int] = set()  # since the last save that was committed
        self._best = self._best_on_disk()

    def save(self, best: Best | None = None) -> None:
        """Begin a checkpoint of this step. It is committed at a later boundary, or by :meth:`finish`.

        Raises:
            SaveFailed: saves failed at more steps in a row than ``train.max_failed_saves``.
        """
        self._wait()
        self._begin(best, final=False)

    def finalize_if_done(self) -> None:
        """Commit the save under way, if all ranks have written their files."""
        self._attempt(self._job.checkpointer.finalize_if_done)

    def keep_if_best(self, value: float | None) -> bool:
        """Keep the weights of this step as the best checkpoint, if their evaluation beats the one on disk.

        Args:
            value: ``train.select_metric`` of this step; ``None`` where it is undefined.

        Returns:
            whether it beats the one on disk.
        """
        metric = self._job.config.train.select_metric
        self._wait()
        if value is None or not _better(metric, value, self._best):
            return False
        best = {"metric": metric, "value": value}
        if self._on_disk != self._state.step:
            self._begin(best, final=False)
        elif self._attempt(lambda: self._job.checkpointer.mark_best(self._state.step, best)):
            self._best = value
        return True

    def settle(self) -> None:
        """Return once this step is on disk, or has failed to be written: at the end of a phase, before the next.

        Raises:
            SaveFailed: saves failed at more steps in a row than ``train.max_failed_saves``.
        """
        self._wait()
        if self._on_disk != self._state.step:
            self._begin(None, final=False)
            self._wait()

    def finish(self) -> None:
        """Return once this step is on disk, as the last thing of a run.

        Raises:
            SaveFailed: it could not be saved.
        """
        self._wait()
        if self._on_disk != self._state.step:
            self._begin(None, final=True)
            self._attempt(self._job.checkpointer.finalize, final=True)
        self._job.checkpointer.close()

    def _wait(self) -> None:
        self._attempt(self._job.checkpointer.finalize)

    def _begin(self, best: Best | None, final: bool) -> None:
        job, state = self._job, self._state
        self._supervisor.beat("saving", state.step, job.total_steps)
        identity = job.identity(state.step)
        self._attempt(
            lambda: job.checkpointer.save(job.engine.ds, state, identity, job.total_steps, best), final
        )
        self._supervisor.beat("training", state.step, job.total_steps)

    def _attempt(self, action: Callable[[], T], final: bool = False) -> T | None:
        """Run a part of a save; log what it committed, and what failed as long as that is tolerated."""
        try:
            result = action()
        except SaveFailed as e:
            self._failed_steps.add(e.step)
            if final or len(self._failed_steps) > self._job.config.train.max_failed_saves:
                raise
            # All ranks say the same: it is shown once.
            level = logging.ERROR if self._job.world.is_main else logging.INFO
            again = (
                "saving again at the end"
                if self._state.step == self._job.total_steps
                else "training continues"
            )
            log.log(level, "%s; %s (train.max_failed_saves)", e, again)
            return None
        if isinstance(result, Saved):
            self._committed(result)
        return result

    def _committed(self, saved: Saved) -> None:
        self._failed_steps.clear()
        self._on_disk = saved.step
        if saved.best is not None:
            self._best = saved.best["value"]
        log.info(
            "saved %s: %.1f MiB; training paused for %.2f s, written in %.2f s",
            saved.path, saved.bytes / 2**20, saved.blocked_seconds, saved.seconds,
        )  # fmt: skip

    def _best_on_disk(self) -> float | None:
        """The selected metric of the checkpoint that best.json names; ``None`` for no such, or for another metric."""
        content, state = self._job.checkpointer.best(), self._state
        if not content:
            return None
        if "metric" in content:
            return content["value"] if content["metric"] == self._job.config.train.select_metric else None
        # Written before the metric was, or by a start that set the pointer right.
        return state.best_value if content["step"] == state.best_step else None


def _better(metric: str, value: float, than: float | None) -> bool:
    return than is None or (value > than if LARGER_IS_BETTER[metric] else value < than)
