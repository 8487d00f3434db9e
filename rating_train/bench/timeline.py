"""What a step keeps the device busy with, and what the host does while it idles: from a profile by torch.

The profiler slows the host down, not the kernels: what the device is busy with is compared with the time of the same
steps without a profile, and the gaps are those of a slowed host, to be read as where time goes, not how much.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rating_train.bench.limits import seconds_of
from rating_train.bench.result import Row

#: Calls of CUDA in which the host waits for the device.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
_STEPS = "rating_train: steps"  # the profiler's name of what is measured
_SHOWN_KERNELS, _SHOWN_GAPS, _NAME_CHARS = 8, 3, 60


@dataclass(frozen=True)
class Span:
    """A time in which a kernel, an operator or a call ran, in microseconds of one clock."""

    name: str
    start: float
    end: float


def busy_us(spans: Iterable[Span]) -> float:
    """Return the time in which at least one of the spans ran."""
    spans = list(spans)
    whole = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    return whole - sum(gap.end - gap.start for gap in gaps(spans))


def gaps(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the times between the first span and the last in which none ran; a gap has the name of what ends it."""
    end = None
    for span in sorted(spans, key=lambda s: s.start):
        if end is not None and span.start > end:
            yield Span(span.name, end, span.start)
        end = span.end if end is None else max(end, span.end)


def meanwhile(gap: Span, host: Sequence[Span]) -> str:
    """Return what the host did in most of a gap: the innermost operator or call that covers at least half of it."""
    half = (gap.end - gap.start) / 2
    covering = [s for s in host if min(s.end, gap.end) - max(s.start, gap.start) >= half]
    return min(covering, key=lambda s: s.end - s.start).name if covering else "Python"


def device_rows(device: Sequence[Span], host: Sequence[Span], step_ms: float, steps: int) -> list[Row]:
    """Return what the kernels of some steps amount to.

    Args:
        device: kernels and copies.
        host: operators and calls of CUDA.
        step_ms: the time of a step without a profile.
        steps: how many there are.
    """
    busy = busy_us(device) / 1000 / steps
    rows = [
        _row("the device is busy", busy, "ms/step", limit=step_ms, limit_name="of the step"),
        _row("kernels and copies", len(device) / steps, "a step", larger_is_better=False),
    ]
    waits = Counter(s.name for s in host if s.name in WAITS)
    waits.update(s.name for s in device if "DtoH" in s.name)
    rows += [_row(f"waits: {name}", n / steps, "a step", larger_is_better=False) for name, n in waits.items()]
    rows += _largest("kernel", ((s.name, s.end - s.start) for s in device), steps, busy, "of the busy time")
    for gap in sorted(gaps(device), key=lambda s: s.start - s.end)[:_SHOWN_GAPS]:
        name = f"gap before {short(gap.name)}, the host in {short(meanwhile(gap, host))}"
        rows.append(_row(name, (gap.end - gap.start) / 1000, "ms"))
    return rows


def short(name: str) -> str:
    """Return the name of a kernel without its template arguments, and cut where it is still long."""
    name = re.sub(r"^void ", "", name)
    plain = name.split("<", 1)[0].strip() or name
    return plain if len(plain) <= _NAME_CHARS else plain[: _NAME_CHARS - 3] + "..."


def measure_timeline(
    take: Callable[[], None], steps: int, device: torch.device, trace: Path | None = None
) -> list[Row]:
    """Profile some steps.

    Args:
        take: takes them; called three times.
        steps: how many it takes.
        device: of the model.
        trace: where to write what the profiler saw, for Perfetto (ui.perfetto.dev).
    """
    take()
    step_ms = 1000 * seconds_of(take, device) / steps
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def marked() -> None:
        with record_function(_STEPS):
            take()

    with profile(activities=kinds) as found:
        seconds_of(marked, device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    events: list[Any] = list(found.events())
    window = next(e.time_range for e in events if e.name == _STEPS and e.device_type == DeviceType.CPU)
    on_host = [
        e
        for e in events
        if e.device_type == DeviceType.CPU
        and e.name != _STEPS
        and window.start <= e.time_range.start <= window.end
    ]
    if not cuda:
        own_us = ((e.name, e.self_cpu_time_total) for e in on_host)  # without the operators that it calls
        return _largest("operator", own_us, steps, step_ms, "of the step")
    # The mark has a span of its own on the device.
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and e.name != _STEPS]
    return device_rows(_spans(on_device), _spans(on_host), step_ms, steps)


def _spans(events: Iterable[Any]) -> list[Span]:
    return [Span(e.name, e.time_range.start, e.time_range.end) for e in events]


def _largest(
    what: str, times_us: Iterable[tuple[str, float]], steps: int, limit: float, limit_name: str
) -> list[Row]:
    """Return the names that took the most time, in ms a step."""
    total: Counter[str] = Counter()
    for name, us in times_us:
        total[short(name)] += us / 1000 / steps  # type: ignore[assignment]
    return [
        _row(f"{what} {name}", ms, "ms/step", limit=limit, limit_name=limit_name)
        for name, ms in total.most_common(_SHOWN_KERNELS)
    ]


def _row(name: str, value: float, unit: str, larger_is_better: bool | None = None, **limit: Any) -> Row:
    return Row("profile", name, value, unit, larger_is_better=larger_is_better, **limit)
