"""Run by test_memory.py: real DeepSpeed engines as rank 0 of 8 on torch's ``fake`` process group, their bytes counted.

    python tests/unit/engine/memory_worker.py OUT.json

Collectives of the fake group return at once and move nothing, so one process holds what one of 8 ranks would hold.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

RANKS, MICRO, PX, TEXT = 8, 4, 128, 60
STEPS = {
    0: 2,
    1: 2,
    2: 2,
    3: 3,
}  # the first makes optimizer state, at stage 3 the second records the order of modules
COMBINATIONS: list[tuple[int, str, int, bool]] = [  # stage, precision, accumulation, gradient checkpointing
    (0, "bf16", 1, False),
    (0, "fp32", 2, False),
    (1, "bf16", 2, True),
    (1, "fp32", 1, False),
    (2, "bf16", 2, False),
    (2, "bf16", 1, True),
    (2, "fp32", 2, False),
    (3, "bf16", 2, False),
]


def architecture() -> Any:
    """A small SmolVLM whose token embedding, as in the full one, is larger than a reduction bucket."""
    from rating_train.bench.synthetic import reduced_architecture

    widths = {"hidden": 192, "mlp": 512}
    text = {**widths, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 32, "vocab": 4096}
    return reduced_architecture(text, {**widths, "layers": 3, "heads": 4}, head_hidden=96)


def measure(stage: int, precision: str, accumulation: int, checkpointing: bool) -> dict[str, Any]:
    """Take some steps; the largest number of live bytes in the last one, beside the prediction."""
    from rating_train.bench.synthetic import noise_batch
    from rating_train.config.load import config_from_dict
    from rating_train.config.resolve import plan_batch
    from rating_train.engine.activations import LiveBytes
    from rating_train.engine.engine import build_engine
    from rating_train.engine.memory import predict_memory
    from rating_train.model.attention import ATTENTION
    from rating_train.model.regressor import build_regressor

    config = config_from_dict(
        {
            "data": {"image_px": PX, "text_tokens": TEXT},
            "model": {"weights": "random", "gradient_checkpointing": checkpointing},
            "zero": {
                "stage": stage,
                "bucket_mb": 1,
                "extra": {"stage3_param_persistence_threshold": 0} if stage == 3 else {},
            },
            "train": {"precision": precision},
            "batch": {"global_items": RANKS * MICRO * accumulation, "micro_items": MICRO},
        }
    )
    plan = plan_batch(config.batch.global_items, MICRO, RANKS)
    with LiveBytes() as live:
        model = build_regressor(config.model, architecture(), PX, 1, seed=1)
        engine = build_engine(model, config, plan, torch.device("cpu"))
        model.backbone.set_attn_implementation(ATTENTION)  # as on a GPU, which is what is predicted
        batch = noise_batch(plan.rank_items, model.visual_tokens + TEXT, PX, architecture().text.vocab)
        for step in range(STEPS[stage]):
            live.peak = live.now
            engine.step(batch, step, 10)
    engine.ds.destroy()
    predicted = predict_memory(config, architecture(), RANKS)
    return {
        "case": [stage, precision, accumulation, checkpointing],
        "measured": live.peak,
        "predicted": predicted.peak,
        "parts": dataclasses.asdict(predicted),
    }


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    rows = []
    for combination in COMBINATIONS:
        rows.append(measure(*combination))
        gc.collect()  # engines are circles
    Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
