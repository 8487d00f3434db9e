"""Build the DeepSpeed engine, step it, read from it."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rating_train.config.lr_schedule import lr_factor
from rating_train.config.resolve import BatchPlan
from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.data.features.identity import features_dtype
from rating_train.distributed.groups import connect_groups, limit_collectives
from rating_train.engine.clipping import Guarded
from rating_train.engine.compiled import compile_model, warm_up
from rating_train.engine.ds_config import build_ds_config
from rating_train.engine.gradient_buckets import GradientBuckets
from rating_train.engine.optimizer import build_optimizer
from rating_train.engine.partitioned_gradients import PartitionedGradients, divide
from rating_train.engine.step_timer import StepTimer
from rating_train.errors import UserError
from rating_train.model.attention import choose_attention
from rating_train.model.custom_loss import LossFunction
from rating_train.model.head import dropout_keys
from rating_train.model.loss import rating_loss
from rating_train.model.param_groups import ParamGroup, group_table, param_groups
from rating_train.model.regressor import RatingRegressor
from rating_train.processes import without_collector

log = logging.getLogger(__name__)

MIN_DEEPSPEED = (0, 19, 5)


@dataclass
class Engine:
    """A DeepSpeed engine with all that one optimizer step needs.

    Args:
        ds: the DeepSpeed engine (also what checkpoints are written through).
        groups: the optimizer's parameter groups, in its order.
        config: the run's configuration.
        plan: how the global batch is divided.
        device: this rank's device.
        custom_loss: the function that ``loss.kind`` names, if it is not a built-in loss.
        buckets: the gradients at stage 0, and at stage 1 in bf16 without offloading; otherwise they are DeepSpeed's.
        timer: measures the parts of a step, in a benchmark. With ``buckets``, "reduction" is what of it is left after
            the backward pass; otherwise DeepSpeed reduces within its backward pass and its optimizer step.
        lengths: all that micro-batches can have, in tokens.
        first_step: steps of the run before those of this engine, at which its learning-rate schedule starts.
        lr_factor: share of the peak learning rates that the last step used.
    """

    ds: Any
    groups: list[ParamGroup]
    config: Config
    plan: BatchPlan
    device: torch.device
    custom_loss: LossFunction | None = None
    buckets: GradientBuckets | PartitionedGradients | None = None
    timer: StepTimer | None = None
    lengths: tuple[int, ...] = ()
    first_step: int = 0
    lr_factor: float = 0.0
    _skipped: list[bool | Tensor] = field(default_factory=list)

    def step(
        self, batch: Batch, step: int, last_step: int, before_micro: Callable[[], None] | None = None
    ) -> Tensor:
        """Take one optimizer step on this rank's batch, in micro-batches. Nothing here waits for the device.

        Args:
            batch: items of this rank, in host memory (pinned, where the device is a GPU).
            step: optimizer steps of the run done before this one.
            last_step: those done when the learning-rate schedule ends: with the run, or with its phase.
            before_micro: called before each micro-batch. What it raises, on all ranks before the same micro-batch,
                leaves the weights as they were.

        Returns:
            This rank's mean loss, a detached float32 scalar on the device. Reading it waits for the device, so the
            loop reads it only when it logs.
        """
        self._set_lr(lr_factor(step, last_step, self.config.optim, self.first_step))
        self.ds.train()
        losses = []
        micros = batch.split(self.plan.micro_items)
        for number, micro in enumerate(micros, start=1):
            if before_micro is not None:
                before_micro()
            with self._timed("host to device"):
                micro = micro.to(self.device).cut(self.config.batch.length_multiple_tokens)
            with self._timed("forward"):
                loss = self._loss(micro, step)
            reduced = self.buckets if number == len(micros) else None
            if reduced is not None:
                reduced.start()
            with self._timed("backward"):
                self.ds.backward(loss)
            if reduced is not None:
                with self._timed("reduction"):
                    reduced.finish()
            with self._timed("optimizer"):
                self.ds.step()  # updates the weights after the last micro-batch of the step
            losses.append(loss.detach().float())
        optimizer = self.ds.optimizer
        guard = optimizer if isinstance(optimizer, Guarded) else self.buckets
        decided = guard.found_inf if isinstance(guard, Guarded | PartitionedGradients) else optimizer.overflow
        self._skipped.append(decided)
        return torch.stack(losses).mean()

    def _loss(self, micro: Batch, step: int) -> Tensor:
        keys = dropout_keys(micro.id_hashes, self.config.train.seed, step)
        scores = self.ds(micro.images, micro.input_ids, micro.used_tokens, keys)
        return rating_loss(
            scores,
            micro.ratings,
            micro.rating_counts,
            self.config.loss,
            self.custom_loss,
            self.config.task.target.transform,
        )

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return self.timer(name) if self.timer is not None else nullcontext()

    def warm_up(self, before: Callable[[int], None]) -> None:
        """Compile what ``train.compile`` asks for, before the first step; ``before`` is told each length."""
        config = self.config
        if config.train.compile == "none" or not self.lengths:
            return
        autocast = config.forward_precision == "autocast"
        warm_up(self.model, self.lengths, self._blank_images(), autocast, before)

    def _blank_images(self) -> Tensor:
        """Return images of a micro-batch, or the visual tokens that stand for them (`data.features`): all zero."""
        items, px = self.plan.micro_items, self.config.model_px
        if not self.config.data.features:
            # In memory as batches are: a graph is compiled for one order of the channels.
            return torch.zeros(items, px, px, 3, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        dtype = getattr(torch, features_dtype(self.config))
        width = self.model.head.inner.in_features
        return torch.zeros(items, self.model.visual_tokens, width, dtype=dtype, device=self.device)

    def read_skipped(self, wait: bool) -> list[bool]:
        """Tell which steps since the last answer were skipped, on every rank alike, for a non-finite gradient.

        Args:
            wait: whether to wait for the device. DeepSpeed's optimizers know the answer on the host; at stage 0, and
                at stage 1 in bf16, it is on the device.

        Returns:
            One flag for each step, oldest first; none where they are not known without waiting.
        """
        flags = self._skipped
        on_device = [flag for flag in flags if isinstance(flag, Tensor)]
        if on_device and not wait:
            return []
        self._skipped = []
        return [bool(flag) for flag in (torch.stack(on_device).tolist() if on_device else flags)]

    @property
    def grad_norm(self) -> float | None:
        """Gradient norm of the last step before clipping; ``None`` if it was not finite. Waits for the device."""
        value = self.ds.get_global_grad_norm()
        value = float(value) if value is not None else None
        return value if value is not None and 0 <= value < float("inf") else None

    def _set_lr(self, factor: float) -> None:
        self.lr_factor = factor
        for group, options in zip(self.groups, self.ds.optimizer.param_groups, strict=True):
            options["lr"] = group.peak_lr * factor

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Rate a batch: (B,) float32 on the CPU. Under ZeRO-3 a collective."""
        self.ds.eval()
        batch = batch.to(self.device).cut(self.config.batch.length_multiple_tokens)
        return self.ds(batch.images, batch.input_ids, batch.used_tokens).float().cpu()

    @property
    def model(self) -> RatingRegressor:
        """The regressor inside (under ZeRO-3 its weights are divided over the ranks)."""
        return self.ds.module


def build_engine(
    model: RatingRegressor,
    config: Config,
    plan: BatchPlan,
    device: torch.device,
    custom_loss: LossFunction | None = None,
    lengths: Sequence[int] = (),
    first_step: int = 0,
) -> Engine:
    """Hand the model to DeepSpeed. A collective; the process group must exist.

    Args:
        model: the regressor, on the CPU.
        config: the run's configuration.
        plan: how the global batch is divided.
        device: this rank's device.
        custom_loss: the function that ``loss.kind`` names, if it is not a built-in loss.
        lengths: all that micro-batches can have, in tokens; for ``train.compile``.
        first_step: as :class:`Engine` has it.

    Raises:
        UserError: DeepSpeed is older than 0.19.5, which has silent gradient bugs at stages 0 and 1.
    """
    with without_collector(freeze=False):  # the model is there already
        import deepspeed  # not at the top: its import looks for accelerators and logs what it finds
        from deepspeed.runtime import torch_autocast

    found = tuple(int(x) for x in deepspeed.__version__.split("+")[0].split(".")[:3])
    if found < MIN_DEEPSPEED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} has silent gradient bugs at ZeRO stages 0 and 1",
            expected="0.19.5 or newer",
            fix="pip install -U deepspeed",
        )
    choose_attention(model.backbone, device, config.train.precision == "bf16")
    compile_model(model, config.train.compile, lengths)
    groups = param_groups(model, config.optim)
    log.info("optimizer groups\n%s", group_table(model, groups))
    if config.partitions_gradients:
        groups = divide(groups, config.zero.bucket_mb * 2**20)
    optimizer = build_optimizer(groups, config)
    _without_shared_memory_collectives(deepspeed)
    _without_memory_reports()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        verbose=False,
        timeout=datetime.timedelta(minutes=config.train.collective_timeout_minutes),
    )
    # DeepSpeed keeps for the process that an engine ran under autocast (stage 0 in bf16), and lets later ones of
    # stages 2 and 3 reduce in the weights' dtype then, whatever their configuration says.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=build_ds_config(config, plan))
    limit_collectives(config.train.collective_timeout_minutes)  # also in the groups that DeepSpeed has made
    connect_groups(device)
    _decide_by_the_norm(ds.optimizer)
    check_fp32_buffers(ds.module)
    buckets = _own_reduction(ds, config)
    return Engine(
        ds, groups, config, plan, device, custom_loss, buckets, lengths=tuple(lengths), first_step=first_step
    )


def _own_reduction(ds: Any, config: Config) -> GradientBuckets | PartitionedGradients | None:
    """Have gradients reduced during the backward pass, in place of DeepSpeed's reduction after it, where it has one.

    At stage 0 they are put into buckets; at stage 1 in bf16 DeepSpeed has the buffers. Stage 1 in fp32 or with an
    offloaded optimizer, and stages 2 and 3, are left to DeepSpeed.
    """
    zero, optimizer = config.zero, ds.optimizer
    sent_as = torch.bfloat16 if zero.communication_dtype == "bf16" else None
    if zero.stage == 0:
        trained = [p for p in ds.module.parameters() if p.requires_grad]
        buckets = GradientBuckets(trained, zero.bucket_mb * 2**20, sent_as)
        ds.zero_grad = buckets.zero  # DeepSpeed's own drops the gradients, and with them the views
        optimizer.buckets = buckets
        ds.enable_backward_allreduce = False
        return buckets
    if config.partitions_gradients:
        gradients = PartitionedGradients(
            optimizer, list(ds.module.parameters()), config.optim.clip_norm, sent_as
        )
        optimizer.step = gradients.step
        optimizer.update_hp_grads = lambda clear_lp_grads=False: None  # they are there already
        optimizer.clear_hp_grads = lambda: None  # and are overwritten
        ds.enable_backward_allreduce = False
        return gradients
    return None


def _without_shared_memory_collectives(deepspeed: Any) -> None:
    """Turn off DeepSpeed's all-reduce for CPUs: it compiles C++ at start-up and shares named memory between runs.

    The operator is marked as incompatible, as DeepSpeed itself does on a machine without a compiler. gloo then does
    all collectives on CPUs. Nothing changes on GPUs.
    """
    getattr(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # noqa: B009


def _without_memory_reports() -> None:
    """Turn off what DeepSpeed's optimizer for bf16 at stage 1 prints about memory, two reports for each group.

    For each it also runs a full garbage collection, and resets the device's peak.
    """
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _decide_by_the_norm(optimizer: Any) -> None:
    """Drop the scan for non-finite gradients of stages 1 and 2 where the gradient norm finds the same.

    The scan takes about twelve small kernels for each gradient, an all-reduce and a read-back in every step. The
    global norm, computed anyway for clipping and the log, is not finite where any gradient is not; DeepSpeed skips
    the step for it from 0.19.6 on (recognised by a helper that came with it; older versions keep the scan). With an
    offloaded optimizer gradients are checked on their way to the host, so nothing is scanned.
    """
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    norm_decides = hasattr(utils, "combine_grad_norm_groups") and getattr(
        optimizer, "compute_grad_norm", False
    )
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and norm_decides and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def check_fp32_buffers(model: torch.nn.Module) -> None:
    """Refuse buffers in bf16: rotary frequencies rounded to it rotate far positions by radians.

    Raises:
        RuntimeError: DeepSpeed has cast a buffer.
    """
    wrong = [n for n, b in model.named_buffers() if b.is_floating_point() and b.dtype != torch.float32]
    if wrong:
        raise RuntimeError(f"DeepSpeed cast buffers that must stay in fp32: {', '.join(wrong[:3])}")
