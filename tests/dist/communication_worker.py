"""Train the small model of the parity test with gradients that are sent in fp32 and in bf16; write the losses of each.

Usage: torchrun --nproc-per-node=2 communication_worker.py OUT.json [STEPS]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rating_train.config.resolve import plan_batch
from rating_train.distributed import world as worlds
from rating_train.engine.engine import build_engine
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, ITEMS, PX, batches, configuration


def train(stage: int, dtype: str, steps: int, world: Any, device: torch.device) -> dict[str, Any]:
    """Train on the same few batches again and again; at stage 0 keep the first step's gradients."""
    config = configuration(stage, 2, 0.5, [], "bf16")
    zero = dataclasses.replace(config.zero, communication_dtype=dtype)
    config = dataclasses.replace(config, zero=zero)
    plan = plan_batch(ITEMS, config.batch.micro_items, world.size)
    engine = build_engine(
        build_regressor(config.model, ARCHITECTURE, PX, 3, seed=17), config, plan, device
    )
    gradients: list[Tensor] = []
    if engine.buckets is not None:
        finish, buckets = engine.buckets.finish, engine.buckets

        def keep() -> None:
            finish()
            gradients.append(torch.cat(buckets.flats).clone())

        engine.buckets.finish = keep  # type: ignore[method-assign]
    losses, data = [], batches()
    for step in range(steps):
        mine = data[step % len(data)].split(plan.rank_items)[world.rank]
        loss = engine.step(mine, step, steps).clone()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world.size)
    engine.ds.destroy()
    return {"stage": stage, "dtype": dtype, "losses": losses, "gradient": gradients[0] if gradients else None}


def main() -> None:
    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4
    world = worlds.detect()
    device = worlds.connect(world)
    rows = []
    for stage in (0, 1, 2):
        exact, rounded = (train(stage, dtype, steps, world, device) for dtype in ("fp32", "bf16"))
        difference = None
        if stage == 0:
            difference = float((rounded["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm())
        rows.append(
            {"stage": stage, "fp32": exact["losses"], "bf16": rounded["losses"], "gradient_difference": difference}
        )  # fmt: skip
    if world.is_main:
        out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
