"""Train with and without ``train.compile`` at stages 0, 1 and 2, and write losses, graphs and graph breaks.

Usage: torchrun --nproc-per-node=1 compile_worker.py OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from rating_train.config.resolve import plan_batch
from rating_train.data.collate import Batch
from rating_train.data.lengths import possible_lengths
from rating_train.distributed import world as worlds
from rating_train.engine import compiled
from rating_train.engine.engine import build_engine
from rating_train.model.regressor import build_regressor
from tests.dist.parity_worker import ARCHITECTURE, PX, TOKENS, batches, configuration

MULTIPLE = 6
LENGTHS = possible_lengths(15, TOKENS, MULTIPLE)


def as_loaded(batch: Batch) -> Batch:
    """Return a batch whose images lie in memory as those of the loader: the channels of a pixel beside each other."""
    return dataclasses.replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))


def train(stage: int, how: str, device: torch.device) -> dict[str, object]:
    """Take some steps; the backend is one that needs no compiler, and traces forward and backward pass alike."""
    config = configuration(stage, 2, 0.5, [], "bf16")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, compile=how),
        data=dataclasses.replace(config.data, image_px=PX),
        batch=dataclasses.replace(config.batch, length_multiple_tokens=MULTIPLE),
    )
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()  # only the last 64 are kept
    model = build_regressor(config.model, ARCHITECTURE, PX, 3, seed=17)
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, 1)
    original = compiled.compile_model

    def compiled_for_no_device(model, how, lengths):  # type: ignore[no-untyped-def]
        original(model, how, lengths, backend="aot_eager")

    with mock.patch("rating_train.engine.engine.compile_model", compiled_for_no_device):
        engine = build_engine(model, config, plan, device, lengths=LENGTHS)
    beats: list[int] = []
    engine.warm_up(beats.append)
    warm, traced = counters["stats"]["unique_graphs"], len(get_compilation_metrics())
    for flat in engine.buckets.flats if engine.buckets else []:
        assert not flat.any(), "the warm-up left a gradient behind"
    losses = [float(engine.step(as_loaded(batch), step, 4)) for step, batch in enumerate(batches()[:3])]
    result = {
        "stage": stage,
        "how": how,
        "losses": losses,
        "beats": beats,
        "graphs": counters["stats"]["unique_graphs"],
        "graphs_of_warm_up": warm,
        "traced_while_training": len(get_compilation_metrics()) - traced,
        "breaks": sum(counters["graph_break"].values()),
    }
    engine.ds.destroy()
    return result


def main() -> None:
    device = worlds.connect(worlds.detect())
    runs = [(stage, how) for stage in (0, 1, 2) for how in ("none", "blocks")]
    rows = [train(stage, how, device) for stage, how in [*runs, (1, "none"), (1, "model")]]
    Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
