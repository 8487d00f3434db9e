"""A run with `stages`, killed in each phase and around their boundary, resumes bit-equal, and elastically on other ranks.

Two phases of three steps: the head alone, then the decoder with it. Saves at steps 2 and 4, and at the end of each phase.
Stage 3 offloads weights and optimizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.conftest import Ranks, full
from tests.dist.stages_worker import POINTS
from tests.helpers.runs import assert_same, evaluations, global_batches, losses, read_ids, read_log

#: ZeRO stage -> precision. Stage 1 has an optimizer of its own in bf16; elsewhere fp32 lets other ranks agree closely.
PRECISION = {0: "fp32", 1: "bf16", 2: "fp32", 3: "fp32"}
LAST = "checkpoints/step_00000006"


def settings(few_items: Path, stage: int) -> dict[str, object]:
    return {
        "data": {"path": str(few_items)},
        "batch": {"global_items": 12, "micro_items": 3},
        "zero": {"stage": stage, "offload_optimizer": stage == 3, "offload_param": stage == 3},
        "train": {"save_every_steps": 2, "keep_last": 9, "precision": PRECISION[stage], "log_every_steps": 1,
                  "eval_every_steps": 0, "log_sample_ids": True, "background_save": stage == 1},
        "stages": [
            {"steps": 3, "freeze": ["vision", "connector", "decoder"], "warmup_fraction": 0.5},
            {"steps": 3, "freeze": ["vision", "connector"], "lr": {"decoder": 1e-3}},
        ],
    }  # fmt: skip


def moved(configs: Sequence[Path], folder: Path) -> list[Path]:
    """Copies of runs as they are now, and configurations that resume them."""
    result = []
    for path in configs:
        content = yaml.safe_load(path.read_text())
        shutil.copytree(Path(content["runs_dir"]) / content["name"], folder / content["name"])
        copy = path.with_name(f"moved_{path.name}")
        copy.write_text(yaml.safe_dump({**content, "runs_dir": str(folder)}))
        result.append(copy)
    return result


def killed(ranks: Ranks, size: int, point: str, configs: Sequence[Path]) -> str:
    """Train up to a point; the output, of processes that SIGKILL has ended."""
    return ranks.run(size, "-m", "tests.dist.stages_worker", point, *configs, code=1)


def finished(ranks: Ranks, size: int, configs: Sequence[Path]) -> str:
    return ranks.run(size, "-m", "tests.dist.stages_worker", "to the end", *configs)


@pytest.mark.timeout(600)
def test_killed_anywhere_resumes_bit_equal_and_on_other_ranks(
    ranks: Ranks, tiny_config: Callable[..., Path], few_items: Path, tmp_path: Path
) -> None:
    """All points at stage 1; stages 0, 2 and 3 after the boundary's commit. Then 2 ranks, 1 rank, and 2 again."""
    straight = [tiny_config(f"straight{s}", **settings(few_items, s)) for s in PRECISION]
    broken = {s: tiny_config(f"broken{s}", **settings(few_items, s)) for s in PRECISION}
    finished(ranks, 2, straight)
    copies: list[Path] = []
    for point in POINTS:
        configs = [broken[s] for s in ((0, 2, 3, 1) if point == "after the commit" else (1,))]
        output = killed(ranks, 2, point, configs)
        if point == "while the engine is built":
            assert "resuming from step 3 of 6, in phase 1 of 2" in output
        if point == "after the commit":
            assert (tmp_path / "runs/broken1/checkpoints/step_00000003").is_dir()
            copies = moved(configs, tmp_path / "elastic")
    output = finished(ranks, 2, list(broken.values()))
    assert output.count("entering phase 2 of 2") >= 3

    for stage in PRECISION:
        a, b = tmp_path / f"runs/straight{stage}", tmp_path / f"runs/broken{stage}"
        assert read_log(a) == read_log(b) and evaluations(a) == evaluations(b)
        assert [row["phase"] for row in read_log(b)] == [1, 1, 1, 2, 2, 2]
        assert [row["step"] for row in evaluations(b)] == [3, 6], "each phase is evaluated at its end"
        for rank in (0, 1):
            assert read_ids(a, rank) == read_ids(b, rank)
        for path in sorted((a / LAST).rglob("*.pt")):
            name = path.relative_to(a / LAST)
            padding = 1 if stage == 3 and "rank_1_" in str(name) else 0
            first, second = (torch.load(run / LAST / name, weights_only=False) for run in (a, b))
            assert_same(first, second, str(name), padding=padding)

    assert "loading a checkpoint of 2 ranks" in killed(ranks, 1, "in phase 2", copies)
    output = finished(ranks, 2, copies)
    assert output.count("resuming from step 4 of 6, in phase 2 of 2") >= 3, "all that save in the foreground"
    assert "loading a checkpoint of 1 ranks" in output
    for stage, precision in PRECISION.items():
        a, c = tmp_path / f"runs/straight{stage}", tmp_path / f"elastic/broken{stage}"
        assert global_batches(a) == global_batches(c)
        assert losses(a) == pytest.approx(losses(c), rel=1e-5 if precision == "fp32" else 2e-2), stage
        check_trained_parts(a / LAST, a / "checkpoints/step_00000003", stage)


def check_trained_parts(last: Path, boundary: Path, stage: int) -> None:
    """The second phase trains the decoder, which the first one left as it was, and the head; nothing else."""
    before, after = consolidated_weights(boundary, stage), consolidated_weights(last, stage)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    parts = {name.split(".")[0 if name.startswith("head") else 1] for name in changed}
    assert parts == {"text_model", "head"}


@full
@pytest.mark.timeout(300)
def test_compiled_layers_offloading_and_features_cross_the_boundary(
    ranks: Ranks, tiny_config: Callable[..., Path], few_items: Path, tmp_path: Path
) -> None:
    """All at once, at stage 2; the losses are those of a run with none of them."""
    plain = settings(few_items, 2)
    plain["train"] = {**plain["train"], "precision": "bf16", "save_every_steps": 0}  # type: ignore[dict-item]
    every = {
        **plain,
        "data": {"path": str(few_items), "features": str(tmp_path / "features")},
        "zero": {"stage": 2, "offload_optimizer": True},
        "train": {**plain["train"], "compile": "blocks"},  # type: ignore[dict-item]
    }
    configs = [tiny_config("plain", **plain), tiny_config("every", **every)]
    ranks.run(1, "-m", "rating_train", "features", configs[1])
    output = ranks.run(2, "-m", "tests.dist.stages_settings_worker", *configs)
    assert output.count("compiled for ") == 2, "in each phase, before its first step"
    one, other = (losses(tmp_path / "runs" / name) for name in ("plain", "every"))
    assert other == pytest.approx(one, rel=2e-3)
