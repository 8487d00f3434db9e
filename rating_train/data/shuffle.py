"""The order of an epoch: MosaicML Streaming's ``py1e`` shuffle, in a tenth of its memory. Imports no streaming.

Shards are put in a random order and divided into canonical nodes. Within each node the shards are shuffled anew in
every epoch, the samples of each shard are shuffled, and every sample is moved by a random distance of at most half a
block, so that a batch mixes the shards of about one block.

The ids are those of ``streaming.base.shuffle.get_shuffle("py1e", ...)`` of streaming 0.13, whatever version is
installed: a resumed run must find the order that it was started with. One thing is fixed here that is left open there.
Two samples may be moved to the same position (about once in 16 epochs of 16 million samples); the order of such a pair
is that before the move, where NumPy's default sort decides by the CPU's instruction set.

Legend: N samples in the split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rating_train.data.order import Ids

_CHUNK = 1 << 20  # samples that are sorted at a time, beside those within half a block of them
_Spans = list[tuple[int, int]]  # (first sample, last sample + 1) of consecutive parts of shards


def shuffled_epoch(
    shard_samples: Ids, *, seed: int, epoch: int, block_samples: int, canonical_nodes: int, shuffle: bool
) -> Ids:
    """Return the sample ids of an epoch in order: (N,) int32.

    Args:
        shard_samples: number of samples of each shard, in stored order.
        seed: of the run; the same in every epoch.
        epoch: number of the epoch.
        block_samples: samples within which shards are mixed.
        canonical_nodes: parts that are shuffled separately and read in turn.
        shuffle: False gives the stored order.
    """
    samples = int(shard_samples.sum())
    if samples >= 2**31:
        raise ValueError(f"{samples} samples do not fit into int32 ids")
    if not shuffle:
        return np.arange(samples, dtype=np.int32)
    parts = min(canonical_nodes, samples)
    ends = np.cumsum(shard_samples).tolist()
    spans = list(zip([0, *ends[:-1]], ends))
    np.random.default_rng(seed).shuffle(spans)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed + epoch)
    nodes = list(_divide(spans, samples, parts))
    for node in nodes:
        rng.shuffle(node)  # type: ignore[arg-type]
    ids = np.empty(samples, np.int32)
    begin = 0
    for node in nodes:
        end = begin + sum(last - first for first, last in node)
        _mix(node, rng, block_samples, ids[begin:end])
        begin = end
    return interleave(ids, parts)


def interleave(ids: Ids, parts: int) -> Ids:
    """Read ``parts`` equal runs of ``ids`` side by side, one item of each run in turn.

    Every canonical node has its own run of shards; taking from all runs in turn mixes them in every batch.

    Args:
        ids: (N,) in run-major order.
        parts: number of runs; the first N % parts of them are longer by one.
    """
    if parts <= 1:
        return ids
    mixed = np.empty_like(ids)
    for number, run in enumerate(np.array_split(ids, parts)):
        mixed[number::parts] = run
    return mixed


def _divide(spans: _Spans, samples: int, parts: int) -> Iterator[_Spans]:
    """Yield the spans of each of ``parts`` equal runs of samples; a span that crosses a boundary is cut there."""
    waiting = spans[::-1]
    done = 0
    for part in range(parts):
        end = samples * (part + 1) // parts
        node: _Spans = []
        while waiting and done < end:
            first, last = waiting.pop()
            cut = min(last, first + end - done)
            if cut < last:
                waiting.append((cut, last))
            node.append((first, cut))
            done += cut - first
        yield node


def _mix(spans: _Spans, rng: np.random.Generator, block_samples: int, samples: Ids) -> None:
    """Shuffle the samples of each span, move each by a random distance, and write them by their new positions.

    Both the draws and the result are those of one sort of all positions. But a sample is moved by half a block at most,
    so a sort of a chunk, with what the chunks before it left, gives the order up to half a block before its end.

    Args:
        spans: of one canonical node.
        rng: the generator of the epoch.
        block_samples: samples within which shards are mixed.
        samples: (n,) int32, written in place.
    """
    np.concatenate([np.arange(*span, dtype=np.int32) for span in spans], out=samples)
    begin = 0
    for first, last in spans:
        rng.shuffle(samples[begin : begin + last - first])
        begin += last - first
    reach = 0.625 * block_samples + 1  # the largest distance that is drawn, rounded up
    waiting, positions = [samples[:0]], [np.empty(0)]
    taken = written = size = 0
    for first, last in spans:
        count = last - first
        waiting.append(samples[taken : taken + count].copy())
        positions.append(
            np.arange(taken, taken + count) + _shifts(rng, block_samples, taken, count, len(samples))
        )
        taken += count
        size += count
        if size >= _CHUNK or taken == len(samples):
            ids, places = np.concatenate(waiting), np.concatenate(positions)
            by_place = np.argsort(places, kind="stable")
            ids, places = ids[by_place], places[by_place]
            final = len(ids) if taken == len(samples) else int(np.searchsorted(places, taken - reach))
            samples[written : written + final] = ids[:final]  # behind `taken`: these were read before
            written += final
            waiting, positions, size = [ids[final:]], [places[final:]], 0


def _shifts(rng: np.random.Generator, block_samples: int, begin: int, count: int, samples: int) -> np.ndarray:
    """Draw the distances, in samples, of the ``count`` samples from ``begin`` on; none leaves [0, ``samples``)."""
    block = rng.integers(int(0.75 * block_samples), int(1.25 * block_samples))
    cutoff = max(0, (block - count) / 2)  # a span that is larger than the block stays where it is
    low, high = max(-cutoff, -begin), min(cutoff, samples - begin - count)
    return rng.uniform(low=low, high=high, size=count)
