"""MLflow: the numbers of the rows as a run of a tracking server (MLFLOW_TRACKING_URI), else of a local SQLite file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from rating_train import run_dir
from rating_train.training.provenance import flat
from rating_train.training.trackers.base import TrackedRun, evaluation_prefix, numbers

log = logging.getLogger(__name__)

_EXPERIMENT = "rating_train"
_VALUE_CHARS = 500  # of a parameter; servers before MLflow 2.8 refuse longer ones
_BATCH = 100  # parameters in a request, which the protocol limits


class MlflowRun:
    """Tells one run of MLflow; a resumed run has the same id, so that its rows continue the curves."""

    def __init__(self, tracked: TrackedRun) -> None:
        file = tracked.path.absolute() / run_dir.MLFLOW_FILE
        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else f"sqlite:///{file}"
        self._client = MlflowClient(uri)
        known = tracked.id_of("mlflow")
        self._id = known if known and self._resumes(known, tracked) else self._create(tracked)
        log.info("mlflow: %s run %s at %s", "resumed" if known == self._id else "new", self._id, uri)

    def train(self, row: Mapping[str, Any]) -> None:
        """Send a row of train.jsonl."""
        self._send("train", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Send a row of eval.jsonl."""
        self._send(evaluation_prefix(row), row)

    def close(self) -> None:
        """Tell that nothing more comes."""
        self._client.set_terminated(self._id)

    def _resumes(self, run_id: str, tracked: TrackedRun) -> bool:
        """Continue a run, or tell that it cannot be: another server, a deleted run, a start with other settings."""
        try:
            self._client.update_run(run_id, status="RUNNING")
            if not tracked.first_step:  # the attempt before may have been killed before it told them
                self._tell_settings(run_id, tracked)
        except MlflowException as e:
            log.warning("mlflow: run %s cannot be resumed (%s); a new one follows", run_id, e.message)
            return False
        return True

    def _create(self, tracked: TrackedRun) -> str:
        name = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or _EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id = str(self._client.create_run(experiment_id, run_name=tracked.name).info.run_id)
        tracked.remember_id("mlflow", run_id)  # at once: an attempt that is killed must not be another run
        self._tell_settings(run_id, tracked)
        return run_id

    def _tell_settings(self, run_id: str, tracked: TrackedRun) -> None:
        settings = [Param(k, str(v)[:_VALUE_CHARS]) for k, v in flat(tracked.settings).items()]
        for first in range(0, len(settings), _BATCH):
            self._client.log_batch(run_id, params=settings[first : first + _BATCH])

    def _send(self, prefix: str, row: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)  # in milliseconds
        values = [Metric(key, float(v), now, row["step"]) for key, v in numbers(prefix, row).items()]
        self._client.log_batch(self._id, metrics=values)


def start(tracked: TrackedRun) -> MlflowRun:
    """Start or resume the run."""
    return MlflowRun(tracked)
