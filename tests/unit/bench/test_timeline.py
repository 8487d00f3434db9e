"""What a profile says: when the device is busy, what it waits for, and what the host does in a gap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rating_train.bench.timeline import (
    Span,
    busy_us,
    device_rows,
    gaps,
    meanwhile,
    measure_timeline,
    short,
)

# Two steps: kernels overlap on two streams, then the host waits, makes a list, and launches again.
DEVICE = [
    Span("void cutlass::gemm<float, 3>(Params)", 0, 40),
    Span("nccl", 20, 60),
    Span("Memcpy DtoH (Device -> Pageable)", 60, 62),
    Span("void cutlass::gemm<float, 3>(Params)", 162, 200),
    Span("add", 230, 240),
]
HOST = [
    Span("optimizer", 50, 240),
    Span("cudaStreamSynchronize", 60, 130),
    Span("aten::add", 205, 229),
    Span("cudaLaunchKernel", 210, 212),
]


def test_busy_time_counts_what_overlaps_once() -> None:
    assert busy_us(DEVICE) == 62 + 38 + 10
    assert busy_us([]) == 0 and busy_us([Span("a", 5, 9), Span("b", 6, 7)]) == 4


def test_gaps_are_named_by_what_ends_them_and_what_the_host_did() -> None:
    first, second = gaps(reversed(DEVICE))
    assert (first.start, first.end, short(first.name)) == (62, 162, "cutlass::gemm")
    assert (second.start, second.end, second.name) == (200, 230, "add")
    assert meanwhile(first, HOST) == "cudaStreamSynchronize"
    assert meanwhile(second, HOST) == "aten::add", "the launch within it is shorter than half of the gap"
    assert meanwhile(Span("", 300, 400), HOST) == "Python"


def test_rows_are_for_a_step_and_of_what_they_are_compared_with() -> None:
    rows = {row.name: row for row in device_rows(DEVICE, HOST, step_ms=0.1, steps=2)}
    assert rows["the device is busy"].value == pytest.approx(0.055)
    assert rows["the device is busy"].ratio == pytest.approx(0.55)
    assert rows["kernels and copies"].value == 2.5
    assert rows["waits: cudaStreamSynchronize"].value == 0.5
    assert rows["waits: Memcpy DtoH (Device -> Pageable)"].value == 0.5
    gemm = rows["kernel cutlass::gemm"]
    assert gemm.value == pytest.approx(0.039) and gemm.ratio == pytest.approx(39 / 55)
    names = list(rows)
    assert names.index("kernel cutlass::gemm") < names.index("kernel nccl"), "the largest first"
    assert rows["gap before cutlass::gemm, the host in cudaStreamSynchronize"].value == pytest.approx(0.1)


def test_steps_on_a_cpu_are_profiled_and_traced(tmp_path: Path) -> None:
    taken = []

    def take() -> None:
        taken.append(torch.ones(300, 300) @ torch.ones(300, 300))
        torch.ones(3) + 1

    trace = tmp_path / "new" / "trace.json"
    rows = {row.name: row for row in measure_timeline(take, 1, torch.device("cpu"), trace)}
    assert len(taken) == 3
    assert rows["operator aten::mm"].value > 0 and rows["operator aten::mm"].ratio is not None
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"rating_train: steps", "aten::mm"} <= names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void at::native::reduce_kernel<4, at::native::Add>(int)", "at::native::reduce_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("<lambda>", "<lambda>"),
        ("k" * 70, "k" * 57 + "..."),
    ],
)  # fmt: skip
def test_short_names(name: str, expected: str) -> None:
    assert short(name) == expected
