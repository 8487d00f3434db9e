"""Trackers of others, by the names of the setting `tracking`: TensorBoard, Weights & Biases, MLflow.

Each module is imported where its name is listed, and only there; so is the package behind it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rating_train.training.trackers.background import Background
from rating_train.training.trackers.base import Listener, TrackedRun

#: Name -> the module with its ``start(TrackedRun) -> Listener``.
_MODULES = {
    "wandb": "rating_train.training.trackers.wandb_run",
    "mlflow": "rating_train.training.trackers.mlflow_run",
}
#: Name -> the packages that it imports; of the extra `tracking`.
PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


def start_trackers(names: Sequence[str], tracked: TrackedRun) -> list[Listener]:
    """Start what is named, TensorBoard in this thread and the others in one of their own. Rank 0.

    Args:
        names: the setting `tracking`; `jsonl` is not started here, for the rows of a run are always written.
        tracked: the run.
    """
    started: list[Listener] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            from rating_train.training.trackers.tensorboard import TensorBoard

            started.append(TensorBoard(tracked))
        elif name in _MODULES:
            module = importlib.import_module(_MODULES[name])
            started.append(Background(name, lambda start=module.start: start(tracked)))  # type: ignore[misc]
    return started
