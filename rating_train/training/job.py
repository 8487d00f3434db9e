"""A training job, assembled: everything that stays the same while it trains, and the state that it starts from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from rating_train import run_dir
from rating_train.checkpoint.manager import Checkpointer
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.config.resolve import BatchPlan, order_fingerprint_inputs, plan_batch, total_steps
from rating_train.config.schema import Config
from rating_train.data.loader import EvaluationData, TrainingData, open_evaluation, open_training
from rating_train.distributed.seeding import seed_everything
from rating_train.distributed.world import World
from rating_train.engine.engine import Engine, build_engine
from rating_train.model.custom_loss import CustomLoss
from rating_train.model.regressor import build_regressor
from rating_train.scoring.metrics import LARGER_IS_BETTER
from rating_train.training import setup
from rating_train.training.checks import check_batch_fits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that stays the same while training."""

    config: Config
    run: Path
    world: World
    plan: BatchPlan
    model_inputs: setup.ModelInputs
    data: TrainingData
    eval_data: EvaluationData
    engine: Engine
    checkpointer: Checkpointer
    total_steps: int
    custom_loss: CustomLoss | None = None

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger ``train.select_metric`` is a better one."""
        return LARGER_IS_BETTER[self.config.train.select_metric]

    def identity(self, step: int) -> Identity:
        """Return what a checkpoint of ``step`` is tied to."""
        config = self.config
        return Identity(
            order=order_fingerprint_inputs(config, self.data.manifest["fingerprint"]),
            order_digest=self.data.order_digest(step),
            engine={"precision": config.train.precision, "freeze": sorted(config.model.freeze)},
            topology={"ranks": self.world.size, "zero_stage": config.zero.stage},
        )


def assemble_job(
    config: Config, run: Path, world: World, device: torch.device, custom_loss: CustomLoss | None = None
) -> Job:
    """Open the data, then build the model and the engine. A collective."""
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, world.size)
    seed_everything(config.train.seed, world.rank)
    model_inputs = setup.read_model_inputs(config)
    prompt = model_inputs.prompt
    data = open_training(config.data, prompt, world, plan.global_items, plan.rank_items)
    check_batch_fits(
        plan.global_items, data.samples, config.data.train_split
    )  # of a remote dataset, only now
    eval_items = config.eval.micro_items or plan.micro_items
    eval_data = open_evaluation(
        config.data, prompt, world, config.data.eval_split, eval_items, config.eval.max_items
    )
    model = build_regressor(
        config.model,
        model_inputs.architecture,
        config.data.image_px,
        prompt.layout.image_start,
        config.train.seed,
    )
    engine = build_engine(model, config, plan, device, custom_loss.function if custom_loss else None)
    checkpointer = Checkpointer(
        run / run_dir.CHECKPOINTS_DIR,
        world,
        config.train.keep_last,
        config.train.keep_every_steps,
        config.train.background_save,
    )
    steps = total_steps(config, data.samples)
    log.info(
        "%d items, %d steps of %d = %d ranks x %d x %d accumulation; evaluating %d items",
        data.samples, steps, plan.global_items, plan.ranks, plan.micro_items, plan.accumulation, eval_data.samples,
    )  # fmt: skip
    return Job(
        config, run, world, plan, model_inputs, data, eval_data, engine, checkpointer, steps, custom_loss
    )


def restore(job: Job, resume: str) -> tuple[TrainState, Path | None]:
    """Load the newest checkpoint that verifies, or start at step 0. A collective.

    Args:
        resume: see ``Checkpointer.find``.

    Returns:
        The state, and the checkpoint that it comes from.
    """
    path = job.checkpointer.find(resume)
    if path is None:
        log.info("starting at step 0")
        return TrainState(), None
    content = job.checkpointer.read_state(path)
    identity = job.identity(content["train_state"]["step"])
    state = job.checkpointer.restore(job.engine.ds, path, content, identity)
    if content["total_steps"] != job.total_steps:
        log.warning(
            "the run now has %d steps, not %d: the learning rate follows the new total",
            job.total_steps, content["total_steps"],
        )  # fmt: skip
    log.info("resuming from step %d of %d (%s)", state.step, job.total_steps, path)
    return state, path
