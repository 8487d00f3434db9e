"""The verb ``train``. One page: put the job together, restore, loop, leave.

::

    restore -> loop { batch; forward, backward per micro-batch; step; record; log? evaluate? save? stop? }

All that changes from step to step is one ``TrainState``; all that a step needs is in one ``Job``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rating_train import assemble, run_dir
from rating_train import log as logs
from rating_train.checkpoint.manager import Checkpointer
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.collectives import on_main, sum_over_ranks
from rating_train.config.load import dump_config
from rating_train.config.resolve import BatchPlan, order_fingerprint_inputs, plan_batch, total_steps
from rating_train.config.schema import Config
from rating_train.data.loader import EvaluationData, TrainingData, open_evaluation, open_training
from rating_train.engine.build import Engine, build_engine
from rating_train.engine.evaluator import evaluate
from rating_train.engine.schedule import lr_factor
from rating_train.errors import UserError
from rating_train.files import append_json_line, atomic_write_json, atomic_write_text
from rating_train.meters import StepMeter, peak_memory_gib
from rating_train.model.regressor import build_regressor
from rating_train.seeding import seed_everything
from rating_train.stop import REQUEUE_REASONS, StopFlag
from rating_train.tracking import Tracker, provenance
from rating_train.world import World

log = logging.getLogger(__name__)

LARGER_IS_BETTER = {"plcc": True, "srcc": True, "rmse": False, "mae": False}


@dataclass(frozen=True)
class Job:
    """Everything that stays the same while training."""

    config: Config
    run: Path
    world: World
    plan: BatchPlan
    blueprint: assemble.Blueprint
    data: TrainingData
    eval_data: EvaluationData
    engine: Engine
    checkpointer: Checkpointer
    total_steps: int

    def identity(self, step: int) -> Identity:
        """What a checkpoint of ``step`` is tied to."""
        config = self.config
        return Identity(
            order=order_fingerprint_inputs(config, self.data.manifest["fingerprint"]),
            order_digest=self.data.order_digest(step),
            engine={
                "ranks": self.world.size,
                "zero_stage": config.zero.stage,
                "precision": config.train.precision,
                "freeze": sorted(config.model.freeze),
            },
        )


def train(config: Config, resume: str) -> str:
    """Train to the end, or until asked to stop; returns "finished", "early stop" or the reason to stop.

    Args:
        config: the resolved configuration.
        resume: auto, never, must, or a checkpoint's path (see ``Checkpointer.find``).
    """
    started = time.monotonic()
    run = Path(config.runs_dir) / config.name
    world, device = assemble.join_job(lambda rank: run_dir.rank_log(run, rank))
    on_main(lambda: run_dir.make(run))
    deadline = started + 60 * config.train.time_limit_minutes if config.train.time_limit_minutes else None
    with StopFlag(run / run_dir.STOP_FILE, deadline, world.is_main) as stop:
        job = assemble_job(config, run, world, device)
        state, path = restore(job, resume)
        on_main(lambda: write_provenance(job, path))
        tracker = Tracker(run, state.step, enabled=world.is_main)
        try:
            outcome = loop(job, state, tracker, stop)
        finally:
            tracker.close()
        on_main(lambda: leave_marker(run, state, outcome))
    return outcome


def assemble_job(config: Config, run: Path, world: World, device: torch.device) -> Job:
    """Check everything that can be checked first, then open the data, then build the model and the engine."""
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, world.size)
    seed_everything(config.train.seed, world.rank)
    blueprint = assemble.read_blueprint(config)
    prompt = blueprint.prompt
    data = open_training(config.data, prompt, world, plan.global_items, plan.rank_items)
    eval_items = config.eval.micro_items or plan.micro_items
    eval_data = open_evaluation(
        config.data, prompt, world, config.data.eval_split, eval_items, config.eval.max_items
    )
    model = build_regressor(
        config.model,
        blueprint.architecture,
        config.data.image_px,
        prompt.layout.image_start,
        config.train.seed,
    )
    engine = build_engine(model, config, plan, device)
    checkpointer = Checkpointer(
        run / run_dir.CHECKPOINTS_DIR, world, config.train.keep_last, config.train.keep_every_steps
    )
    steps = total_steps(config, data.samples)
    log.info(
        "%d items, %d steps of %d = %d ranks x %d x %d accumulation; evaluating %d items",
        data.samples, steps, plan.global_items, plan.ranks, plan.micro_items, plan.accumulation, eval_data.samples,
    )  # fmt: skip
    return Job(config, run, world, plan, blueprint, data, eval_data, engine, checkpointer, steps)


def restore(job: Job, resume: str) -> tuple[TrainState, Path | None]:
    """The state to go on from: the newest checkpoint that verifies, or step 0."""
    path = job.checkpointer.find(resume)
    if path is None:
        log.info("starting at step 0")
        return TrainState(), None
    content = job.checkpointer.read_state(path)
    identity = job.identity(content["train_state"]["step"])
    state = job.checkpointer.restore(job.engine.ds, path, content, identity)
    if content["total_steps"] != job.total_steps:
        log.warning(
            "the run now has %d steps, not %d: the schedule follows", job.total_steps, content["total_steps"]
        )
    log.info("going on from step %d of %d (%s)", state.step, job.total_steps, path)
    return state, path


def loop(job: Job, state: TrainState, tracker: Tracker, stop: StopFlag) -> str:
    """Train from ``state.step`` on; returns why it ended."""
    t = job.config.train
    meter = StepMeter()
    watched = job.world.is_main and logs.on_terminal()
    bar = tqdm(total=job.total_steps, initial=state.step, unit="step", disable=not watched)
    for batch in meter.timed(job.data.batches(state.step, job.total_steps)):
        loss = job.engine.step(batch, state.step, job.total_steps)
        state.record_step(job.plan.global_items, job.engine.step_skipped)
        meter.add(loss, job.plan.global_items, batch.cut_tokens)
        bar.update()
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
        best = False
        if last or (t.eval_every_steps and state.step % t.eval_every_steps == 0):
            best = evaluate_and_record(job, state, tracker)
            meter.reset()  # the next interval's rate is that of training alone
        stopping = stop.agreed() if state.step % t.stop_check_steps == 0 and not last else ""
        exhausted = bool(t.early_stop_evals) and state.evals_since_best >= t.early_stop_evals
        if (
            best
            or last
            or stopping
            or exhausted
            or (t.save_every_steps and state.step % t.save_every_steps == 0)
        ):
            save(job, state, best)
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
        error.__dict__["raised_on_all_ranks"] = True
        raise error


def log_row(job: Job, state: TrainState, meter: StepMeter) -> dict[str, Any]:
    """One line of train.jsonl: means over all ranks and over the steps since the last line."""
    own = meter.read()
    loss_sum, wait, seconds, cut = sum_over_ranks(
        [own["loss_sum"], own["data_wait_seconds"], own["seconds"], own["cut_tokens"]]
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
        "cut_tokens": int(cut),
        "skipped_steps": state.skipped_steps,
    }
    remaining = (job.total_steps - state.step) * seconds / count
    log.info(
        "step %d/%d loss %.4f grad norm %s %.1f items/s, waiting for data %.0f%%, %.0f s left",
        state.step, job.total_steps, loss, row["grad_norm"], own["samples_per_second"], 100 * wait / seconds, remaining,
    )  # fmt: skip
    return row


def evaluate_and_record(job: Job, state: TrainState, tracker: Tracker) -> bool:
    """Evaluate, write the row and the predictions; returns whether it is the best so far."""
    started = time.monotonic()
    split = job.config.data.eval_split
    result = evaluate(job.engine.predict, job.eval_data, run_dir.predictions_file(job.run, split, state.step))
    row = assemble.evaluation_row(
        job.blueprint,
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


def save(job: Job, state: TrainState, best: bool) -> None:
    """Commit a checkpoint of this step."""
    saved = job.checkpointer.save(job.engine.ds, state, job.identity(state.step), job.total_steps, best)
    rate = saved.bytes / 2**20 / max(saved.seconds, 1e-9)
    log.info(
        "saved %s: %.1f MiB in %.2f s (%.0f MiB/s)", saved.path, saved.bytes / 2**20, saved.seconds, rate
    )


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
