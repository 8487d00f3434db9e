"""Measure how long training waits for a checkpoint, with and without background saving. Not part of the package.

    python benchmarks/save.py [--rounds N] [--ranks N] [--folder F] [--threads N]

The state is that of configs/full_ft_228m.yaml after one step, with random weights (nothing is downloaded): bf16, ZeRO
stage 1, on CPU processes of this machine. In each round, on the same state:

1. a save with train.background_save false: training waits for all of it (copy, write, fsync, SHA-256, commit)
2. a save with train.background_save true: training waits until the state is copied; the rest is timed separately
3. the same bytes copied in memory; written to one file per rank and fsynced; hashed with SHA-256: the limits of the
   machine

All ranks start together, and the slowest one counts. Needs about 16 GB of memory and 10 GB on the disk of F.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rating_train.bench.synthetic import noise_batch
from rating_train.checkpoint.manager import Checkpointer
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.config.resolve import plan_batch
from rating_train.distributed.collectives import all_gather, broadcast, sum_over_ranks
from rating_train.distributed.world import World
from rating_train.engine.engine import build_engine
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.regressor import build_regressor
from rating_train.training import setup

REPO = Path(__file__).resolve().parents[1]
CONFIG = REPO / "configs" / "full_ft_228m.yaml"
STAGE = 1
CHUNK = 64 << 20
FULL, COPY, REST = (
    "save, in the foreground",
    "save, in the background",
    "  its rest, while training continues",
)
MEMORY, NEW, DISK, HASH = (
    "raw: copy in memory",
    "raw: copy into new memory",
    "raw: write and fsync",
    "raw: SHA-256",
)


def trained_engine(world: World, device: torch.device) -> Any:
    """Return DeepSpeed's engine after one step on noise, so that AdamW's moments exist."""
    overrides = ["model.weights=random", f"zero.stage={STAGE}", f"batch.global_items={world.size}"]
    config = load_config(CONFIG, overrides)
    architecture = KNOWN_ARCHITECTURES[config.model.backbone]
    model = build_regressor(config.model, architecture, config.data.image_px, 4, seed=17)
    engine = build_engine(model, config, plan_batch(world.size, 0, world.size), device)
    px, tokens = config.data.image_px, 36 + config.data.text_tokens
    engine.step(noise_batch(1, tokens, px, 49_000), 0, 10)
    return engine.ds


def slowest(action: Callable[[], Any]) -> float:
    """Return the seconds that the slowest rank takes; all start together."""
    all_gather(0)
    started = time.monotonic()
    action()
    return max(all_gather(time.monotonic() - started))


def copy_in_memory(size: int, new: bool) -> None:
    """Copy piece by piece, into memory that is new to the process, as that of a save is, or into memory it has."""
    source, target = torch.ones(CHUNK, dtype=torch.uint8), torch.ones(CHUNK, dtype=torch.uint8)
    kept = []
    for _ in range(size // CHUNK):
        if new:
            kept.append(source.clone())
        else:
            target.copy_(source)


def write_and_sync(path: Path, size: int) -> None:
    chunk = os.urandom(CHUNK)
    with open(path, "wb") as f:
        for start in range(0, size, CHUNK):
            f.write(chunk[: size - start])
        f.flush()
        os.fsync(f.fileno())


def hash_bytes(size: int) -> None:
    digest, chunk = hashlib.sha256(), bytes(CHUNK)
    for start in range(0, size, CHUNK):
        digest.update(chunk[: size - start])


def measure_raw(seconds: dict[str, list[float]], size: int, path: Path) -> None:
    """Measure one round of the raw limits, for ``size`` bytes of each rank."""
    seconds[MEMORY].append(slowest(lambda: copy_in_memory(size, new=False)))
    seconds[NEW].append(slowest(lambda: copy_in_memory(size, new=True)))
    seconds[DISK].append(slowest(lambda: write_and_sync(path, size)))
    seconds[HASH].append(slowest(lambda: hash_bytes(size)))
    path.unlink()


def rank_main(rounds: int, folder: Path) -> None:
    world, device = setup.join_job()
    ds = trained_engine(world, device)
    identity = Identity({}, "", {}, {"ranks": world.size, "zero_stage": STAGE})
    seconds: dict[str, list[float]] = {name: [] for name in (FULL, COPY, REST, MEMORY, NEW, DISK, HASH)}
    total = 0  # bytes of a checkpoint, over all ranks
    for turn in range(rounds):
        for background in (False, True):
            saver = Checkpointer(folder / "checkpoints", world, 1, 0, background)
            step = TrainState(step=2 * turn + 1 + int(background))
            begin = lambda saver=saver, step=step: saver.save(ds, step, identity, 10)  # noqa: E731
            seconds[COPY if background else FULL].append(slowest(begin))
            if background:
                seconds[REST].append(slowest(saver.finalize))
            saver.close()
            all_gather(0)  # rank 0 has pruned
        files = (folder / "checkpoints").rglob("*")
        total = broadcast(sum(p.stat().st_size for p in files if p.is_file()))
        measure_raw(seconds, total // world.size, folder / f"raw_{world.rank}.bin")
        if world.is_main:
            print(f"round {turn + 1} of {rounds} done", flush=True)
    (parameters,) = sum_over_ranks([sum(p.numel() for p in ds.module.parameters()) / world.size])
    if world.is_main:
        report(seconds, total, int(parameters), world.size)


def report(seconds: dict[str, list[float]], total: int, parameters: int, ranks: int) -> None:
    print(
        f"\n{parameters:,} parameters, bf16, ZeRO stage {STAGE}, {ranks} ranks, {torch.get_num_threads()} threads each"
        f"\na checkpoint has {total:,} bytes ({total / 2**20:.0f} MiB)\n"
    )
    print(f"{'':<36}{'median s':>10}{'min':>8}{'max':>8}{'MiB/s':>8}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:<36}{middle:>10.2f}{min(values):>8.2f}{max(values):>8.2f}{total / 2**20 / middle:>8.0f}"
        )
    for name, best in (("medians", statistics.median), ("minima", min)):
        value = {key: best(values) for key, values in seconds.items()}
        print(
            f"\nby the {name}: training waits {value[FULL] / value[COPY]:.1f} times shorter with background saving;"
            f"\n  that wait is {value[COPY] / value[NEW]:.2f} times a plain copy into new memory,"
            f"\n  and a save in the foreground takes {value[FULL] / value[DISK]:.2f} times a plain write and fsync"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of each rank (default: cores / ranks)")
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to measure")
    args = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(args.rounds, args.folder)
        leave(0)
    folder = Path(tempfile.mkdtemp(prefix="save-", dir=args.folder))
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.ranks)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks]
    command = [*launcher, __file__, "--rounds", args.rounds, "--folder", folder]
    try:
        done = subprocess.run([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    finally:
        shutil.rmtree(folder)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
