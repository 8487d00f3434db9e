"""Where the time of a step goes: forward, backward, reduction, optimizer. Only a benchmark measures it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class StepTimer:
    """Seconds of the parts of steps, on the device's own clock where it is a GPU: nothing is waited for meanwhile.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, float, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what runs in this block under ``name``."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._spans.append((name, started, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the sum of each part since the last reading. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, begin, end in self._spans:
            sums[name] = sums.get(name, 0.0) + end - begin
        for name, started, ended in self._events:
            sums[name] = sums.get(name, 0.0) + started.elapsed_time(ended) / 1000
        self._spans, self._events = [], []
        return sums
