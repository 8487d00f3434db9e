"""Count what one optimizer step launches and waits for, by a dispatch mode on a CPU. One-off; not part of the package.

    python benchmarks/step_operations.py [--stages 0,1,2,3] [--ranks 2] [--accumulation 1] [--precision bf16]
        [--layers 12,30] [--json F]

Every operator call that is not a view is a kernel launch on a GPU; every read-back (``.item()``, ``bool(tensor)``,
``nonzero``, a boolean index) makes the host wait for the device; a tensor made of Python numbers is a blocking copy
where it is sent to a device. The model has as many layers and parameters as SmolVLM2-256M at a hundredth of their
widths: the counts depend on the list of parameters, not on their sizes. Counts are of the fourth step: the first ones
make optimizer state and record in which order stage 3 gathers weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that make the host wait for the device.
READ_BACKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
#: Operators that find out on the host how many elements are meant, where they are indexed by a boolean mask.
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
#: Operators that launch nothing: memory without contents, and changes of shape or ownership.
NO_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "set_",
)
WARM_UP = 3
PACKAGES = ("rating_train", "deepspeed", "transformers")


class StepOperations(TorchDispatchMode):
    """Counts kernels, collectives, read-backs and tensors made of host data, with the code that asked for each."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.read_backs: Counter[str] = Counter()
        self.host_data: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives[name] += 1
        elif name in READ_BACKS or (name in INDEXING and has_mask(args)):
            self.read_backs[asked_by()] += 1
        elif name == "lift_fresh":
            self.host_data[asked_by()] += 1
        elif name not in NO_KERNEL and not is_view(func):
            self.kernels[name] += 1
            self.phases[self.phase] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count the kernels of this block under a name of their own."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def is_view(func: Any) -> bool:
    """Whether the operator returns an alias of an argument that it does not write to."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def has_mask(args: Any) -> bool:
    """Whether one of an operator's indices is a boolean mask."""
    indices = args[1] if len(args) > 1 else ()
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def asked_by() -> str:
    """The nearest caller in one of PACKAGES, as ``package/file.py function``."""
    frame = sys._getframe(2)
    while frame is not None:
        for package in PACKAGES:
            start = frame.f_code.co_filename.rfind(f"/{package}/")
            if start >= 0:
                return f"{frame.f_code.co_filename[start + 1 :]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def architecture(layers: str) -> Any:
    """SmolVLM2-256M at a hundredth of its widths, with the layers of its vision tower and decoder as ``12,30``."""
    from rating_train.bench.synthetic import reduced_architecture

    vision, decoder = (int(n) for n in layers.split(","))
    text = {"layers": decoder, "hidden": 18, "head_dim": 2, "mlp": 16, "vocab": 64}
    tower = {"layers": vision, "hidden": 24, "mlp": 32, "patch": 4, "image_size": 32}
    return reduced_architecture(text, tower, scale_factor=2, head_hidden=9)


def count(stage: int, options: argparse.Namespace, world: Any, device: torch.device) -> dict[str, Any]:
    """Build an engine, take WARM_UP steps, and count the next."""
    from rating_train.bench.synthetic import noise_batch
    from rating_train.config.load import config_from_dict
    from rating_train.config.resolve import plan_batch
    from rating_train.engine.engine import build_engine
    from rating_train.model.regressor import build_regressor

    config = config_from_dict(
        {
            "model": {"weights": "random", "head_hidden": 9},
            # Small tensors stay on every rank at stage 3: 100,000 elements at full size.
            "zero": {
                "stage": stage,
                "extra": {"stage3_param_persistence_threshold": 100} if stage == 3 else {},
            },
            "train": {"precision": options.precision},
            "batch": {"global_items": world.size * options.accumulation, "micro_items": 1},
        }
    )
    model = build_regressor(config.model, architecture(options.layers), 32, 3, seed=1)
    parameters = sum(1 for p in model.parameters() if p.requires_grad)
    plan = plan_batch(config.batch.global_items, 1, world.size)
    engine = build_engine(model, config, plan, device)
    batch = noise_batch(plan.rank_items, 3 + model.visual_tokens + 8, 32, vocabulary=64)
    for step in range(WARM_UP):
        engine.step(batch, step, 10)
    counter = StepOperations()
    parts = {"forward": engine.ds.module.forward, "backward": engine.ds.backward, "step": engine.ds.step}
    for phase, part in parts.items():

        def counted(*args: Any, _phase: str = phase, _part: Any = part, **options: Any) -> Any:
            with counter.counting(_phase):
                return _part(*args, **options)

        owner = engine.ds.module if phase == "forward" else engine.ds
        setattr(owner, phase, counted)
    with counter:
        engine.step(batch, WARM_UP, 10)
    row = {
        "stage": stage,
        "precision": options.precision,
        "ranks": world.size,
        "accumulation": options.accumulation,
        "parameters": parameters,
        "kernels": {phase or "other": n for phase, n in counter.phases.items()},
        "by_operator": dict(counter.kernels.most_common()),
        "collectives": dict(counter.collectives),
        "read_backs": dict(counter.read_backs),
        "host_data": dict(counter.host_data),
        "skipped": engine.read_skipped(wait=True)[-1],
    }
    for phase in parts:
        delattr(engine.ds.module if phase == "forward" else engine.ds, phase)
    engine.ds.destroy()
    return row


def worker(options: argparse.Namespace) -> None:
    """One rank: every stage in turn."""
    from rating_train.training import setup

    world, device = setup.join_job()
    stages = [int(s) for s in options.stages.split(",")]
    rows = [count(s, options, world, device) for s in stages]
    if world.is_main:
        text = json.dumps(rows, indent=1)
        if options.json:
            Path(options.json).write_text(text)
        else:
            print(render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as two tables of Markdown."""
    lines = ["| stage | kernels: forward | backward | step | other | collectives | read-backs | host data |"]
    lines.append("| --- " * 8 + "|")
    for row in rows:
        kernels = [row["kernels"].get(p, 0) for p in ("forward", "backward", "step", "other")]
        sums = [sum(row[k].values()) for k in ("collectives", "read_backs", "host_data")]
        lines.append(f"| {row['stage']} | " + " | ".join(f"{n:,}" for n in (*kernels, *sums)) + " |")
    lines += ["", "| stage | read back or copied to the device by | times |", "| --- | --- | --- |"]
    for row in rows:
        for kind in ("read_backs", "host_data"):
            lines += [
                f"| {row['stage']} | `{who}`{'' if kind == 'read_backs' else ' (host data)'} | {n} |"
                for who, n in row[kind].items()
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--layers", default="12,30", help="of the vision tower and the decoder")
    parser.add_argument("--json", default="", help="write the counts to this file instead of printing tables")
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options)
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={options.ranks}",
    ]
    subprocess.run(
        [*command, __file__, *sys.argv[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


if __name__ == "__main__":
    main()
