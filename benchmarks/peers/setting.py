"""What all peers share: the same configuration, model, shards, batch and precision, and how items/s are counted.

A peer trains ``warmup`` optimizer steps, then ``steps`` more, and reports the rate of the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from streaming import LocalDataset

from rating_train.config.load import load_config
from rating_train.config.resolve import BatchPlan, plan_batch
from rating_train.config.schema import Config
from rating_train.data.collate import Batch, Collator, Purpose
from rating_train.model.regressor import RatingRegressor, build_regressor
from rating_train.training.setup import read_model_inputs


@dataclass
class Setting:
    """One peer's share of the common setting."""

    config: Config
    plan: BatchPlan
    model: RatingRegressor
    dataset: LocalDataset
    collate: Collator
    device: torch.device
    rank: int
    ranks: int
    warmup: int
    steps: int

    @property
    def bf16(self) -> bool:
        return self.config.train.precision == "bf16"


def read_setting(connect: bool) -> Setting:
    """Read the command line (CONFIG --set A.B=V --warmup W --steps N) and build what all peers train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--deepspeed", action="store_true", help="of the Trainer")
    args = parser.parse_args()
    config = load_config(args.config, [*args.set, "model.head_dropout=0"])
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if connect:
        dist.init_process_group("nccl" if cuda else "gloo")
    inputs = read_model_inputs(config)
    start = inputs.prompt.layout.image_start
    model = build_regressor(config.model, inputs.architecture, config.data.image_px, start, config.train.seed)
    return Setting(
        config=config,
        plan=plan_batch(config.batch.global_items, config.batch.micro_items, ranks),
        model=model,
        dataset=LocalDataset(local=config.data.path, split=config.data.train_split),
        collate=Collator(inputs.prompt, config.data.image_px, purpose=Purpose(slices=False)),
        device=device,
        rank=rank,
        ranks=ranks,
        warmup=args.warmup,
        steps=args.steps,
    )


class Clock:
    """Items per second of the steps after the warm-up; :meth:`step` is called after every optimizer step."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._done, self._began = setting, 0, 0.0

    def step(self) -> bool:
        """Count a step; returns whether all are done."""
        self._done += 1
        if self._done == self._setting.warmup:
            self._synchronize()
            self._began = time.perf_counter()
        return self._done >= self._setting.warmup + self._setting.steps

    def report(self) -> None:
        """Print one JSON line on rank 0."""
        self._synchronize()
        seconds = time.perf_counter() - self._began
        items = self._setting.steps * self._setting.plan.global_items
        if self._setting.rank == 0:
            print(json.dumps({"items_per_second": items / seconds, "steps": self._setting.steps}), flush=True)

    def _synchronize(self) -> None:
        if self._setting.device.type == "cuda":
            torch.cuda.synchronize()


def forward_arguments(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of :meth:`RatingRegressor.forward` (no dropout keys: peers train without dropout)."""
    return {"images": batch.images, "input_ids": batch.input_ids, "used_tokens": batch.used_tokens}
