"""The task of a run: taken from its dataset, and refused where the two contradict each other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.config.task import PAPER, Task, task_of
from rating_train.errors import UserError
from rating_train.shards.manifest import read_manifest

log = logging.getLogger(__name__)


def with_task_of_data(config: Config) -> Config:
    """Return the configuration of a run with the task of its dataset, where that is here.

    What a dataset cannot give is left out of ``model.inputs``. Of a remote dataset the manifest is not here yet: its
    task is the configuration's, and is compared when the manifest is.

    Raises:
        UserError: the configuration has another task than the dataset, or asks for inputs or weights that its items
            do not have.
    """
    source = config.data.train_sources[0]
    manifest = None
    if not source.remote:
        with contextlib.suppress(UserError):  # a missing dataset is reported with all other problems
            manifest = read_manifest(source.path)
    if manifest is not None:
        config = _adopted(config, manifest, source.path)
    task = config.task
    inputs = [name for name in config.model.inputs if name in task.inputs]
    if not inputs:
        raise UserError(
            f"the items of this task have {' and '.join(task.inputs)} only",
            where=f"model.inputs={config.model.inputs}",
            fix=f"set model.inputs={task.inputs}",
        )
    if inputs != config.model.inputs:
        log.info("the task has no %s: the model reads %s alone", *({"image", "text"} - set(inputs)), *inputs)
    if config.loss.count_weight != "none" and not task.weight:
        raise UserError(
            f"loss.count_weight={config.loss.count_weight} needs a number of ratings or a weight of each item, which "
            "the dataset does not have",
            where="loss.count_weight",
            fix="set loss.count_weight=none, or prepare with `weight: COLUMN` in the task",
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, inputs=inputs))


def _adopted(config: Config, manifest: Mapping[str, Any], path: str) -> Config:
    task = task_of(manifest)
    if config.task.model_part() != PAPER.model_part():
        refuse_other_task(config.task, task, path, "the configuration")
    return dataclasses.replace(config, task=task)


def refuse_other_task(own: Task, task: Task, path: str | Path, whose: str) -> None:
    """Refuse a dataset of another task than a configuration or run.

    Raises:
        UserError: names each difference.
    """
    if difference := own.difference(task):
        raise UserError(
            f"the dataset has another task than {whose}: {difference}",
            where=path,
            fix="train a new run on it, or prepare the dataset with the same --task",
        )


def check_task_of_run(config: Config, run: Path) -> None:
    """Refuse to resume a run whose task is not the dataset's.

    Raises:
        UserError: as :func:`refuse_other_task`.
    """
    file = run / run_dir.CONFIG_FILE
    if file.is_file():
        own = load_config(file).task
        refuse_other_task(own, config.task, config.data.train_sources[0].path, f"the run {run}")


def check_manifests(config: Config, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse datasets of another task than the configuration's, when their manifests are known: path -> manifest.

    Raises:
        UserError: as :func:`refuse_other_task`.
    """
    for path, manifest in manifests.items():
        refuse_other_task(config.task, task_of(manifest), path, "the configuration")
