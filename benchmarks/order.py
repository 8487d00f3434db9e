"""CPU time and memory of making the order of an epoch: of one dataset, or of two mixed 70 to 30. One-off.

python benchmarks/order.py one|mixed [--items N]
"""

from __future__ import annotations

import argparse
import resource
import time
from fractions import Fraction

import numpy as np

from rating_train.data.mixture import Mixture, PassIds, mixed_epoch, source_seed
from rating_train.data.order import Ids
from rating_train.data.shuffle import shuffled_epoch

SHARD_ITEMS, SEED, BLOCK = 2500, 9176, 262144


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["one", "mixed"])
    parser.add_argument("--items", type=int, default=16_400_000)
    args = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if args.what == "one":
        ids = passes_of(args.items, 0)(0)
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
