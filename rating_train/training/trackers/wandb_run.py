"""Weights & Biases: the numbers of the rows as a run of theirs, online where a key is there, else in local files.

Its own environment variables hold (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL, WANDB_API_KEY).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

import wandb

from rating_train.training.trackers.background import CLOSE_SECONDS, START_SECONDS
from rating_train.training.trackers.base import TrackedRun, evaluation_prefix, numbers

log = logging.getLogger(__name__)

_PROJECT = "rating_train"


class WandbRun:
    """Tells one run of wandb; a resumed run has the same id, so that its rows continue the curves."""

    def __init__(self, tracked: TrackedRun) -> None:
        known = tracked.id_of("wandb")
        run_id = known or secrets.token_hex(4)
        tracked.remember_id("wandb", run_id)  # at once: an attempt that is killed must not be another run
        # Without a key wandb would ask for one on a terminal, and training would wait for the answer.
        has_key = wandb.login(prompt=False, verify=False)
        settings = wandb.Settings(
            console="off",  # the log files of the ranks are the run's own
            silent=True,
            disable_code=True,
            disable_git=True,
            init_timeout=START_SECONDS,
            finish_timeout=CLOSE_SECONDS / 2,
        )
        chosen = wandb.setup().settings
        self._run = wandb.init(
            project=chosen.project or _PROJECT,
            name=tracked.name,
            id=run_id,
            resume="allow",
            dir=str(tracked.path),
            config=dict(tracked.settings),
            mode=None if has_key else "disabled" if chosen.mode == "disabled" else "offline",
            settings=settings,
        )
        # A step of our own: after a resume from an older checkpoint wandb's own would refuse the steps in between.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        where = self._run.url or f"offline; `wandb sync {self._run.settings.sync_dir}` uploads it"
        log.info("wandb: %s run %s (%s)", "resumed" if known else "new", run_id, where)

    def train(self, row: Mapping[str, Any]) -> None:
        """Send a row of train.jsonl."""
        self._run.log({"step": row["step"], **numbers("train", row)})

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Send a row of eval.jsonl."""
        self._run.log({"step": row["step"], **numbers(evaluation_prefix(row), row)})

    def close(self) -> None:
        """Wait until the rows are sent, or are in the local file."""
        self._run.finish()


def start(tracked: TrackedRun) -> WandbRun:
    """Start or resume the run."""
    return WandbRun(tracked)
