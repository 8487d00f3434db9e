"""GPUs by their vendors' data sheets. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        memory_gb: memory in GB.
        bf16_tflops: dense bf16 TFLOP/s with fp32 accumulation.
        link_gb: GB/s to the other GPUs of its node, in one direction: NVLink, or PCIe where it has none.
    """

    memory_gb: int
    bf16_tflops: float
    link_gb: float


GPUS = {
    "l4": Gpu(24, 121, 32),
    "a10": Gpu(24, 125, 32),
    "l40s": Gpu(48, 362, 32),
    "a100": Gpu(80, 312, 300),
    "h100": Gpu(80, 989, 450),
    "h200": Gpu(141, 989, 450),
    "b200": Gpu(180, 2250, 900),
}


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU of a name as the driver tells it ("NVIDIA H200"); ``None`` where the table lacks it."""
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
