"""The verb ``evaluate``: score a checkpoint or an export on a split, on any number of ranks, and judge the scores."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rating_train import run_dir
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.checkpoint.resume import choose_checkpoint
from rating_train.checkpoint.state import STATE_FILE, from_json
from rating_train.config.schema import Config
from rating_train.config.task import task_of
from rating_train.data.loader import open_evaluation
from rating_train.distributed.collectives import on_main
from rating_train.errors import UserError
from rating_train.evaluation import baselines
from rating_train.evaluation.stored import Seen, read_texts, read_texts_of_all, trained_on
from rating_train.files import atomic_write_json, read_json
from rating_train.row_files import append_json_line
from rating_train.scoring import bootstrap
from rating_train.scoring.analysis import analyse, item_groups
from rating_train.scoring.predictions import Prediction, deduplicate, read_predictions
from rating_train.shards.manifest import read_manifest
from rating_train.shards.schema import PREDICT_SPLIT
from rating_train.shards.task import refuse_other_task
from rating_train.training import setup
from rating_train.training.evaluation import Evaluation, evaluate
from rating_train.training.predictor import load_predictor
from rating_train.weights.exported import (
    CONFIG_NAME,
    exported_architecture,
    exported_weights,
    is_exported,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how.

    Attributes:
        checkpoint: of a run: ``best``, ``latest`` or a step.
        split: ``""`` for the split of the run's own evaluations.
        data: another prepared dataset; ``""`` for the configured one.
        out: folder of an export's results; default ``EXPORT.evaluation`` beside it. A run's are in the run.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        ridge: whether to fit the baseline on the texts, if scikit-learn is installed.
    """

    checkpoint: str = "best"
    split: str = ""
    data: str = ""
    out: Path | None = None
    resamples: int = bootstrap.RESAMPLES
    seed: int = 0
    ridge: bool = True


@dataclass(frozen=True)
class _Trained:
    """What the model was trained on, and where its results go."""

    folder: Path
    step: int
    zero_stage: int | None
    data: dict[Path, str]  # dataset -> its fingerprint as the training knew it, or ""
    split: str
    out: Path


def evaluate_model(path: Path, config: Config, options: EvaluateOptions) -> dict[str, Any]:
    """Score a model; write its predictions, a row of eval.jsonl, and the judgement. A collective.

    Args:
        path: run directory, or exported folder.
        config: the run's configuration, with any overrides.
        options: what to evaluate.

    Returns:
        The judgement: what :func:`rating_train.scoring.analysis.analyse` returns, with ``row`` (of eval.jsonl),
        ``seen``, ``baselines`` and ``files``.
    """
    split = options.split or config.data.eval_split
    world, device = setup.join_job(wanted=config.train.device)
    trained = on_main(lambda: _find(path, config, options))
    # Of the pixels, whatever the training read: features are of its weights alone.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=""))
    if options.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_path=options.data))
    log.info("evaluating %s on %s of %s", trained.folder, split, config.data.eval_source.path)
    if trained.zero_stage is None:
        inputs = setup.model_inputs_of(config, exported_architecture(path))
    else:
        inputs = setup.read_model_inputs(config)
    items = _batch_items(config, world.size)
    on_main(lambda: _check_task(config, split))
    data = open_evaluation(config.data, inputs.prompt, world, split, items, device=device)
    if trained.zero_stage is None:
        weights = exported_weights(path)
    else:
        weights = consolidated_weights(trained.folder, trained.zero_stage)
    predictor = load_predictor(config, inputs.architecture, inputs.prompt.layout.image_start, weights, device)
    label = on_main(lambda: _label(trained, Path(config.data.eval_source.path), split))
    file = run_dir.predictions_file(trained.out, label, trained.step)
    started = time.monotonic()
    result = evaluate(predictor, data, file, world)
    row = setup.evaluation_row(
        inputs,
        result.scores,
        step=trained.step,
        split=label,
        source="evaluate",
        seconds=time.monotonic() - started,
        lengths=result.lengths,
    )
    return on_main(lambda: _judge(trained, config, split, row, result, options))


def _check_task(config: Config, split: str) -> None:
    """Refuse items of another task, and items without a target. Rank 0."""
    source = config.data.eval_source
    if split == PREDICT_SPLIT:
        raise UserError(
            f"the split {split!r} holds items without {config.task.target.name}, which cannot be evaluated",
            where="--split",
            fix=f"score them: rating-train predict RUN --data {source.path} --split {split}",
        )
    if not source.remote:
        refuse_other_task(config.task, task_of(read_manifest(source.path)), source.path, "the model")


def _find(path: Path, config: Config, options: EvaluateOptions) -> _Trained:
    """Find the checkpoint and verify it; say what it was trained on. Rank 0."""
    data, split = [Path(source.path) for source in config.data.train_sources], config.data.train_split
    if is_exported(path):
        told = read_json(path / CONFIG_NAME).get("trained") or {}
        step = str(told.get("checkpoint", "")).rpartition("_")[2]
        out = options.out or path.resolve().with_name(f"{path.resolve().name}.evaluation")
        for name in (run_dir.PREDICTIONS_DIR, run_dir.EVALUATIONS_DIR):
            (out / name).mkdir(parents=True, exist_ok=True)
        fingerprint = str(told.get("data_fingerprint", ""))
        return _Trained(path, int(step) if step.isdigit() else 0, None, {data[0]: fingerprint}, split, out)
    if options.out is not None:
        raise UserError("--out is for an export: the results of a run are in the run", where="--out")
    folder = choose_checkpoint(path / run_dir.CHECKPOINTS_DIR, options.checkpoint)
    content = read_json(folder / STATE_FILE)
    identity = content["identity"]
    (path / run_dir.EVALUATIONS_DIR).mkdir(exist_ok=True)
    known = identity["order"].get("data_fingerprint", "")
    fingerprints = known if isinstance(known, list) else [str(known)]
    stage = identity["topology"]["zero_stage"]
    return _Trained(
        folder, from_json(content).step, stage, dict(zip(data, fingerprints, strict=False)), split, path
    )


def _label(trained: _Trained, data: Path, split: str) -> str:
    """Return the split's name in the results; with the dataset's, where that is not the training's."""
    try:
        known = read_manifest(data).get("fingerprint") in trained.data.values()
    except UserError:  # a remote dataset, whose manifest is not here: the configured one
        known = True
    return split if known or not any(trained.data.values()) else f"{split}@{data.resolve().name}"


def _judge(
    trained: _Trained,
    config: Config,
    split: str,
    row: dict[str, Any],
    result: Evaluation,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Analyse the predictions, and write what was found. Rank 0."""
    assert result.predictions_path is not None
    rows = [r for r in deduplicate(read_predictions(result.predictions_path)) if r.rating is not None]
    data = Path(config.data.eval_source.path)
    seen = trained_on(trained.data, trained.split, data, split, len(rows))
    if warning := seen.warning():
        log.warning("%s", warning)
    unit = config.task.target.unit
    found = analyse(rows, options.resamples, options.seed, unit)
    row = {**row, "intervals_95": {name: m["interval_95"] for name, m in found["metrics"].items()}}
    evaluated = run_dir.evaluation_file(trained.out, row["split"], trained.step)
    judgement = {
        "model": str(trained.folder),
        "data": str(data),
        "row": row,
        "unit": unit,
        **found,
        "seen": {**dataclasses.asdict(seen), "warning": warning},
        "baselines": _baselines(trained, data, split, rows, seen, options),
        "files": {"predictions": str(result.predictions_path), "evaluation": str(evaluated)},
    }
    append_json_line(trained.out / run_dir.EVAL_LOG, row)
    atomic_write_json(evaluated, judgement)
    return judgement


def _baselines(
    trained: _Trained, data: Path, split: str, rows: list[Prediction], seen: Seen, options: EvaluateOptions
) -> dict[str, Any]:
    """Score the baselines, fitted on the training split; without it, say why there are none."""
    if seen.by_id == len(rows) and rows:
        return {"unavailable": "they would be fitted on the very items that are evaluated", "scores": []}
    try:
        train = read_texts_of_all(list(trained.data), trained.split, baselines.MOST_ITEMS)
        items = read_texts(data, split)
    except UserError as e:
        return {"unavailable": f"{e.what} ({e.where})", "scores": []}
    place = {identity: i for i, identity in enumerate(items.ids)}
    if not train.ids or any(r.id not in place for r in rows):
        return {"unavailable": "the texts of the items are not in the dataset", "scores": []}
    order = [place[r.id] for r in rows]
    items = dataclasses.replace(
        items,
        ids=[items.ids[i] for i in order],
        texts=[items.texts[i] for i in order],
        categories=[items.categories[i] for i in order],
        ratings=items.ratings[order],
    )
    scores = baselines.score_baselines(
        train,
        items,
        np.array([r.score for r in rows], np.float64),
        items.ratings,
        item_groups(rows),
        ridge=options.ridge,
        target=task_of(read_manifest(data)).target,
        resamples=options.resamples,
        seed=options.seed,
    )
    return {"unavailable": "", "scores": scores}


def _batch_items(config: Config, ranks: int) -> int:
    if config.eval.micro_items or config.batch.micro_items:
        return config.eval.micro_items or config.batch.micro_items
    return max(1, config.batch.global_items // ranks)
