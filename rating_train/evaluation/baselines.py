"""Simple predictors on the same items, so that everyone sees whether a model earns its cost.

The mean of the training ratings, the mean of the item's category, and (with scikit-learn, extra ``baselines``) ridge
regression on the TF-IDF of words and word pairs of all text fields, its strength chosen by 5-fold cross-validation on
the training split.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rating_train.config.task import PAPER, Target
from rating_train.evaluation.stored import Texts
from rating_train.scoring import bootstrap
from rating_train.scoring.metrics import score

Float64Array = npt.NDArray[np.float64]

ALPHAS = (0.3, 1.0, 3.0, 10.0)
#: Most training items that the baselines read: beyond it, the ridge regression alone would take minutes.
MOST_ITEMS = 20_000
_DIFFERENCES = ("plcc", "rmse")


@dataclass(frozen=True)
class Baseline:
    """Predictions of one baseline.

    Attributes:
        name: for people.
        predicted: (N,) float64, in the unit and the bounds of the target; ``None`` where it could not be computed.
        unavailable: why it could not.
    """

    name: str
    predicted: Float64Array | None
    unavailable: str = ""


def predict_baselines(
    train: Texts, items: Texts, ridge: bool = True, target: Target = PAPER.target
) -> list[Baseline]:
    """Fit every baseline on ``train`` and predict ``items``; ``ridge=False`` leaves out the slow one."""
    mean = float(train.ratings.mean())
    found = [
        Baseline("training mean", np.full(len(items.ids), mean)),
        Baseline("category mean", category_means(train, items)),
    ]
    if ridge:
        found.append(_ridge(train, items, target))
    return found


def category_means(train: Texts, items: Texts) -> Float64Array:
    """Predict the mean rating of the item's category; of all training items for a category that is new."""
    by_category: dict[str, list[float]] = defaultdict(list)
    for category, rating in zip(train.categories, train.ratings.tolist(), strict=True):
        by_category[category].append(rating)
    means = {category: float(np.mean(ratings)) for category, ratings in by_category.items()}
    overall = float(train.ratings.mean())
    return np.array([means.get(category, overall) for category in items.categories], np.float64)


def _ridge(train: Texts, items: Texts, target: Target) -> Baseline:
    name = "ridge on TF-IDF"
    try:
        search = fit_ridge(dataclasses.replace(train, ratings=target.transformed(train.ratings)))
    except ImportError:
        return Baseline(name, None, "needs scikit-learn: pip install 'rating_train[baselines]'")
    except ValueError as e:  # no words, or fewer items than folds
        return Baseline(name, None, f"cannot be fitted: {e}")
    alpha = search.best_params_["ridge__alpha"]
    terms = len(search.best_estimator_.named_steps["tfidfvectorizer"].vocabulary_)
    # `np.clip` between two `None` is an error before numpy 2.1.
    low = -np.inf if target.lower is None else target.lower
    high = np.inf if target.upper is None else target.upper
    predicted = np.clip(target.restored(search.predict(items.texts)), low, high)
    return Baseline(f"{name} (alpha {alpha:g}, {terms:,} terms)", np.asarray(predicted, np.float64))


def fit_ridge(train: Texts) -> Any:
    """Fit TF-IDF and ridge regression: a fitted ``GridSearchCV``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: too few items, or none with words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)[a-z0-9]+")
    return GridSearchCV(
        make_pipeline(words, Ridge(random_state=0)),
        {"ridge__alpha": list(ALPHAS)},
        scoring="neg_mean_squared_error",
        cv=KFold(5, shuffle=True, random_state=0),
    ).fit(train.texts, train.ratings)


def score_baselines(
    train: Texts,
    items: Texts,
    predicted: Float64Array,
    true: Float64Array,
    groups: list[str] | None,
    *,
    ridge: bool = True,
    target: Target = PAPER.target,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score every baseline, and compare the model with it by a paired bootstrap.

    Args:
        train: what baselines are fitted on.
        items: the evaluated items, in the order of the arrays.
        predicted: (N,) float64, the model's predictions.
        true: (N,) float64.
        groups: product groups for the bootstrap, or ``None``.
        target: ridge regression learns its transform, and its predictions keep to its bounds.

    Returns:
        For each, its scores and ``model_minus_baseline``: metric -> value and 95 % interval, or ``None``.
    """
    found = []
    for baseline in predict_baselines(train, items, ridge, target):
        entry: dict[str, Any] = {"name": baseline.name, "fitted_on": len(train.ids), "of": train.of}
        if baseline.predicted is None:
            found.append({**entry, "unavailable": baseline.unavailable})
            continue
        differences = bootstrap.compare(
            baseline.predicted, predicted, true, groups, resamples, seed, metrics=_DIFFERENCES
        )
        entry |= score(baseline.predicted, true).as_dict()
        entry["model_minus_baseline"] = {
            name: None
            if d is None
            else {"value": d.value, "interval_95": [d.interval.low, d.interval.high] if d.interval else None}
            for name, d in differences.items()
        }
        found.append(entry)
    return found
