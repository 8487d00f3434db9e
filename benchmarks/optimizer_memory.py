"""Memory of the optimizer's state, and time of its step, for AdamW and its 8-bit form, on a CPU with random weights.

python benchmarks/optimizer_memory.py configs/paper_frozen_228m.yaml [STEPS]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from rating_train.config.load import load_config
from rating_train.engine.optimizer import build_optimizer
from rating_train.model.architecture import read_architecture
from rating_train.model.param_groups import param_groups
from rating_train.model.regressor import build_regressor


def tensors(value: Any) -> dict[int, torch.Tensor]:
    """All tensors in nested dicts and lists, each memory once."""
    if isinstance(value, torch.Tensor):
        return {value.data_ptr(): value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {key: tensor for item in inner for key, tensor in tensors(item).items()}


def main(path: str, steps: int) -> None:
    """Print one line for each kind."""
    settings = ["zero.stage=0", "model.weights=random"]
    config = load_config(path, settings)
    model = build_regressor(config.model, read_architecture(config.model), config.data.image_px, 1, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    count = sum(p.numel() for p in trained)
    print(f"{count:,} trained parameters, {torch.get_num_threads()} threads")
    for kind in ("adamw", "adamw_8bit"):
        kind_config = load_config(path, [*settings, f"optim.kind={kind}"])
        optimizer = build_optimizer(param_groups(model, kind_config.optim), kind_config)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        held = sum(t.numel() * t.element_size() for t in tensors(dict(optimizer.state)).values())
        print(
            f"{kind:<11} state {held / 2**20:8.1f} MiB  {held / count:5.2f} bytes/parameter  {min(seconds):6.2f} s/step"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
