"""Saves an engine's shards, of each stage and precision: after two steps, or right after reading another save.

Usage: torchrun reshard_worker.py OUT [FROM RANKS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rating_train.distributed import world as worlds
from rating_train.checkpoint.deepspeed_io import ENGINE_DIR, capture_shards, read_shards
from rating_train.checkpoint.zero_shards import MASTER, MOMENTS, Shards
from rating_train.cli import leave
from rating_train.config.resolve import plan_batch
from rating_train.engine.engine import build_engine
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, PX, batches, configuration

STAGES, PRECISIONS = (1, 2, 3), ("bf16", "fp32")


def main() -> None:
    world = worlds.detect()
    device = worlds.connect(world)
    for stage in STAGES:
        for precision in PRECISIONS:
            name = f"stage{stage}_{precision}"
            save(
                stage,
                precision,
                Path(sys.argv[1]) / name,
                Path(sys.argv[2]) / name if sys.argv[2:] else None,
                world,
                device,
            )


def save(stage, precision, out, source, world, device) -> None:
    config = configuration(stage, 1, 1.0, ["vision"], precision)
    # The engine's own plan needs a batch that divides; what is read and saved does not depend on it.
    plan = plan_batch(4 * world.size, 4, world.size)
    model = build_regressor(config.model, ARCHITECTURE, PX, 4, seed=1 if source is None else 2)
    engine = build_engine(model, config, plan, device)
    if source is None:
        for step in range(2):
            engine.step(batches()[step].split(4)[world.rank], step, 4)
    else:  # the other seed shows that what is read replaces everything
        read_shards(engine.ds, source, stage, int(sys.argv[3]))
    (out / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
    for name, content in capture_shards(engine.ds).items():
        torch.save(content, out / name)
    torch.distributed.barrier()
    if world.is_main:
        shards = Shards(out / ENGINE_DIR, stage)
        full = {f"{name}/{k}": shards.read(name, k) for name in shards.places for k in (MASTER, *MOMENTS)}
        frozen = {f"{name}/frozen": value for name, value in shards.frozen().items()}
        torch.save({**full, **frozen, "steps": shards.steps()}, out / "whole.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
    leave(0)
