"""Training, on one page: put the job together, restore, loop, leave.

::

    restore -> loop { batch; forward, backward per micro-batch; step; record; log? save? evaluate? stop? } -> save

With ``stages`` the loop runs once for each phase, each time with another engine. All that changes from step to step is
one ``TrainState``; all that a step needs is in one ``Job``. What is written down is in recording.py, when and how it
is saved in saver.py.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rating_train import log as logs
from rating_train import run_dir
from rating_train.checkpoint.state import TrainState
from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.distributed.collectives import on_main
from rating_train.distributed.world import scheduled_job
from rating_train.errors import UserError
from rating_train.files import make_folder, remove
from rating_train.resilience.graceful_stop import Stopped
from rating_train.resilience.supervisor import Supervisor, leave_markers, supervise
from rating_train.shards.task import with_task_of_data
from rating_train.training import setup
from rating_train.training.checks import (
    check_job,
    custom_loss_of_all,
    make_run_folder,
    warn_of_missing_cores,
)
from rating_train.training.evaluation import evaluate
from rating_train.training.job import (
    Job,
    assemble_job,
    check_features,
    enter_next_phase,
    open_checkpoints,
    restore,
)
from rating_train.training.provenance import record_start
from rating_train.training.recording import Recorder
from rating_train.training.saver import Saver

log = logging.getLogger(__name__)

FINISHED, EARLY_STOP = "finished", "early stop"


def train(config: Config, resume: str) -> str:
    """Train to the end, or until asked to stop.

    Args:
        config: the resolved configuration.
        resume: auto, never, must, or a checkpoint's path (see ``Checkpointer.find``).

    Returns:
        "finished", "early stop", or the reason to stop.
    """
    started = time.monotonic()
    run = Path(config.runs_dir) / config.name
    world, device = setup.join_job(config.train.collective_timeout_minutes, config.train.device)
    own = config
    config = on_main(lambda: with_task_of_data(own))
    on_main(lambda: check_job(config, run, resume, world, device))
    custom_loss = custom_loss_of_all(config)
    on_main(lambda: make_run_folder(run))
    logs.set_up(world.rank, run_dir.rank_log(run, world.rank))
    warn_of_missing_cores(config, world)
    with supervise(run, config.train, world, scheduled_job(), started) as supervisor:
        checkpointer = open_checkpoints(config, run, world)
        path = checkpointer.find(resume)
        job = assemble_job(config, run, world, device, checkpointer, path, custom_loss)
        state = restore(job, path)
        check_features(job)
        on_main(lambda: record(job, state, path))
        warm_up(job, state, supervisor)
        with Recorder(job, state) as recorder:
            outcome = loop(job, state, recorder, supervisor)
        supervisor.lock.update(outcome=outcome)
        on_main(lambda: leave_markers(run, outcome, state.step))
        on_main(lambda: recorder.summary(outcome, time.monotonic() - started))
    return outcome


def warm_up(job: Job, state: TrainState, supervisor: Supervisor) -> None:
    """Compile before anything is measured, and tell the watchdog of each graph."""
    started = time.monotonic()

    job.engine.warm_up(
        lambda length: supervisor.beat(f"compiling for {length} tokens", state.step, job.total_steps)
    )
    if job.config.train.compile != "none":
        log.info("compiled for %d lengths in %.0f s", len(job.engine.lengths), time.monotonic() - started)


def record(job: Job, state: TrainState, resumed_from: Path | None) -> None:
    """Write down what starts, and remove what the attempt before left for its launcher. Rank 0."""
    record_start(
        job.run,
        job.config,
        state.step,
        resumed_from,
        job.custom_loss.facts() if job.custom_loss else None,
        job.warm_start,
        ranks=job.world.size,
        nodes=job.world.nodes,
        device=str(job.engine.device),
        data_fingerprint=", ".join(job.data.fingerprints),
        data_sources=job.data_sources(),
    )
    remove(job.run / run_dir.REQUEUE_FILE)
    if job.config.train.log_sample_ids:
        make_folder(job.run / run_dir.SAMPLES_DIR)


def loop(job: Job, state: TrainState, recorder: Recorder, supervisor: Supervisor) -> str:
    """Train from ``state.step`` on; returns why it ended, with that step on disk."""
    saver = Saver(job, state, supervisor)
    supervisor.beat("training", state.step, job.total_steps)
    outcome = catch_up(job, state, recorder, saver, supervisor)
    if not outcome:
        outcome = train_phase(job, state, recorder, saver, supervisor)
    while not outcome and not job.phase.is_last:
        next_phase(job, state, recorder, saver, supervisor)
        outcome = train_phase(job, state, recorder, saver, supervisor)
    record_skips(job, state, wait=True)
    saver.finish()
    return outcome or FINISHED


def train_phase(job: Job, state: TrainState, recorder: Recorder, saver: Saver, supervisor: Supervisor) -> str:
    """Train to the end of the phase; returns why to stop before that, or ""."""
    for batch in recorder.timed(job.data.batches(state.step, job.phase.last_step)):
        outcome = take_step(batch, job, state, recorder, supervisor)
        outcome = outcome or boundary(job, state, recorder, saver, supervisor)
        if outcome:
            return outcome
    return ""


def next_phase(job: Job, state: TrainState, recorder: Recorder, saver: Saver, supervisor: Supervisor) -> None:
    """Enter the next phase of a run with ``stages``, once the end of this one is on disk."""
    saver.settle()
    supervisor.beat("building the engine of the next phase", state.step, job.total_steps)
    enter_next_phase(job, state)
    warm_up(job, state, supervisor)
    recorder.enter_phase()
    supervisor.beat("training", state.step, job.total_steps)


def take_step(batch: Batch, job: Job, state: TrainState, recorder: Recorder, supervisor: Supervisor) -> str:
    """Train on one global batch; returns why to stop, where the first step of an attempt was cut short, or ""."""
    try:
        before_micro = None if recorder.steps else supervisor.stop_if_urgent
        loss = job.engine.step(batch, state.step, job.phase.last_step, before_micro)
    except Stopped as e:  # the weights are those of the step before, which is on disk
        return str(e)
    state.record_step(job.plan.global_items)
    recorder.step(batch, loss)
    supervisor.first_step_done()
    supervisor.beat("training", state.step, job.total_steps)
    record_skips(job, state, wait=False)
    return ""


def boundary(job: Job, state: TrainState, recorder: Recorder, saver: Saver, supervisor: Supervisor) -> str:
    """Do what is due between two steps: log, save, evaluate; returns why to stop, or ""."""
    t, last = job.config.train, state.step == job.phase.last_step

    def due(every_steps: int) -> bool:
        return bool(every_steps) and state.step % every_steps == 0

    logged, saving = last or due(t.log_every_steps), last or due(t.save_every_steps)
    state.evaluation_due = evaluated = last or due(t.eval_every_steps)
    if logged or saving or evaluated:
        record_skips(job, state, wait=True)
    if logged:
        recorder.log_training()
    saver.finalize_if_done()
    if saving:  # before an evaluation, which may take long, or be cut short
        saver.save()
    if evaluated and (outcome := evaluate_step(job, state, recorder, saver, supervisor)):
        return outcome
    if saving or evaluated:
        recorder.pause()  # the next interval's rate is that of training alone
    # After an evaluation or a save too: a signal that came meanwhile is honoured right after.
    if state.step < job.total_steps and (saving or evaluated or due(t.stop_check_steps)):
        return supervisor.agreed_to_stop()
    return ""


def evaluate_step(
    job: Job, state: TrainState, recorder: Recorder, saver: Saver, supervisor: Supervisor
) -> str:
    """Evaluate, record, and keep the weights if they are the best; returns why to stop, or ""."""
    started, split = time.monotonic(), job.config.data.eval_split
    file = run_dir.predictions_file(job.run, split, state.step)

    def before_batch() -> None:
        supervisor.beat("evaluating", state.step, job.total_steps)
        saver.finalize_if_done()  # what was saved before is safe from now on, also from a kill
        supervisor.stop_if_agreed()

    try:
        result = evaluate(job.engine.predict, job.eval_data, file, job.world, before_batch)
    except Stopped as e:
        log.info("the evaluation at step %d is abandoned (%s); a resumed run repeats it", state.step, e)
        return str(e)
    value = recorder.evaluation(result, time.monotonic() - started)
    saver.keep_if_best(value)
    return early_stop(job, state)


def catch_up(job: Job, state: TrainState, recorder: Recorder, saver: Saver, supervisor: Supervisor) -> str:
    """Do what an earlier attempt left undone at the step that it saved; returns why to stop, or ""."""
    wanted = state.step == job.phase.last_step or job.config.train.eval_every_steps
    if state.evaluation_due and wanted:
        row = recorder.replay_evaluation()
        if row is None:
            return evaluate_step(job, state, recorder, saver, supervisor)
        saver.keep_if_best(row[job.config.train.select_metric])
    return early_stop(job, state)


def early_stop(job: Job, state: TrainState) -> str:
    """Return "early stop" after too many evaluations of the last phase without a better metric, else ""."""
    t = job.config.train
    if not t.early_stop_evals or not job.phase.is_last or state.evals_since_best < t.early_stop_evals:
        return ""
    log.info("no better %s in %d evaluations", t.select_metric, state.evals_since_best)
    return EARLY_STOP


def record_skips(job: Job, state: TrainState, wait: bool) -> None:
    """Take into the state which steps were skipped for want of a finite gradient; give up after too many in a row.

    Args:
        job: the job.
        state: what to record it in.
        wait: whether to wait for the device where it alone knows: when logging or saving, not in every step.

    Raises:
        UserError: more than ``train.max_skipped_steps`` in a row; on all ranks alike.
    """
    flags = job.engine.read_skipped(wait)
    for step, skipped in enumerate(flags, state.step - len(flags) + 1):
        state.record_skip(skipped)
        if skipped:
            log.warning(
                "step %d skipped: its loss or gradient is not finite (%d skipped so far)",
                step,
                state.skipped_steps,
            )
        if state.skipped_in_a_row > job.config.train.max_skipped_steps:
            raise UserError(
                f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite",
                where=f"step {step}",
                fix="lower optim.lr.*, raise optim.warmup_fraction or lower optim.clip_norm; "
                "the last checkpoint is intact, and `--resume auto` resumes from it",
                on_all_ranks=True,
            )
