"""AdamW, and AdamW that clips and guards by itself for plain data parallelism (ZeRO stage 0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rating_train.config.schema import Config
from rating_train.model.param_groups import ParamGroup, for_optimizer


class GuardedAdamW(torch.optim.AdamW):
    """AdamW with gradient clipping and a guard: a non-finite gradient norm skips the step.

    ZeRO's optimizers bring both; a plain optimizer in DeepSpeed does neither count nor skip. The engine reads
    ``overflow`` after each step, as it does from ZeRO's.

    Why stage 0 does not go through DeepSpeed's bf16 wrapper (seen in 0.19.8): it initialises Adam by a step
    with zero gradients, so the step counter stands at 2 after the first real update and the bias correction
    is off, and it accumulates micro-batches in bf16.
    """

    def __init__(self, params: Any, clip_norm: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip_norm = clip_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip by the global norm and update, or skip. Gradients are already averaged over ranks."""
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = float(norm)
        if self.overflow:
            return
        if self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        super().step()


def build_optimizer(groups: list[ParamGroup], config: Config, device: torch.device) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` on every device: no JIT build; fused on a GPU."""
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (config.optim.beta1, config.optim.beta2),
        "eps": config.optim.eps,
        "fused": device.type == "cuda" and not config.zero.offload_optimizer,
    }
    if config.zero.stage == 0:
        return GuardedAdamW(for_optimizer(groups), config.optim.clip_norm, **options)
    return torch.optim.AdamW(for_optimizer(groups), **options)
