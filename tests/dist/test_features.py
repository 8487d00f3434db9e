"""A frozen recipe on stored features trains as on the images, on two ranks, and refuses features of other weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.helpers.runs import global_batches, losses, rows

pytestmark = pytest.mark.timeout(240)


def test_a_run_on_features_is_the_run_on_images(
    ranks: Ranks, tiny_config: Callable[..., Path], sharded: Path, demo: Path, tmp_path: Path
) -> None:
    """In bf16, with accumulation. Micro-batches have the size at which the features were computed."""
    sections = {
        "data": {"path": str(sharded), "workers": 1},
        "model": {"freeze": ["vision", "connector"]},
        "batch": {"micro_items": 3},
        "train": {"max_steps": 4},
        "zero": {"stage": 1},
    }
    images = tiny_config("images", **sections)
    stored = {**sections, "data": {**sections["data"], "features": str(tmp_path / "features")}}
    features = tiny_config("features", **stored)
    ranks.run(2, "-m", "rating_train", "features", features)
    ranks.train(2, images)
    ranks.train(2, features)
    one, other = tmp_path / "runs" / "images", tmp_path / "runs" / "features"
    assert global_batches(other) == global_batches(one)
    # Rounding in bf16 may depend on an item's place in its batch; on the machines tried the losses were equal.
    assert losses(other) == pytest.approx(losses(one), rel=2e-3)
    scores = [
        {row["id"]: row["score"] for row in rows(next((run / "predictions").iterdir()))}
        for run in (one, other)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=2e-3)
    flops = [rows(run / "train.jsonl")[-1] for run in (one, other)]
    per_token = [row["tflops_per_rank"] / row["tokens_per_second"] for row in flops]
    assert per_token[1] < 0.97 * per_token[0], "the tower's operations are not counted"

    moved = Path(shutil.copytree(demo / "model", tmp_path / "model"))
    change_the_connector(moved)
    wrong = tiny_config("wrong", **{**stored, "model": {**sections["model"], "backbone": str(moved)}})
    assert "the features were computed with other weights" in ranks.train(1, wrong, code=1)


def change_the_connector(model: Path) -> None:
    """Add 1 to the connector's weights in a model folder."""
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if "connector" in name)
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
