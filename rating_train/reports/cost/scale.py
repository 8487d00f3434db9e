"""How training scales over GPUs and nodes, on paper: compute, gradients, data, checkpoints, evaluations. No torch.

Counted: operations, gradient bytes, batches. From data sheets: speed of GPUs and their links. Assumed: the share of
the GPU's speed (MFU), and the share of a link that a collective reaches. Measured (docs/scaling.md, docs/planning.md):
bytes of an item, the pause of a save. An upper bound: no straggler, no other traffic, and an MFU that does not fall
where a GPU has few items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rating_train.config.schema import Config
from rating_train.data.lengths import text_tokens_of
from rating_train.distributed.gpus import GPUS
from rating_train.errors import UserError
from rating_train.log import duration, text_table
from rating_train.model.architecture import Architecture
from rating_train.model.cost import (
    count_parameters,
    image_tokens,
    largest_phase,
    training_flops,
    training_forward,
)
from rating_train.reports.planning import stored_bytes

#: GPUs of a node, and the share of a link's data sheet speed that an all-reduce is assumed to reach.
GPUS_PER_NODE, LINK_SHARE = 8, 0.7
#: Measured for the full state of 228M parameters on a local disk (docs/decisions.md): seconds that training pauses.
SAVE_PAUSE_SECONDS = 1.15
#: Share of a step's compute during which gradients can be reduced: the backward pass, as far as it overlaps.
_BACKWARD_SHARE = 2 / 3
#: Items of the evaluation, as in the paper.
_EVALUATION_ITEMS = 10_000


@dataclass(frozen=True)
class Scaled:
    """One step, and one epoch, on some GPUs. Seconds.

    Attributes:
        gpus: number of GPUs.
        rank_items: items of one GPU in a step.
        compute: forward and backward pass.
        inside: averaging the gradients inside a node; at stage 1 also collecting the new weights.
        between: the same between nodes.
        can_hide: of both, the share that can be sent during the backward pass, 0 to 1.
        exposed: of both, what the backward pass does not hide.
        saves: of each step, its share of the pauses of checkpoints.
        evaluations: of each step, its share of the evaluations.
        rate: items/s of all GPUs.
        data_bytes: of shards, read by a node in a second.
    """

    gpus: int
    rank_items: int
    compute: float
    inside: float
    between: float
    can_hide: float
    exposed: float
    saves: float
    evaluations: float
    rate: float
    data_bytes: float

    @property
    def efficiency(self) -> float:
        """Share of the time that is compute."""
        return self.compute / (self.compute + self.exposed + self.saves + self.evaluations)


def scale(
    config: Config, arch: Architecture, gpu: str, gpus: int, network_gbit: float, mfu: float
) -> list[Scaled]:
    """Compute a step on 1, 2, 4, ... GPUs, up to ``gpus``, as far as the global batch divides.

    Args:
        config: the configuration.
        arch: the backbone and its head.
        gpu: a name in :data:`GPUS`.
        gpus: largest number of GPUs.
        network_gbit: network of one node in one direction, in Gbit/s.
        mfu: share of the GPU's speed that the compute reaches.

    Raises:
        UserError: an unknown GPU, or numbers out of bounds.
    """
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}", where="--gpu", expected=f"one of {', '.join(GPUS)}")
    if not 0 < network_gbit < math.inf or not 0 < mfu <= 1 or gpus < 1:
        raise UserError(
            f"a network of {network_gbit} Gbit/s, an MFU of {mfu} and {gpus} GPUs cannot be computed",
            where="--network-gbit, --mfu, --gpus",
            expected="above 0, above 0 and at most 1, 1 or more",
        )
    config = largest_phase(config, arch)
    counts = [n for n in _doubled(gpus) if config.batch.global_items % n == 0]
    return [_scaled(config, arch, gpu, n, network_gbit, mfu) for n in counts]


def _doubled(most: int) -> list[int]:
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return sorted({*powers, most})


def _scaled(
    config: Config, arch: Architecture, gpu: str, gpus: int, network_gbit: float, mfu: float
) -> Scaled:
    sheet, px = GPUS[gpu], config.model_px
    tiles = config.data.tiles_per_side
    forward = training_forward(config, arch, image_tokens(arch, px, tiles) + text_tokens_of(config))
    speed = mfu * sheet.bf16_tflops * 1e12
    rank_items = config.batch.global_items // gpus
    compute = rank_items * training_flops(forward, config.model.freeze) / speed
    inside, between = reduction_seconds(config, arch, gpu, gpus, network_gbit)
    can_hide = _can_hide(config)
    exposed = inside + between - min(_BACKWARD_SHARE * compute, can_hide * (inside + between))
    saves = SAVE_PAUSE_SECONDS / config.train.save_every_steps if config.train.save_every_steps else 0.0
    evaluation = _EVALUATION_ITEMS * forward.total("flop_attention") / speed / gpus
    evaluations = evaluation / config.train.eval_every_steps if config.train.eval_every_steps else 0.0
    rate = config.batch.global_items / (compute + exposed + saves + evaluations)
    stored = stored_bytes(config, arch)
    nodes = -(-gpus // GPUS_PER_NODE)
    return Scaled(
        gpus, rank_items, compute, inside, between, can_hide, exposed, saves, evaluations, rate,
        rate * stored / nodes,
    )  # fmt: skip


def _can_hide(config: Config) -> float:
    """Return the share of a step's communication that can run during the backward pass.

    All gradients of stages 0 and 2. Where :mod:`~rating_train.engine.partitioned_gradients` reduces, the gradients, but
    not the new weights in bf16. Nothing is counted where a stage reduces after the backward pass, or gathers weights.
    """
    if config.partitions_gradients:
        sent = _gradient_bytes(config)
        return sent / (sent + 2)
    return 1.0 if config.zero.stage in (0, 2) else 0.0


def _gradient_bytes(config: Config) -> int:
    return 2 if config.zero.communication_dtype == "bf16" else 4


def reduction_seconds(
    config: Config, arch: Architecture, gpu: str, gpus: int, network_gbit: float
) -> tuple[float, float]:
    """Return the seconds of averaging the gradients of a step, and of what follows: (inside nodes, between nodes).

    A hierarchical all-reduce: each GPU sends 2 (g - 1) / g of the gradients to the g GPUs of its node, and each node
    2 (n - 1) / n of them to the n nodes. At stage 1 in bf16 half of it, as a GPU gets its share alone, and then as much
    of the new weights in bf16. Stages 0 and 1 reduce once in a step, in `zero.communication_dtype`.
    """
    counts = count_parameters(arch, config.model_px)
    bytes_each = _gradient_bytes(config)
    both_ways = bytes_each + (2 if config.partitions_gradients else bytes_each)
    sent = both_ways * (counts["total"] - sum(counts[part] for part in config.model.freeze))
    local, nodes = min(gpus, GPUS_PER_NODE), -(-gpus // GPUS_PER_NODE)
    inside = (local - 1) / local * sent / (GPUS[gpu].link_gb * 1e9 * LINK_SHARE)
    between = (nodes - 1) / nodes * sent / (network_gbit * 1e9 / 8 * LINK_SHARE)
    return inside, between


def items_for_efficiency(found: Scaled) -> int:
    """Return the items of one GPU in a step at which communication leaves 90% of the time to compute."""
    one, sent, left = found.compute / found.rank_items, found.inside + found.between, 1 / 0.9 - 1
    # What is sent may take what the backward pass hides and a ninth of the compute; what cannot be hidden, the ninth.
    compute = max(
        (1 - found.can_hide) * sent / left, sent / (_BACKWARD_SHARE + left) if found.can_hide else 0
    )
    return max(1, math.ceil(compute / one))


def render_scale(found: Sequence[Scaled], gpu: str, network_gbit: float, mfu: float, items: int) -> str:
    """Return the table, where scaling stops, and what all of it rests on."""
    body = [
        [
            str(s.gpus),
            str(s.rank_items),
            *(f"{1000 * v:.2f}" for v in (s.compute, s.inside, s.between, s.exposed, s.saves, s.evaluations)),
            f"{s.rate:,.0f}",
            f"{100 * s.efficiency:.0f}%",
            duration(items / s.rate),
            f"{s.data_bytes / 1e6:,.0f}",
        ]
        for s in found
    ]
    header = ["GPUs", "items", "compute", "inside", "between", "exposed", "saves", "evals", "items/s", "compute share",
              "epoch", "MB/s per node"]  # fmt: skip
    last = found[-1]
    needed = items_for_efficiency(last)
    return "\n".join(
        [
            f"Scaling on {gpu}, {GPUS_PER_NODE} to a node, {network_gbit:g} Gbit/s for each node, MFU {mfu:g} "
            f"(assumed), links at {100 * LINK_SHARE:.0f}% of",
            "their data sheets (assumed); an upper bound, not measured. Times in ms per step; inside and between: the",
            f"averages of gradients; exposed: what the backward pass does not hide; an epoch of {items:,} items.",
            "",
            *text_table(header, body),
            "",
            f"With {last.gpus} GPUs gradients leave 90% of the time to compute from {needed} items per GPU on:",
            f"a global batch of {needed * last.gpus:,} (another batch needs other learning rates).",
        ]
    )
