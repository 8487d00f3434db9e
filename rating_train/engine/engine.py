"""The door to DeepSpeed's engine: build it, step it, read from it."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rating_train.config.resolve import BatchPlan
from rating_train.config.schedule import lr_factor
from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.distributed.groups import connect_groups, limit_collectives
from rating_train.engine.ds_config import build_ds_config
from rating_train.engine.optimizer import build_optimizer
from rating_train.errors import UserError
from rating_train.model.head import dropout_keys
from rating_train.model.loss import rating_loss
from rating_train.model.param_groups import ParamGroup, group_table, param_groups
from rating_train.model.regressor import RatingRegressor

log = logging.getLogger(__name__)

MIN_DEEPSPEED = (0, 19, 5)


@dataclass
class Engine:
    """A DeepSpeed engine with what one optimizer step needs.

    Args:
        ds: the DeepSpeed engine (also what checkpoints are written through).
        groups: the optimizer's groups, in its order.
        config: the run's configuration.
        plan: how the global batch is divided.
        device: this rank's device.
    """

    ds: Any
    groups: list[ParamGroup]
    config: Config
    plan: BatchPlan
    device: torch.device

    def step(
        self, batch: Batch, step: int, total_steps: int, before_micro: Callable[[], None] | None = None
    ) -> Tensor:
        """One optimizer step on this rank's batch, in micro-batches; returns its mean loss.

        What ``before_micro`` raises, on all ranks before the same micro-batch, leaves the weights as they were.

        The loss is a detached float32 scalar on the device: reading it waits for the device, so the loop
        does that only when it logs.
        """
        self.set_lr(lr_factor(step, total_steps, self.config.optim))
        self.ds.train()
        losses = []
        for micro in batch.split(self.plan.micro_items):
            if before_micro is not None:
                before_micro()
            keys = dropout_keys(micro.ids, self.config.train.seed, step).to(self.device)
            micro = micro.to(self.device)
            scores = self.ds(micro.images, micro.input_ids, micro.used_tokens, keys)
            loss = rating_loss(scores, micro.ratings, micro.rating_counts, self.config.loss)
            self.ds.backward(loss)
            self.ds.step()  # acts on the last micro-batch of the step
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    @property
    def step_skipped(self) -> bool:
        """Whether the last step was left out, on every rank alike, for a non-finite gradient."""
        return bool(getattr(self.ds.optimizer, "overflow", False))

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; ``None`` where it was not finite."""
        value = self.ds.get_global_grad_norm()
        value = float(value) if value is not None else None
        return value if value is not None and 0 <= value < float("inf") else None

    def set_lr(self, factor: float) -> None:
        """Learning rate of every group: its peak times ``factor``."""
        for group, options in zip(self.groups, self.ds.optimizer.param_groups, strict=True):
            options["lr"] = group.peak_lr * factor

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """(B,) float32 ratings on the CPU. Under ZeRO-3 a collective."""
        self.ds.eval()
        batch = batch.to(self.device)
        return self.ds(batch.images, batch.input_ids, batch.used_tokens).float().cpu()

    @property
    def model(self) -> RatingRegressor:
        """The module inside (its weights are divided over ranks under ZeRO-3)."""
        return self.ds.module


def build_engine(model: RatingRegressor, config: Config, plan: BatchPlan, device: torch.device) -> Engine:
    """Hand the model to DeepSpeed. A collective; the process group must be connected.

    Raises:
        UserError: DeepSpeed is older than 0.19.5 (silent gradient bugs at stages 0 and 1).
    """
    import deepspeed  # here, not above: it looks for accelerators, and says so, when it is imported

    found = tuple(int(x) for x in deepspeed.__version__.split("+")[0].split(".")[:3])
    if found < MIN_DEEPSPEED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} has silent gradient bugs at ZeRO stages 0 and 1",
            expected="0.19.5 or newer",
            fix="pip install -U deepspeed",
        )
    groups = param_groups(model, config.optim)
    log.info("optimizer groups\n%s", group_table(model, groups))
    optimizer = build_optimizer(groups, config, device)
    _without_shared_memory_collectives(deepspeed)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        verbose=False,
        timeout=datetime.timedelta(minutes=config.train.collective_timeout_minutes),
    )
    ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=build_ds_config(config, plan))
    limit_collectives(config.train.collective_timeout_minutes)  # of the groups that DeepSpeed made, too
    connect_groups(device)
    check_fp32_buffers(ds.module)
    return Engine(ds, groups, config, plan, device)


def _without_shared_memory_collectives(deepspeed: Any) -> None:
    """Keep DeepSpeed's CPU all-reduce out: it compiles C++ at start-up and shares named memory between runs.

    Marking the operator as incompatible is what DeepSpeed does itself on a machine without a compiler; gloo
    then does all collectives. On GPUs nothing changes.
    """
    getattr(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # noqa: B009


def check_fp32_buffers(model: torch.nn.Module) -> None:
    """Rotary frequencies in bf16 would turn far positions by whole radians, silently; refuse that."""
    wrong = [n for n, b in model.named_buffers() if b.is_floating_point() and b.dtype != torch.float32]
    if wrong:
        raise RuntimeError(f"DeepSpeed cast buffers that must stay in fp32: {', '.join(wrong[:3])}")
