"""Meters: sums and counts of an interval, nothing carried over, waiting time told from working time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rating_train.training.meters import StepMeter, peak_memory_gib


def test_losses_items_and_cut_tokens_are_summed_over_steps() -> None:
    meter = StepMeter()
    for loss, cut in ((0.5, 3), (0.25, 0), (1.0, 4)):
        meter.add(torch.tensor(loss), 64, cut)
    row = meter.read()
    assert (row["steps"], row["loss_sum"], row["truncated_tokens"]) == (3, 1.75, 7)
    assert row["samples_per_second"] == pytest.approx(192 / row["seconds"])


def test_losses_are_summed_in_float64() -> None:
    meter = StepMeter()
    for _ in range(1000):
        meter.add(torch.tensor(0.1), 1, 0)
    assert meter.read()["loss_sum"] == pytest.approx(1000 * float(torch.tensor(0.1)), rel=1e-12)


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    meter = StepMeter()
    meter.add(torch.tensor(float("nan")), 1, 0)
    meter.add(torch.tensor(1.0), 1, 0)
    assert math.isnan(meter.read()["loss_sum"])


def test_reading_starts_a_new_interval() -> None:
    meter = StepMeter()
    meter.add(torch.tensor(1.0), 8, 2)
    list(meter.timed([1, 2]))
    meter.read()
    row = meter.read()
    assert (row["steps"], row["loss_sum"], row["truncated_tokens"], row["data_wait_seconds"]) == (
        0,
        0.0,
        0,
        0.0,
    )
    assert row["samples_per_second"] == 0 and row["seconds"] < 1


def test_time_waiting_for_batches_is_counted_and_time_at_work_is_not() -> None:
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.05)
            yield i

    meter = StepMeter()
    seen = []
    for item in meter.timed(slow()):
        time.sleep(0.1)
        seen.append(item)
    row = meter.read()
    assert seen == [0, 1, 2]
    assert 0.15 <= row["data_wait_seconds"] < 0.29
    assert row["seconds"] >= 0.45


def test_an_error_of_the_loader_comes_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("item 7")

    with pytest.raises(ValueError, match="item 7"):
        list(StepMeter().timed(broken()))


def test_peak_memory_of_the_cpu_is_that_of_this_process() -> None:
    device = torch.device("cpu")
    before = peak_memory_gib(device)
    block = torch.ones(2**26)  # 256 MiB of float32
    after = peak_memory_gib(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.01 < before <= after < 1000
    assert after >= resident - 0.05 and block.numel() == 2**26
