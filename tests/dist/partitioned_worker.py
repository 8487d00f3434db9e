"""Trains at stage 1 in bf16, with gradients averaged everywhere or scattered as on GPUs, in few or many buffers.

Usage: partitioned_worker.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rating_train.checkpoint.deepspeed_io import ENGINE_DIR, capture_shards, read_shards
from rating_train.config.resolve import plan_batch
from rating_train.distributed import world as worlds
from rating_train.distributed.collectives import all_gather
from rating_train.engine import engine as engines
from rating_train.engine.engine import Engine, build_engine
from rating_train.engine.partitioned_gradients import PartitionedGradients, divide
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, ITEMS, PX, batches, configuration

WHOLE, SMALL = 2**30, 4096  # bytes of a buffer: each group in one, or in several


def build(clip_norm: float, bucket_bytes: int, world: worlds.World, device: torch.device) -> Engine:
    config = configuration(1, 2, clip_norm, [], "bf16")
    plan = plan_batch(ITEMS, config.batch.micro_items, world.size)
    model = build_regressor(config.model, ARCHITECTURE, PX, 3, seed=17)
    with mock.patch.object(engines, "divide", lambda groups, _: divide(groups, bucket_bytes)):
        return build_engine(model, config, plan, device)


def train(engine: Engine, world: worlds.World, first: int = 0, last: int = len(batches())) -> dict[str, Any]:
    """Return this rank's losses, the norms, and all weights and moments of its share."""
    losses, norms = [], []
    for step, batch in list(enumerate(batches()))[first:last]:
        mine = batch.split(ITEMS // world.size)[world.rank]
        losses.append(float(engine.step(mine, step, len(batches()))))
        norms.append(engine.grad_norm)
    assert all(p.grad is None for p in engine.model.parameters())
    weights = [p.detach().clone() for p in engine.model.parameters()]
    states = [s["exp_avg"].clone() for s in engine.ds.optimizer.optimizer.state.values()]
    return {"losses": losses, "norms": norms, "weights": weights, "states": states, "buffers": buffers(engine)}


def buffers(engine: Engine) -> int:
    assert isinstance(engine.buckets, PartitionedGradients)
    return len(engine.buckets.flats)


def scattered_or_not(scatter: bool, world: worlds.World, device: torch.device) -> dict[str, Any]:
    engine = build(0.5, SMALL, world, device)
    engine.buckets._scatter = scatter  # type: ignore[union-attr]
    result = train(engine, world)
    engine.ds.destroy()
    return result


def resumed(before: int, after: int, folder: Path, world: worlds.World, device: torch.device) -> dict[str, Any]:
    """Train half of the steps with buffers of ``before`` bytes, and the rest with others, from a checkpoint."""
    engine = build(0.0, before, world, device)
    train(engine, world, last=2)
    (folder / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
    for name, content in capture_shards(engine.ds).items():
        torch.save(content, folder / name)
    all_gather(None)
    engine.ds.destroy()
    engine = build(0.0, after, world, device)
    read_shards(engine.ds, folder, 1, world.size)
    result = train(engine, world, first=2)
    engine.ds.destroy()
    return result


def main() -> None:
    world = worlds.detect()
    device = worlds.connect(world)
    found = {
        "everywhere": scattered_or_not(False, world, device),
        "scattered": scattered_or_not(True, world, device),
    }
    for name, size in (("whole", WHOLE), ("divided", SMALL)):
        engine = build(0.0, size, world, device)
        found[name] = train(engine, world)
        engine.ds.destroy()
    folder = Path(sys.argv[1]).parent
    found["whole, then divided"] = resumed(WHOLE, SMALL, folder / "whole", world, device)
    found["divided, then whole"] = resumed(SMALL, WHOLE, folder / "divided", world, device)
    everyone = all_gather(found)
    if world.is_main:
        torch.save(everyone, Path(sys.argv[1]))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
