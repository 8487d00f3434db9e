"""The training state and the identity that a checkpoint records beside the engine's shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rating_train.errors import UserError

STATE_FILE = "state.json"
#: What a checkpoint from before a key was recorded has.
_UNRECORDED = {
    "optimizer": "adamw",
    "phase": "none",
    "phase_first_step": "none",
}  # without `stages` there is none


@dataclass
class TrainState:
    """Everything except the weights that changes from step to step. Only the loop writes to it.

    ``step`` counts completed optimizer steps, skipped ones included: it is the position in the data.
    ``evaluation_due``: this step is to be evaluated and has not been yet; a run that resumes here evaluates first.
    """

    step: int = 0
    samples: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    evaluation_due: bool = False

    def record_step(self, items: int) -> None:
        """Count one more step, of ``items`` items over all ranks."""
        self.step += 1
        self.samples += items

    def record_skip(self, skipped: bool) -> None:
        """Count whether a step was skipped; once for each step, in order, perhaps some steps later."""
        self.skipped_steps += int(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def record_metric(self, value: float | None, larger_is_better: bool) -> bool:
        """Compare the evaluation of this step with the best one so far; return whether it is the new best."""
        self.evaluation_due = False
        better = value is not None and (
            self.best_value is None
            or (value > self.best_value if larger_is_better else value < self.best_value)
        )
        if better:
            self.best_value, self.best_step, self.evals_since_best = value, self.step, 0
        else:
            self.evals_since_best += 1
        return better


def can_reshard(saved_stage: int, stage: int) -> bool:
    """Return whether shards of one ZeRO stage can be loaded into an engine of another."""
    return saved_stage == stage == 0 or (saved_stage > 0 and stage > 0)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint and the run that loads it must agree on.

    Args:
        order: every setting that decides which samples a step reads, and the dataset's fingerprint.
        order_digest: digest of the actual order of the epoch that contains the next step.
        engine: precision and frozen parts, which determine the content of the engine's shards; and with ``stages`` the
            phase, whose optimizer they hold.
        topology: number of ranks and ZeRO stage, which determine the layout of the shards. Other layouts are
            converted, see :func:`~.deepspeed_io.read_shards`.
    """

    order: dict[str, Any]
    order_digest: str
    engine: dict[str, Any]
    topology: dict[str, int]


def to_json(state: TrainState, identity: Identity, total_steps: int) -> dict[str, Any]:
    """Return the content of state.json."""
    return {
        "train_state": dataclasses.asdict(state),
        "identity": dataclasses.asdict(identity),
        "total_steps": total_steps,
    }


def from_json(content: dict[str, Any]) -> TrainState:
    """Return the TrainState recorded in state.json."""
    return TrainState(**content["train_state"])


def check_identity(content: dict[str, Any], now: Identity, where: object) -> None:
    """Refuse a checkpoint of another dataset, another sample order, or another kind of weights.

    Another number of ranks is accepted, and so is another ZeRO stage among 1, 2 and 3.

    Raises:
        UserError: lists every difference, with the old and the new value.
    """
    saved = content["identity"]
    differences = []
    for section, current in (("order", now.order), ("engine", now.engine)):
        for key in sorted(set(saved[section]) | set(current)):
            old, new = (side.get(key, _UNRECORDED.get(key)) for side in (saved[section], current))
            if old != new:
                differences.append(f"{key} was {old!r} and is now {new!r}")
    old_stage, new_stage = saved["topology"]["zero_stage"], now.topology["zero_stage"]
    if not can_reshard(old_stage, new_stage):
        differences.append(
            f"zero_stage was {old_stage} and is now {new_stage} (stages 1, 2 and 3 read each other's checkpoints; "
            "stage 0 reads only its own)"
        )
    if not differences and saved["order_digest"] != now.order_digest:
        differences.append(
            "the shuffle yields another order than before (another version of streaming or numpy)"
        )
    if differences:
        raise UserError(
            f"this run cannot resume from the checkpoint: {'; '.join(differences)}",
            where=where,
            fix="restore these settings, or start a new run with another `name`",
        )
