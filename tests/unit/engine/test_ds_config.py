"""The DeepSpeed dict: every number derived, nothing automatic, nothing left to a default."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rating_train.config.load import config_from_dict
from rating_train.config.resolve import plan_batch
from rating_train.config.schema import Config
from rating_train.engine.ds_config import build_ds_config
from rating_train.errors import UserError

STAGES = [0, 1, 2, 3]
PLAN = plan_batch(64, 4, 2)


def config(
    stage: int = 2, precision: str = "bf16", zero: dict[str, Any] | None = None, **optim: Any
) -> Config:
    return config_from_dict(
        {"zero": {"stage": stage, **(zero or {})}, "train": {"precision": precision}, "optim": optim}
    )


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    return [value]


@pytest.mark.parametrize("stage", STAGES)
def test_the_batch_is_ranks_times_micro_times_accumulation(stage: int) -> None:
    ds = build_ds_config(config(stage), PLAN)
    assert ds["train_batch_size"] == 64
    assert ds["train_micro_batch_size_per_gpu"] == 4
    assert ds["gradient_accumulation_steps"] == 8
    assert (
        ds["train_batch_size"] == 2 * ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_automatic_and_the_dict_is_plain_json(stage: int, precision: str) -> None:
    ds = build_ds_config(config(stage, precision), PLAN)
    assert "auto" not in leaves(ds) and None not in leaves(ds)
    assert json.loads(json.dumps(ds)) == ds


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", [0.0, 0.5, 1.0])
def test_clipping_is_always_set_and_left_to_the_optimizer_at_stage_0(stage: int, clip: float) -> None:
    assert build_ds_config(config(stage, clip_norm=clip), PLAN)["gradient_clipping"] == (
        clip if stage else 0.0
    )


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_master_weights_under_zero_and_autocast_at_stage_0(stage: int) -> None:
    half, full = (build_ds_config(config(stage, p), PLAN) for p in ("bf16", "fp32"))
    assert half["bf16"]["enabled"] == (stage > 0) and half["torch_autocast"]["enabled"] == (stage == 0)
    assert not full["bf16"]["enabled"] and not full["torch_autocast"]["enabled"]
    for ds in (half, full):
        assert not ds["fp16"]["enabled"]
        assert ds["bf16"]["check_grad_overflow"], (
            "a gradient that is not finite skips the step at every stage"
        )
        assert ds["data_types"]["grad_accum_dtype"] == ds["communication_data_type"] == "fp32"


def test_gradients_are_sent_in_bf16_and_accumulated_in_fp32_where_that_is_asked_for() -> None:
    ds = build_ds_config(config_from_dict({"zero": {"stage": 1, "communication_dtype": "bf16"}}), PLAN)
    assert (ds["communication_data_type"], ds["data_types"]["grad_accum_dtype"]) == ("bf16", "fp32")
    with pytest.raises(UserError, match=r"needs `train\.precision` bf16"):
        config_from_dict({"zero": {"communication_dtype": "bf16"}, "train": {"precision": "fp32"}})


def test_a_bucket_of_mib_is_counted_in_bf16_elements() -> None:
    zero = build_ds_config(config(2, zero={"bucket_mb": 50}), PLAN)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 50 * 1024 * 1024 // 2
    assert isinstance(zero["reduce_bucket_size"], int)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_says_where_its_state_is_kept(stage: int) -> None:
    zero = build_ds_config(config(stage), PLAN)["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == (stage > 0)
    assert ("offload_param" in zero) == (stage == 3)


def test_offload_is_passed_on() -> None:
    zero = build_ds_config(config(3, zero={"offload_optimizer": True, "offload_param": True}), PLAN)
    assert zero["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert zero["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_further_keys_are_passed_through_and_derived_ones_are_refused() -> None:
    extra = {"stage3_prefetch_bucket_size": 123, "round_robin_gradients": True}
    zero = build_ds_config(config(3, zero={"extra": extra}), PLAN)["zero_optimization"]
    assert {k: zero[k] for k in extra} == extra
    with pytest.raises(UserError, match=r"reduce_bucket_size, stage cannot be set by hand.*zero\.extra"):
        build_ds_config(config(2, zero={"extra": {"stage": 1, "reduce_bucket_size": 5, "other": 1}}), PLAN)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_itself_reads_back_what_was_meant(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parser, in one process: 64 = 1 x 4 x 16."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(build_ds_config(config(stage, precision, clip_norm=0.7), plan_batch(64, 4, 1)))
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (64, 4)
    assert parsed.gradient_accumulation_steps == 16
    assert parsed.gradient_clipping == (0.7 if stage else 0.0)
    assert parsed.zero_optimization_stage == stage
    assert parsed.bfloat16_config.enabled == (precision == "bf16" and stage > 0)
    assert parsed.grad_accum_dtype == "fp32"
    assert not parsed.checkpoint_tag_validation_enabled
    assert not parsed.timers_config.enabled, "its throughput timer synchronises the device"
