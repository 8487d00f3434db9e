"""Correlations against the definitions, and what is undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from rating_train.errors import UserError
from rating_train.scoring.metrics import METRICS, Scores, per_group, score


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
    with pytest.raises(UserError, match="index 1"):
        per_group([1, math.nan], [1, 2], ["a", "a"])
    assert per_group([], [], []) == {}
