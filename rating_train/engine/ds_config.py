"""Generate the complete DeepSpeed configuration from ours. Pure; imports no DeepSpeed.

Nothing is "auto", and nothing that matters is left to a default: defaults of DeepSpeed have changed between versions
(gradient clipping went from 0 to 1.0).
"""

from __future__ import annotations

from typing import Any

from rating_train.config.resolve import BatchPlan
from rating_train.config.schema import Config
from rating_train.errors import UserError


def build_ds_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """Build the dict for ``deepspeed.initialize``.

    Stage 0 is plain data parallelism: fp32 weights with bf16 autocast. DeepSpeed's own bf16 at stage 0 would
    accumulate gradients in bf16 and start Adam with a fake step, so clipping and the guard against non-finite
    gradients are left to the optimizer (see ``engine/optimizer.py``).

    Raises:
        UserError: a key of ``zero.extra`` collides with a derived one.
    """
    stage = config.zero.stage
    return {
        "train_batch_size": plan.global_items,
        "train_micro_batch_size_per_gpu": plan.micro_items,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_norm if stage > 0 else 0.0,
        # Without it, stage 2 would apply a step whose gradient norm is not finite.
        "bf16": {"enabled": config.forward_precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": config.forward_precision == "autocast", "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # By default in the dtype of the accumulation: a bf16 sum over many ranks loses small gradients.
        "communication_data_type": config.zero.communication_dtype,
        "zero_optimization": _zero(config),
        # The tag is a constant: to compare it over ranks costs two collectives at every save.
        "checkpoint": {"tag_validation": "Ignore"},
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Its throughput timer would synchronise the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "memory_breakdown": False,
    }


def _zero(config: Config) -> dict[str, Any]:
    zero = config.zero
    bucket = zero.bucket_mb * 2**20 // 2  # DeepSpeed counts elements; a bf16 value has 2 bytes
    derived: dict[str, Any] = {"stage": zero.stage}
    if zero.stage > 0:
        derived |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": zero.stage > 1,
            "reduce_scatter": True,
            "offload_optimizer": {"device": "cpu" if zero.offload_optimizer else "none"},
        }
    if zero.stage == 3:
        derived |= {
            "offload_param": {"device": "cpu" if zero.offload_param else "none"},
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    clashes = sorted(set(derived) & set(zero.extra))
    if clashes:
        raise UserError(
            f"{', '.join(clashes)} cannot be set by hand: derived from other settings",
            where="zero.extra",
            fix="remove it there, and set zero.stage, zero.bucket_mb or zero.offload_* instead",
        )
    return {**derived, **zero.extra}
