"""The bootstrap: equal to SciPy on the resamples themselves, right coverage, few false alarms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rating_train.errors import UserError
from rating_train.scoring import bootstrap
from rating_train.scoring.bootstrap import METRICS, compare, intervals, point_metrics, resample_metrics

pytestmark = pytest.mark.timeout(120)


def by_scipy(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    error = x - y
    with np.errstate(all="ignore"):
        return {
            "plcc": stats.pearsonr(x, y).statistic,
            "srcc": stats.spearmanr(x, y).statistic,
            "kendall": stats.kendalltau(x, y, variant="b").statistic,
            "rmse": float(np.sqrt(np.mean(error**2))),
            "mae": float(np.mean(np.abs(error))),
            "r2": float(1 - np.sum(error**2) / np.sum((y - y.mean()) ** 2)),
        }


@pytest.mark.parametrize("seed", range(12))
def test_every_metric_equals_scipy_on_the_resampled_items(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(3, 80))
    true = generator.normal(4, 0.4, n)
    predicted = true + generator.normal(0, 0.5, n)
    if seed % 3:  # ties in one side, or in both
        true = np.round(true, 1)
    if seed % 3 == 2:
        predicted = np.round(predicted, 1)
    groups = [str(g) for g in generator.integers(0, max(2, n // 2), n)] if seed % 2 else None
    (found,) = resample_metrics([predicted], true, groups, resamples=7, seed=seed)
    counts = np.concatenate(list(bootstrap._counts(n, groups, 7, seed)), axis=1).astype(int)
    for resample in range(7):
        x, y = np.repeat(predicted, counts[:, resample]), np.repeat(true, counts[:, resample])
        if len(set(x)) < 2 or len(set(y)) < 2:
            assert np.isnan(found["plcc"][resample])
            continue
        for name, expected in by_scipy(x, y).items():
            assert found[name][resample] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_items_themselves_equal_scipy_also_far_from_zero(offset: float) -> None:
    generator = np.random.default_rng(5)
    y = offset + generator.normal(size=500)
    x = y + generator.normal(size=500)
    for name, expected in by_scipy(x, y).items():
        assert point_metrics(x, y)[name] == pytest.approx(expected, abs=1e-9), name


def test_what_is_undefined_is_none() -> None:
    constant, line = np.full(20, 4.0), np.arange(20.0)
    found = point_metrics(constant, line)
    assert found["plcc"] is found["srcc"] is found["kendall"] is None
    assert found["rmse"] is not None and found["r2"] is not None
    assert point_metrics(line, constant)["r2"] is None
    assert intervals(constant, line, resamples=50)["plcc"] is None
    assert intervals(line, line, ["one group"] * 20, resamples=50) == dict.fromkeys(METRICS)
    assert compare(constant, line, line, resamples=50)["plcc"] is None
    empty = np.zeros(0)
    assert intervals(empty, empty) == dict.fromkeys(METRICS)
    assert set(point_metrics(empty, empty).values()) == {None}


def test_the_same_seed_gives_the_same_interval() -> None:
    generator = np.random.default_rng(0)
    y = generator.normal(size=100)
    x = y + generator.normal(size=100)
    assert intervals(x, y, resamples=100, seed=3) == intervals(x, y, resamples=100, seed=3)
    assert intervals(x, y, resamples=100, seed=3) != intervals(x, y, resamples=100, seed=4)


@pytest.mark.parametrize(
    ("predicted", "resamples", "message"),
    [
        (np.zeros(3), 10, "differ"),
        (np.array([1.0, np.nan]), 10, "not finite"),
        (np.array([1.0, 2.0]), 0, "0 resamples"),
    ],
)
def test_bad_input(predicted: np.ndarray, resamples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resample_metrics([predicted], np.array([1.0, 2.0]), resamples=resamples)


def coverage(simulations: int, group_size: int, by_group: bool) -> dict[str, float]:
    """Share of simulated data sets whose 95% interval holds the true PLCC and RMSE (0.8 and 0.6)."""
    hits = {"plcc": 0, "rmse": 0}
    truth = {"plcc": 0.8, "rmse": 0.6}
    for seed in range(simulations):
        generator = np.random.default_rng(seed)
        names = np.repeat(np.arange(300 // group_size), group_size)
        # Prediction and error are independent, and shared by the items of a group.
        x = generator.normal(0, 0.8, 300 // group_size)[names]
        y = x + generator.normal(0, 0.6, 300 // group_size)[names]
        groups = [str(name) for name in names] if by_group else None
        found = intervals(x, y, groups, resamples=250, seed=seed)
        for name, value in truth.items():
            interval = found[name]
            assert interval is not None
            hits[name] += interval.low <= value <= interval.high
    return {name: count / simulations for name, count in hits.items()}


def test_coverage_of_the_intervals() -> None:
    for name, share in coverage(200, group_size=1, by_group=False).items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_groups_keep_the_coverage_that_items_lose() -> None:
    grouped = coverage(100, group_size=3, by_group=True)
    single = coverage(100, group_size=3, by_group=False)
    for name in grouped:
        assert grouped[name] >= 0.9 > 0.85 > single[name], (grouped, single)


def test_two_models_that_are_equally_good_rarely_differ() -> None:
    metrics = [name for name in METRICS if name != "kendall"]  # which takes most of the time
    alarms = dict.fromkeys(metrics, 0)
    for seed in range(200):
        generator = np.random.default_rng(10_000 + seed)
        y = generator.normal(size=200)
        first, second = (y + generator.normal(size=200) for _ in range(2))
        found = compare(first, second, y, resamples=1000, seed=seed, metrics=metrics)
        for name, difference in found.items():
            alarms[name] += difference is not None and difference.significant
    assert max(alarms.values()) <= 0.07 * 200, alarms


def test_a_better_model_is_told_from_a_worse_one_on_the_same_items() -> None:
    generator = np.random.default_rng(1)
    y = generator.normal(size=400)
    noise = generator.normal(size=400)
    found = compare(y + noise, y + 0.8 * noise, y, resamples=300)
    assert found["plcc"] is not None and found["plcc"].significant and found["plcc"].value > 0
    assert found["rmse"] is not None and found["rmse"].significant and found["rmse"].value < 0
