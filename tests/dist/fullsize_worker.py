"""Train the complete 228M architecture, with random weights, for 5 steps on CPU ranks; report the memory it took.

Usage: torchrun --nproc-per-node=2 fullsize_worker.py STAGE OUT.json [STEPS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from rating_train.training import setup
from rating_train.bench.synthetic import noise_batch
from rating_train.cli import leave
from rating_train.distributed.collectives import sum_over_ranks
from rating_train.config.load import config_from_dict
from rating_train.config.resolve import plan_batch
from rating_train.engine.engine import build_engine
from rating_train.training.meters import peak_memory_gib
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.regressor import build_regressor

NAME = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


def main() -> None:
    stage, out = int(sys.argv[1]), Path(sys.argv[2])
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    world, device = setup.join_job()
    config = config_from_dict(
        {
            "model": {"backbone": NAME, "weights": "random"},
            "zero": {"stage": stage},
            "batch": {"global_items": world.size},
        }
    )
    plan = plan_batch(config.batch.global_items, 0, world.size)
    began = time.monotonic()
    model = build_regressor(config.model, KNOWN_ARCHITECTURES[NAME], 384, 4, seed=17)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    engine = build_engine(model, config, plan, device)
    built = time.monotonic() - began
    losses, seconds, norms = [], [], []
    for step in range(steps):
        started = time.monotonic()
        tokens, seed = 36 + config.data.text_tokens, 1000 * step + world.rank
        batch = noise_batch(plan.rank_items, tokens, 384, 49_000, seed, padding=20)
        loss = sum_over_ranks([float(engine.step(batch, step, steps))])[0] / world.size
        losses.append(loss)
        norms.append(engine.grad_norm)
        assert engine.read_skipped(wait=True) == [False]
        seconds.append(round(time.monotonic() - started, 2))
    (memory,) = sum_over_ranks([peak_memory_gib(torch.device("cpu"))])
    if world.is_main:
        row = {
            "stage": stage, "backbone_parameters": backbone, "losses": losses, "grad_norms": norms,
            "step_seconds": seconds, "build_seconds": round(built, 1), "peak_gib_all_ranks": round(memory, 2),
        }  # fmt: skip
        out.write_text(json.dumps(row))
        print(json.dumps(row))


if __name__ == "__main__":
    main()
    leave(0)
