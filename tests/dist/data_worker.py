"""What every rank reads and how it is scored, written by rank 0 as JSON. Uses the real shards, loader and evaluator.

Usage: torchrun data_worker.py OUT.json DATA MODEL order|evaluate

DATA is a dataset directory, or the sources of a mixture as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rating_train.training import setup
from rating_train.cli import leave
from rating_train.distributed.collectives import all_gather
from rating_train.config.load import config_from_dict
from rating_train.data.loader import open_evaluation, open_training
from rating_train.training.evaluation import evaluate
from rating_train.training.predictor import Predictor
from rating_train.model.regressor import build_regressor

GLOBAL_ITEMS, STEPS, RESUMED_STEP = 12, 45, 17  # 45 steps cross two epoch boundaries of about 240 items


def read_orders(inputs, world) -> dict:
    """{workers: ordered ids of every global batch}, and the same from a later step on."""
    result = {}
    for workers in (0, 1, 3):
        config = dataclasses.replace(inputs.config.data, workers=workers)
        data = open_training(config, inputs.prompt, world, GLOBAL_ITEMS, GLOBAL_ITEMS // world.size)
        for first in (0, RESUMED_STEP):
            mine = [batch.ids for batch in data.batches(first, STEPS)]
            full = [[i for part in parts for i in part] for parts in zip(*all_gather(mine), strict=True)]
            result[f"workers {workers} from {first}"] = full
    return {"orders": result, "samples": data.samples}


def score_all(inputs, world, device, out: Path) -> dict:
    """Scores of 7, 64 and 101 items."""
    config = inputs.config
    start = inputs.prompt.layout.image_start
    model = build_regressor(config.model, inputs.architecture, config.data.image_px, start, seed=5).eval()
    predictor = Predictor(model, device=device, autocast=False)
    result = {}
    for items in (7, 64, 101):
        data = open_evaluation(config.data, inputs.prompt, world, "train", 5, max_items=items)
        path = out.with_suffix(f".{items}.jsonl")
        result[str(items)] = evaluate(predictor, data, path, world).scores.as_dict()
    return result


def main() -> None:
    out, data, model, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    world, device = setup.join_job()
    where = {"sources": json.loads(data)} if data.startswith("[") else {"path": data}
    config = config_from_dict(
        {
            "data": {**where, "image_px": 64, "text_tokens": 96, "workers": 0, "num_canonical_nodes": 3},
            "model": {"backbone": model, "head_hidden": 16},
            "batch": {"global_items": GLOBAL_ITEMS},
        }
    )
    inputs = setup.read_model_inputs(config)
    result = read_orders(inputs, world) if what == "order" else score_all(inputs, world, device, out)
    if world.is_main:
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave(0)
