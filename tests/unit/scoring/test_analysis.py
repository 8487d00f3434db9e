"""The judgement of a split: against closed forms, and with a reason where it is undefined."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rating_train.errors import UserError
from rating_train.scoring.analysis import analyse, bias, calibration, logistic_plcc
from rating_train.scoring.metrics import METRICS, score
from rating_train.scoring.predictions import Prediction

pytestmark = pytest.mark.timeout(60)


def predictions(n: int, seed: int = 0, group_size: int = 1) -> list[Prediction]:
    generator = np.random.default_rng(seed)
    true = np.clip(generator.normal(4, 0.4, n), 1, 5)
    predicted = 4 + 0.6 * (true - 4) + generator.normal(0, 0.2, n)
    return [
        Prediction(
            f"i{i}",
            float(p),
            float(t),
            f"c{i % 4}",
            int(generator.integers(1, 9999)),
            i % 900,
            f"g{i // group_size}",
        )
        for i, (p, t) in enumerate(zip(predicted, true))
    ]


def test_a_judgement_holds_every_metric_with_an_interval_around_it() -> None:
    rows = predictions(300, group_size=2)
    found = analyse(rows, resamples=200)
    scores = score([r.score for r in rows], [r.rating or 0 for r in rows])
    assert found["n"] == 300 and found["groups"] == 150
    for name in METRICS:
        metric = found["metrics"][name]
        assert metric["value"] == getattr(scores, name)
        assert metric["interval_95"][0] < metric["value"] < metric["interval_95"][1], name
    assert set(found["slices"]) == {"category", "rating_count", "rating", "text_chars"}
    for parts in found["slices"].values():
        assert sum(part["n"] for part in parts) == 300
    worst = max(rows, key=lambda r: abs(r.score - (r.rating or 0)))
    assert found["items"]["worst"][0] == worst.id and len(found["items"]["best"]) == 12
    json.dumps(found, allow_nan=False)
    assert found == analyse(rows, resamples=200), "the same seed, the same judgement"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_items_are_judged_with_reasons(n: int) -> None:
    found = analyse(predictions(n), resamples=50)
    json.dumps(found, allow_nan=False)
    for name in METRICS:
        metric = found["metrics"][name]
        assert (metric["value"] is None) == ("undefined" in metric), name
    assert (found["metrics"]["plcc"]["value"] is None) == (n < 2)
    assert found["logistic"]["plcc"] is None and found["logistic"]["undefined"]


def test_a_row_without_a_rating_is_refused() -> None:
    with pytest.raises(UserError, match="item a"):
        analyse([Prediction("a", 4.0)])


def test_calibration_is_exact_on_a_line() -> None:
    predicted = np.linspace(2, 4, 1000)
    found = calibration(predicted, 0.5 * predicted + 2)
    assert found["slope"] == pytest.approx(0.5) and found["intercept"] == pytest.approx(2.0)
    assert sum(b["n"] for b in found["bins"]) == 1000 and len(found["bins"]) == 10
    gaps = [abs(b["mean_true"] - b["mean_predicted"]) * b["n"] for b in found["bins"]]
    assert found["mean_gap"] == pytest.approx(sum(gaps) / 1000)
    perfect = calibration(predicted, predicted)
    assert perfect["mean_gap"] == pytest.approx(0, abs=1e-12)
    constant = calibration(np.full(5, 4.0), np.arange(5.0))
    assert constant["slope"] is None and "all predictions are 4" in constant["undefined"]
    assert len(constant["bins"]) == 1 and constant["bins"][0]["mean_true"] == 2.0
    assert calibration(np.zeros(0), np.zeros(0))["undefined"] == "no items"


def test_the_interval_of_a_calibration_bin_is_that_of_a_mean_and_wider_for_groups() -> None:
    generator = np.random.default_rng(0)
    noise = np.repeat(generator.normal(0, 1, 200), 5)
    predicted = np.full(1000, 4.0)
    (alone,) = calibration(predicted, noise)["bins"]
    (grouped,) = calibration(predicted, noise, [str(i // 5) for i in range(1000)])["bins"]
    width = alone["interval_95"][1] - alone["interval_95"][0]
    assert width == pytest.approx(2 * 1.959964 * noise.std(ddof=1) / np.sqrt(1000), rel=1e-6)
    wide = grouped["interval_95"][1] - grouped["interval_95"][0]
    assert wide == pytest.approx(width * np.sqrt(5), rel=0.01), "five equal items say what one says"


def test_a_relation_with_one_bend_is_fitted_too() -> None:
    """Its upper asymptote has no best value; a fit without bounds followed it until it gave up."""
    x = np.random.default_rng(0).uniform(3.5, 4.5, 60)
    for seed in range(8):
        y = 1.5 + np.exp(4 * (x - 4)) / 8 + np.random.default_rng(seed).normal(0, 0.02, 60)
        found = logistic_plcc(x, y)
        assert found["plcc"] is not None and found["plcc"] > 0.99, found


def test_a_logistic_relation_is_made_straight() -> None:
    x = np.linspace(1, 5, 400)
    y = 1.5 + 3 / (1 + np.exp(-(x - 3) / 0.3))
    plain, found = score(x, y), logistic_plcc(x, y)
    assert plain.plcc is not None and plain.plcc < 0.97 < 0.9999 < found["plcc"]
    high, low, middle, width = found["parameters"]
    assert (high, low, middle, abs(width)) == pytest.approx((4.5, 1.5, 3, 0.3), abs=1e-3)
    assert "undefined" in logistic_plcc(np.full(50, 4.0), x[:50])


def test_bias_names_both_tails_and_what_is_often_in_them() -> None:
    n = 200
    true = np.full(n, 4.0)
    predicted = true + np.linspace(-0.1, 0.1, n)
    predicted[:10] += 1.0
    predicted[-10:] -= 1.0
    rows = [
        Prediction(f"{i}", float(p), 4.0, "Toys" if i < 20 else "Home", 30) for i, p in enumerate(predicted)
    ]
    found = bias(rows, predicted, true)
    assert found["over"]["n"] == found["under"]["n"] == 10
    assert found["over"]["mean_error"] == pytest.approx(predicted[:10].mean() - 4)
    assert found["over"]["categories"] == [{"name": "Toys", "n": 10, "expected": 1.0}]
    assert found["under"]["categories"][0]["name"] == "Home"
    assert found["over"]["least_error"] <= found["over"]["mean_error"]
    assert found["under"]["mean_error"] < -0.8 and found["over"]["median_rating_count"] == 30
    assert found["correlation_with_true"] is None, "all ratings are equal"
