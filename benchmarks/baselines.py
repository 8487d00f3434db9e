"""Score simple predictors on a prepared dataset, without a model. `rating-train evaluate` does it beside a model.

    pip install -e '.[baselines]'
    python benchmarks/baselines.py DATA

On the validation split: the mean of the training ratings, the mean of the item's category, and ridge regression on the
TF-IDF of words and word pairs of all text fields, with its strength chosen by cross-validation on the training split.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rating_train.evaluation.baselines import predict_baselines
from rating_train.evaluation.stored import read_texts
from rating_train.scoring.metrics import METRICS, score


def main() -> None:
    """Print one line for each predictor."""
    data = Path(sys.argv[1])
    train, items = read_texts(data, "train"), read_texts(data, "val")
    print(f"{len(train.ids):,} training items, {len(items.ids):,} validation items")
    for baseline in predict_baselines(train, items):
        if baseline.predicted is None:
            print(f"{baseline.name}: {baseline.unavailable}")
            continue
        scores = score(baseline.predicted, items.ratings).as_dict()
        numbers = [f"{k.upper()} {'undefined' if scores[k] is None else f'{scores[k]:.4f}'}" for k in METRICS]
        print(f"{baseline.name:<48} {'  '.join(numbers)}")


if __name__ == "__main__":
    main()
