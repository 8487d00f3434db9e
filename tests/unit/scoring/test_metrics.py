"""Correlations against the definitions, and what is undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from rating_train.errors import UserError
from rating_train.scoring.metrics import METRICS, Scores, metric_label, per_group, score


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged, by the definition."""
    return np.array([np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values])


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def test_against_the_definitions_with_ties() -> None:
    rng = np.random.default_rng(0)
    true = np.round(rng.uniform(1, 5, 300), 1)
    predicted = np.round(0.5 * true + rng.normal(0, 0.5, 300), 1)
    scores = score(predicted, true)
    assert scores.n == 300 and scores.undefined == {}
    assert scores.plcc == pytest.approx(_pearson(predicted, true), abs=1e-12)
    assert scores.srcc == pytest.approx(_pearson(_ranks(predicted), _ranks(true)), abs=1e-12)
    assert scores.rmse == pytest.approx(math.sqrt(np.mean((predicted - true) ** 2)))
    assert scores.mae == pytest.approx(np.mean(np.abs(predicted - true)))


def test_perfect_and_reversed() -> None:
    one = pytest.approx(1.0, abs=1e-12)
    assert score([1, 2, 3], [1, 2, 3]) == Scores(3, one, one, 0.0, 0.0, {}, kendall=one, r2=1.0)
    reversed_scores = score([3, 2, 1], [1, 2, 3])
    assert reversed_scores.plcc == pytest.approx(-1.0) and reversed_scores.srcc == pytest.approx(-1.0)


def test_float32_input_is_scored_in_float64() -> None:
    # Ratings near 4 that differ in the 4th decimal: float32 sums would lose most of the correlation.
    true = np.linspace(4.0, 4.001, 50_000, dtype=np.float32)
    plcc = score(true[::-1].copy(), true).plcc
    assert plcc is not None and plcc == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "targets", "side"),
    [([4.2, 4.2, 4.2], [1, 2, 3], "predictions"), ([1, 2, 3], [5, 5, 5], "targets")],
)
def test_constant_side_has_no_correlation(predictions: list[float], targets: list[float], side: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score(predictions, targets)
    assert scores.plcc is None and scores.srcc is None
    assert side in scores.undefined["plcc"] and side in scores.undefined["srcc"]
    assert scores.rmse is not None and scores.mae is not None


def test_constant_up_to_rounding() -> None:
    nearly = np.array([4.2, 4.2, np.nextafter(4.2, 5)])
    scores = score(nearly, [1, 2, 3])
    assert scores.plcc is None and "rounding" in scores.undefined["plcc"]


def test_too_few() -> None:
    one = score([4.0], [3.0])
    assert (one.plcc, one.srcc, one.rmse, one.mae) == (None, None, 1.0, 1.0)
    assert "at least 2" in one.undefined["plcc"]
    none = score([], [])
    assert none.n == 0 and set(none.undefined) == set(METRICS)


def test_too_large_for_float64() -> None:
    scores = score([1e200, -1e200, 3e200], [1.0, 2.0, 3.0])
    assert scores.rmse is None and "too large" in scores.undefined["rmse"]


def test_first_bad_index_is_named() -> None:
    with pytest.raises(UserError, match=r"predictions\[2\]"):
        score([1, 2, math.nan, math.inf], [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"targets\[1\]"):
        score([1, 2], [1, -math.inf])


def test_bad_shapes_and_types() -> None:
    with pytest.raises(UserError, match="2 predictions for 3 targets"):
        score([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="dimension"):
        score(np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(UserError, match="numbers"):
        score(["high", "low"], [1, 2])  # type: ignore[list-item]


def test_json_has_reasons_only_when_needed() -> None:
    assert "undefined" not in score([1, 2], [1, 2]).as_dict()
    assert score([1], [1]).as_dict()["undefined"]["srcc"]


def test_per_group_reads_generators_once_and_sorts_by_size() -> None:
    rows = [(1.0, 1.0, "b"), (2.0, 3.0, "a"), (3.0, 2.0, "b"), (4.0, 4.0, "b"), (2.5, 2.0, "c")]
    table = per_group((r[0] for r in rows), (r[1] for r in rows), (r[2] for r in rows))
    assert list(table) == ["b", "a", "c"]
    assert table["b"] == score([1, 3, 4], [1, 2, 4])
    assert table["a"].plcc is None and table["a"].rmse == 1.0


def test_per_group_checks_its_input() -> None:
    with pytest.raises(UserError, match="unequal lengths"):
        per_group([1, 2], [1, 2], ["a"])
    with pytest.raises(UserError, match=r"predictions\[1\]"):
        per_group([1, math.nan], [1, 2], ["a", "a"])
    assert per_group([], [], []) == {}


def _by_libraries(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The metrics as SciPy and scikit-learn define them."""
    from scipy import stats
    from sklearn import metrics

    return {
        "plcc": stats.pearsonr(predicted, true).statistic,
        "srcc": stats.spearmanr(predicted, true).statistic,
        "kendall": stats.kendalltau(predicted, true, variant="b").statistic,
        "rmse": math.sqrt(metrics.mean_squared_error(true, predicted)),
        "mae": metrics.mean_absolute_error(true, predicted),
        "r2": metrics.r2_score(true, predicted),
    }


def _random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of 0 to 60 items: ties in one side or both, constants, equal sides, far from zero, tiny, in reverse."""
    generator = np.random.default_rng(seed)
    n = int(generator.choice([0, 1, 2, 3, 5, 17, 60]))
    true = generator.normal(4, 0.4, n)
    predicted = true + generator.normal(0, generator.choice([0.0, 0.1, 3.0]), n)
    true, predicted = (np.round(v, int(generator.choice([0, 1, 12]))) for v in (true, predicted))
    if generator.random() < 0.15:
        predicted = np.full(n, 4.2)
    if generator.random() < 0.1:
        true = np.full(n, 4.5)
    if generator.random() < 0.2:
        predicted = -predicted[::-1]
    scale, offset = generator.choice([1e-6, 1.0, 1e6]), generator.choice([0.0, 1e3])
    return scale * predicted + offset, scale * true + offset


def test_every_metric_equals_the_libraries_or_is_undefined_with_a_reason() -> None:
    pytest.importorskip("sklearn")
    undefined = 0
    for seed in range(400):
        predicted, true = _random_case(seed)
        scores = score(predicted, true)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = _by_libraries(predicted, true) if len(true) > 1 else {}
        for name in METRICS:
            value = getattr(scores, name)
            assert (value is None) == (name in scores.undefined), (seed, name)
            if value is None:
                undefined += 1
                constant = len(set(true)) < 2 or (name != "r2" and len(set(predicted)) < 2)
                rounding = "rounding" in scores.undefined[name]
                assert len(true) < 2 or constant or rounding, (seed, name, scores.undefined[name])
            elif expected:
                assert value == pytest.approx(expected[name], rel=1e-7, abs=1e-9), (seed, name)
    assert undefined > 100, "the cases hold what has no value"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(bad: float, side: int) -> None:
    for place in (0, 3, 6):
        vectors = [np.linspace(1, 5, 7), np.linspace(5, 1, 7)]
        vectors[side][place] = bad
        with pytest.raises(UserError, match=rf"\[{place}\]"):
            score(*vectors)


def test_a_label_has_the_unit_of_errors_alone() -> None:
    labels = [metric_label(name, "stars") for name in METRICS]
    assert labels == ["PLCC", "SRCC", "Kendall tau-b", "RMSE (stars)", "MAE (stars)", "R2"]
    assert metric_label("rmse", "") == "RMSE" and metric_label("plcc", "INR") == "PLCC"
