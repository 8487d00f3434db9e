"""CPU time and memory of making the order of an epoch: of one dataset, or of two mixed 70 to 30. One-off.

python benchmarks/order.py one|mixed [--items N]
python benchmarks/order.py resume [--items N] --sample S

`resume` is all that a rank of two does with the order before its first batch, where a run resumes at sample S.
"""

from __future__ import annotations

import argparse
import resource
import time
from fractions import Fraction

import numpy as np

from rating_train.data.mixture import Mixture, PassIds, mixed_epoch, source_seed
from rating_train.data.order import FirstReads, Ids, SampleOrder, rank_part
from rating_train.data.shuffle import shuffled_epoch

SHARD_ITEMS, SEED, BLOCK, GLOBAL_ITEMS = 2500, 9176, 262144, 64


def passes_of(items: int, number: int) -> PassIds:
    """The passes of a source with shards of 2,500 items."""
    shards = np.full(items // SHARD_ITEMS, SHARD_ITEMS, np.int64)

    def ids(epoch: int) -> Ids:
        return shuffled_epoch(
            shards,
            seed=source_seed(SEED, number),
            epoch=epoch,
            block_samples=BLOCK,
            canonical_nodes=1,
            shuffle=True,
        )

    return ids


def resumed(items: int, sample: int) -> Ids:
    """Return the first rank's batches, (K, G / 2), from ``sample`` to the end of its epoch."""
    step = sample // GLOBAL_ITEMS
    order = SampleOrder(items, GLOBAL_ITEMS, passes_of(items, 0))
    order.order_digest(step)
    reads = FirstReads(np.full(items // SHARD_ITEMS, SHARD_ITEMS, np.int64), 0, [0, 1])
    _, end = next(order.segments(step, items // GLOBAL_ITEMS))
    batches = order.batches(step, end)
    reads.of(batches, 2)
    return rank_part(batches, 0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["one", "mixed", "resume"])
    parser.add_argument("--items", type=int, default=16_400_000)
    parser.add_argument("--sample", type=int, default=0)
    args = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if args.what == "one":
        ids = passes_of(args.items, 0)(0)
    elif args.what == "resume":
        ids = resumed(args.items, args.sample)
    else:
        first = args.items * 7 // 10 // SHARD_ITEMS * SHARD_ITEMS
        sizes = [first, args.items - first]
        mixture = Mixture(sizes, [Fraction(7, 10), Fraction(3, 10)])
        ids = mixed_epoch(mixture, [passes_of(size, number) for number, size in enumerate(sizes)], 0)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{args.what}: {len(ids):,} ids, {time.process_time() - started:.1f} s of CPU, {peak:.0f} MiB at the peak"
    )


if __name__ == "__main__":
    main()
