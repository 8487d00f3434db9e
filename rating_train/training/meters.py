"""Where a step's time goes, measured without waiting for the device at every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class StepMeter:
    """Sums over the steps since the last reading.

    Losses stay on the device until :meth:`read`, which is the only place that waits for it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval now."""
        self._losses: list[Tensor] = []
        self._items = 0
        self._wait_seconds = 0.0
        self._truncated_tokens = 0
        self._started = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time spent waiting for each added up."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._wait_seconds += time.perf_counter() - before
            yield batch

    def add(self, loss: Tensor, global_items: int, truncated_tokens: int) -> None:
        """One step: its loss on the device (not read here) and its items over all ranks."""
        self._losses.append(loss)
        self._items += global_items
        self._truncated_tokens += truncated_tokens

    def read(self) -> dict[str, float]:
        """This rank's numbers since the last reading; starts a new interval.

        ``loss_sum`` and ``steps`` are a sum and a count, to be added over ranks; seconds are wall-clock.
        """
        steps = len(self._losses)
        loss_sum = float(torch.stack(self._losses).double().sum()) if steps else 0.0
        seconds = time.perf_counter() - self._started
        result = {
            "steps": steps,
            "loss_sum": loss_sum,
            "seconds": seconds,
            "samples_per_second": self._items / seconds if seconds > 0 else 0.0,
            "data_wait_seconds": self._wait_seconds,
            "truncated_tokens": self._truncated_tokens,
        }
        self.reset()
        return result


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, in GiB: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
