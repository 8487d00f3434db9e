"""Meters: sums and counts of an interval, nothing carried over, waiting time told from working time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.distributed.gpus import find_gpu
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.cost import count_forward, training_flops
from rating_train.training.meters import (
    StepMeter,
    Work,
    WorkCounter,
    flops_by_length,
    peak_flops,
    peak_memory_gib,
    work_fields,
)


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
    assert 0.15 <= row["data_wait_seconds"] <= row["seconds"] - 0.3, (
        "three waits of 0.05 s, three times 0.1 s of work"
    )


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


def test_the_work_of_a_batch_is_that_of_its_micro_batches() -> None:
    arch = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    counter = WorkCounter(arch, Config(), micro_items=2)
    batch = Batch(
        ids=list("abcd"),
        categories=["c"] * 4,
        images=torch.empty(4, 3, 1, 1, dtype=torch.uint8),
        input_ids=torch.zeros(4, 212, dtype=torch.int64),
        used_tokens=torch.tensor([200, 120, 100, 90]),
        ratings=torch.zeros(4),
        rating_counts=torch.zeros(4),
        truncated_tokens=0,
        lengths=[200, 120, 100, 90],
    )
    work = counter.of(batch)
    assert (work.tokens, work.computed_tokens) == (510, 2 * 208 + 2 * 112)
    one = training_flops(count_forward(arch, 384, 112), [])
    two = training_flops(count_forward(arch, 384, 208), [])
    assert work.computed_flops == pytest.approx(2 * one + 2 * two) and work.flops < work.computed_flops
    fields = work_fields(work + work, seconds=2.0, ranks=2, peak=1e12)
    assert fields["padding_share"] == pytest.approx(1 - 510 / 640, abs=1e-4)
    assert fields["tokens_per_second"] == 510
    assert fields["mfu"] == pytest.approx(work.flops / 2 / 1e12, abs=1e-4)
    assert work_fields(Work(), 0.0, 2, None)["mfu"] is None


def test_a_full_step_at_the_reference_length_is_478_gflop() -> None:
    arch = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    assert flops_by_length(arch, Config())(212) / 1e9 == pytest.approx(478, abs=1)


def test_a_gpu_is_known_by_its_driver_name() -> None:
    found = find_gpu("NVIDIA H200")
    assert found is not None and found.bf16_tflops == 989
    assert find_gpu("NVIDIA A100-SXM4-80GB") is not None and find_gpu("NVIDIA GeForce RTX 4090") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
