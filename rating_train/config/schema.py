"""Every setting, in frozen sections; ``configs/base.yaml`` is this file written out.

A field is declared with :func:`setting`: its default, documentation and bounds. Units are in the names.
What the settings imply for a number of ranks is in :mod:`rating_train.config.resolve`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rating_train.config.data_schema import DataConfig
from rating_train.config.data_schema import SourceConfig as SourceConfig
from rating_train.config.fields import section, setting
from rating_train.config.stage_schema import StageConfig
from rating_train.config.task import Task, TextField

#: Parts of the model: each is trained or frozen, and has a learning rate of its own.
PARTS = ("vision", "connector", "decoder", "head")
#: Losses that are built in.
LOSSES = ("mse", "huber")


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = setting(
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "Hub id or local folder of a SmolVLM/Idefics3 model."
    )
    tokenizer: str = setting("", "Hub id or folder of the tokenizer; empty takes the backbone's.")
    revision: str = setting("", "Hub revision (branch, tag or commit); empty takes the hub's main.")
    weights: Literal["pretrained", "random"] = setting(
        "pretrained", "`random` builds the architecture without reading weights (tests, benchmarks)."
    )
    init_from: str = setting(
        "",
        "Warm start: another run (its best checkpoint, or RUN/checkpoints/step_N) or an exported folder, whose weights "
        "a new run starts from. The backbone must have the same shape; image size, text length and learning rates may "
        "differ. A run that resumes does not load it again.",
    )
    init_parts: list[str] = setting(
        ["vision", "connector", "decoder", "head"],
        "Parts that `init_from` fills. The others come from `backbone`; a head that is left out, or has another "
        "`head_hidden`, is drawn anew.",
    )
    freeze: list[str] = setting(
        [], "Parts that are not trained, of: vision, connector, decoder, head. [] is full fine-tuning."
    )
    inputs: list[str] = setting(
        ["image", "text"],
        "What the model reads, of: image, text. Without `image` there is no vision tower and no visual token; without "
        "`text` the prompt has no fields. A task without one of them leaves it out by itself.",
    )
    head_hidden: int = setting(288, "Hidden units of the regression head.", low=1)
    head_dropout: float = setting(0.1, "Dropout probability in the regression head.", low=0, high=0.99)
    rating_bias: float = setting(
        0.0,
        "Initial bias x of the last layer of the head: y = lower + (upper - lower) sigmoid(x). For stars, 1.15 starts "
        "training at 4.04. 0 takes, for every task but stars, the bias that starts at the mean of the training split.",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, about a third more compute."
    )


@dataclass(frozen=True)
class LossConfig:
    kind: str = setting(
        "mse",
        "Error per item: mse, huber, or MODULE:FUNCTION, a function of your own in a file of the current directory or "
        "an installed package: def FUNCTION(scores, ratings, rating_counts), each of shape (items,) in float32, which "
        "returns the loss of each item, (items,), or one scalar.",
    )
    huber_delta: float = setting(
        0.5,
        "Huber: error beyond which the loss grows linearly, in the unit of the (transformed) target.",
        low=1e-6,
    )
    count_weight: Literal["none", "log", "sqrt", "linear"] = setting(
        "none",
        "Weight of an item by its number of ratings n (or the `weight` column of its task): 1, log(1 + n), sqrt(n) or "
        "n, divided by the same function of `count_reference`. Weights are not normalised within a batch.",
    )
    count_reference: float = setting(
        100.0, "Number of ratings (or weight) at which an item has weight 1.", low=1e-6
    )
    plcc_weight: float = setting(0.0, "Weight of an added (1 - PLCC) term over each micro-batch.", low=0)

    @property
    def is_custom(self) -> bool:
        """Whether `kind` names a function of the user's own."""
        return self.kind not in LOSSES

    @property
    def couples_items(self) -> bool:
        """Whether an item's loss may depend on the others of its micro-batch."""
        return self.is_custom or self.plcc_weight > 0


@dataclass(frozen=True)
class LearningRates:
    vision: float = setting(5e-5, "Peak learning rate of the vision tower.", low=0, high=1)
    connector: float = setting(2e-4, "Peak learning rate of the connector.", low=0, high=1)
    decoder: float = setting(1e-4, "Peak learning rate of the decoder.", low=0, high=1)
    head: float = setting(4e-4, "Peak learning rate of the regression head.", low=0, high=1)


@dataclass(frozen=True)
class OptimConfig:
    lr: LearningRates = section(LearningRates, "Peak learning rate of each part of the model.")
    kind: Literal["adamw", "adamw_8bit"] = setting(
        "adamw",
        "`adamw_8bit` keeps the moments of matrices in 8 bits (bitsandbytes, extra `eightbit`; the paper's optimizer). "
        "Needs `zero.stage` 0.",
    )
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "Decay after the warm-up.")
    warmup_fraction: float = setting(
        0.03, "Share of all steps over which the learning rate rises from 0.", low=0, high=1
    )
    final_fraction: float = setting(
        0.0, "Learning rate at the last step, as a share of the peak.", low=0, high=1
    )
    beta1: float = setting(0.9, "AdamW first-moment decay.", low=0, high=0.99999)
    beta2: float = setting(0.999, "AdamW second-moment decay.", low=0, high=0.999999)
    eps: float = setting(1e-8, "AdamW denominator constant.", low=1e-20, high=1)
    weight_decay: float = setting(
        0.01, "AdamW weight decay of matrices; biases, norms and embeddings have none.", low=0, high=10
    )
    clip_norm: float = setting(1.0, "Largest global gradient norm; 0 turns clipping off.", low=0)


@dataclass(frozen=True)
class BatchConfig:
    global_items: int = setting(
        64, "Items per optimizer step over all ranks. It does not change with the number of ranks.", low=1
    )
    micro_items: int = setting(
        0,
        "Items per forward pass of one rank; 0 takes its complete batch. The rest is gradient accumulation.",
        low=0,
    )
    length_multiple_tokens: int = setting(
        16,
        "Micro-batches are cut to their longest item, rounded up to a multiple of so many tokens, and a rank's items "
        "are put into micro-batches by length. No score and no item's weight depends on it: what is left out is "
        "padding. 0 pads every item to its full length.",
        low=0,
        high=8192,
    )


@dataclass(frozen=True)
class ZeroConfig:
    stage: Literal[0, 1, 2, 3] = setting(
        1,
        "DeepSpeed ZeRO stage: what is divided over the ranks (0: nothing, 1: optimizer state, 2: gradients too, "
        "3: weights too).",
    )
    offload_optimizer: bool = setting(False, "Keep optimizer state in CPU memory (stages 1 to 3).")
    offload_param: bool = setting(False, "Keep weights in CPU memory (stage 3).")
    communication_dtype: Literal["fp32", "bf16"] = setting(
        "fp32",
        "Dtype in which gradients travel between ranks. bf16 halves the bytes, and rounds each gradient before it is "
        "summed; needs `train.precision` bf16.",
    )
    bucket_mb: int = setting(
        50,
        "Size of communication buckets, in MiB: of fp32 gradients at stage 0 and at stage 1 in bf16, of bf16 values "
        "elsewhere.",
        low=1,
        high=100_000,
    )
    extra: dict[str, Any] = setting(
        {}, "Further keys of DeepSpeed's zero_optimization section, passed through; derived keys are refused."
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = setting(5.0, "Passes over the training split.", low=1e-9)
    max_steps: int = setting(0, "Stop after this many optimizer steps; 0 trains for `epochs`.", low=0)
    seed: int = setting(17, "Seed of dropout and of weights that are not loaded.", low=0)
    precision: Literal["bf16", "fp32"] = setting(
        "bf16", "bf16 compute with fp32 master weights and fp32 accumulation, or fp32 throughout."
    )
    compile: Literal["none", "blocks", "model"] = setting(
        "none",
        "torch.compile: each layer of both towers, or the whole model (whose gradients can then be reduced only when "
        "its backward pass has ended). One graph for each length of a micro-batch, made before the first step. ZeRO "
        "stages 0 to 2.",
    )
    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto",
        "`auto` takes a GPU if there is one, else the CPU, and refuses the CPU where a GPU is evidently expected "
        "(CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE, SLURM_JOB_GPUS, /dev/nvidia0 or an NVIDIA driver).",
    )
    log_every_steps: int = setting(10, "Steps between lines of train.jsonl.", low=1)
    eval_every_steps: int = setting(500, "Steps between evaluations; 0 evaluates only at the end.", low=0)
    save_every_steps: int = setting(
        500, "Steps between checkpoints; 0 saves only at the end or when stopped.", low=0
    )
    keep_last: int = setting(2, "Newest checkpoints kept. The best one is kept in addition.", low=1)
    keep_every_steps: int = setting(
        0, "Also keep the checkpoints at multiples of this many steps; 0 keeps none.", low=0
    )
    select_metric: Literal["plcc", "srcc", "rmse", "mae"] = setting(
        "plcc", "Validation metric of the best checkpoint and of early stopping."
    )
    early_stop_evals: int = setting(
        0, "Stop after this many evaluations in a row without a better `select_metric`; 0 never does.", low=0
    )
    max_skipped_steps: int = setting(
        10,
        "Steps with a non-finite loss or gradient are skipped and counted; training stops after more in a row.",
        low=0,
    )
    stop_check_steps: int = setting(5, "Steps after which the ranks agree on whether to stop.", low=1)
    log_sample_ids: bool = setting(
        False, "Write the ids of the samples of every step and rank to samples/ (for audits)."
    )
    time_limit_minutes: float = setting(0.0, "Save and stop after this time; 0 never does.", low=0)
    job_end_margin_minutes: float = setting(
        3.0,
        "Save and stop this long before the scheduler ends the job (SLURM_JOB_END_TIME, where it is set), but at "
        "most a quarter of the time that is left at start-up.",
        low=0,
    )
    background_save: bool = setting(
        True,
        "Write checkpoints in the background from a copy in memory (of weights and optimizer state: about 3.6 GB "
        "for 228M parameters, divided over the ranks). `false` makes training wait for the disk.",
    )
    max_failed_saves: int = setting(
        2,
        "Checkpoints in a row that may fail (on a full disk, say) before training stops; 0 stops at the first. "
        "Each failure is logged, and the last checkpoint of a run may not fail.",
        low=0,
    )
    watchdog_minutes: float = setting(
        20.0,
        "After this time without progress (in data, a collective or a save), every rank writes its stacks to logs/ "
        "and exits with code 75, so that the launcher can restart it; 0 never does.",
        low=0,
    )
    collective_timeout_minutes: float = setting(
        10.0, "Time-out of a collective, set for gloo, NCCL and DeepSpeed.", low=0.01, high=10_000
    )


@dataclass(frozen=True)
class EvalConfig:
    micro_items: int = setting(
        0, "Items per forward pass of one rank in evaluation; 0 takes that of training.", low=0
    )
    max_items: int = setting(
        0, "Evaluate only the first items of the split, up to this many, while training; 0 takes all.", low=0
    )


@dataclass(frozen=True)
class Config:
    """The complete configuration. Immutable: what changes during training is in ``TrainState``."""

    name: str = setting("run", "Name of the run; its directory is `runs_dir`/`name`.")
    runs_dir: str = setting("runs", "Folder of run directories.")
    extensions: list[str] = setting(
        [], "Python modules to import first: they add backbones, metrics or listeners (docs/extending.md)."
    )
    tracking: list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] = setting(
        ["jsonl", "tensorboard"],
        "Where the numbers of a run go, of: jsonl (train.jsonl and eval.jsonl, which are always written: status, "
        "report and a resumed run read them), tensorboard, wandb, mlflow (extra `tracking`; docs/usage.md).",
    )
    stages: list[StageConfig] | None = setting(
        None,
        "Phases that follow one another in one run, for example [{epochs: 1, freeze: [vision, connector, decoder]}, "
        "{epochs: 4, lr: {decoder: 5e-5}}]: the head first, then everything. Each has a length, `epochs` or `steps`, "
        "in place of `train.epochs`, and may override `freeze` (of `model`), `lr` and `warmup_fraction` (of `optim`). "
        "Each starts with the weights of the one before and a new optimizer, and has a learning-rate schedule, a "
        "checkpoint and an evaluation of its own at its end. null is a run without phases.",
    )
    data: DataConfig = section(DataConfig, "What is read, and in which order.")
    model: ModelConfig = section(ModelConfig, "The regressor.")
    loss: LossConfig = section(LossConfig, "The training loss.")
    optim: OptimConfig = section(OptimConfig, "AdamW and its learning rates.")
    batch: BatchConfig = section(BatchConfig, "global = ranks x micro x accumulation, exactly.")
    zero: ZeroConfig = section(ZeroConfig, "DeepSpeed ZeRO.")
    train: TrainConfig = section(TrainConfig, "The training loop.")
    eval: EvalConfig = section(EvalConfig, "Evaluation.")
    task: Task = section(
        Task,
        "What is predicted from what. A run takes it from its dataset; it is given here for `data.remote` only.",
    )

    @property
    def model_px(self) -> int:
        """Side of the square image that the model reads, in pixels; 0 if it reads none."""
        return self.data.image_px if "image" in self.model.inputs else 0

    @property
    def forward_precision(self) -> Literal["fp32", "bf16", "autocast"]:
        """How a forward pass computes: ``bf16`` is with bf16 weights; ``autocast``, at ZeRO stage 0, with fp32 ones."""
        if self.train.precision == "fp32":
            return "fp32"
        return "bf16" if self.zero.stage > 0 else "autocast"

    @property
    def partitions_gradients(self) -> bool:
        """Whether gradients go into ``engine/partitioned_gradients.py``, in place of DeepSpeed's own reduction."""
        zero = self.zero
        return zero.stage == 1 and self.train.precision == "bf16" and not zero.offload_optimizer

    @property
    def model_fields(self) -> list[TextField]:
        """Text fields that the model reads; none if it reads images alone."""
        return self.task.fields if "text" in self.model.inputs else []


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a section to plain nested dicts, in the order of declaration."""
    return dataclasses.asdict(config)
