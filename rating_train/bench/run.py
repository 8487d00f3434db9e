"""Put a job together for a benchmark, and run its parts."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rating_train.bench.parts import Bench
from rating_train.bench.result import Row
from rating_train.bench.setting import bench_config
from rating_train.config.schema import Config
from rating_train.distributed.collectives import all_gather, on_main
from rating_train.shards.task import with_task_of_data
from rating_train.training import setup
from rating_train.training.checks import make_run_folder
from rating_train.training.job import assemble_job, open_checkpoints

log = logging.getLogger(__name__)

#: Synthetic listings for each item of a global batch, and at least.
_LISTINGS_PER_ITEM, _LEAST_LISTINGS = 4, 64


def run_bench(
    config: Config, parts: Sequence[str], rounds: int, steps: int, trace: Path | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """Measure a configuration on all ranks. A collective.

    Args:
        config: the configuration; what it lacks here is made up (:mod:`.setting`).
        parts: of :data:`~.result.PARTS` and :data:`~.result.MORE_PARTS`.
        rounds: measurements of each figure.
        steps: optimizer steps of a round.
        trace: where rank 0 writes the trace of the part ``profile``.

    Returns:
        What it was measured on, and this rank's rows.
    """
    world, device = setup.join_job(config.train.collective_timeout_minutes, config.train.device)
    with tempfile.TemporaryDirectory(prefix="rating_train-bench-") as own:
        folder = Path(on_main(lambda: own))
        items = max(_LEAST_LISTINGS, _LISTINGS_PER_ITEM * config.batch.global_items)
        measured = on_main(lambda: with_task_of_data(bench_config(config, folder, items)))
        run = Path(measured.runs_dir) / measured.name
        on_main(lambda: make_run_folder(run))
        checkpointer = open_checkpoints(measured, run, world)
        job = assemble_job(measured, run, world, device, checkpointer, None)
        job.engine.warm_up(lambda length: log.info("compiling for %d tokens", length))
        bench = Bench(job, rounds, steps, trace if world.rank == 0 else None)
        rows = [row for part in parts for row in getattr(bench, part)()]
        all_gather(None)  # all ranks are done with the folder
        checkpointer.close()
    return describe(job.config, device, world.size), rows


def describe(config: Config, device: torch.device, ranks: int) -> dict[str, Any]:
    """Return what a result was measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "torch": torch.__version__,
        "backbone": config.model.backbone,
        "image_px": config.data.image_px,
        "batch": dataclasses.asdict(config.batch),
        "zero_stage": config.zero.stage,
        "precision": config.train.precision,
        "workers": config.data.workers,
    }
