"""Which samples a step reads: pure functions of (dataset, seed, step), the same for every world size.

The training stream is endless: the shuffled epochs one after another, cut into global batches of G items.
Step k reads stream positions [k*G, (k+1)*G); with N samples per epoch, position p is sample p % N of epoch
p // N. So no sample is dropped at the end of an epoch and none is padded in: the batch that straddles a border
takes its tail from the next epoch. The number of steps done is the whole position of a run.

Rank r of R reads the contiguous part [r*G/R, (r+1)*G/R) of each global batch. Concatenated over ranks this is
the same ordered global batch for every R that divides G.

Legend: N samples in the split, G items per global batch, K steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

# Orders are made about this many samples at a time: 16 MB of ids.
_SEGMENT_SAMPLES = 2_000_000


def epoch_of_step(step: int, samples: int, global_items: int) -> int:
    """The epoch in which global batch ``step`` starts."""
    return step * global_items // samples


def first_step_of_epoch(epoch: int, samples: int, global_items: int) -> int:
    """The first step whose batch starts within ``epoch`` or later."""
    return -(-epoch * samples // global_items)


def interleave(ids: Ids, parts: int) -> Ids:
    """Read ``parts`` equal runs of ``ids`` side by side: one item of each run in turn.

    Every canonical node has its own run of shards; taking from all runs in turn mixes them in every batch.

    Args:
        ids: (N,) int64, in run-major order.
        parts: number of runs; the first N % parts of them are longer by one.
    """
    if parts <= 1:
        return ids
    runs = np.array_split(ids, parts)
    longest = len(runs[0])
    table = np.full((longest, parts), -1, np.int64)
    for column, run in enumerate(runs):
        table[: len(run), column] = run
    flat = table.reshape(-1)
    return flat[flat >= 0]


def digest(ids: Ids) -> str:
    """Hex digest of an order: a resumed run compares it, so that a changed shuffle is never missed."""
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SampleOrder:
    """The stream of one split.

    Args:
        samples: N.
        global_items: G.
        epoch_ids: (N,) int64 sample ids of an epoch, in order; a pure function of the epoch.
    """

    samples: int
    global_items: int
    epoch_ids: Callable[[int], Ids]

    def batches(self, first_step: int, last_step: int) -> Ids:
        """Global batches of the steps [first_step, last_step): (K, G) int64."""
        begin, end = first_step * self.global_items, last_step * self.global_items
        pieces = []
        position = begin
        while position < end:
            epoch, offset = divmod(position, self.samples)
            take = min(self.samples - offset, end - position)
            pieces.append(self.epoch_ids(epoch)[offset : offset + take])
            position += take
        flat = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        return flat.reshape(last_step - first_step, self.global_items)

    def segment_end(self, step: int) -> int:
        """A later step up to which to make the order in one go: whole epochs, about 2 million samples."""
        epochs = max(1, _SEGMENT_SAMPLES // self.samples)
        epoch = epoch_of_step(step, self.samples, self.global_items)
        return max(step + 1, first_step_of_epoch(epoch + epochs, self.samples, self.global_items))


def rank_part(batches: Ids, rank: int, ranks: int) -> Ids:
    """The columns of rank ``rank``: (K, G) -> (K, G / ranks)."""
    items = batches.shape[1] // ranks
    return batches[:, rank * items : (rank + 1) * items]


def worker_part(batches: Ids, worker: int, workers: int) -> Ids:
    """The rows of one loader process: batches are dealt in turn, as the loader collects them."""
    return batches[worker::workers]


def evaluation_batches(samples: int, rank: int, ranks: int, rank_items: int) -> Ids:
    """Every sample once over all ranks, in equal numbers of equal batches: (B, rank_items) int64.

    Ranks must run the same number of forward passes (ZeRO-3 gathers weights in each), so the last ids are
    filled up by repeating the last sample; the evaluator drops repeated ids.
    """
    per_batch = ranks * rank_items
    count = -(-samples // per_batch)
    ids = np.minimum(np.arange(count * per_batch, dtype=np.int64), samples - 1)
    return ids.reshape(count, ranks, rank_items)[:, rank]
