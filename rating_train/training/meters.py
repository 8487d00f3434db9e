"""Where a step's time goes, and what is computed in it, measured without waiting for the device at every step."""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.data.lengths import cut_lengths
from rating_train.distributed.gpus import find_gpu
from rating_train.model.architecture import Architecture
from rating_train.model.cost import training_flops, training_forward

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Tokens and FLOPs (``flop_attention``) of training on some items.

    Attributes:
        tokens: before padding, visual tokens included.
        computed_tokens: with the padding that is left after the cut.
        flops: of the items at their own lengths.
        computed_flops: of the items as they are computed.
    """

    tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    computed_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.computed_tokens + other.computed_tokens,
            self.flops + other.flops,
            self.computed_flops + other.computed_flops,
        )


def flops_by_length(architecture: Architecture, config: Config) -> Callable[[int], float]:
    """Return a function (tokens of an item) -> FLOPs of training on it."""

    @functools.cache
    def flops(tokens: int) -> float:
        return training_flops(training_forward(config, architecture, tokens), config.model.freeze)

    return flops


class WorkCounter:
    """Counts the work of a rank's batches.

    Args:
        architecture: the backbone and its head.
        config: the run's configuration.
        micro_items: items of a micro-batch.
    """

    def __init__(self, architecture: Architecture, config: Config, micro_items: int) -> None:
        self._flops = flops_by_length(architecture, config)
        self._micro_items = micro_items
        self._multiple = config.batch.length_multiple_tokens

    def of(self, batch: Batch) -> Work:
        """Return the work of a batch; of one without lengths, as if it had no padding."""
        full = batch.input_ids.shape[1]
        used = batch.lengths or [full] * len(batch)
        computed = cut_lengths(used, self._micro_items, full, self._multiple)
        return Work(sum(used), sum(computed), sum(map(self._flops, used)), sum(map(self._flops, computed)))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s that the device's data sheet names for bf16; ``None`` where none is known, or for fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16_tflops * 1e12 if gpu else None


def work_fields(work: Work, seconds: float, ranks: int, peak: float | None) -> dict[str, float | None]:
    """Return what a row of train.jsonl says of the work of all ranks in ``seconds``.

    ``padding_share`` is the share of computed tokens that are padding. ``tflops_per_rank`` and ``mfu`` count the items
    at their own lengths, ``*_padded`` as they are computed. MFU is a share of ``peak``, and ``None`` without it.
    """
    per_rank = [
        value / seconds / ranks if seconds > 0 else 0.0 for value in (work.flops, work.computed_flops)
    ]
    shares = [round(rate / peak, 4) if peak else None for rate in per_rank]
    padding = 1 - work.tokens / work.computed_tokens if work.computed_tokens else None
    return {
        "tokens_per_second": round(work.tokens / seconds, 1) if seconds > 0 else 0.0,
        "padding_share": round(padding, 4) if padding is not None else None,
        "tflops_per_rank": round(per_rank[0] / 1e12, 6),
        "tflops_per_rank_padded": round(per_rank[1] / 1e12, 6),
        "mfu": shares[0],
        "mfu_padded": shares[1],
    }


class StepMeter:
    """Sums over the steps since the last reading.

    Losses stay on the device until :meth:`read`, which is the only place that waits for it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval now."""
        self._losses: list[Tensor] = []
        self._items = 0
        self._wait_seconds = 0.0
        self._truncated_tokens = 0
        self._work = Work()
        self._started = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time spent waiting for each added up."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._wait_seconds += time.perf_counter() - before
            yield batch

    def add(self, loss: Tensor, global_items: int, truncated_tokens: int, work: Work | None = None) -> None:
        """One step: its loss on the device (not read here), its items over all ranks, and this rank's work."""
        self._losses.append(loss)
        self._items += global_items
        self._truncated_tokens += truncated_tokens
        self._work += work or Work()

    def read(self) -> dict[str, float]:
        """This rank's numbers since the last reading; starts a new interval.

        ``loss_sum`` and ``steps`` are a sum and a count, to be added over ranks; seconds are wall-clock.
        """
        steps = len(self._losses)
        loss_sum = float(torch.stack(self._losses).double().sum()) if steps else 0.0
        seconds = time.perf_counter() - self._started
        result = {
            "steps": steps,
            "loss_sum": loss_sum,
            "seconds": seconds,
            "samples_per_second": self._items / seconds if seconds > 0 else 0.0,
            "data_wait_seconds": self._wait_seconds,
            "truncated_tokens": self._truncated_tokens,
            **dataclasses.asdict(self._work),
        }
        self.reset()
        return result


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, in GiB: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
