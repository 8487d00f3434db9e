"""Clipping and skipping for an optimizer of ZeRO stage 0, where DeepSpeed does neither."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Guarded:
    """Clipping, and a guard against gradients that are not finite, for an optimizer that DeepSpeed only calls.

    Attributes:
        found_inf: float32 scalar on the device, 1 if the last step was skipped, else 0.
    """

    param_groups: list[dict[str, Any]]
    found_inf: Tensor

    def guard(self, clip_norm: float) -> None:
        """Set the largest global gradient norm; 0 turns clipping off."""
        self.clip_norm = clip_norm
        self.found_inf = torch.zeros(())
        self._global_grad_norm: Tensor | None = None  # read by DeepSpeed

    def clip(self) -> None:
        """Note the global gradient norm and whether it is finite, and clip by it. Waits for nothing."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.found_inf = 1 - torch.isfinite(norm).float()
        self._global_grad_norm = norm
        if self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
