"""Which samples a step reads: pure functions of (dataset, seed, step), the same for every world size.

The training stream is endless: the shuffled epochs one after another, cut into global batches of G items.
Step k reads stream positions [k*G, (k+1)*G); with N samples per epoch, position p is sample p % N of epoch
p // N. So no sample is dropped at the end of an epoch and no padding is added: the batch that crosses an epoch
boundary takes its last items from the next epoch. The number of completed steps is all there is to the position of a
run.

Rank r of R reads the contiguous part [r*G/R, (r+1)*G/R) of each global batch. Concatenated over ranks this is
the same ordered global batch for every R that divides G.

Legend: N samples in the split, G items per global batch, K steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]

_CHUNK = 1 << 20  # samples that are hashed, or looked up, at a time


def epoch_of_step(step: int, samples: int, global_items: int) -> int:
    """Return the epoch in which global batch ``step`` starts."""
    return step * global_items // samples


def digest(ids: Ids) -> str:
    """Return the hex digest of an order as int64: a resumed run compares it, so that no changed shuffle is missed."""
    state = hashlib.blake2b(digest_size=16)
    for begin in range(0, len(ids), _CHUNK):
        state.update(np.ascontiguousarray(ids[begin : begin + _CHUNK], dtype=np.int64).data)
    return state.hexdigest()


class EpochOrders:
    """The orders of epochs. Each is made once and kept until :meth:`release`; digests and last ids are kept longer.

    At 16 million samples, making an order takes seconds, and keeping it 66 MB per rank.

    Args:
        make: gives the sample ids of an epoch in order, (N,), as a pure function of the epoch.
        tail: number of ids at the end of an epoch that a batch may need after the release.
    """

    def __init__(self, make: Callable[[int], Ids], tail: int) -> None:
        self._make, self._tail = make, tail
        self._digests: dict[int, str] = {}
        self._held: tuple[int, Ids] | None = None
        self._released: tuple[int, Ids] | None = None  # an epoch, and the last ids of it

    def part(self, epoch: int, begin: int, end: int) -> Ids:
        """Return the ids at [begin, end) of an epoch; ``end`` is at most N."""
        if self._held is None or self._held[0] != epoch:
            if self._released is not None and self._released[0] == epoch:
                missing = self._samples - len(self._released[1])
                if begin >= missing:
                    return self._released[1][begin - missing : end - missing]
            self._hold(epoch)
        assert self._held is not None
        return self._held[1][begin:end]

    def digest(self, epoch: int) -> str:
        """Return the digest of the order of an epoch."""
        if epoch not in self._digests:
            self._hold(epoch)
        return self._digests[epoch]

    def release(self, epoch: int) -> None:
        """Free the order of an epoch of which only the end is still needed."""
        if self._held is not None and self._held[0] == epoch:
            self._drop()

    def _hold(self, epoch: int) -> None:
        self._drop()  # before the next is made: never two at a time
        ids = self._make(epoch)
        self._digests[epoch] = digest(ids)
        self._samples = len(ids)
        self._held = epoch, ids

    def _drop(self) -> None:
        if self._held is not None:
            epoch, ids = self._held
            self._released = epoch, ids[max(0, len(ids) - self._tail) :].copy()
            self._held = None


class SampleOrder:
    """The training stream of one split.

    Args:
        samples: N.
        global_items: G.
        epoch_ids: gives the sample ids of an epoch in order, (N,), as a pure function of the epoch.
    """

    def __init__(self, samples: int, global_items: int, epoch_ids: Callable[[int], Ids]) -> None:
        self.samples, self.global_items = samples, global_items
        self.epochs = EpochOrders(epoch_ids, tail=global_items)

    def batches(self, first_step: int, last_step: int) -> Ids:
        """Return the global batches of the steps [first_step, last_step): (K, G)."""
        position, end = first_step * self.global_items, last_step * self.global_items
        pieces: list[Ids] = [np.empty(0, np.int32)]
        while position < end:
            epoch, offset = divmod(position, self.samples)
            take = min(self.samples - offset, end - position)
            pieces.append(self.epochs.part(epoch, offset, offset + take))
            position += take
        flat = pieces[1] if len(pieces) == 2 else np.concatenate(pieces)
        return flat.reshape(last_step - first_step, self.global_items)

    def segments(self, first_step: int, last_step: int) -> Iterator[tuple[int, int]]:
        """Divide steps into ranges of which each but the shortest lies within one epoch: (first, last + 1).

        The batch that crosses an epoch boundary is a range of its own, so that no range needs two orders at a time.
        """
        step = first_step
        while step < last_step:
            epoch = epoch_of_step(step, self.samples, self.global_items)
            end = min(last_step, max(step + 1, (epoch + 1) * self.samples // self.global_items))
            yield step, end
            step = end

    def release(self, step: int) -> None:
        """Free the order of the epoch before ``step``, of which only the last ids may still be needed."""
        self.epochs.release(epoch_of_step(step - 1, self.samples, self.global_items))

    def order_digest(self, step: int) -> str:
        """Return the digest of the order of the epoch in which ``step`` starts."""
        return self.epochs.digest(epoch_of_step(step, self.samples, self.global_items))


def rank_part(batches: Ids, rank: int, ranks: int) -> Ids:
    """Return the columns of rank ``rank``, as a copy: (K, G) -> (K, G / ranks). A view would keep all batches alive."""
    items = batches.shape[1] // ranks
    return batches[:, rank * items : (rank + 1) * items].copy()


class FirstReads:
    """Which rank checks which shard: the one that reads it first, of all ranks that read the same files.

    So every shard is checked exactly once, and before any step that uses it can end: the step needs the batch of the
    rank that checks.

    Args:
        shard_samples: samples of each shard, in stored order.
        rank: this rank.
        sharers: the ranks that read the same files, this one included, in ascending order; ``None`` checks nothing.
    """

    def __init__(self, shard_samples: Ids, rank: int, sharers: Sequence[int] | None) -> None:
        self._ends = np.cumsum(shard_samples)
        self._unread = np.ones(len(shard_samples), bool)
        self._rank = rank
        self._sharers = np.array(sharers if sharers is not None else [], np.int64)

    def of(self, batches: Ids, ranks: int) -> dict[int, list[int]]:
        """Return the shards that this rank has to check before it reads a row: row -> shards.

        Call it once for each global batch that is read, in order, and on all sharers alike.

        Args:
            batches: (K, G) sample ids.
            ranks: number of ranks among which the columns are divided.
        """
        items = batches.shape[1] // ranks
        found: dict[int, list[int]] = {}
        rows = max(1, _CHUNK // batches.shape[1])
        for begin in range(0, len(batches), rows):
            if not len(self._sharers) or not self._unread.any():
                break
            chunk = batches[begin : begin + rows].reshape(-1, ranks, items)
            if len(self._sharers) < ranks:
                chunk = chunk[:, self._sharers]
            shards = np.searchsorted(self._ends, chunk.reshape(-1), side="right")
            first = np.full(len(self._ends), len(shards))
            np.minimum.at(first, shards, np.arange(len(shards)))
            new = np.flatnonzero((first < len(shards)) & self._unread)
            self._unread[new] = False
            row, place = np.divmod(first[new], len(self._sharers) * items)
            mine = self._sharers[place // items] == self._rank
            for r, shard in zip((row[mine] + begin).tolist(), new[mine].tolist()):
                found.setdefault(r, []).append(shard)
        return found


def evaluation_batches(samples: int, rank: int, ranks: int, rank_items: int) -> Ids:
    """Return the batches of one rank, so that all ranks together read every sample: (B, rank_items) int64.

    Ranks must run the same number of forward passes (ZeRO-3 gathers weights in each), so the last batches are
    filled up by repeating the last sample; the evaluator drops repeated ids.
    """
    per_batch = ranks * rank_items
    count = -(-samples // per_batch)
    ids = np.minimum(np.arange(count * per_batch, dtype=np.int64), samples - 1)
    return rank_part(ids.reshape(count, per_batch), rank, ranks)
