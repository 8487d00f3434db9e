"""The parts of a benchmark: loader, forward pass, step, training. Each is a collective and gives rows on each rank."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rating_train.bench.attention import measure_attention, shapes_of
from rating_train.bench.features import measure_features
from rating_train.bench.limits import decode_rate, matrix_flops, seconds_of, synchronize
from rating_train.bench.memory import family_bytes, memory_rows
from rating_train.bench.result import Row
from rating_train.bench.timeline import measure_timeline
from rating_train.checkpoint.state import TrainState
from rating_train.config.schema import PARTS as SECTIONS
from rating_train.data.collate import Batch
from rating_train.data.samples.streaming_dataset import Request
from rating_train.engine.step_timer import StepTimer
from rating_train.training.job import Job
from rating_train.training.meters import Work, WorkCounter
from rating_train.training.recording import Recorder

#: Steps after the start of DataLoader workers that are not timed. Where workers are forked, the first write to a page
#: of this process copies it, and memory that was given back before is taken again: at full size 1.3 million page
#: faults in the first step, 150,000 in the next two, and 95,000 in each one after them.
_WARM_UP_STEPS = 3
#: What of a step is the model's own work; the rest is spent around it.
_MODEL = ("forward", "backward")


@dataclass
class Bench:
    """A job that is measured.

    Args:
        job: as training assembles it.
        rounds: measurements of each figure, whose median is given.
        steps: optimizer steps (or batches) of a round.
        trace: where the part ``profile`` writes what it saw, if at all.
    """

    job: Job
    rounds: int
    steps: int
    trace: Path | None = None

    def __post_init__(self) -> None:
        job, config = self.job, self.job.config
        self.device = job.engine.device
        self._training = WorkCounter(job.model_inputs.architecture, config, job.plan.micro_items)
        frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze=list(SECTIONS)))
        self._forward = WorkCounter(job.model_inputs.architecture, frozen, job.plan.micro_items)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self._flops: float | None = None

    @property
    def device_flops(self) -> float:
        """FLOP/s of a matrix product in the run's precision on this rank, while the other ranks do the same."""
        if self._flops is None:
            self._flops = matrix_flops(self.device, self.dtype)
        return self._flops

    def batches(self, first: int = 0) -> list[Batch]:
        """Return this rank's batches from step ``first`` on, on the device."""
        with contextlib.closing(self.job.data.batches(first, first + self.steps)) as batches:
            found = [batch.to(self.device) for batch in batches]
        synchronize(self.device)
        return found

    def _work(self, batches: Sequence[Batch], counter: WorkCounter) -> Work:
        """Return the work of batches on this rank."""
        return sum((counter.of(batch) for batch in batches), Work())

    # --- parts

    def loader(self) -> list[Row]:
        """Reading, decoding, tokenizing and collating, against decoding alone."""
        split, items = self.job.data.split, self.job.data.rank_items
        ids = np.arange(min(self.job.data.samples, max(64, items * self.steps)))
        chunks = [ids[i : i + items] for i in range(0, len(ids) // items * items, items)] or [ids]
        samples = split.dataset.__getitems__(Request(np.concatenate(chunks)))
        size_px = split.collator.image_px  # 0: the model reads text alone, and nothing is decoded
        decoding, loading, through, early, late = [], [], [], [], []
        for _ in range(self.rounds):
            if size_px:
                decoding.append(decode_rate([s["image"] for s in samples], size_px, rounds=1))
            started = time.perf_counter()
            for chunk in chunks:
                split.collator(split.dataset.__getitems__(Request(chunk)))
            loading.append(len(samples) / (time.perf_counter() - started))
            rate, memory = self._loaded()
            through.append(rate)
            early.append(memory[0])
            late.append(memory[-1])
        workers = split.config.workers
        found = [
            Row("loader", "one process", statistics.median(loading), "items/s", _spread(loading)),
            Row("loader", f"DataLoader, {workers} workers", statistics.median(through), "items/s", _spread(through)),
        ]  # fmt: skip
        held = memory_rows(early, late)
        if not decoding:
            return [*found, *held]
        ratio = statistics.median(
            a / b for a, b in zip(loading, decoding)
        )  # of rounds: a machine's speed drifts
        limits = (found[0].value / ratio, max(1, workers) * statistics.median(decoding))
        names = ("decoding alone", f"decoding alone, {max(1, workers)} cores")
        limited = [
            dataclasses.replace(row, limit=limit, limit_name=name)
            for row, limit, name in zip(found, limits, names)
        ]
        return [*limited, *held]

    def _loaded(self) -> tuple[float, list[int]]:
        """Return the items that the DataLoader gives in a second, after its first batch, and the memory it takes.

        The memory is that after a tenth of the batches, and at the last one.
        """
        count, memory, looking = 0, [], 0.0
        with contextlib.closing(self.job.data.batches(0, self.steps + 1)) as batches:
            next(batches)
            started = time.perf_counter()
            for number, batch in enumerate(batches, start=1):
                count += len(batch)
                if number in (-(-self.steps // 10), self.steps):
                    looked = time.perf_counter()
                    memory.append(family_bytes())
                    looking += time.perf_counter() - looked
            return count / (time.perf_counter() - started - looking), memory

    @torch.no_grad()
    def forward(self) -> list[Row]:
        """Run forward passes of micro-batches that lie on the device, against the device's rate of matrix products."""
        engine, multiple = self.job.engine, self.job.config.batch.length_multiple_tokens
        micros = [m.cut(multiple) for batch in self.batches() for m in batch.split(self.job.plan.micro_items)]
        engine.ds.eval()

        def run() -> None:
            for micro in micros:
                engine.ds(micro.images, micro.input_ids, micro.used_tokens)

        run()
        seconds = [seconds_of(run, self.device) for _ in range(self.rounds)]
        return self._rows(
            "forward", "forward", seconds, sum(map(len, micros)), self._work(micros, self._forward)
        )

    def step(self) -> list[Row]:
        """Take optimizer steps on batches that lie on the device, against the device's rate of matrix products."""
        batches = self.batches()
        self._take(batches)
        seconds = [seconds_of(lambda: self._take(batches), self.device) for _ in range(self.rounds)]
        rows = self._rows(
            "step", "step", seconds, sum(map(len, batches)), self._work(batches, self._training)
        )
        timer = StepTimer(self.device)
        with self._clocked(timer):
            total = seconds_of(lambda: self._take(batches), self.device)
        return [*rows, *_split("step", timer, total, len(batches))]

    def train(self) -> list[Row]:
        """Train as `rating-train train` does, against the same steps on batches that lie on the device."""
        batches = self.batches(_WARM_UP_STEPS)
        state, resident, trained, waits = TrainState(), [], [], []
        self._take(batches)
        with Recorder(self.job, state) as recorder:
            for _ in range(self.rounds):
                resident.append(seconds_of(lambda: self._take(batches), self.device))
                seconds, wait = self._train(state, recorder)
                trained.append(seconds)
                waits.append(wait)
            pause = self._save(state)
        items, count = sum(map(len, batches)) * self.job.world.size, len(batches)
        ratio = statistics.median(a / b for a, b in zip(resident, trained))
        rate = items / statistics.median(trained)
        rows = [
            Row("train", "framework efficiency", ratio, "of the same steps on the device",
                _spread([a / b for a, b in zip(resident, trained)]), 1.0, "the steps alone"),
            Row("train", "throughput", rate, "items/s", _spread([items / s for s in trained]), rate / ratio,
                "the steps alone"),
            Row("train", "waiting for data", 1000 * statistics.median(waits) / count, "ms/step",
                larger_is_better=False),
        ]  # fmt: skip
        timer = StepTimer(self.device)
        total, _ = self._train(state, None, timer)
        rows += _split("train", timer, total, count)
        rows.append(Row("train", "pause of a save", 1000 * pause, "ms/save", larger_is_better=False))
        return rows

    def features(self) -> list[Row]:
        """Take steps on stored visual tokens, against the same steps on images."""
        return measure_features(self.job, self.batches(), self._take, self.rounds)

    def attention(self) -> list[Row]:
        """Time the attention kernels for a micro-batch of the longest items."""
        job, config = self.job, self.job.config
        architecture, length = job.model_inputs.architecture, job.model_inputs.prompt.layout.length
        items, freeze = job.plan.micro_items, config.model.freeze
        shapes = shapes_of(architecture, config.model_px, length, items, freeze)
        return measure_attention(shapes, self.device, self.dtype, self.rounds)

    def profile(self) -> list[Row]:
        """Profile the steps of a round: what they keep the device busy with, and what it waits for."""
        batches = self.batches()
        return measure_timeline(lambda: self._take(batches), len(batches), self.device, self.trace)

    # --- what they share

    def _take(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.job.engine.step(batch, 0, self.job.total_steps)
        self.job.engine.read_skipped(wait=True)

    def _train(
        self, state: TrainState, recorder: Recorder | None, timer: StepTimer | None = None
    ) -> tuple[float, float]:
        """Train on the same batches from the loader, after a warm-up: (seconds, of them waiting for data)."""
        job, every = self.job, min(self.job.config.train.log_every_steps, self.steps)
        with contextlib.closing(job.data.batches(0, _WARM_UP_STEPS + self.steps)) as batches:
            self._take(list(itertools.islice(batches, _WARM_UP_STEPS)))
            synchronize(self.device)
            if recorder is not None:
                recorder.pause()
            waited, started = 0.0, time.perf_counter()
            with self._clocked(timer):
                while True:
                    asked = time.perf_counter()
                    batch = next(batches, None)
                    waited += time.perf_counter() - asked
                    if batch is None:
                        break
                    loss = job.engine.step(batch, 0, job.total_steps)
                    state.record_step(job.plan.global_items)
                    if recorder is not None:
                        recorder.step(batch, loss)
                        if state.step % every == 0:
                            recorder.log_training()
                job.engine.read_skipped(wait=True)
                synchronize(self.device)
            return time.perf_counter() - started, waited

    @contextlib.contextmanager
    def _clocked(self, timer: StepTimer | None) -> Iterator[None]:
        """Have a clock around each part of a step."""
        self.job.engine.timer = timer
        try:
            yield
        finally:
            self.job.engine.timer = None

    def _save(self, state: TrainState) -> float:
        """Return how long training pauses for a checkpoint that is written in the background."""
        job = self.job
        started = time.perf_counter()
        job.checkpointer.save(job.engine.ds, state, job.identity(state.step), job.total_steps)
        pause = time.perf_counter() - started
        job.checkpointer.finalize()
        return pause

    def _rows(self, part: str, name: str, seconds: list[float], items: int, work: Work) -> list[Row]:
        """Return items/s and the model's FLOP/s of ``items`` on this rank."""
        median = statistics.median(seconds)
        spread = _spread([items / s for s in seconds])
        rows = [Row(part, f"{name}, one rank", items / median, "items/s", spread)]
        for label, flops in (("real tokens", work.flops), ("with padding", work.computed_flops)):
            rates = [flops / s / 1e12 for s in seconds]
            rows.append(
                Row(part, f"MFU, {label}", statistics.median(rates), "TFLOP/s", _spread(rates),
                    self.device_flops / 1e12, "matrix product")
            )  # fmt: skip
        padding = 1 - work.tokens / work.computed_tokens
        return [*rows, Row(part, "padding", 100 * padding, "% of computed tokens", larger_is_better=None)]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _split(part: str, timer: StepTimer, total: float, steps: int) -> list[Row]:
    """Return what a step's time was spent on, in a round of ``total`` seconds with a clock around each part."""
    found = timer.seconds()
    found["outside forward and backward"] = total - sum(found.get(name, 0.0) for name in _MODEL)
    return [
        Row(part, name, 1000 * seconds / steps, "ms/step", limit=1000 * total / steps, limit_name="of the step",
            larger_is_better=False if name != "outside forward and backward" else None)
        for name, seconds in found.items()
    ]  # fmt: skip
