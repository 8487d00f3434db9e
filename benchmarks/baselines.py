"""Score simple predictors on a prepared dataset, to compare a model with. Not part of the package.

    pip install -e '.[bench]'
    python benchmarks/baselines.py DATA

On the validation split: the mean of the training ratings, the mean of the item's category, and ridge regression on the
TF-IDF of words and word pairs of all text fields, with its strength chosen by cross-validation on the training split.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline

from rating_train.scoring.metrics import score
from rating_train.shards.mds_read import iter_sampled
from rating_train.shards.schema import TEXT_FIELDS

SHOWN = ("plcc", "srcc", "rmse", "mae")
ALPHAS = [0.3, 1.0, 3.0, 10.0]


def read(data: Path, split: str) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return the text, the main category and the rating of every item of a split."""
    items = list(iter_sampled([data / split]))
    texts = [" ".join(item[field] for field in TEXT_FIELDS) for item in items]
    return (
        texts,
        [item["main_category"] for item in items],
        np.array([float(item["rating"]) for item in items]),
    )


def main() -> None:
    """Print one line for each predictor."""
    data = Path(sys.argv[1])
    texts, categories, ratings = read(data, "train")
    val_texts, val_categories, val_ratings = read(data, "val")
    mean = float(ratings.mean())
    by_category = defaultdict(list)
    for category, rating in zip(categories, ratings, strict=True):
        by_category[category].append(rating)

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)[a-z0-9]+")
    folds = KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(
        make_pipeline(words, Ridge(random_state=0)),
        {"ridge__alpha": ALPHAS},
        scoring="neg_mean_squared_error",
        cv=folds,
    ).fit(texts, ratings)
    alpha = search.best_params_["ridge__alpha"]
    terms = len(search.best_estimator_.named_steps["tfidfvectorizer"].vocabulary_)
    predictions = {
        "training mean": np.full(len(val_ratings), mean),
        "category mean": np.array([float(np.mean(by_category.get(c, [mean]))) for c in val_categories]),
        f"ridge on TF-IDF (alpha {alpha:g}, {terms:,} terms)": search.predict(val_texts),
    }
    print(f"{len(ratings):,} training items, {len(val_ratings):,} validation items")
    for name, predicted in predictions.items():
        scores = score(np.clip(predicted, 1, 5), val_ratings).as_dict()
        numbers = [f"{k.upper()} {'undefined' if scores[k] is None else f'{scores[k]:.4f}'}" for k in SHOWN]
        print(f"{name:<48} {'  '.join(numbers)}")


if __name__ == "__main__":
    main()
