"""Clipping and skipping for an optimizer of ZeRO stage 0, where DeepSpeed does neither."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rating_train.engine.gradient_buckets import GradientBuckets


class Guarded:
    """Clipping, and a guard against gradients that are not finite, for an optimizer that DeepSpeed only calls.

    Attributes:
        buckets: where the gradients are, if they are views of a few flat tensors: norm and clipping then take a few
            kernels, not some for each parameter.
        found_inf: float32 scalar on the device, 1 if the last step was skipped, else 0.
    """

    param_groups: list[dict[str, Any]]
    found_inf: Tensor
    buckets: GradientBuckets | None = None

    def guard(self, clip_norm: float) -> None:
        """Set the largest global gradient norm; 0 turns clipping off."""
        self.clip_norm = clip_norm
        self.found_inf = torch.zeros(())
        self._global_grad_norm: Tensor | None = None  # read by DeepSpeed

    def clip(self) -> None:
        """Note the global gradient norm and whether it is finite, and clip by it. Waits for nothing."""
        if self.buckets is not None:
            gradients = self.buckets.flats
        else:
            gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.found_inf = 1 - torch.isfinite(norm).float()
        self._global_grad_norm = norm
        if self.clip_norm > 0:
            factor = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils computes it
            for gradient in gradients:
                gradient.mul_(factor)
