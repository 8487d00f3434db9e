"""Baselines: what they predict, and that a model is told from them."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from rating_train.config.task import Target
from rating_train.evaluation.baselines import predict_baselines, score_baselines
from rating_train.evaluation.stored import Texts


def catalogue(n: int, seed: int) -> Texts:
    """Items whose rating is told by one word of their text."""
    generator = np.random.default_rng(seed)
    good = generator.random(n) < 0.5
    words = [f"{'sturdy' if g else 'flimsy'} lamp number {i % 7}" for i, g in enumerate(good)]
    ratings = np.where(good, 4.5, 3.5) + generator.normal(0, 0.05, n)
    return Texts(
        [f"{seed}-{i}" for i in range(n)], words, ["Home" if i % 3 else "Toys" for i in range(n)], ratings, n
    )


def test_means_are_those_of_the_training_items_and_a_new_category_gets_that_of_all() -> None:
    train = Texts(["a", "b", "c"], ["x"] * 3, ["Home", "Home", "Toys"], np.array([4.0, 5.0, 1.5]), 3)
    items = Texts(["d", "e"], ["x", "x"], ["Home", "Garden"], np.array([4.0, 4.0]), 2)
    overall, by_category = predict_baselines(train, items, ridge=False)
    assert overall.predicted is not None and overall.predicted.tolist() == [3.5, 3.5]
    assert by_category.predicted is not None and by_category.predicted.tolist() == [4.5, 3.5]


def test_ridge_learns_what_words_say_and_a_better_model_is_told_from_the_means() -> None:
    pytest.importorskip("sklearn")
    train, items = catalogue(200, 0), catalogue(120, 1)
    perfect = items.ratings + np.random.default_rng(2).normal(0, 0.01, 120)
    found = {
        b["name"].split(" (")[0]: b
        for b in score_baselines(train, items, perfect, items.ratings, None, resamples=100)
    }
    assert found["ridge on TF-IDF"]["plcc"] > 0.95
    assert found["training mean"]["plcc"] is None and "undefined" in found["training mean"]
    assert found["training mean"]["model_minus_baseline"]["plcc"] is None
    low, high = found["training mean"]["model_minus_baseline"]["rmse"]["interval_95"]
    assert low < high < 0, "a smaller error"
    assert found["category mean"]["fitted_on"] == found["category mean"]["of"] == 200


def test_predictions_keep_to_the_bounds_that_a_target_has() -> None:
    pytest.importorskip("sklearn")
    train, items = catalogue(60, 0), catalogue(40, 1)
    *_, free = predict_baselines(train, items, target=Target(lower=None, upper=None))
    *_, bounded = predict_baselines(train, items, target=Target(lower=None, upper=4.2))
    assert free.predicted is not None and bounded.predicted is not None
    assert free.predicted.max() > 4.2 > free.predicted.min()
    assert bounded.predicted.tolist() == np.minimum(free.predicted, 4.2).tolist()


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    *_, ridge = predict_baselines(catalogue(20, 0), catalogue(10, 1))
    assert ridge.predicted is None and "rating_train[baselines]" in ridge.unavailable


def test_too_few_items_for_a_fit_are_said() -> None:
    pytest.importorskip("sklearn")
    *_, ridge = predict_baselines(catalogue(3, 0), catalogue(10, 1))
    assert ridge.predicted is None and "cannot be fitted" in ridge.unavailable
