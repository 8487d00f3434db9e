"""Which machine, how long: memory, hours, disk, network and cores of a training run, before it is started. No torch.

Counted in closed form: operations, model state, batches. Measured, on the machine of docs/results.md: bytes of a stored
item, CPU time of loading and of preparing one. From the vendors' data sheets: memory and speed of GPUs. Assumed: the
share of that speed that training reaches (MFU). Every line of the report says which of these it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rating_train.config.phases import largest_in_words, phases
from rating_train.config.resolve import plan_batch
from rating_train.config.schema import Config
from rating_train.data.lengths import text_tokens_of
from rating_train.distributed.gpus import GPUS
from rating_train.errors import UserError
from rating_train.log import duration, text_table
from rating_train.model.architecture import Architecture
from rating_train.model.cost import (
    ForwardCost,
    activation_bytes,
    count_parameters,
    feature_bytes,
    largest_phase,
    training_flops,
    training_forward,
    visual_tokens,
)

GIB = 2**30
STAGES = (0, 1, 2, 3)

#: Measured (docs/planning.md has the commands): a stored item at 384 px with its texts; CPU of a DataLoader worker
#: per item at 384 px; images of about 1000 x 1200 that one core of `prepare` makes to squares in a second.
STORED_BYTES, STORED_PX = 26_200, 384
LOAD_CPU_SECONDS = 0.00134
PREPARED_PER_CORE_SECOND = 159
STORED_WORDS = "measured at 384 px"
ASSUMED_MFU = (0.2, 0.3, 0.4)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the model's state on one GPU between two steps."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(trained: int, frozen: int, stage: int, ranks: int, bf16: bool = True) -> StateBytes:
    """Count the model's state on one GPU: weights, fp32 gradients, fp32 master weights and AdamW's two moments.

    Stage 0 keeps fp32 weights (its bf16 is autocast), which are the master weights. Stages 0 and 1 keep all gradients.
    What stage 3 gathers for a layer is not counted, nor are communication buckets.
    """
    width = 2 if bf16 else 4
    if stage == 0:
        return StateBytes(4 * (trained + frozen), 4 * trained, 8 * trained)
    weights = width * (trained + frozen) / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (1 if stage == 1 else ranks)
    return StateBytes(weights, gradients, 12 * trained / ranks)


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        items: of the training split.
        gpus: number of GPUs.
        gpu: its name in :data:`GPUS`.
        epochs: passes over the items.
        steps: optimizer steps.
        rank_items: items of a step on one GPU.
        flops: of training on one item; with ``stages`` the mean over all steps, where all else is of the phase that
            trains most.
        state: ZeRO stage -> bytes of the model's state on one GPU.
        item_bytes: what one item of a micro-batch keeps for the backward pass, at least.
        trained: trained parameters.
        frozen: frozen parameters.
        stored_bytes: of one item in a shard that training reads.
        stored: what they are, in words.
        phase: which one is meant by "the phase that trains most", as a sentence; "" without ``stages``.
        gpu_rate: (MFU or 0.0 where the rate was given, items/s of one GPU), one or several.
    """

    items: int
    gpus: int
    gpu: str
    epochs: float
    steps: int
    global_items: int
    rank_items: int
    flops: float
    state: dict[int, StateBytes]
    item_bytes: int
    trained: int
    frozen: int
    stored_bytes: float
    gpu_rate: list[tuple[float, float]]
    stored: str
    phase: str = ""

    def seconds(self, rate: float) -> float:
        """Return the time of all steps at ``rate`` items/s of one GPU, without start-up, evaluations and saves."""
        return self.steps * self.global_items / (rate * self.gpus)


def make_plan(
    config: Config,
    arch: Architecture,
    items: int,
    gpus: int,
    gpu: str,
    mfu: float | None = None,
    rate: float | None = None,
) -> Plan:
    """Compute the plan of a configuration.

    Args:
        config: the configuration; its batch must divide over the GPUs.
        arch: the backbone and its head.
        items: of the training split.
        gpus: number of GPUs.
        gpu: a name in :data:`GPUS`.
        mfu: share of the GPU's speed that training reaches; ``None`` takes :data:`ASSUMED_MFU`.
        rate: measured items/s of one GPU, in place of the MFU.

    Raises:
        UserError: an unknown GPU, numbers out of bounds, a batch that does not divide.
    """
    _check(items, gpus, gpu, mfu, rate)
    visual = visual_tokens(arch, config.model_px)
    tokens = visual + text_tokens_of(config)
    batch = plan_batch(config.batch.global_items, config.batch.micro_items, gpus)
    counts = count_parameters(arch, config.model_px)
    largest = largest_phase(config, arch)
    frozen = sum(counts[part] for part in largest.model.freeze)
    trained = counts["total"] - frozen
    bf16 = config.train.precision == "bf16"
    steps, flops = _steps_and_flops(config, items, training_forward(config, arch, tokens))
    speed = GPUS[gpu].bf16_tflops * 1e12
    return Plan(
        items=items,
        gpus=gpus,
        gpu=gpu,
        epochs=config.train.epochs if config.stages is None else steps * batch.global_items / items,
        steps=steps,
        global_items=batch.global_items,
        rank_items=batch.rank_items,
        flops=flops,
        state={stage: state_bytes(trained, frozen, stage, gpus, bf16) for stage in STAGES},
        item_bytes=activation_bytes(
            arch,
            config.model_px,
            tokens,
            freeze=largest.model.freeze,
            bf16=bf16,
            gradient_checkpointing=config.model.gradient_checkpointing,
        ),
        trained=trained,
        frozen=frozen,
        stored_bytes=stored_bytes(config, arch),
        stored="visual tokens, of data.features; counted" if config.data.features else STORED_WORDS,
        phase=largest_in_words(config, largest),
        gpu_rate=[(0.0, rate)] if rate else [(m, m * speed / flops) for m in ([mfu] if mfu else ASSUMED_MFU)],
    )


def stored_bytes(config: Config, arch: Architecture) -> float:
    """Return the bytes of an item in the shards that training reads: of its image and texts, or of its features."""
    if config.data.features:
        return feature_bytes(config, arch)
    return STORED_BYTES * (config.data.image_px / STORED_PX) ** 2


def _steps_and_flops(config: Config, items: int, forward: ForwardCost) -> tuple[int, float]:
    """Return the steps of a run, and the FLOPs of training on one item, as a mean over them."""
    found = phases(config, items)
    steps = found[-1].last_step
    flops = (
        (phase.last_step - phase.first_step) * training_flops(forward, phase.config.model.freeze)
        for phase in found
    )
    return steps, sum(flops) / steps


def _check(items: int, gpus: int, gpu: str, mfu: float | None, rate: float | None) -> None:
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}", where="--gpu", expected=f"one of {', '.join(GPUS)}")
    problems = [
        (items < 1, f"{items} items", "--items", "1 or more"),
        (gpus < 1, f"{gpus} GPUs", "--gpus", "1 or more"),
        (mfu is not None and not 0 < mfu <= 1, f"an MFU of {mfu}", "--mfu", "above 0, at most 1"),
        (rate is not None and not 0 < rate < math.inf, f"{rate} items/s", "--rate", "above 0"),
    ]
    for wrong, what, where, expected in problems:
        if wrong:
            raise UserError(what, where=where, expected=expected)


def render_plan(plan: Plan) -> str:
    """Return the plan as plain text: one table after another, with a newline at the end."""
    gpu = GPUS[plan.gpu]
    lines = [
        f"Training on {plan.items:,} items, {plan.epochs:g} epochs, on {plan.gpus} x {plan.gpu} "
        f"({gpu.memory_gb} GB, {gpu.bf16_tflops:g} TFLOP/s in bf16 by its data sheet):",
        f"{plan.steps:,} steps of {plan.global_items} items; {plan.flops / 1e9:.1f} GFLOP per item, "
        f"{plan.flops * plan.steps * plan.global_items / 1e18:.2f} EFLOP in all (counted, flop_attention)",
        "",
        *_time_table(plan),
        "",
        *_memory_table(plan),
        "",
        *_data_table(plan),
    ]
    return "\n".join(lines) + "\n"


def _time_table(plan: Plan) -> list[str]:
    body = [
        [
            f"MFU {mfu:g} (assumed)" if mfu else "rate as given",
            f"{rate:,.0f}",
            f"{rate * plan.gpus:,.0f}",
            duration(plan.seconds(rate)),
            str(cores_per_gpu(rate)),
        ]
        for mfu, rate in plan.gpu_rate
    ]
    header = ["speed", "items/s per GPU", "items/s", "time of all steps", "cores per GPU"]
    notes = [
        f"Cores: one for the rank, and {1000 * LOAD_CPU_SECONDS:g} ms of CPU per item (measured; without handing "
        "batches over).",
        "Start-up, evaluations and saves come on top of the time. Few items per GPU and step, or a slow network, make",
        "the MFU small: train a few hundred steps and give --rate.",
    ]
    return [*text_table(header, body), *notes]


def cores_per_gpu(rate: float) -> int:
    """Return the cores that a GPU of ``rate`` items/s needs: one for its rank, the others for DataLoader workers."""
    return 1 + max(1, math.ceil(rate * LOAD_CPU_SECONDS))


def _memory_table(plan: Plan) -> list[str]:
    sizes = micro_sizes(plan.rank_items)
    body = [
        [str(stage), f"{state.total / GIB:.2f}"]
        + [f"{(state.total + size * plan.item_bytes) / GIB:.1f}" for size in sizes]
        for stage, state in plan.state.items()
    ]
    header = ["ZeRO stage", "model state", *(f"with micro-batch {size}" for size in sizes)]
    notes = [
        f"GiB per GPU, counted from below: {plan.trained:,} trained and {plan.frozen:,} frozen parameters, and "
        f"{plan.item_bytes / 2**20:.0f} MiB of activations",
        "per item. The attention matrix, temporary results, communication buckets and the allocator come on top.",
        *([plan.phase] if plan.phase else []),
    ]
    return [*text_table(header, body), *notes]


def micro_sizes(rank_items: int) -> Sequence[int]:
    """Return the powers of two that divide a rank's batch, the largest few."""
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rank_items % size == 0][-5:]


def _data_table(plan: Plan) -> list[str]:
    stored = plan.items * plan.stored_bytes
    checkpoint = 2 * plan.frozen + 14 * plan.trained
    rate = plan.gpu_rate[-1][1]
    gradients = 2 * 4 * plan.trained * (plan.gpus - 1) / plan.gpus
    traffic = gradients * rate * plan.gpus / plan.global_items
    rows = [
        (
            "shards",
            f"{stored / 1e9:,.1f} GB",
            f"{plan.stored_bytes / 1000:.1f} kB per item ({plan.stored})",
        ),
        (
            "prepare",
            f"{plan.items / PREPARED_PER_CORE_SECOND / 3600:,.1f} core-hours",
            "measured, of 1000 x 1200 px",
        ),
        (
            "a checkpoint",
            f"{checkpoint / 1e9:.1f} GB",
            "counted; train.keep_last, the best and the one under way",
        ),
        (
            "reading shards",
            f"{rate * plan.gpus * plan.stored_bytes / 1e6:,.1f} MB/s",
            "all GPUs, at the last speed",
        ),
        (
            "gradients",
            f"{gradients / 1e9:.2f} GB per step",
            "each GPU sends in fp32 at stage 0, 0.75 of it at stage 1 (counted): "
            f"{traffic / 1e9:,.1f} GB/s at the last speed",
        ),
    ]
    return [f"{what:<16}{amount:<20}{basis}" for what, amount, basis in rows]
