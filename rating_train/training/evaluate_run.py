"""The verb ``evaluate``: score a checkpoint of a run on a split, on any number of ranks."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.checkpoint.resume import choose_checkpoint
from rating_train.checkpoint.state import STATE_FILE, from_json
from rating_train.config.schema import Config
from rating_train.data.loader import open_evaluation
from rating_train.distributed.collectives import on_main
from rating_train.files import append_json_line, read_json
from rating_train.scoring.ces import CONVENTIONS
from rating_train.training import setup
from rating_train.training.evaluation import evaluate
from rating_train.training.predictor import load_predictor

log = logging.getLogger(__name__)


def evaluate_run(run: Path, config: Config, checkpoint: str, split: str) -> dict[str, Any]:
    """Score one checkpoint; write its predictions and a row of eval.jsonl. A collective.

    Args:
        run: run directory.
        config: the run's configuration, with any overrides (for example another ``data.path``).
        checkpoint: ``best``, ``latest`` or a step.
        split: ``""`` for the split of the run's own evaluations.

    Returns:
        The row of eval.jsonl.
    """
    split = split or config.data.eval_split
    world, device = setup.join_job(wanted=config.train.device)
    directory = on_main(lambda: choose_checkpoint(run / run_dir.CHECKPOINTS_DIR, checkpoint))
    content = on_main(lambda: read_json(directory / STATE_FILE))
    step, stage = from_json(content).step, content["identity"]["topology"]["zero_stage"]
    log.info("evaluating %s on %s", directory, split)
    model_inputs = setup.read_model_inputs(config)
    prompt = model_inputs.prompt
    data = open_evaluation(config.data, prompt, world, split, _batch_items(config, world.size))
    weights = consolidated_weights(directory, stage)
    predictor = load_predictor(config, model_inputs.architecture, prompt.layout.image_start, weights, device)
    started = time.monotonic()
    result = evaluate(predictor, data, run_dir.predictions_file(run, split, step), world)
    seconds = time.monotonic() - started
    row = setup.evaluation_row(
        model_inputs, result.scores, step=step, split=split, source="evaluate", seconds=seconds
    )
    on_main(lambda: append_json_line(run / run_dir.EVAL_LOG, row))
    return row


def render(row: dict[str, Any]) -> str:
    """Return the row as text for a terminal: every number with its name, CES with its convention."""
    lines = [f"step {row['step']}, split {row['split']}, {row['n']} items, {row['items_per_second']} items/s"]
    for name, label in (("plcc", "PLCC"), ("srcc", "SRCC"), ("rmse", "RMSE (stars)"), ("mae", "MAE (stars)")):
        value = row[name]
        reason = (row.get("undefined") or {}).get(name, "")
        lines.append(f"{label:<14} {f'{value:.4f}' if value is not None else f'undefined: {reason}'}")
    for convention, label in CONVENTIONS.items():
        value = row[f"ces_{convention}"]
        lines.append(
            f"CES            {'undefined' if value is None else f'{value:.4f}'}  [{convention}: {label}]"
        )
    return "\n".join(lines)


def _batch_items(config: Config, ranks: int) -> int:
    if config.eval.micro_items or config.batch.micro_items:
        return config.eval.micro_items or config.batch.micro_items
    return max(1, config.batch.global_items // ranks)
