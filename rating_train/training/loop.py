"""The verb ``train``. One page: put the job together, restore, loop, leave.

::

    restore -> loop { batch; forward, backward per micro-batch; step; record; log? evaluate? save? stop? }

All that changes from step to step is one ``TrainState``; all that a step needs is in one ``Job``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rating_train import log as logs
from rating_train import run_dir
from rating_train.checkpoint.manager import Saved, SaveFailed
from rating_train.checkpoint.state import TrainState
from rating_train.config.load import dump_config
from rating_train.config.schedule import lr_factor
from rating_train.config.schema import Config
from rating_train.distributed.collectives import on_main, sum_over_ranks
from rating_train.distributed.world import scheduled_job
from rating_train.errors import UserError
from rating_train.files import append_json_line, atomic_write_json, atomic_write_text
from rating_train.resilience.graceful_stop import REQUEUE_REASONS
from rating_train.resilience.supervisor import Supervisor, supervise
from rating_train.training import setup
from rating_train.training.evaluation import evaluate
from rating_train.training.job import Job, assemble_job, restore
from rating_train.training.meters import StepMeter, peak_memory_gib
from rating_train.training.provenance import provenance
from rating_train.training.tracking import Tracker

log = logging.getLogger(__name__)

LARGER_IS_BETTER = {"plcc": True, "srcc": True, "rmse": False, "mae": False}


def train(config: Config, resume: str) -> str:
    """Train to the end, or until asked to stop; returns "finished", "early stop" or the reason to stop.

    Args:
        config: the resolved configuration.
        resume: auto, never, must, or a checkpoint's path (see ``Checkpointer.find``).
    """
    started = time.monotonic()
    run = Path(config.runs_dir) / config.name
    world, device = setup.join_job(
        lambda rank: run_dir.rank_log(run, rank), config.train.collective_timeout_minutes
    )
    with supervise(run, config.train, world, scheduled_job(), started) as supervisor:
        job = assemble_job(config, run, world, device)
        state, path = restore(job, resume)
        on_main(lambda: write_provenance(job, path))
        tracker = Tracker(run, state.step, enabled=world.is_main)
        try:
            outcome = loop(job, state, tracker, supervisor)
        finally:
            tracker.close()
        supervisor.lock.update(outcome=outcome)
        on_main(lambda: leave_marker(run, state, outcome))
    return outcome


def loop(job: Job, state: TrainState, tracker: Tracker, supervisor: Supervisor) -> str:
    """Train from ``state.step`` on; returns why it ended."""
    t = job.config.train
    meter = StepMeter()
    saver = Saver(job, state, supervisor)
    watched = job.world.is_main and logs.on_terminal()
    bar = tqdm(total=job.total_steps, initial=state.step, unit="step", disable=not watched)
    supervisor.beat("training", state.step, job.total_steps)
    for batch in meter.timed(job.data.batches(state.step, job.total_steps)):
        loss = job.engine.step(batch, state.step, job.total_steps)
        state.record_step(job.plan.global_items, job.engine.step_skipped)
        meter.add(loss, job.plan.global_items, batch.truncated_tokens)
        bar.update()
        supervisor.beat("training", state.step, job.total_steps)
        if t.log_sample_ids:
            append_json_line(
                run_dir.samples_file(job.run, job.world.rank), {"step": state.step, "ids": batch.ids}
            )
        check_skipped(job, state)

        last = state.step == job.total_steps
        if last or state.step % t.log_every_steps == 0:
            row = log_row(job, state, meter)
            tracker.train(row)
            bar.set_postfix(loss=row["loss"], refresh=False)
        best = evaluated = False
        if last or (t.eval_every_steps and state.step % t.eval_every_steps == 0):
            best, evaluated = evaluate_and_record(job, state, tracker, supervisor), True
            meter.reset()  # the next interval's rate is that of training alone
        exhausted = bool(t.early_stop_evals) and state.evals_since_best >= t.early_stop_evals
        saving = (
            last or exhausted or best or bool(t.save_every_steps and state.step % t.save_every_steps == 0)
        )
        saver.finalize_if_done()
        # After an evaluation or a save too: a signal that came meanwhile is honoured right after.
        border = evaluated or saving or state.step % t.stop_check_steps == 0
        stopping = supervisor.agreed_to_stop() if border and not last else ""
        if saving or stopping:
            saver.save(best, final=last or exhausted or bool(stopping))
            meter.reset()
        if last:
            break
        if exhausted:
            log.info("no better %s in %d evaluations", t.select_metric, state.evals_since_best)
            return "early stop"
        if stopping:
            return stopping
    bar.close()
    return "finished"


class Saver:
    """When a save may fail, and what is said of one that did not. Its methods are collectives."""

    def __init__(self, job: Job, state: TrainState, supervisor: Supervisor) -> None:
        self.job, self.state, self.supervisor = job, state, supervisor
        self.failed_in_a_row = 0

    def save(self, best: bool, final: bool) -> None:
        """Begin a checkpoint of this step; a ``final`` one is committed before this returns.

        Raises:
            SaveFailed: a final save, or too many in a row.
        """
        job, state = self.job, self.state
        self.supervisor.beat("saving", state.step, job.total_steps)
        identity = job.identity(state.step)
        self._try(lambda: job.checkpointer.finalize(), final=False)
        self._try(lambda: job.checkpointer.save(job.engine.ds, state, identity, job.total_steps, best), final)
        if final:
            self._try(job.checkpointer.finalize, final)
            job.checkpointer.close()
        self.supervisor.beat("training", state.step, job.total_steps)

    def finalize_if_done(self) -> None:
        """Commit the save under way, if all ranks have written it."""
        self._try(self.job.checkpointer.finalize_if_done, final=False)

    def _try(self, action: Callable[[], Saved | None], final: bool) -> None:
        try:
            saved = action()
        except SaveFailed as e:
            self.failed_in_a_row += 1
            if final or self.failed_in_a_row > self.job.config.train.max_failed_saves:
                raise
            level = (
                logging.ERROR if self.job.world.is_main else logging.INFO
            )  # all say the same: it is shown once
            log.log(level, "%s; training goes on (train.max_failed_saves)", e)
            return
        if saved is not None:
            self.failed_in_a_row = 0
            log.info(
                "saved %s: %.1f MiB; training stood still for %.2f s, the whole took %.2f s",
                saved.path, saved.bytes / 2**20, saved.blocked_seconds, saved.seconds,
            )  # fmt: skip


def check_skipped(job: Job, state: TrainState) -> None:
    """Stop, on all ranks alike, after too many steps in a row without a finite gradient."""
    if not state.skipped_in_a_row:
        return
    log.warning(
        "step %d skipped: its loss or gradient is not finite (%d in all)", state.step, state.skipped_steps
    )
    if state.skipped_in_a_row > job.config.train.max_skipped_steps:
        error = UserError(
            f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite",
            where=f"step {state.step}",
            fix="lower optim.lr.*, raise optim.warmup_fraction or lower optim.clip_norm; "
            "the last checkpoint is intact and `--resume auto` goes on from it",
        )
        error.on_all_ranks = True
        raise error


def log_row(job: Job, state: TrainState, meter: StepMeter) -> dict[str, Any]:
    """One line of train.jsonl: means over all ranks and over the steps since the last line."""
    own = meter.read()
    loss_sum, wait, seconds, cut = sum_over_ranks(
        [own["loss_sum"], own["data_wait_seconds"], own["seconds"], own["truncated_tokens"]]
    )
    count, ranks = own["steps"] * job.world.size, job.world.size
    loss = loss_sum / count
    finite = abs(loss) < float("inf")  # False for NaN too
    factor = lr_factor(state.step - 1, job.total_steps, job.config.optim)
    row = {
        "step": state.step,
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
        "peak_memory_gib": round(peak_memory_gib(job.engine.device), 3),
        "truncated_tokens": int(cut),
        "cut_tokens": int(cut),  # the field's former name, for what reads the logs of older runs
        "skipped_steps": state.skipped_steps,
    }
    remaining = (job.total_steps - state.step) * seconds / count
    log.info(
        "step %d/%d loss %.4f grad norm %s %.1f items/s, waiting for data %.0f%%, %.0f s left",
        state.step, job.total_steps, loss, row["grad_norm"], own["samples_per_second"], 100 * wait / seconds, remaining,
    )  # fmt: skip
    return row


def evaluate_and_record(job: Job, state: TrainState, tracker: Tracker, supervisor: Supervisor) -> bool:
    """Evaluate, write the row and the predictions; returns whether it is the best so far."""
    started = time.monotonic()
    split = job.config.data.eval_split
    result = evaluate(
        job.engine.predict,
        job.eval_data,
        run_dir.predictions_file(job.run, split, state.step),
        lambda _items: supervisor.beat("evaluating", state.step, job.total_steps),
    )
    row = setup.evaluation_row(
        job.inputs,
        result.scores,
        step=state.step,
        split=split,
        source="train",
        seconds=time.monotonic() - started,
    )
    tracker.evaluation(row)
    metric = job.config.train.select_metric
    best = state.record_metric(row[metric], LARGER_IS_BETTER[metric])
    shown = {k: "undefined" if row[k] is None else f"{row[k]:.4f}" for k in ("plcc", "srcc", "rmse", "mae")}
    log.info("evaluation at step %d: %s%s", state.step, shown, " (best)" if best else "")
    return best


def write_provenance(job: Job, resumed_from: Path | None) -> None:
    """config.yaml, provenance.json, and a clean slate for markers. Rank 0."""
    atomic_write_text(job.run / run_dir.CONFIG_FILE, dump_config(job.config))
    facts = provenance(
        ranks=job.world.size,
        nodes=job.world.nodes,
        device=str(job.engine.device),
        data_fingerprint=job.data.manifest["fingerprint"],
        resumed_from=str(resumed_from) if resumed_from else None,
    )
    atomic_write_json(job.run / run_dir.PROVENANCE_FILE, facts)
    (job.run / run_dir.REQUEUE_FILE).unlink(missing_ok=True)
    if job.config.train.log_sample_ids:
        (job.run / run_dir.SAMPLES_DIR).mkdir(exist_ok=True)


def leave_marker(run: Path, state: TrainState, outcome: str) -> None:
    """A run that something else than a person stopped leaves REQUEUE for its launcher. Rank 0."""
    log.info("%s at step %d", outcome, state.step)
    (run / run_dir.STOP_FILE).unlink(missing_ok=True)  # it has been obeyed
    if outcome in REQUEUE_REASONS:
        atomic_write_text(run / run_dir.REQUEUE_FILE, f"{outcome} at step {state.step}\n")
