"""Hands the weights of one engine to the next, at each stage and precision, and writes what differs and what stays.

Usage: torchrun handover_worker.py OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from pathlib import Path

import torch

from rating_train.cli import leave
from rating_train.config.resolve import plan_batch
from rating_train.distributed import world as worlds
from rating_train.engine.engine import build_engine
from rating_train.engine.handover import complete_weights, release, start_from
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, PX, batches, configuration


def hand_over(stage: int, precision: str, world, device) -> dict[str, object]:
    config = configuration(stage, 1, 1.0, ["vision", "connector"], precision)
    plan = plan_batch(4 * world.size, 4, world.size)
    first = build_engine(build_regressor(config.model, ARCHITECTURE, PX, 4, seed=1), config, plan, device)
    for step in range(2):
        first.step(batches()[step].split(4)[world.rank], step, 4)
    before = complete_weights(first)
    computing = {n: p.detach().float().clone() for n, p in first.model.named_parameters()} if stage < 3 else {}
    old = [weakref.ref(x) for x in (first.ds, first.ds.optimizer, first.model, first.buckets) if x is not None]
    parameters = list(first.model.parameters())  # as if C++ held them
    release(first)
    left = [type(one()).__name__ for one in old if one() is not None]
    held = sum(p.untyped_storage().nbytes() + len(vars(p)) for p in parameters)

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze=["decoder"]))
    model = build_regressor(config.model, ARCHITECTURE, PX, 4, seed=2)
    model.load_state_dict(before, strict=True)
    second = build_engine(model, config, plan, device, first_step=2)
    start_from(second, before)
    after = complete_weights(second)
    refreshed = {n: p.detach().float().clone() for n, p in second.model.named_parameters()} if stage < 3 else {}
    frozen = {n for n, p in second.model.named_parameters() if not p.requires_grad}
    # What is frozen has no master: where bf16 computes, it is rounded to it.
    rounds = precision == "bf16" and stage > 0
    expected = {n: v.bfloat16().float() if rounds and n in frozen else v for n, v in before.items()}
    second.step(batches()[2].split(4)[world.rank], 2, 4)
    moved = [n for n, v in complete_weights(second).items() if not torch.equal(v, after[n])]
    result = {
        "case": f"stage{stage}_{precision}",
        "differ": [n for n, v in after.items() if not torch.equal(v, expected[n])],
        "computing_differ": [n for n, v in refreshed.items() if not torch.equal(v, computing[n])],
        "unrounded": sum(not torch.equal(v, v.bfloat16().float()) for v in before.values()),
        "left": left,
        "held": held,
        "frozen_moved": sorted(set(moved) & frozen),
        "parts_moved": sorted({n.split(".")[0] if n.startswith("head") else n.split(".")[1] for n in moved}),
        "shapes": all(after[n].shape == v.shape for n, v in before.items()),
    }
    release(second)
    return result


def main() -> None:
    world = worlds.detect()
    device = worlds.connect(world)
    # Stage 1 has another optimizer in bf16 than in fp32.
    cases = [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32"), (3, "fp32")]
    found = [hand_over(stage, precision, world, device) for stage, precision in cases]
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps({"cases": found, "process_groups": groups}, indent=1))


if __name__ == "__main__":
    main()
    leave(0)
