"""Time and coverage of the bootstrap, on simulated data. Not part of the package.

    OMP_NUM_THREADS=1 python benchmarks/bootstrap.py [SIMULATIONS]

Prints the CPU time of all metrics on 10,000 items and 2,000 resamples, the share of intervals that hold the true value
(PLCC, RMSE), and the share of comparisons of two equally good models that call them different.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from rating_train.scoring.bootstrap import METRICS, RESAMPLES, compare, intervals

WITHOUT_KENDALL = [name for name in METRICS if name != "kendall"]


def cpu_seconds(items: int) -> float:
    """Return the CPU time of all intervals of ``items`` items."""
    generator = np.random.default_rng(0)
    true = generator.normal(4, 0.4, items)
    started = time.process_time()
    intervals(true + generator.normal(0, 0.3, items), true, resamples=RESAMPLES)
    return time.process_time() - started


def coverage(simulations: int, items: int = 300) -> dict[str, float]:
    """Return the share of data sets whose 95 % interval holds the true value."""
    truth, hits = {"plcc": 0.8, "rmse": 0.6}, {"plcc": 0, "rmse": 0}
    for seed in range(simulations):
        generator = np.random.default_rng(seed)
        x = generator.normal(0, 0.8, items)
        found = intervals(x, x + generator.normal(0, 0.6, items), resamples=500, seed=seed)
        for name, value in truth.items():
            interval = found[name]
            hits[name] += interval is not None and interval.low <= value <= interval.high
    return {name: count / simulations for name, count in hits.items()}


def false_alarms(simulations: int, items: int = 200) -> dict[str, float]:
    """Return the share of pairs of equally good models that are called different."""
    alarms = dict.fromkeys(WITHOUT_KENDALL, 0)
    for seed in range(simulations):
        generator = np.random.default_rng(10_000 + seed)
        y = generator.normal(size=items)
        first, second = (y + generator.normal(size=items) for _ in range(2))
        for name, found in compare(
            first, second, y, resamples=1000, seed=seed, metrics=WITHOUT_KENDALL
        ).items():
            alarms[name] += found is not None and found.significant
    return {name: count / simulations for name, count in alarms.items()}


def main() -> None:
    """Print the figures."""
    simulations = int(sys.argv[1]) if sys.argv[1:] else 1000
    print(
        f"10,000 items, {RESAMPLES:,} resamples, all metrics: {cpu_seconds(10_000):.1f} s of CPU time",
        flush=True,
    )
    print(f"false alarms in {simulations} pairs: {false_alarms(simulations)}", flush=True)
    print(f"coverage in {simulations} data sets: {coverage(simulations)}", flush=True)


if __name__ == "__main__":
    main()
