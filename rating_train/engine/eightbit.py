"""AdamW with moments in 8 bits, of bitsandbytes, with the clipping and the guard of ``GuardedAdamW``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch

from rating_train.engine.clipping import Guarded
from rating_train.model.param_groups import ParamGroup, for_optimizer


class GuardedAdamW8bit(Guarded, bitsandbytes.optim.AdamW):  # type: ignore[misc]
    """AdamW whose moments take one byte each, with a scale for each block of 256 (Dettmers et al. 2022).

    Only groups with ``bits`` 8 have such moments, and of those only tensors of at least 4,096 elements. bitsandbytes'
    kernels know no flag to skip a step, so the host waits for the gradient norm in every step.
    """

    def __init__(self, params: Any, clip_norm: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.guard(clip_norm)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Tell bitsandbytes how many bits the moments of a parameter have."""
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["bits"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip by the global norm and update, or skip. Gradients are already averaged over ranks."""
        assert closure is None
        self.clip()
        if not self.found_inf:
            super().step()


def build_eightbit(groups: list[ParamGroup], clip_norm: float, **options: Any) -> GuardedAdamW8bit:
    """Build the optimizer: 8 bits for matrices, fp32 for embeddings, norms and biases, as its authors advise."""
    described = for_optimizer(groups)
    for group, entry in zip(groups, described, strict=True):
        entry["bits"] = 8 if group.matrices else 32
    return GuardedAdamW8bit(described, clip_norm, **options)
