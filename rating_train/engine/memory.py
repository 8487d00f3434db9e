"""Predict the memory of a rank: what DeepSpeed 0.19 keeps at each ZeRO stage, and the traced micro-batch.

Bytes per trained parameter (P; F are frozen ones, R ranks), as its optimizers allocate them:

=====================  ==========  ===================  ======================  =========================
stage                  weights     gradients            master and moments      optimizer class
=====================  ==========  ===================  ======================  =========================
0 (bf16 is autocast)   4 (P+F)     4 P, in buckets      8 P                     none: torch's fused AdamW
1, bf16                2 (P+F)     4 P                  12 P / R                BF16_Optimizer
1, fp32                4 (P+F)     4 P                  12 P / R                DeepSpeedZeroOptimizer
2 (fp32: weights 4)    2 (P+F)     4 P / R              12 P / R                DeepSpeedZeroOptimizer
3 (fp32: weights 4)    2 (P+F) /R  4 P / R              12 P / R, fp32: 8 P / R DeepSpeedZeroOptimizer_Stage3
=====================  ==========  ===================  ======================  =========================

Stage 1 in bf16 frees a bf16 gradient as soon as it is in its fp32 sum, and stages 2 and 3 as soon as it is in a
bucket. Gradients that travel in bf16 are copies at stages 0 and 1. Stage 3 gathers weights when they are needed and,
with its default settings, keeps up to 10^9 of them from the forward to the backward pass. The peak is in one of two
moments: in the backward pass, with activations; or in the reduction and update after it, with the copies that those
make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from rating_train.config.resolve import BatchPlan, plan_batch
from rating_train.config.schema import Config
from rating_train.engine.activations import GradientHook, LiveBytes, MicroBatchMemory, trace_micro_batch
from rating_train.model.architecture import Architecture
from rating_train.model.param_groups import param_groups
from rating_train.model.regressor import empty_regressor

_MAX_LIVE_ELEMENTS = 1_000_000_000  # its default of stage3_max_live_parameters
_PREFETCHED_ELEMENTS = (
    50_000_000  # and of stage3_prefetch_bucket_size: the received copy of what is gathered next
)
_NORM_BYTES = 8  # stages 2 and 3 take norms in fp64


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements: trained parameters of each optimizer group, the largest one, and frozen ones."""

    groups: tuple[int, ...]
    largest: int
    frozen: int

    @property
    def trained(self) -> int:
        return sum(self.groups)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one rank.

    Attributes:
        weights: of the model; at stage 3 this rank's part of them.
        gathered: weights of other ranks that stage 3 holds in the backward pass.
        gradients: that are there in the backward pass, before the micro-batch's own.
        optimizer: fp32 master weights and AdamW's moments.
        micro_batch: activations, temporary results, new gradients and reduction buckets at their peak.
        update: gradients and copies at the peak of the reduction and update, which follow without activations.
        host: in CPU memory, with ``zero.offload_*``.
    """

    weights: int
    gradients: int
    optimizer: int
    micro_batch: int
    update: int
    gathered: int = 0
    host: int = 0

    @property
    def in_backward(self) -> int:
        """Bytes at the peak of the backward pass."""
        return self.weights + self.gathered + self.optimizer + self.gradients + self.micro_batch

    @property
    def in_update(self) -> int:
        """Bytes at the peak of the reduction and update."""
        return self.weights + self.optimizer + self.update

    @property
    def peak(self) -> int:
        """Bytes at the larger peak of both."""
        return max(self.in_backward, self.in_update)


def model_sizes(config: Config, architecture: Architecture) -> Sizes:
    """Count the elements of a model's optimizer groups without making it."""
    model = empty_regressor(config.model, architecture, config.model_px, image_start=1)
    groups = param_groups(model, config.optim)
    largest = max(p.numel() for g in groups for p in g.parameters)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Sizes(tuple(g.numel for g in groups), largest, frozen)


def predict_memory(config: Config, architecture: Architecture, ranks: int) -> RankMemory:
    """Predict the memory of each of ``ranks`` ranks in a steady step.

    Raises:
        UserError: the global batch does not divide over the ranks and micro-batches.
    """
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, ranks)
    return memory_of(config, model_sizes(config, architecture), plan, trace(config, architecture, plan))


def trace(config: Config, architecture: Architecture, plan: BatchPlan) -> MicroBatchMemory:
    """Trace a micro-batch with the gradients and buckets that its stage has."""
    stage = config.zero.stage
    existing = stage == 0 or (stage == 1 and plan.accumulation > 1 and not config.partitions_gradients)
    on_gradient = _reduction(config) if stage > 1 else None
    at_once = config.train.compile == "model"  # its gradients are all complete at the end
    if config.partitions_gradients and not at_once:
        on_gradient = _free_at_once
    return trace_micro_batch(
        config,
        architecture,
        plan.micro_items,
        existing_gradients=existing,
        on_gradient=on_gradient,
    )


def memory_of(config: Config, sizes: Sizes, plan: BatchPlan, micro_batch: MicroBatchMemory) -> RankMemory:
    """Add up what a stage keeps and a traced micro-batch."""
    bf16, ranks, stage = config.train.precision == "bf16", plan.ranks, config.zero.stage
    trained = sizes.trained
    share, largest_share = -(-trained // ranks), -(-max(sizes.groups) // ranks)
    everything = trained + sizes.frozen
    bucket = bucket_elements(config)
    norm = _NORM_BYTES * min(sizes.largest, share)
    sent = 2 * trained if config.zero.communication_dtype == "bf16" and ranks > 1 else 0
    if stage == 0:
        kept = 4 * trained + sent  # the buckets, which are reduced in place
        return RankMemory(4 * everything, kept, 8 * trained, micro_batch.peak, kept)
    width = 2 if bf16 else 4
    weights, optimizer, gathered, host = width * everything, 12 * share, 0, 0
    if config.partitions_gradients:
        kept = update = 4 * trained + sent
    elif stage == 1:
        kept = 4 * trained if plan.accumulation > 1 else 0
        update = 4 * trained + 4 * share + 4 * bucket
        micro_batch = MicroBatchMemory(micro_batch.items, micro_batch.saved, micro_batch.peak + 4 * bucket)
    elif stage == 2:
        # In fp32 a rank keeps complete the tensors that it shares with its neighbours, in each micro-batch anew.
        one = share if bf16 or ranks == 1 else share + sizes.largest
        kept = 4 * one * (1 if bf16 or plan.accumulation == 1 else 2)
        update = kept + max(norm, 0 if bf16 else 4 * largest_share)
    else:
        weights = -(-weights // ranks)
        if ranks > 1:
            live = min(everything, _MAX_LIVE_ELEMENTS) + min(everything, _PREFETCHED_ELEMENTS)
            gathered = width * live
        optimizer = (12 if bf16 else 8) * share
        kept = 4 * share
        update = kept + 4 * bucket + max(norm, 4 * largest_share)
    if config.zero.offload_optimizer:
        host, optimizer = optimizer + 4 * share, 2 * sizes.largest
    if config.zero.offload_param:
        host, weights = host + weights, 0
    return RankMemory(weights, kept, optimizer, micro_batch.peak, update, gathered, host)


def _free_at_once(_live: LiveBytes) -> GradientHook:
    """Return a hook that frees a gradient as soon as it is complete."""

    def on_gradient(parameter: nn.Parameter) -> None:
        parameter.grad = None

    return on_gradient


def bucket_elements(config: Config) -> int:
    """Count the elements of a reduction bucket, as ``engine/ds_config.py`` sets it."""
    return config.zero.bucket_mb * 2**20 // 2


def _reduction(config: Config) -> Callable[[LiveBytes], GradientHook]:
    """Return a maker of hooks that reduce as stages 2 and 3 do: into buckets, which are flattened and sent as fp32."""
    stage, bf16 = config.zero.stage, config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 and stage == 2 else torch.float32
    bucket = bucket_elements(config)
    buffers = 2 if stage == 2 else 1

    def make(_live: LiveBytes) -> GradientHook:
        held = [torch.empty(bucket, dtype=dtype) for _ in range(buffers)]
        waiting: list[nn.Parameter] = []
        filled = 0

        def flush() -> None:
            flat = torch.empty(filled, dtype=dtype)
            if dtype != torch.float32:
                flat = flat.to(torch.float32)
            del flat
            for parameter in waiting:
                parameter.grad = None
            waiting.clear()

        def on_gradient(parameter: nn.Parameter) -> None:
            nonlocal filled
            assert held
            if filled and filled + parameter.numel() > bucket:
                flush()
                filled = 0
            filled += parameter.numel()
            if parameter.numel() > bucket:  # a gradient of its own, until it is reduced
                waiting.append(parameter)
            else:
                parameter.grad = None

        return on_gradient

    return make


def fitting_items(points: Sequence[tuple[int, int]], limit: int) -> int:
    """Find the most items whose peak is at most ``limit`` bytes.

    Args:
        points: (items, peak in bytes), at least two, in rising order. The peak is a maximum of straight lines, so
            between points a straight line is at or above it; after the last one it is continued.
        limit: in bytes.

    Returns:
        0 if none fit.
    """
    most = 0
    for (a, low), (b, high) in pairwise(points):
        if limit < low:
            break
        slope = (high - low) / (b - a)
        most = a + int((limit - low) // slope) if slope > 0 else b
        if limit < high:
            break
    return most
