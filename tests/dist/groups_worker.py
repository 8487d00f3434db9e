"""Records which process groups are made, and when each is first used, while an engine of each stage works.

On GPUs a group has two sides: tensors of DeepSpeed travel by NCCL, objects and flags of this package by gloo. Here all
is gloo, so the side is told by the caller. A side that is first used late would connect late.

Usage: groups_worker.py OUT
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

COLLECTIVES = (
    "all_reduce broadcast barrier all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor reduce gather "
    "scatter all_to_all all_to_all_single"
).split()
SIDES = {
    "deepspeed": "device",
    "rating_train.distributed.groups": "device",
    "rating_train.engine.gradient_buckets": "device",
    "rating_train.engine.partitioned_gradients": "device",
}


class Recorder:
    """Wraps torch's functions. ``phase`` is noted with every new group and with the first use of every side."""

    def __init__(self) -> None:
        self.phase = "start-up"
        self.made: list[tuple[str, str]] = []  # (phase, caller)
        self.first_used: dict[str, str] = {}  # "group side" -> phase
        for name in (*COLLECTIVES, "new_group"):
            wrapped = self.around(name, getattr(torch.distributed, name))
            setattr(torch.distributed, name, wrapped)
            setattr(distributed_c10d, name, wrapped)

    def around(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(action)
        def call(*args: Any, **more: Any) -> Any:
            caller = self.caller()
            if name == "new_group":
                self.made.append((self.phase, caller))
                return action(*args, **more)
            group = more.get("group") or next((a for a in args if isinstance(a, torch.distributed.ProcessGroup)), None)
            group = group or torch.distributed.group.WORLD
            side = next((side for prefix, side in SIDES.items() if caller.startswith(prefix)), "cpu")
            self.first_used.setdefault(f"{group.group_name} {side}", self.phase)
            return action(*args, **more)

        return call

    @staticmethod
    def caller() -> str:
        """The module that asked, torch's own and this one left out."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch", __name__)):
            frame = frame.f_back
        return frame.f_globals["__name__"] if frame is not None else ""


@contextlib.contextmanager
def first_looks_fail(folder: Path) -> Iterator[None]:
    """Let each first look at a path below ``folder`` fail, as on a network file system that is away for a moment."""
    names = ("stat", "listdir", "scandir")
    real = {name: getattr(os, name) for name in names}
    seen = set()

    def failing(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **more: Any) -> Any:
            if str(path).startswith(str(folder)) and (name, str(path)) not in seen:
                seen.add((name, str(path)))
                raise OSError(errno.ESTALE, "away for a moment", str(path))
            return real[name](path, *args, **more)

        return call

    for name in names:
        setattr(os, name, failing(name))
    try:
        yield
    finally:
        for name in names:
            setattr(os, name, real[name])


def main(out: Path) -> None:
    recorder = Recorder()
    from rating_train.checkpoint.deepspeed_io import ENGINE_DIR, capture_shards, read_shards
    from rating_train.config.resolve import plan_batch
    from rating_train.distributed import collectives
    from rating_train.distributed import world as worlds
    from rating_train.engine.engine import build_engine
    from rating_train.model.regressor import build_regressor
    from tests.dist.parity_worker import ARCHITECTURE, PX, batches, configuration

    world = worlds.detect()
    device = worlds.connect(world)
    collectives.all_gather(None)  # as every job does before its first step
    rows = {}
    for stage in (0, 1, 2, 3):
        recorder.phase = "start-up"
        recorder.made.clear()
        config = configuration(stage, 1, 1.0, ["vision"], "bf16")
        plan = plan_batch(4 * world.size, 4, world.size)
        engine = build_engine(build_regressor(config.model, ARCHITECTURE, PX, 4, seed=1), config, plan, device)
        for step, phase in enumerate(("first step", "later")):
            recorder.phase = phase
            engine.step(batches()[step].split(4)[world.rank], step, 4)
        recorder.phase = "later"
        folder = out / f"stage{stage}"
        (folder / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
        for name, content in capture_shards(engine.ds).items():
            torch.save(content, folder / name)
        collectives.all_gather(None)
        with first_looks_fail(folder):
            read_shards(engine.ds, folder, stage, world.size)
        engine.predict(batches()[0].split(4)[world.rank])
        rows[stage] = {"made": list(recorder.made), "first_used": dict(recorder.first_used)}
        engine.ds.destroy()
    if world.is_main:
        (out / "groups.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    from rating_train.cli import leave

    main(Path(sys.argv[1]))
    leave(0)
