"""What a run says about itself: rows of train.jsonl and eval.jsonl, for trackers too, and lines for people."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rating_train import log as logs
from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.state import TrainState
from rating_train.data.collate import Batch
from rating_train.distributed.collectives import on_main, sum_over_ranks
from rating_train.errors import UserError
from rating_train.files import file_size, read_json, read_json_lines, retry
from rating_train.log import duration, number
from rating_train.row_files import RowFiles
from rating_train.training.evaluation import Evaluation
from rating_train.training.job import Job
from rating_train.training.lines import evaluation_lines, step_line
from rating_train.training.meters import (
    StepMeter,
    Work,
    WorkCounter,
    peak_flops,
    peak_memory_gib,
    work_fields,
)
from rating_train.training.setup import evaluation_row
from rating_train.training.tracking import Tracker

log = logging.getLogger(__name__)


class Recorder:
    """Measures a run and writes down what it measured. On every rank; rank 0 writes.

    Args:
        job: the job.
        state: where it starts; rows of later steps, left by an earlier attempt, are dropped.
    """

    def __init__(self, job: Job, state: TrainState) -> None:
        self._job, self._state = job, state
        self._tracker = Tracker(job.run, state.step, job.world.is_main, job.config)
        self._sample_rows = RowFiles()
        self._meter = StepMeter()
        self._counter = self._work_counter()
        self._evaluations = self._earlier(state.step) if job.world.is_main else []
        self._left_seconds: float | None = None
        #: Steps of this attempt.
        self.steps = 0
        watched = job.world.is_main and logs.on_terminal()
        self._bar = tqdm(total=job.total_steps, initial=state.step, unit="step", disable=not watched)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()
        self._sample_rows.close()
        self._tracker.close()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and count the time spent waiting for them."""
        return self._meter.timed(batches)

    def enter_phase(self) -> None:
        """Count the work of the phase that begins: what is frozen takes less of it."""
        self._counter = self._work_counter()
        self.pause()

    def _work_counter(self) -> WorkCounter:
        job = self._job
        return WorkCounter(job.model_inputs.architecture, job.phase.config, job.plan.micro_items)

    def pause(self) -> None:
        """Leave out of the step times what was done since the last step: a save, an evaluation."""
        self._meter.reset()

    def step(self, batch: Batch, loss: Tensor) -> None:
        """Count one step. Does not wait for the device."""
        job = self._job
        self.steps += 1
        work = self._counter.of(batch)
        self._meter.add(loss, job.plan.global_items, batch.truncated_tokens, work)
        self._bar.update()
        if job.config.train.log_sample_ids:
            file = run_dir.samples_file(job.run, job.world.rank)
            self._sample_rows.append(file, {"step": self._state.step, "ids": batch.ids_as_read()})

    def log_training(self) -> None:
        """Write a row of train.jsonl: means over all ranks and over the steps since the last row. A collective."""
        job, state = self._job, self._state
        row = training_row(job, state, self._meter)
        self._tracker.train(row)
        self._bar.set_postfix(loss=number(row["loss"]), refresh=False)
        self._left_seconds = (job.total_steps - state.step) * row["step_seconds"]
        log.info("%s", step_line(row, job.total_steps))

    def evaluation(self, result: Evaluation, seconds: float) -> float | None:
        """Write a row of eval.jsonl, and take its metric into the state; returns the metric."""
        job, state = self._job, self._state
        row = evaluation_row(
            job.model_inputs,
            result.scores,
            step=state.step,
            split=job.config.data.eval_split,
            source="train",
            seconds=seconds,
            lengths=result.lengths,
        )
        self._tracker.evaluation(row)
        metric = job.config.train.select_metric
        value: float | None = row[metric]
        state.record_metric(value, job.larger_is_better)
        if job.world.is_main:
            told = evaluation_lines(row, self._evaluations, metric, seconds, self._left_seconds)
            log.info("%s", told)
            self._evaluations.append(row)
        return value

    def replay_evaluation(self) -> dict[str, Any] | None:
        """Find this step's row in eval.jsonl and take its metric into the state; ``None`` where there is none.

        A checkpoint may be older than the evaluation of its own step, for a save comes first. A collective.
        """
        step, split = self._state.step, self._job.config.data.eval_split
        row = on_main(lambda: self._find_row(step, split))
        if row is not None:
            self._state.record_metric(row[self._job.config.train.select_metric], self._job.larger_is_better)
        return row

    def _earlier(self, step: int) -> list[dict[str, Any]]:
        """Return the rows of this run's evaluations before a step, for the best so far; none if they cannot be read."""
        file, split = self._job.run / run_dir.EVAL_LOG, self._job.config.data.eval_split
        try:
            rows = list(read_json_lines(file)) if file_size(file) is not None else []
        except (OSError, UserError):
            return []
        own = [r for r in rows if r.get("source") == "train" and r.get("split") == split]
        return [r for r in own if isinstance(r.get("step"), int) and r["step"] <= step]

    def _find_row(self, step: int, split: str) -> dict[str, Any] | None:
        file = self._job.run / run_dir.EVAL_LOG
        if not store.is_committed(self._job.checkpointer.root, step) or file_size(file) is None:
            return None  # the checkpoint is that of another run, and so its evaluation is not in this file
        found = retry(lambda: list(read_json_lines(file)), file)
        rows = [r for r in found if (r.get("step"), r.get("split")) == (step, split)]
        return next((r for r in rows if r.get("source") == "train"), None)

    def summary(self, outcome: str, seconds: float) -> None:
        """Say how the run ended, where its results are, and what to run next. Rank 0."""
        job, state = self._job, self._state
        lines = [f"{outcome} at step {state.step} of {job.total_steps}, after {duration(seconds)}"]
        try:
            lines += self._results()
        except OSError as e:  # all is saved: no reason to fail
            lines.append(f"  results            cannot be listed now ({e}): see {job.run}")
        if outcome in ("finished", "early stop"):
            lines.append(
                f"  next               rating-train evaluate {job.run} && rating-train report {job.run}"
            )
        else:
            lines.append("  next               the same command resumes the run at this step")
        log.info("\n".join(lines))

    def _results(self) -> list[str]:
        job, state, lines = self._job, self._state, []
        root, run = job.checkpointer.root, job.run
        best, latest = (store.pointed_step(root, name) for name in (store.BEST, store.LATEST))
        if best is not None:
            content = read_json(root / store.BEST)
            metric = content.get("metric", job.config.train.select_metric).upper()
            lines.append(
                f"  best checkpoint    {root / store.step_name(best)} ({metric} {number(content['value'])})"
            )
        if latest is not None:
            lines.append(f"  latest checkpoint  {root / store.step_name(latest)}")
        predictions = run_dir.predictions_file(run, job.config.data.eval_split, state.step)
        if file_size(predictions) is not None:
            lines.append(f"  predictions        {predictions}")
        lines.append(f"  metrics            {run / run_dir.TRAIN_LOG}, {run / run_dir.EVAL_LOG}")
        page = run / run_dir.REPORT_DIR / "index.html"
        made = "" if file_size(page) is not None else " (after `rating-train report`)"
        return [*lines, f"  report             {page}{made}"]


def training_row(job: Job, state: TrainState, meter: StepMeter) -> dict[str, Any]:
    """Return one row of train.jsonl. A collective; waits for the device, and starts a new interval of the meter."""
    own = meter.read()
    summed = ("loss_sum", "data_wait_seconds", "seconds", "truncated_tokens")
    counted = tuple(field.name for field in dataclasses.fields(Work))
    loss_sum, wait, seconds, truncated, *work = sum_over_ranks([own[name] for name in (*summed, *counted)])
    count, ranks = own["steps"] * job.world.size, job.world.size
    loss = loss_sum / count
    peak = peak_flops(job.engine.device, job.config.train.precision)
    finite = abs(loss) < float("inf")  # False for NaN too
    factor = job.engine.lr_factor
    return {
        "step": state.step,
        **({"phase": job.phase.number} if job.phase.count else {}),
        "epoch": round(state.samples / job.data.samples, 6),
        "samples": state.samples,
        "loss": loss if finite else None,
        "lr": max(g.peak_lr for g in job.engine.groups) * factor,
        "lr_factor": factor,
        "grad_norm": job.engine.grad_norm,  # of the last step, before clipping; None where it is not finite
        "samples_per_second": round(own["samples_per_second"], 3),
        "step_seconds": round(seconds / count, 6),
        "data_wait_seconds": round(wait / ranks, 6),
        "data_wait_fraction": round(wait / seconds, 4) if seconds else None,
        **work_fields(Work(int(work[0]), int(work[1]), *work[2:]), seconds / ranks, ranks, peak),
        "peak_memory_gib": round(peak_memory_gib(job.engine.device), 3),
        "truncated_tokens": int(truncated),
        "cut_tokens": int(truncated),  # the field's former name, for what reads the logs of older runs
        "skipped_steps": state.skipped_steps,
    }
