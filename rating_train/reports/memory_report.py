"""``rating-train cost --memory``: what a rank holds at its peak, and the largest micro-batch that fits a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rating_train.config.phases import largest_in_words
from rating_train.config.resolve import BatchPlan, plan_batch
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.log import Progress, text_table
from rating_train.model.architecture import Architecture
from rating_train.model.cost import largest_phase

if TYPE_CHECKING:
    from rating_train.engine.memory import RankMemory

GIB = 2**30
#: Name -> memory as the vendor states it, taken as GiB.
GPUS = {"L4": 24.0, "RTX 4090": 24.0, "A100 40 GB": 40.0, "A100 80 GB": 80.0, "H100": 80.0, "H200": 141.0}
#: Share left for the CUDA context, NCCL, cuDNN and cuBLAS workspaces, and fragmentation. An assumption: not measured.
RESERVED = 0.1
#: Micro-batches that are traced; between them and after them the peak is taken for a straight line.
TRACED_ITEMS = (1, 64)


@dataclass(frozen=True)
class MemoryReport:
    """The memory of each rank.

    Attributes:
        config: the configuration.
        plan: how its global batch is divided.
        memory: of the configured micro-batch.
        phase: which phase of ``stages`` it is of, as a sentence; "" without them.
        fitting: (GPU, its memory in GiB, most items of a micro-batch, the largest ``batch.micro_items`` that divides
            the rank's batch); 0 where not even one item fits.
    """

    config: Config
    plan: BatchPlan
    memory: RankMemory
    fitting: list[tuple[str, float, int, int]]
    phase: str = ""


def measure_memory(
    config: Config, architecture: Architecture, ranks: int, gpu_gib: float = 0
) -> MemoryReport:
    """Trace micro-batches of several sizes and find the largest that fits each GPU.

    Args:
        config: a configuration.
        architecture: its backbone's shape.
        ranks: number of GPUs.
        gpu_gib: memory of one GPU, in GiB; 0 takes the table :data:`GPUS`.

    Raises:
        UserError: numbers out of range, or a global batch that does not divide.
    """
    from rating_train.engine.memory import fitting_items, memory_of, model_sizes, trace

    if ranks < 1 or gpu_gib < 0:
        raise UserError("numbers of GPUs and GiB are positive", where="cost --memory")
    plan = plan_batch(config.batch.global_items, config.batch.micro_items, ranks)
    largest = largest_phase(config, architecture)
    config, phase = largest, largest_in_words(config, largest)
    sizes = model_sizes(config, architecture)
    found: dict[int, RankMemory] = {}
    wanted = sorted({*TRACED_ITEMS, plan.micro_items})
    progress = Progress("tracing micro-batches with fake tensors", len(wanted), "sizes")
    for items in wanted:
        assumed = dataclasses.replace(plan, micro_items=items)
        found[items] = memory_of(config, sizes, assumed, trace(config, architecture, assumed))
        progress.add(1)
    progress.close()
    points = [(items, memory.peak) for items, memory in found.items()]
    gpus = {f"{gpu_gib:g} GiB": gpu_gib} if gpu_gib else GPUS
    fitting = []
    for name, gib in gpus.items():
        most = fitting_items(points, int(gib * GIB * (1 - RESERVED)))
        fitting.append((name, gib, most, _largest_divisor(plan.rank_items, most)))
    return MemoryReport(config, plan, found[plan.micro_items], fitting, phase)


def render_memory(report: MemoryReport) -> str:
    """Return the report as plain text, with a newline at the end."""
    config, plan, memory = report.config, report.plan, report.memory
    checkpointing = ", gradient checkpointing" if config.model.gradient_checkpointing else ""
    frozen = f", frozen: {', '.join(config.model.freeze)}" if config.model.freeze else ""
    lines = [
        f"Memory of each of {plan.ranks} ranks: ZeRO stage {config.zero.stage}, {config.train.precision}, "
        f"micro-batch of {plan.micro_items} items x {plan.accumulation}{checkpointing}{frozen}",
        *([report.phase] if report.phase else []),
        "",
        *text_table(["GiB", "backward pass", "reduction and update"], _rows(memory)),
    ]
    if memory.host:
        lines.append(f"In CPU memory (offloaded): {memory.host / GIB:.2f} GiB")
    lines += [
        "",
        f"Largest micro-batch, with {RESERVED:.0%} of the GPU left for CUDA, NCCL, workspaces and fragmentation:",
        *_fitting_table(report),
        "",
        "Predicted from DeepSpeed 0.19's allocations and a trace with fake tensors, without compilation, at the full",
        "number of tokens. Compared with DeepSpeed on a CPU (docs/results.md); not measured on a GPU.",
        f"`batch.micro_items` is a divisor of the {plan.rank_items} items that a rank has in each step.",
    ]
    return "\n".join(lines) + "\n"


def _rows(memory: RankMemory) -> list[list[str]]:
    parts = [
        ("weights", memory.weights, memory.weights),
        ("weights gathered (stage 3)", memory.gathered, 0),
        ("master weights and moments", memory.optimizer, memory.optimizer),
        ("gradients from before", memory.gradients, 0),
        ("micro-batch: activations, its gradients, buckets", memory.micro_batch, 0),
        ("gradients and copies", 0, memory.update),
        ("peak", memory.in_backward, memory.in_update),
    ]
    return [[name, *(f"{b / GIB:.2f}" if b else "-" for b in both)] for name, *both in parts if any(both)]


def _fitting_table(report: MemoryReport) -> Sequence[str]:
    body = [
        [name, f"{gib:g}", f"{most:,}" if most else "none", str(divisor) if divisor else "-"]
        for name, gib, most, divisor in report.fitting
    ]
    return text_table(["GPU", "GiB", "most items", "batch.micro_items"], body)


def _largest_divisor(number: int, most: int) -> int:
    return max((d for d in range(1, min(number, most) + 1) if number % d == 0), default=0)
