"""The learning rate: a pure function of (step, total). There is no scheduler state to save or to lose."""

from __future__ import annotations

import math

from rating_train.config.schema import OptimConfig


def lr_factor(step: int, last_step: int, config: OptimConfig, first_step: int = 0) -> float:
    """Compute the share of the peak learning rate that step ``step`` in [first_step, last_step) uses.

    Linear warm-up over w = ceil(warmup_fraction * total) steps: step k uses (k + 1) / w, so no step is wasted at
    0. Then linear or cosine decay to ``final_fraction``, which the last step reaches.
    """
    step, total_steps = step - first_step, last_step - first_step
    warmup = math.ceil(config.warmup_fraction * total_steps - 1e-9)  # 0.07 * 100 is slightly above 7
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - 1 - warmup)
    done = min(1.0, (step - warmup) / span)
    shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_fraction + (1 - config.final_fraction) * shape
