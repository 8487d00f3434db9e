"""What a person gets wrong when starting a training run: one line that says what, where and what to do; exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.helpers.cli import rating_train

pytestmark = pytest.mark.timeout(200)


def refused(config: Path, *options: str) -> str:
    """Start one process, expecting a user error; the line."""
    done = rating_train("train", config, *options)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return errors[0]


def test_missing_data_folder(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    error = refused(tiny_config(data={"path": str(tmp_path / "nowhere")}))
    assert "dataset directory not found" in error and "nowhere" in error and "rating-train prepare" in error


def test_folder_without_manifest(demo: Path, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(demo / "data", tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    error = refused(tiny_config(data={"path": str(tmp_path / "data")}))
    assert "has no manifest.json" in error and "rating-train prepare" in error


def test_unknown_backbone_path(tiny_config: Callable[..., Path]) -> None:
    error = refused(tiny_config(model={"backbone": "/no/such/model"}))
    assert "/no/such/model" in error and "model.backbone" in error


def test_batch_that_does_not_divide(tiny_config: Callable[..., Path]) -> None:
    error = refused(tiny_config(batch={"global_items": 12, "micro_items": 5}))
    assert (
        "12 over 1 ranks" in error and "one of 1, 2, 3, 4, 6, 12" in error and "batch.micro_items=4" in error
    )


def test_image_side_that_does_not_divide(tiny_config: Callable[..., Path]) -> None:
    assert "a positive multiple of 16" in refused(tiny_config(data={"image_px": 70}))


def test_resume_must_without_a_checkpoint_and_never_with_one(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(train={"max_steps": 1})
    assert "no checkpoint to resume from" in refused(config, "--resume", "must")
    ranks.train(1, config)
    assert "the run has checkpoints already" in refused(config, "--resume", "never")
    damaged = next((tmp_path / "runs/run/checkpoints/step_00000001").rglob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    error = refused(config)
    assert "none can be trusted" in error and damaged.name in error and "instead of" in error


def test_early_stopping_ends_the_run_with_the_best_checkpoint_kept(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    still = {"vision": 0.0, "connector": 0.0, "decoder": 0.0, "head": 0.0}
    config = tiny_config(
        optim={"lr": still},
        train={"max_steps": 50, "eval_every_steps": 2, "early_stop_evals": 2, "select_metric": "rmse"},
    )
    output = ranks.train(2, config)
    assert "no better rmse in 2 evaluations" in output and "early stop at step 6" in output
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == 2
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000006"]
    assert not (run / "REQUEUE").exists()
    steps = [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
