"""A training job, assembled: everything that stays the same while a phase trains, and the state that it starts from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rating_train import run_dir
from rating_train.checkpoint.manager import Checkpointer
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.config.phases import Phase, phase_after, phases
from rating_train.config.resolve import (
    BatchPlan,
    order_fingerprint_inputs,
    plan_batch,
    source_shares,
)
from rating_train.config.schema import PARTS, Config, ModelConfig
from rating_train.data.features.identity import features_dtype, refuse_other_weights
from rating_train.data.lengths import possible_lengths
from rating_train.data.loader import EvaluationData, TrainingData, open_evaluation, open_training
from rating_train.data.prompt import PromptEncoder
from rating_train.distributed.collectives import on_main
from rating_train.distributed.seeding import seed_everything
from rating_train.distributed.world import World
from rating_train.engine.engine import Engine, build_engine
from rating_train.engine.handover import complete_weights, release, start_from
from rating_train.model.custom_loss import CustomLoss
from rating_train.model.regressor import RatingRegressor, build_regressor
from rating_train.scoring.metrics import LARGER_IS_BETTER
from rating_train.shards.task import check_manifests
from rating_train.training import setup
from rating_train.training.checks import check_batch_fits
from rating_train.weights.fingerprint import tower_fingerprint
from rating_train.weights.warm_start import find_source, warm_start

log = logging.getLogger(__name__)


@dataclass
class Job:
    """Everything that stays the same while training; with ``stages``, engine and phase change at their boundaries."""

    config: Config
    run: Path
    world: World
    plan: BatchPlan
    model_inputs: setup.ModelInputs
    data: TrainingData
    eval_data: EvaluationData
    engine: Engine
    checkpointer: Checkpointer
    phases: list[Phase]
    phase: Phase  # the one that the engine trains
    custom_loss: CustomLoss | None = None
    warm_start: dict[str, Any] | None = None  # facts of the weights that another run gave to this start

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.phases[-1].last_step

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger ``train.select_metric`` is a better one."""
        return LARGER_IS_BETTER[self.config.train.select_metric]

    def data_sources(self) -> list[dict[str, Any]]:
        """Return what provenance.json says of each dataset to train on."""
        data = self.config.data
        return [
            {"path": source.path, "remote": source.remote, "share": str(share)}
            | {"items": manifest["splits"][data.train_split]["items"], "fingerprint": manifest["fingerprint"]}
            for source, share, manifest in zip(
                data.train_sources, source_shares(data.train_sources), self.data.manifests, strict=True
            )
        ]

    def identity(self, step: int) -> Identity:
        """Return what a checkpoint of ``step`` is tied to."""
        config = self.config
        return Identity(
            order=order_fingerprint_inputs(config, self.data.fingerprints),
            order_digest=self.data.order_digest(step),
            engine={
                "precision": config.train.precision,
                "freeze": sorted(self.phase.config.model.freeze),
                "optimizer": config.optim.kind,
                **self.phase.identity(),
            },
            topology={"ranks": self.world.size, "zero_stage": config.zero.stage},
        )


def open_checkpoints(config: Config, run: Path, world: World) -> Checkpointer:
    """Return what reads and writes the checkpoints of a run."""
    t = config.train
    return Checkpointer(
        run / run_dir.CHECKPOINTS_DIR, world, t.keep_last, t.keep_every_steps, t.background_save
    )


def assemble_job(
    config: Config,
    run: Path,
    world: World,
    device: torch.device,
    checkpointer: Checkpointer,
    resumed_from: Path | None,
    custom_loss: CustomLoss | None = None,
) -> Job:
    """Open the data, then build the model and the engine. A collective.

    Args:
        config: the resolved configuration.
        run: the run directory.
        world: this process among the ranks.
        device: this rank's device.
        checkpointer: of the run.
        resumed_from: the checkpoint that :func:`restore` loads afterwards. Without one, ``model.init_from`` is loaded.
        custom_loss: a loss of the user's own.
    """
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, world.size)
    seed_everything(config.train.seed, world.rank)
    model_inputs = setup.read_model_inputs(config)
    prompt = model_inputs.prompt
    # Not where the loss depends on an item's neighbours: those should be drawn at random.
    by_length = config.batch.length_multiple_tokens > 0 and plan.accumulation > 1
    by_length = by_length and not config.loss.couples_items
    data = open_training(config.data, prompt, world, plan.global_items, plan.rank_items, device, by_length)
    check_batch_fits(
        plan.global_items, data.samples, config.data.train_split
    )  # of a remote dataset, only now
    eval_items = config.eval.micro_items or plan.micro_items
    eval_data = open_evaluation(
        config.data, prompt, world, config.data.eval_split, eval_items, config.eval.max_items, device
    )
    check_manifests(config, dict(zip((s.path for s in config.data.train_sources), data.manifests)))
    all_phases = phases(config, data.samples)
    done = checkpointer.read_state(resumed_from)["train_state"]["step"] if resumed_from is not None else 0
    phase = phase_after(all_phases, done)
    model, warm = build_model(phase.config, model_inputs, fresh=resumed_from is None)
    lengths = _lengths(config, prompt)
    engine = _engine(model, phase, plan, device, custom_loss, lengths)
    log.info(
        "%d items, %d steps of %d = %d ranks x %d x %d accumulation; evaluating %d items",
        data.samples, all_phases[-1].last_step, plan.global_items, plan.ranks, plan.micro_items, plan.accumulation,
        eval_data.samples,
    )  # fmt: skip
    if config.stages is not None:
        log.info("%s", "\n".join(map(str, all_phases)))
    parts = (config, run, world, plan, model_inputs, data, eval_data, engine, checkpointer)
    return Job(*parts, all_phases, phase, custom_loss, warm)


def _lengths(config: Config, prompt: PromptEncoder) -> list[int]:
    """Return the lengths that micro-batches can have, in tokens."""
    shortest = prompt.layout.length - prompt.field_budget  # the template alone
    return possible_lengths(shortest, prompt.layout.length, config.batch.length_multiple_tokens)


def _engine(
    model: RatingRegressor,
    phase: Phase,
    plan: BatchPlan,
    device: torch.device,
    custom_loss: CustomLoss | None,
    lengths: Sequence[int],
) -> Engine:
    """Build the engine of a phase. A collective."""
    function = custom_loss.function if custom_loss else None
    return build_engine(model, phase.config, plan, device, function, lengths, phase.first_step)


def build_model(
    config: Config, inputs: setup.ModelInputs, fresh: bool
) -> tuple[RatingRegressor, dict[str, Any] | None]:
    """Build the model; of a fresh start, with the weights that ``model.init_from`` gives it, and what they were."""
    own, source = config.model, None
    if fresh and own.init_from:
        source = on_main(lambda: find_source(own.init_from))
    if source is not None and set(own.init_parts) >= set(PARTS) - {"head"}:
        own = dataclasses.replace(
            own, weights="random"
        )  # all of them are replaced below: nothing to download
    model = _model(config, own, inputs)
    return model, warm_start(model, source, own.init_parts) if source is not None else None


def _model(config: Config, own: ModelConfig, inputs: setup.ModelInputs) -> RatingRegressor:
    """Build the regressor of a configuration with the section ``own`` in place of its ``model``."""
    start = inputs.prompt.layout.image_start
    return build_regressor(
        own, inputs.architecture, config.model_px, start, config.train.seed, config.task.target
    )


def check_features(job: Job) -> None:
    """Refuse `data.features` that other weights than the job's computed. A collective, after :func:`restore`.

    Raises:
        UserError: on all ranks.
    """
    data = job.config.data
    if data.features:
        dtype = features_dtype(job.config)
        on_main(lambda: refuse_other_weights(data.features, tower_fingerprint(job.engine.model), dtype))


def restore(job: Job, path: Path | None) -> TrainState:
    """Load a checkpoint that ``Checkpointer.find`` found, or start at step 0. A collective."""
    if path is None:
        log.info("starting at step 0")
        return TrainState()
    content = job.checkpointer.read_state(path)
    identity = job.identity(content["train_state"]["step"])
    state = job.checkpointer.restore(job.engine.ds, path, content, identity)
    if content["total_steps"] != job.total_steps:
        log.warning(
            "the run now has %d steps, not %d: the learning rate follows the new total",
            job.total_steps, content["total_steps"],
        )  # fmt: skip
    inside = f", in phase {job.phase.number} of {job.phase.count}" if job.phase.count else ""
    log.info("resuming from step %d of %d%s (%s)", state.step, job.total_steps, inside, path)
    return state


def enter_next_phase(job: Job, state: TrainState) -> None:
    """Train the next phase's parts from here on: the same weights, a new model, engine and optimizer. A collective.

    The weights travel through the host's memory, not through the checkpoint of the boundary: an attempt that resumes
    there comes by here too, with the engine that it restored.
    """
    phase, engine = job.phases[job.phase.number], job.engine
    weights = complete_weights(engine)
    release(engine)
    bare = dataclasses.replace(phase.config.model, weights="random")  # all of them are replaced
    model = _model(phase.config, bare, job.model_inputs)
    model.load_state_dict(weights, strict=True)
    job.engine = _engine(model, phase, job.plan, engine.device, job.custom_loss, engine.lengths)
    start_from(job.engine, weights)
    job.phase = phase
    state.evals_since_best = 0
    log.info("entering %s", phase)
