"""`rating-train evaluate` reproduces the run's own evaluation at every stage and precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import Ranks

CASES = {
    f"stage{stage}_{precision}": (stage, precision) for stage in range(4) for precision in ("bf16", "fp32")
}


@pytest.mark.timeout(400)
def test_a_checkpoint_evaluates_as_the_run_did(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    configs = [
        tiny_config(
            name,
            zero={"stage": stage},
            model={"freeze": ["vision"] if stage in (1, 3) else []},
            train={"max_steps": 3, "precision": precision},
        )
        for name, (stage, precision) in CASES.items()
    ]
    ranks.run(2, "-m", "tests.dist.train_worker", *configs)
    runs = {name: tmp_path / "runs" / name for name in CASES}
    ranks.run(1, "-m", "tests.dist.train_worker", *runs.values())
    for name, (stage, precision) in CASES.items():
        check(runs[name], stage, precision)


def check(run: Path, stage: int, precision: str) -> None:
    trained, alone = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert (trained["source"], alone["source"]) == ("train", "evaluate") and trained["n"] == alone["n"]
    # One rank instead of two: other batches, hence other rounding.
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for metric in ("plcc", "srcc", "rmse", "mae"):
        assert abs(trained[metric] - alone[metric]) < tolerance, (run.name, metric)
    weights = consolidated_weights(run / "checkpoints" / "step_00000003", stage)
    assert all(w.dtype == torch.float32 for w in weights.values())
    if precision == "bf16" and stage in (
        1,
        2,
    ):  # masters hold more than the bf16 weights that were trained on
        inner = weights["head.inner.weight"]
        assert not torch.equal(inner, inner.bfloat16().float())
