"""Trains at stage 1 in bf16 with gradients that are averaged everywhere, and that are scattered as on GPUs.

Usage: partitioned_worker.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from rating_train.config.resolve import plan_batch
from rating_train.distributed import world as worlds
from rating_train.distributed.collectives import all_gather
from rating_train.engine.engine import build_engine
from rating_train.engine.partitioned_gradients import PartitionedGradients
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, ITEMS, PX, batches, configuration


def train(scatter: bool, world: worlds.World, device: torch.device) -> dict[str, Any]:
    """Return this rank's losses, the norms, and all weights and moments of its share."""
    config = configuration(1, 2, 0.5, [], "bf16")
    plan = plan_batch(ITEMS, config.batch.micro_items, world.size)
    model = build_regressor(config.model, ARCHITECTURE, PX, 3, seed=17)
    engine = build_engine(model, config, plan, device)
    assert isinstance(engine.buckets, PartitionedGradients)
    engine.buckets._scatter = scatter
    losses, norms = [], []
    for step, batch in enumerate(batches()):
        losses.append(float(engine.step(batch.split(plan.rank_items)[world.rank], step, len(batches()))))
        norms.append(engine.grad_norm)
    assert all(p.grad is None for p in engine.model.parameters())
    weights = [p.detach().clone() for p in engine.model.parameters()]
    states = [s["exp_avg"].clone() for s in engine.ds.optimizer.optimizer.state.values()]
    engine.ds.destroy()
    return {"losses": losses, "norms": norms, "weights": weights, "states": states}


def main() -> None:
    world = worlds.detect()
    device = worlds.connect(world)
    everywhere, scattered = (train(scatter, world, device) for scatter in (False, True))
    everyone = all_gather((everywhere, scattered))
    if world.is_main:
        torch.save(everyone, Path(sys.argv[1]))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
