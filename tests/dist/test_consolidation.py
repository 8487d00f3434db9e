"""`rating-train evaluate` gives the numbers of the run's own evaluation, at every stage and precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import Ranks


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_evaluates_as_the_run_did(
    stage: int, precision: str, ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    frozen = ["vision"] if stage in (1, 3) else []
    config = tiny_config(
        zero={"stage": stage}, model={"freeze": frozen}, train={"max_steps": 3, "precision": precision}
    )
    ranks.train(2, config)
    run = tmp_path / "runs" / "run"
    ranks.run(1, "-m", "rating_train", "evaluate", run, "--checkpoint", "latest", timeout=120)
    trained, alone = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert (trained["source"], alone["source"]) == ("train", "evaluate") and trained["n"] == alone["n"]
    # One rank instead of two: other batches, so other roundings.
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for metric in ("plcc", "srcc", "rmse", "mae"):
        assert abs(trained[metric] - alone[metric]) < tolerance, metric
    weights = consolidated_weights(run / "checkpoints" / "step_00000003", stage)
    assert all(w.dtype == torch.float32 for w in weights.values())
    if precision == "bf16" and stage in (
        1,
        2,
    ):  # masters hold more than the bf16 weights that were trained on
        inner = weights["head.inner.weight"]
        assert not torch.equal(inner, inner.bfloat16().float())
