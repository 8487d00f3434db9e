"""Limits that a part is compared with, measured on the same machine in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from rating_train.data.decode import decode_square

#: Sides of the square matrices whose product is timed: large enough for each device's best rate.
_CUDA_SIDE, _CPU_SIDE = 8192, 1024


def synchronize(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of ``action``, with all that it starts on the device."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest FLOP/s of a matrix product that the device reached: 2 per multiply-accumulate."""
    side = _CUDA_SIDE if device.type == "cuda" else _CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 1

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    multiply()
    return repeats * 2 * side**3 / min(seconds_of(multiply, device) for _ in range(5))


def decode_rate(images: Sequence[bytes], image_px: int, rounds: int = 3) -> float:
    """Return the stored images that this process decodes in a second, and does nothing else: the median of rounds."""
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        for content in images:
            decode_square(content, image_px, "")
        rates.append(len(images) / (time.perf_counter() - started))
    return statistics.median(rates)
